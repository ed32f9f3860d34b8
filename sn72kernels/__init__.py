"""Triton kernels for image cascades, each beside a plain PyTorch reference.

Importing this package imports neither PyTorch nor Triton; the first use of an op does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sn72kernels.library import Choice
    from sn72kernels.ops.attention.op import attention
    from sn72kernels.ops.cascade_route.op import cascade_route
    from sn72kernels.ops.classifier_head.op import classifier_head
    from sn72kernels.ops.ensemble_vote.op import ensemble_vote
    from sn72kernels.ops.layernorm_gelu.op import layernorm_gelu
    from sn72kernels.ops.linear.op import linear
    from sn72kernels.ops.preprocess.op import preprocess
    from sn72kernels.ops.quantize.op import dequantize, quantize
    from sn72kernels.ops.quantize_blocks.op import dequantize_blocks, quantize_blocks
    from sn72kernels.ops.rope.op import rope, rope_

# Public op -> folder under sn72kernels.ops that defines it.
OPS: dict[str, str] = {
    "attention": "attention",
    "cascade_route": "cascade_route",
    "classifier_head": "classifier_head",
    "dequantize": "quantize",
    "dequantize_blocks": "quantize_blocks",
    "ensemble_vote": "ensemble_vote",
    "layernorm_gelu": "layernorm_gelu",
    "linear": "linear",
    "preprocess": "preprocess",
    "quantize": "quantize",
    "quantize_blocks": "quantize_blocks",
    "rope": "rope",
    "rope_": "rope",
}

__all__ = [
    "OPS",
    "attention",
    "cascade_route",
    "classifier_head",
    "dequantize",
    "dequantize_blocks",
    "ensemble_vote",
    "explain",
    "layernorm_gelu",
    "linear",
    "preprocess",
    "quantize",
    "quantize_blocks",
    "rope",
    "rope_",
]


def explain(op: str, *args: Any, **kwargs: Any) -> Choice:
    """Which implementation ``op(*args, **kwargs)`` would run here, and why; runs nothing.

    Args:
        op: name of a public op, a key of :data:`OPS`.
        args: as for the op.
        kwargs: as for the op.

    Raises:
        ArgumentError: there is no such op.
    """
    from sn72kernels.errors import ArgumentError

    if op not in OPS:
        raise ArgumentError(f"there is no op {op!r}; there are: {', '.join(OPS)}")
    choice: Choice = _module(op).explain(*args, **kwargs)
    return choice


def _module(op: str) -> Any:
    return importlib.import_module(f"sn72kernels.ops.{OPS[op]}.op")


def __getattr__(name: str) -> Any:
    if name in OPS:
        value = getattr(_module(name), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
