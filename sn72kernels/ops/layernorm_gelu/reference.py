"""LayerNorm then GELU in plain PyTorch: the definition that the kernels are held to.

LayerNorm: Ba, Kiros, Hinton 2016 (arXiv:1607.06450).
"""

from __future__ import annotations

import torch

from sn72kernels.ops.gelu import gelu, gelu_slope


def forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    tanh: bool,
    keep_total: bool,
    keep_stats: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``gelu(layer_norm(x + residual) * weight + bias)`` over the last axis.

    The sum is rounded to the dtype of ``x`` before it is normalised, as two separate PyTorch ops
    would do, so that the backward pass sees the number that the forward pass used.

    Args:
        x: shape (..., N), float16, bfloat16, float32 or float64.
        residual: same shape and dtype as ``x``, or None.
        weight: shape (N,), or None for ones.
        bias: shape (N,), or None for zeros.
        eps: added to the variance.
        tanh: the tanh form of GELU instead of the exact one.
        keep_total: return ``x + residual``.
        keep_stats: return mean and reciprocal standard deviation.

    Returns:
        output, shape and dtype of ``x``; the sum, likewise, or an empty tensor; statistics, shape
        (2, rows): mean and reciprocal standard deviation in float32 (float64 for float64), or an
        empty tensor.
    """
    total = x if residual is None else x + residual
    wide = _widen(total)
    mean = wide.mean(-1, keepdim=True)
    centred = wide - mean
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    out = gelu(_affine(centred * rstd, weight, bias), tanh).to(x.dtype).contiguous()
    stats = torch.stack((mean.reshape(-1), rstd.reshape(-1)))
    return (
        out,
        _own(total, x) if keep_total else x.new_empty(0),
        stats if keep_stats else stats.new_empty(0),
    )


def backward(
    grad: torch.Tensor,
    grad_total: torch.Tensor | None,
    total: torch.Tensor,
    stats: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    tanh: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of :func:`forward`.

    Args:
        grad: gradient of the output, shape (..., N).
        grad_total: gradient of the returned sum, likewise, or None.
        total: what was normalised: ``x``, or ``x + residual``.
        stats: as :func:`forward` returned them.
        weight: as given to :func:`forward`.
        bias: as given to :func:`forward`.
        tanh: as given to :func:`forward`.

    Returns:
        gradient of ``x`` (and of ``residual``: it is the same), of ``weight`` and of ``bias``; the
        last two are empty where there is no such argument.
    """
    shape = (*total.shape[:-1], 1)
    mean, rstd = stats[0].reshape(shape), stats[1].reshape(shape)
    normal = (_widen(total) - mean) * rstd
    grad_affine = _widen(grad) * gelu_slope(_affine(normal, weight, bias), tanh)
    inner = grad_affine if weight is None else grad_affine * _widen(weight)
    along = (inner * normal).mean(-1, keepdim=True)
    grad_x = (inner - inner.mean(-1, keepdim=True) - normal * along) * rstd
    if grad_total is not None:
        grad_x = grad_x + _widen(grad_total)
    rows = (-1, total.shape[-1])
    empty = total.new_empty(0)
    return (
        grad_x.to(total.dtype).contiguous(),
        empty if weight is None else (grad_affine * normal).reshape(rows).sum(0).to(weight.dtype),
        empty.clone() if bias is None else grad_affine.reshape(rows).sum(0).to(bias.dtype),
    )


def _affine(
    normal: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor:
    if weight is not None:
        normal = normal * weight.to(normal.dtype)
    return normal if bias is None else normal + bias.to(normal.dtype)


def _widen(x: torch.Tensor) -> torch.Tensor:
    """The dtype of the arithmetic: float32, and float64 for float64."""
    return x if x.dtype == torch.float64 else x.float()


def _own(total: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A registered op may not return its own input."""
    return total.clone(memory_format=torch.contiguous_format) if total is x else total.contiguous()
