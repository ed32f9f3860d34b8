"""The classifier head in two launches against the same in PyTorch ops."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

import sn72kernels
from benchmarks.kernels import gates, peers, work
from benchmarks.kernels.harness import Case
from sn72kernels.ops.classifier_head import reference

DEPTH, UNITS = 1024, 256


def cases(device: torch.device) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Batches of one to the largest that the kernel takes."""
    for rows in (1, 16, 64, 256) if device.type == "cuda" else (1, 16):
        yield f"{rows} rows", partial(build, device, rows)


def ours(*arguments: torch.Tensor) -> Any:
    x, nw, nb, w1, b1, w2, b2 = arguments
    return tuple(
        sn72kernels.classifier_head(x, w1, b1, w2, b2, norm=True, norm_weight=nw, norm_bias=nb)
    )


def eager(*arguments: torch.Tensor) -> Any:
    return reference.head(*arguments, None, None, 0.15, 0.85, True, 1e-5, False)


def build(device: torch.device, rows: int) -> Case:
    """LayerNorm, 1024 -> 256, GELU, 256 -> 1, sigmoid, route."""
    dtype = torch.float16
    shapes = ((rows, DEPTH), (DEPTH,), (DEPTH,), (UNITS, DEPTH), (UNITS,), (UNITS,), ())
    tensors = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
    tensors[3] /= DEPTH**0.5
    tensors[5] /= UNITS**0.5
    logits = eager(*(t.double() for t in tensors))[0]
    others, absent = peers.others(device, eager)

    def near(out: Any) -> bool:
        # Features are rounded to 16 bits after the norm; a logit sums 1024 x 256 of them. The
        # probability follows its own logit.
        gap = float((out[0].double() - logits).abs().max())
        follows = gates.close(out[0].double().sigmoid(), dtype=torch.float16)
        return gap < 64 * 2.0**-11 and follows(out[1])

    return Case(
        op="classifier_head",
        label=f"{rows} x {DEPTH} to {UNITS} to 1",
        dtype="float16",
        shape=(rows,),
        ours=ours,
        others=others,
        absent=absent,
        arguments=tuple(tensors),
        correct=near,
        work=work.classifier_head(rows, DEPTH, UNITS, 2),
    )
