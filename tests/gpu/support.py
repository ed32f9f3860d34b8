"""Where the tests of this folder run, with which numbers, and how they check graphs and streams.

They need a CUDA device. With ``SN72_GPU_TESTS_ON_INTERPRETER=1`` the same bodies run on the CPU,
kernels under Triton's interpreter, at the second of the sizes that they give; what has no
counterpart there (graphs, streams) is called plainly. That finds typing errors and misuse of an
API, and proves nothing about a GPU.

Inputs differ from run to run. The seed is in the first lines of pytest's output;
``SN72_GPU_TESTS_SEED`` sets it.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from sn72kernels import testing

INTERPRETED = os.environ.get("SN72_GPU_TESTS_ON_INTERPRETER") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
SEED = int(os.environ.get("SN72_GPU_TESTS_SEED") or secrets.randbelow(1 << 30))

T = TypeVar("T")


def sizes(card: T, interpreter: T) -> T:
    """The first on a card, the second under the interpreter, which is a million times slower."""
    return interpreter if INTERPRETED else card


def seeded(seed: int) -> torch.Generator:
    """Numbers of this run: the same for the same ``seed`` within it."""
    return torch.Generator().manual_seed(SEED + seed)


def check_graph_and_streams(
    call: Callable[..., Sequence[torch.Tensor]],
    first: Sequence[torch.Tensor],
    second: Sequence[torch.Tensor],
) -> None:
    """Captured on ``first`` and replayed on ``second``; and both at once on two streams."""
    if INTERPRETED:
        for arguments in (first, second):
            testing.assert_same(call(*arguments), call(*arguments))
        return
    testing.assert_capturable(call, first, second)
    testing.assert_stream_safe(call, first, second)


def compiled(call: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile`` without graph breaks; only traced where there is no card."""
    torch._dynamo.reset()  # after eight shapes of one function it would fall back in silence
    return torch.compile(call, fullgraph=True, backend=sizes("inductor", "eager"))


def free_bytes() -> int:
    """Memory of the device that can still be had, what PyTorch keeps for later included."""
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info()[0]) if DEVICE.type == "cuda" else 1 << 33
