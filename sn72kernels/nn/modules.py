"""Modules on the ops of this package.

A module here holds the submodules and parameters of the one it stands for, under the same names,
so that a model's state dict does not change. Where a gradient is wanted and its ops have none, it
calls the original.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

import sn72kernels
from sn72kernels.errors import ArgumentError
from sn72kernels.ops.classifier_head.op import Decision
from sn72kernels.ops.layernorm_gelu.op import Approximate


class LayerNormGelu(nn.Module):
    """LayerNorm and the GELU after it, in one pass. Differentiable.

    Args:
        norm: over the last axis only; its parameters are shared.
        gelu: the activation.
    """

    def __init__(self, norm: nn.LayerNorm, gelu: nn.GELU) -> None:
        super().__init__()
        if len(norm.normalized_shape) != 1:
            raise ArgumentError(
                f"norm is over the axes {tuple(norm.normalized_shape)}; give one over the last only"
            )
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        self.approximate = cast("Approximate", gelu.approximate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Same shape and dtype as ``x``."""
        return sn72kernels.layernorm_gelu(
            x,
            self.weight,
            self.bias,
            eps=self.eps,
            approximate=self.approximate,
        )


class ClassifierHead(nn.Sequential):
    """``[LayerNorm,] Linear, GELU, Linear`` to one logit, fused at small batch.

    Args:
        layers: the original; dropout in it does nothing outside training.
    """

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        parts = head_parts(layers)
        if parts is None:
            raise ArgumentError(
                f"layers are {[type(layer).__name__ for layer in layers]}; give [LayerNorm,] "
                "Linear, GELU, Linear with one output"
            )
        for name, layer in layers.named_children():
            self.add_module(name, layer)
        self.train(layers.training)
        self._parts = (parts,)  # in a tuple, so that nothing is registered twice

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits, shape (..., 1), dtype of ``x``."""
        if _trains(self, x):
            out: torch.Tensor = super().forward(x)  # type: ignore[no-untyped-call]
            return out
        logits = self.decide(x.reshape(-1, x.shape[-1])).logits
        return logits.to(x.dtype).reshape(*x.shape[:-1], 1)

    def decide(
        self, x: torch.Tensor, low: float | torch.Tensor = 0.15, high: float | torch.Tensor = 0.85
    ) -> Decision:
        """Logits, probabilities and routes of features (n, D); :func:`classifier_head`."""
        norm, first, gelu, last = self._parts[0]
        return sn72kernels.classifier_head(
            x,
            first.weight,
            first.bias,
            last.weight,
            last.bias,
            low=low,
            high=high,
            norm=norm is not None,
            norm_weight=None if norm is None else norm.weight,
            norm_bias=None if norm is None else norm.bias,
            eps=1e-5 if norm is None else norm.eps,
            approximate=gelu.approximate,
        )


class RotaryAttention(nn.Module):
    """Attention with separate projections and rotary embedding, as in transformers' DINOv3.

    Args:
        original: has ``q_proj``, ``k_proj``, ``v_proj``, ``o_proj``, ``num_heads``, ``head_dim``,
            ``scaling``.
    """

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module

    def __init__(self, original: Any) -> None:
        super().__init__()
        for name, child in original.named_children():
            self.add_module(name, child)
        self.num_heads, self.head_dim = original.num_heads, original.head_dim
        self.scaling = original.scaling
        self.train(original.training)
        self._original = (original,)  # in a tuple, so that nothing is registered twice

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As the original; the weights of the attention are None."""
        if not self.runs(hidden_states, attention_mask, position_embeddings, **kwargs):
            out: tuple[torch.Tensor, torch.Tensor | None] = self._original[0](
                hidden_states, attention_mask, position_embeddings, **kwargs
            )
            return out
        assert position_embeddings is not None
        shape = (*hidden_states.shape[:2], self.num_heads, self.head_dim)
        q, k, v = (
            projection(hidden_states).view(shape).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = sn72kernels.rope(q, k, *position_embeddings)
        joined = sn72kernels.attention(q, k, v, scale=self.scaling).transpose(1, 2).flatten(2)
        return self.o_proj(joined), None

    def runs(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> bool:
        """Whether a call runs the ops here, and not the original."""
        asked = attention_mask is not None or kwargs.get("output_attentions")
        return not (asked or position_embeddings is None or _trains(self, hidden_states))


class Attention(nn.Module):
    """Attention with one projection for queries, keys and values, as in timm.

    Args:
        original: has ``qkv``, ``proj``, ``num_heads``; may have ``q_norm``, ``k_norm``, ``norm``
            (of the joined heads), ``scale``; and, as timm's DINOv3, ``num_prefix_tokens`` and
            ``rotate_half``.
    """

    qkv: nn.Module
    proj: nn.Module

    def __init__(self, original: Any) -> None:
        super().__init__()
        for name, child in original.named_children():
            self.add_module(name, child)
        self.num_heads = original.num_heads
        self.scale = getattr(original, "scale", None)
        self.rotate_half = getattr(original, "rotate_half", False)
        self.num_prefix_tokens = getattr(original, "num_prefix_tokens", 0)
        self.train(original.training)
        self._original = (original,)  # in a tuple, so that nothing is registered twice

    def forward(
        self, x: torch.Tensor, *args: Any, rope: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """Shape (B, T, D), as the original.

        Args:
            x: shape (B, T, D).
            args: handed to the original.
            rope: sines and cosines side by side, shape (P, 2 * head_dim).
            kwargs: handed to the original.
        """
        if not self.runs(x, *args, rope=rope, **kwargs):
            given = kwargs if rope is None else {"rope": rope, **kwargs}
            out: torch.Tensor = self._original[0](x, *args, **given)
            return out
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k = (
            norm(t) if norm is not None else t
            for norm, t in ((getattr(self, "q_norm", None), q), (getattr(self, "k_norm", None), k))
        )
        if rope is not None:
            sin, cos = rope.chunk(2, -1)
            q, k = sn72kernels.rope(q, k, cos, sin)
        joined = sn72kernels.attention(q, k, v, scale=self.scale).transpose(1, 2).flatten(2)
        norm = getattr(self, "norm", None)
        projected: torch.Tensor = self.proj(joined if norm is None else norm(joined))
        return projected

    def runs(
        self, x: torch.Tensor, *args: Any, rope: torch.Tensor | None = None, **kwargs: Any
    ) -> bool:
        """Whether a call runs the ops here, and not the original."""
        if rope is not None:
            patches = x.shape[1] - self.num_prefix_tokens
            if not self.rotate_half or rope.dim() != 2 or rope.shape[0] != patches:
                return False
        given = [v for v in (*args, *kwargs.values()) if v is not None and v is not False]
        return not (given or _trains(self, x))


def head_parts(layers: nn.Sequential) -> tuple[Any, Any, Any, Any] | None:
    """LayerNorm or None, Linear, GELU, Linear; None where ``layers`` are something else."""
    rest: list[Any] = [
        layer for layer in layers if not isinstance(layer, (nn.Dropout, nn.Identity))
    ]
    norm = rest.pop(0) if rest and isinstance(rest[0], nn.LayerNorm) else None
    kinds = (nn.Linear, nn.GELU, nn.Linear)
    if len(rest) != 3 or not all(map(isinstance, rest, kinds)):
        return None
    first, gelu, last = rest
    if last.out_features != 1 or (norm is not None and len(norm.normalized_shape) != 1):
        return None
    return norm, first, gelu, last


def _trains(module: nn.Module, x: torch.Tensor) -> bool:
    """Whether dropout would act, or a gradient is wanted."""
    return module.training or _wants_gradient(module, x)


def _wants_gradient(module: nn.Module, x: torch.Tensor) -> bool:
    if not torch.is_grad_enabled():
        return False
    return x.requires_grad or any(p.requires_grad for p in module.parameters())
