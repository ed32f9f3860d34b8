"""What Triton's interpreter lacks: which tests it cannot run, and the arithmetic of small floats.

The interpreter keeps a bfloat16 as the integer of its bits: it multiplies matrices of these
integers, and where it converts from float32 it cuts bits off instead of rounding. Here operands
of a matrix product become float32 first, which is exact (a product of two bfloat16, float16 or fp8
numbers has at most 22 significant bits), and conversions round half to even.
"""

from __future__ import annotations

import importlib.util
from importlib.metadata import version
from typing import Any

import numpy as np
import pytest
import torch

_BITS: dict[str, tuple[torch.dtype, type[np.generic]]] = {
    "bf16": (torch.bfloat16, np.int16),
    "fp8e4nv": (torch.float8_e4m3fn, np.uint8),
}


def marks() -> tuple[pytest.MarkDecorator, ...]:
    """For tests that it runs: 3.6 takes numbers in a way that NumPy deprecates, and 2.4 refuses."""
    if importlib.util.find_spec("triton") is None or _release("triton") >= (3, 7):
        return ()
    if _release("numpy") >= (2, 4):
        reason = "Triton 3.6 interprets loops only with NumPy before 2.4"
        return (pytest.mark.skip(reason=reason),)
    return (pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),)


def _release(package: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version(package).split(".")[:2])


def repair() -> None:
    """Put the conversions below in place of the interpreter's, for the life of this process."""
    from triton.runtime import interpreter

    builder: Any = interpreter.InterpreterBuilder
    handle: Any = interpreter.TensorHandle
    if getattr(builder, "sn72_repaired", False):
        return
    builder.sn72_repaired = True
    plain_cast, plain_dot = builder.cast_impl, builder.create_dot

    def cast(self: Any, source: Any, target: Any) -> Any:
        kinds = source.dtype.scalar.name, target.scalar.name
        if kinds == ("fp32", "bf16"):
            return handle(_rounded(source.data), target.scalar)
        if kinds == ("bf16", "fp32"):
            return handle(_widened(source.data, "bf16"), target.scalar)
        return plain_cast(self, source, target)

    def dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        a, b = (
            handle(_widened(t.data, t.dtype.scalar.name), interpreter.tl.float32)
            if t.dtype.scalar.name in _BITS
            else t
            for t in (a, b)
        )
        return plain_dot(self, a, b, d, *options)

    builder.cast_impl, builder.create_dot = cast, dot


def _widened(bits: np.ndarray[Any, Any], kind: str) -> np.ndarray[Any, Any]:
    dtype, integer = _BITS[kind]
    whole = np.array(bits).view(integer)
    return torch.from_numpy(whole).view(dtype).float().numpy()


def _rounded(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    whole = torch.from_numpy(np.array(values, np.float32))
    return whole.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
