"""The cases of every op: which sizes, against whom, and what a right result is.

A module per op has ``cases(device)``: an iterator of ``(name, build)``, where ``build()`` makes the
tensors and the :class:`~benchmarks.kernels.harness.Case`. Sizes for a GPU and for a CPU differ.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.kernels.harness import Case

# LayerNorm+GELU has as many cases as all others together, so a run that is cut off has the others.
OPS = (
    "cascade_route",
    "classifier_head",
    "attention",
    "rope",
    "preprocess",
    "quantize",
    "quantize_blocks",
    "linear",
    "ensemble_vote",
    "layernorm_gelu",
)


def every(device: torch.device) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Names and builders of the cases of all ops on ``device``."""
    for op in OPS:
        module: Any = importlib.import_module(f"benchmarks.kernels.cases.{op}")
        for name, build in module.cases(device):
            yield f"{op}: {name}", build


__all__ = ["OPS", "every"]
