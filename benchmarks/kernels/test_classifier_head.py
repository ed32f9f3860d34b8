"""The classifier head in two launches against the same in PyTorch ops."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import sn72kernels
from sn72kernels import bench
from sn72kernels.ops.classifier_head import reference


def ours(*arguments: torch.Tensor) -> torch.Tensor:
    x, nw, nb, w1, b1, w2, b2 = arguments
    return sn72kernels.classifier_head(
        x, w1, b1, w2, b2, norm=True, norm_weight=nw, norm_bias=nb
    ).logits


def eager(*arguments: torch.Tensor) -> torch.Tensor:
    return reference.head(*arguments, None, None, 0.15, 0.85, True, 1e-5, False)[0]


@pytest.mark.parametrize("rows", [1, 16, 256])
def test_head(race: Callable[..., None], device: torch.device, rows: int) -> None:
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    shapes = ((rows, 1024), (1024,), (1024,), (256, 1024), (256,), (256,), ())
    arguments = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
    arguments[3] /= 32
    arguments[5] /= 16
    want = eager(*(t.double() for t in arguments))
    candidates = {"sn72kernels": ours, "PyTorch ops": eager}
    if device.type == "cuda":
        candidates["torch.compile"] = torch.compile(eager, dynamic=False)
    race(
        f"classifier_head {rows} x 1024 -> 256 -> 1",
        candidates,
        arguments,
        lambda out: float((out - want).abs().max()) < 64 * 2.0**-11,
        bench.bytes_of(*arguments),
    )
