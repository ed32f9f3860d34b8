"""What holds for every registered operator and every public op: none may be missing here."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import sn72kernels
from sn72kernels import device as devices
from sn72kernels import library, testing
from sn72kernels.errors import GradientError
from sn72kernels.ops.rope import tables
from tests.kernel_cases import operators

pytest.importorskip("triton", reason="Triton is not installed")

SPECS = operators.specs()


@pytest.fixture(scope="module")
def examples() -> dict[str, list[tuple[Any, ...]]]:
    return operators.examples()


Results = Callable[[str], list[list[torch.Tensor]]]


def outputs(name: str, arguments: tuple[Any, ...], returned: Any) -> list[torch.Tensor]:
    """What a call has written, in place or not."""
    return operators.listed(arguments[:2] if name == "rope_" else returned)


@pytest.fixture(scope="module")
def launched(examples: dict[str, list[tuple[Any, ...]]]) -> Results:
    """What a launcher gives for each of its examples; interpreted once."""

    @functools.cache
    def results(name: str) -> list[list[torch.Tensor]]:
        calls = [operators.each_tensor(torch.clone, arguments) for arguments in examples[name]]
        return [outputs(name, call, SPECS[name].launch(*call)) for call in calls]

    return results


def has_float8(value: Any) -> bool:
    found: list[torch.dtype] = []
    operators.each_tensor(lambda t: found.append(t.dtype) or t, value)
    return any("float8" in str(dtype) for dtype in found)


def test_none_is_missing(examples: dict[str, list[tuple[Any, ...]]]) -> None:
    in_pytorch = {name for name in dir(torch.ops.sn72) if not name.startswith("_")} - {"name"}
    assert set(examples) == set(SPECS) == in_pytorch
    assert set(PUBLIC) == set(sn72kernels.OPS)


@pytest.mark.parametrize("name", sorted(SPECS))
def test_opcheck(name: str, examples: dict[str, list[tuple[Any, ...]]]) -> None:
    """PyTorch's own checks: schema, no missing autograd, fake function, tracing by AOT."""
    torch.use_deterministic_algorithms(False)  # filled allocations do not trace
    operator = getattr(torch.ops.sn72, name).default
    for arguments in examples[name]:
        checks = ["test_autograd_registration", "test_faketensor"]
        # The other two compare tensors by arithmetic that PyTorch lacks for fp8.
        if not has_float8((arguments, operator(*operators.each_tensor(torch.clone, arguments)))):
            checks += ["test_schema", "test_aot_dispatch_dynamic"]
        found = torch.library.opcheck(operator, arguments, test_utils=checks)
        assert set(found.values()) == {"SUCCESS"}, found


# In place the last axis must be contiguous: the public op refuses the other.
LAID_OUT = sorted(set(itertools.product(SPECS, operators.LAYOUTS)) - {("rope_", "turned")})


@pytest.mark.parametrize(("name", "layout"), LAID_OUT)
def test_launcher_gives_the_same_bits_for_every_layout(
    name: str, layout: str, examples: dict[str, list[tuple[Any, ...]]], launched: Results
) -> None:
    """Misaligned, with gaps between rows or elements, transposed: all tensors of a call at once."""
    for arguments, wanted in zip(examples[name], launched(name), strict=True):
        # A layout may be the tensor itself, which an operator in place would change.
        given = operators.each_tensor(lambda t: operators.LAYOUTS[layout](t.clone()), arguments)
        testing.assert_same(outputs(name, given, SPECS[name].launch(*given)), wanted)


@pytest.mark.parametrize("name", sorted(SPECS))
def test_launcher_agrees_with_the_reference(
    name: str, examples: dict[str, list[tuple[Any, ...]]], launched: Results
) -> None:
    """The awkward sizes of the examples; tolerances are derived in the tests of each op."""
    for arguments, have in zip(examples[name], launched(name), strict=True):
        given = operators.each_tensor(torch.clone, arguments)
        want = outputs(name, given, SPECS[name].reference(*given))
        for one, other in zip(have, want, strict=True):
            assert one.dtype == other.dtype
            if other.is_floating_point():
                assert testing.error_ratio(one.nan_to_num(7), other.nan_to_num(7)) < 4e-3
            else:
                assert torch.equal(one, other)


# Kernel -> most programs along the second axis of its grid, which ends at 65535.
SECOND_AXIS = {
    "hidden": "1024 parts, as the op's unsupported() sees to",
    "backward_columns": "two for each multiprocessor",
}


def test_no_grid_grows_along_a_short_axis() -> None:
    """Batches times heads, or rows over rows per program, can be more than 65535."""
    found = set()
    for name, calls in operators.examples().items():
        for call in calls:
            meta = operators.each_tensor(lambda t: t.to("meta"), call)
            for launch in testing.record(SPECS[name].launch, *meta, arch=90):
                if len(launch.grid) > 1:
                    found.add(launch.kernel.fn.__name__)
    assert found == set(SECOND_AXIS)


# --- public ops ----------------------------------------------------------------------------


def arguments(device: str) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """A plain call of every public op."""

    def half(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.float16, device=device)

    def full(*shape: int) -> torch.Tensor:
        return torch.ones(shape, device=device)

    codes, heads, cos = half(4, 32).to(torch.int8), half(1, 2, 5, 16), full(4, 16)
    fours = half(4, 16).byte(), full(4, 2).to(torch.float8_e4m3fn), full()
    return {
        "attention": ((heads, heads, heads), {}),
        "cascade_route": ((full(8), 0.1, 0.9), {}),
        "classifier_head": ((half(4, 32), half(8, 32), None, half(8), None), {}),
        "dequantize": ((codes, full()), {}),
        "dequantize_blocks": (fours, {}),
        "ensemble_vote": (([full(8), full(8)], full(2)), {}),
        "layernorm_gelu": ((half(4, 32), half(32)), {}),
        "linear": ((codes, full(), codes, full()), {"activation": "gelu"}),
        "preprocess": ((half(2, 8, 8, 3).byte(), (4, 4)), {"fit": "pad"}),
        "quantize": ((half(4, 32),), {"granularity": "token"}),
        "quantize_blocks": ((half(4, 32),), {"format": "mxfp8"}),
        "rope": ((heads, heads, cos, cos), {}),
        "rope_": ((heads, heads, cos, cos), {}),
    }


# Public op -> the kernel's configuration, by a name in it.
PUBLIC = {
    "attention": "queries",
    "cascade_route": "launches",
    "classifier_head": "units",
    "dequantize": "rows",
    "dequantize_blocks": "size",
    "ensemble_vote": "size",
    "layernorm_gelu": "whole",
    "linear": "stages",
    "preprocess": "cols",
    "quantize": "whole",
    "quantize_blocks": "size",
    "rope": "size",
    "rope_": "size",
}


@pytest.mark.parametrize("op", sorted(PUBLIC))
def test_explain(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, on a card, and where the environment asks for the reference."""
    args, kwargs = arguments("cpu")[op]
    here = sn72kernels.explain(op, *args, **kwargs)
    assert here.implementation == ("sdpa" if op == "attention" else "reference")
    assert "the tensors are on cpu" in here.reason
    monkeypatch.setattr(library, "triton_available", lambda: True)
    with FakeTensorMode():  # tensors of a card that need not be here
        args, kwargs = arguments("cuda")[op]
    with devices.assume(90):
        there = sn72kernels.explain(op, *args, **kwargs)
        assert there.implementation == "triton"
        assert PUBLIC[op] in there.config
        assert there.config["chosen_by"].startswith("rule ")
        assert there.op in SPECS
        monkeypatch.setenv("SN72_KERNELS", "reference")
        again = sn72kernels.explain(op, *args, **kwargs)
        assert again.implementation == here.implementation
        assert "SN72_KERNELS=reference is set" in again.reason


DIFFERENTIABLE = {"attention", "layernorm_gelu", "rope"}
NO_FLOATS = {"preprocess"}


@pytest.mark.parametrize("op", sorted(set(PUBLIC) - DIFFERENTIABLE - NO_FLOATS))
def test_an_op_without_a_backward_refuses_a_gradient(op: str) -> None:
    """Rather than cut the graph in silence; whatever float32 or float16 tensor asks for it."""
    call: Callable[..., Any] = getattr(sn72kernels, op)
    seen = 0
    for place in range(20):
        args, kwargs = arguments("cpu")[op]
        count = 0

        def want(tensor: torch.Tensor, place: int = place) -> torch.Tensor:
            nonlocal count, seen
            if tensor.dtype not in (torch.float32, torch.float16):
                return tensor
            count += 1
            seen += count - 1 == place
            return tensor.clone().requires_grad_(count - 1 == place)

        changed = operators.each_tensor(want, args)
        if count <= place:
            break
        with pytest.raises(GradientError, match=f"{op} has no backward, and .* requires a grad"):
            call(*changed, **kwargs)
        with torch.no_grad():
            call(*changed, **kwargs)
    assert seen


def rotated(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    cos, sin = tables.axial(2, 3, 8)
    one, other = sn72kernels.rope(q, k, cos, sin)
    return one.square().sum() + other.sin().sum()


def attended(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return sn72kernels.attention(q, k, k.cos()).square().sum()


def normed(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return sn72kernels.layernorm_gelu(q, residual=k).square().sum()


@pytest.mark.parametrize("loss", [rotated, attended, normed])
def test_compiled_gradients_are_the_eager_ones(loss: Callable[..., torch.Tensor]) -> None:
    torch.use_deterministic_algorithms(False)
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 2, 7, 8, generator=generator) for _ in "qk")

    def gradients(function: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, ...]:
        leaves = (q.clone().requires_grad_(), k.clone().requires_grad_())
        return torch.autograd.grad(function(*leaves), leaves)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for have, want in zip(gradients(compiled), gradients(loss), strict=True):
        torch.testing.assert_close(have, want)
