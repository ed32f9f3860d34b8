"""Every error that sn72kernels raises on purpose, and the check that names the argument."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch


class KernelError(Exception):
    """Base of all deliberate errors of sn72kernels."""


class ArgumentError(KernelError, ValueError):
    """An argument has a value that the op does not take."""


class ShapeError(ArgumentError):
    """A tensor has the wrong number of dimensions or a wrong size."""


class DtypeError(KernelError, TypeError):
    """A tensor has a dtype that the op does not take."""


class DeviceError(ArgumentError):
    """Tensors of one call live on different devices."""


class GradientError(ArgumentError):
    """A gradient is wanted of an op that has no backward."""


class PatchError(KernelError):
    """A patched model does not compute what it did before."""


class NoTritonError(KernelError, ImportError):
    """Triton is needed for this and is absent."""


class NoGpuError(KernelError, RuntimeError):
    """A CUDA device is needed for this (timing, tuning) and none is visible."""


def check_tensor(
    name: str,
    tensor: torch.Tensor,
    *,
    shape: Sequence[int | None] | None = None,
    dtype: torch.dtype | tuple[torch.dtype, ...] | None = None,
    device: torch.device | None = None,
) -> None:
    """Check one tensor argument; only what is given is checked.

    Args:
        name: the argument's name as the caller of the op knows it.
        tensor: the value.
        shape: expected sizes; ``None`` in a place accepts any size there.
        dtype: the accepted dtype, or several.
        device: the device of the call's first tensor.

    Raises:
        DtypeError: not a tensor, or of another dtype.
        ShapeError: another number of dimensions or another size.
        DeviceError: on another device.
    """
    import torch

    if not isinstance(tensor, torch.Tensor):
        raise DtypeError(
            f"Invalid type of {name}: expected torch.Tensor, got {type(tensor).__name__}; "
            f"convert it with torch.as_tensor({name})."
        )
    if dtype is not None:
        accepted = dtype if isinstance(dtype, tuple) else (dtype,)
        if tensor.dtype not in accepted:
            raise DtypeError(
                f"Invalid dtype of {name}: expected {_choice(accepted)}, got {_short(tensor.dtype)}"
                f"; convert it with {name}.to({accepted[0]})."
            )
    if shape is not None and not _fits(tensor, shape):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ShapeError(f"Invalid shape of {name}: expected ({wanted}), got {tuple(tensor.shape)}")
    if device is not None and tensor.device != device:
        raise DeviceError(
            f"Invalid device of {name}: expected {device}, got {tensor.device}; "
            f'move it with {name}.to("{device}").'
        )


def check_no_gradient(op: str, **tensors: torch.Tensor | None) -> None:
    """Refuse tensors that want a gradient from an op that has none, rather than drop it unsaid.

    Args:
        op: its public name.
        tensors: the tensor arguments by name.

    Raises:
        GradientError: gradients are being recorded and one of the tensors requires one.
    """
    import torch

    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise GradientError(
                f"{op} has no backward, and {name} requires a gradient; call it under "
                f"torch.no_grad(), or give {name}.detach()"
            )


def _fits(tensor: torch.Tensor, shape: Sequence[int | None]) -> bool:
    if tensor.dim() != len(shape):
        return False
    return all(want is None or have == want for have, want in zip(tensor.shape, shape, strict=True))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _choice(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(_short(dtype) for dtype in dtypes)
