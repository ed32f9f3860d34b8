"""That a call can be captured in a CUDA graph, as far as it can be seen without a GPU.

A capture fails when something waits for the device, which raises here (there is no number to wait
for), or copies from the host. Here launchers and
public calls run on fake CUDA tensors, which have shapes and no memory, kernels are recorded instead
of launched, and every PyTorch operation on the way is looked at. ``preprocess`` is left out: its
first call for a size of image copies the filter's weights, and its documentation says so.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import sn72kernels
from sn72kernels import OPS, device, library

pytest.importorskip("triton", reason="Triton is not installed")

CUDA = torch.device("cuda")
FOLDERS = sorted(set(OPS.values()) - {"preprocess"})


class Witness(TorchDispatchMode):
    """Names of operations that a capture does not take."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        # A number on the CPU is an argument of a kernel; copied, it is a copy like any other.
        copies = "copy" in str(func)
        places = {tensor.device.type for tensor in tensors if tensor.dim() or copies}
        waits = "_local_scalar_dense" in str(func) and "cuda" in {t.device.type for t in tensors}
        if waits or places == {"cpu", "cuda"}:
            self.seen.append(str(func))
        return out


def witnessed(call: Callable[..., Any], *args: Any) -> tuple[list[str], int]:
    """What a capture would not take, and the number of kernels launched."""
    with device.assume(90), library.recording() as launches, Witness() as witness:
        call(*args)
    return witness.seen, len(launches)


def on_cuda(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=CUDA)


@pytest.fixture
def fake() -> Any:
    torch.use_deterministic_algorithms(False)  # poison would be one more operation
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


@pytest.mark.parametrize("folder", FOLDERS)
def test_launchers(folder: str, fake: FakeTensorMode) -> None:
    cases = importlib.import_module(f"sn72kernels.ops.{folder}.op").compile_cases()
    for label, (call, args) in cases.items():
        seen, launches = witnessed(call, *tree_map_only(torch.Tensor, on_cuda, args))
        assert not seen, label
        assert launches, label


def empty(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=CUDA)


FLOAT, INT8 = torch.float32, torch.int8

# Without classifier_head, which indexes a tensor: PyTorch starts CUDA for that, fake or not.
CALLS: dict[str, Callable[[], Any]] = {
    "layernorm_gelu": lambda: sn72kernels.layernorm_gelu(empty(4, 64), empty(64)),
    "cascade_route": lambda: sn72kernels.cascade_route(empty(9), 0.2, 0.8, buckets=(4, 16)),
    "cascade_route, tensors": lambda: sn72kernels.cascade_route(
        empty(9), empty(dtype=FLOAT), empty(9, dtype=FLOAT)
    ),
    "ensemble_vote": lambda: sn72kernels.ensemble_vote([empty(9)] * 2, empty(2, dtype=FLOAT)),
    "attention": lambda: sn72kernels.attention(*[empty(1, 2, 9, 64)] * 3),
    "rope": lambda: sn72kernels.rope(
        empty(1, 2, 9, 64), empty(1, 2, 9, 64), *[empty(9, 64, dtype=FLOAT)] * 2
    ),
    "quantize": lambda: sn72kernels.quantize(empty(4, 64), granularity="token", dtype=INT8),
    "quantize_blocks": lambda: sn72kernels.quantize_blocks(empty(4, 64)),
    "linear": lambda: sn72kernels.linear(
        empty(4, 64, dtype=INT8), empty(4, dtype=FLOAT), empty(8, 64, dtype=INT8),
        empty(8, dtype=FLOAT),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_public_calls(name: str, fake: FakeTensorMode) -> None:
    """What the checks and conversions before the operator do."""
    assert witnessed(CALLS[name])[0] == []


@pytest.mark.parametrize(
    "call",
    [
        lambda x: torch.ones(2).to(x.device) + x,
        lambda x: torch.tensor(3.0).to(x.device) + x,
    ],
    ids=["to the device", "number to the device"],
)
def test_the_witness_sees_copies(call: Callable[[torch.Tensor], Any], fake: FakeTensorMode) -> None:
    assert witnessed(call, empty(2))[0]
