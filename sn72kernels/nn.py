"""Modules on the ops of this package, and :func:`patch`, which puts them into a model.

A module here holds the submodules and parameters of the one it stands for, under the same names,
so that a model's state dict does not change. Where a gradient is wanted and its ops have none, it
calls the original.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn

import sn72kernels
from sn72kernels.errors import ArgumentError, KernelError, PatchError
from sn72kernels.ops.classifier_head.op import Decision
from sn72kernels.ops.layernorm_gelu.op import Approximate
from sn72kernels.testing import error_ratio

# Root mean square of the difference over that of the original's output: a few roundings of the
# dtype that a module computes in, which add up along a model.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 5e-3,
    torch.bfloat16: 4e-2,
}


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
        parts = _head_parts(layers)
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


# --- patching ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Change:
    """One place that :func:`patch` looked at.

    Attributes:
        name: of the module in the model.
        before: its class.
        after: the class that stands for it.
        error: root mean square of the difference of the outputs over that of the original's.
    """

    name: str
    before: str
    after: str
    error: float

    def __str__(self) -> str:
        return f"{self.name}: {self.before} -> {self.after} (error {self.error:.1e})"


@dataclass
class Patched:
    """What :func:`patch` did.

    Attributes:
        changes: what was swapped.
        refused: what was recognised and left alone, since its outputs differed, or since the op
            does not take what it is called with (an infinite error).
        error: as in :class:`Change`, of the whole model.
    """

    changes: tuple[Change, ...] = ()
    refused: tuple[Change, ...] = ()
    error: float = 0.0
    _undo: list[tuple[nn.Module, str, nn.Module]] = field(default_factory=list, repr=False)

    def revert(self) -> None:
        """Put the original modules back; a second call does nothing."""
        while self._undo:
            parent, name, original = self._undo.pop()
            setattr(parent, name, original)

    def __str__(self) -> str:
        lines = [f"{len(self.changes)} modules swapped, error {self.error:.1e}"]
        lines += [f"  {change}" for change in self.changes]
        lines += [f"  refused {change}" for change in self.refused]
        return "\n".join(lines)


@dataclass
class _Candidate:
    """Modules to put in place of others, and between which two the outputs are compared."""

    swaps: dict[str, nn.Module]
    entry: str
    exit: str
    before: str
    arguments: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    output: Any = None


def patch(
    model: nn.Module,
    example: Sequence[Any] | Mapping[str, Any],
    *,
    tolerance: float | None = None,
) -> Patched:
    """Swap what fits for the modules here, check each against the original, and say what was done.

    Recognised: ``nn.LayerNorm`` then ``nn.GELU`` in an ``nn.Sequential``; an ``nn.Sequential``
    that :class:`ClassifierHead` takes; attention as in transformers' DINOv3 and as in timm, its
    DINOv3 included. A module that the example does not reach is left alone, and so is one that is
    used in two places, or called with what its replacement would hand back to it (a mask).

    Args:
        model: in eval mode; changed in place.
        example: positional or keyword arguments of a call, on the model's device.
        tolerance: largest relative error of a module, and of the model; by default that of
            :data:`TOLERANCE` for the output's dtype.

    Returns:
        The changes, and ``revert()``.

    Raises:
        ArgumentError: the model is in training mode.
        PatchError: each module passed but the whole model does not; it is as it was.
    """
    if model.training:
        raise ArgumentError("the model is in training mode; call model.eval() first")
    candidates = _candidates(model)
    with torch.no_grad():
        before = _observe(model, candidates, example)
        result = Patched()
        try:
            for candidate in candidates:
                if candidate.arguments is not None and _runs(candidate):
                    _swap(model, candidate, tolerance, result)
            result.error, limit = _distance(_call(model, example), before, tolerance)
        except BaseException:
            result.revert()
            raise
    if result.error > limit:
        result.revert()
        raise PatchError(
            f"after {len(result.changes)} swaps the model's output differs by {result.error:.1e}, "
            f"more than {limit:.1e}; the model is as it was. Give a larger tolerance if that is "
            "fine."
        )
    return result


def _swap(
    model: nn.Module, candidate: _Candidate, tolerance: float | None, result: Patched
) -> None:
    """Swap a candidate whose outputs agree, refuse another; ``result`` takes it down."""
    error, limit = _compare(candidate, tolerance)
    after = type(candidate.swaps[candidate.entry]).__name__
    change = Change(candidate.entry, candidate.before, after, error)
    if error > limit:
        result.refused += (change,)
        return
    result.changes += (change,)
    for name, module in candidate.swaps.items():
        parent, _, leaf = name.rpartition(".")
        holder = model.get_submodule(parent)
        result._undo.append((holder, leaf, getattr(holder, leaf)))
        setattr(holder, leaf, module)


def _candidates(model: nn.Module) -> list[_Candidate]:
    seen: dict[int, int] = {}
    for _, module in model.named_modules(remove_duplicate=False):
        seen[id(module)] = seen.get(id(module), 0) + 1
    found = []
    for name, module in model.named_modules():
        if seen[id(module)] > 1 or not name:
            continue
        kind = type(module).__name__
        if isinstance(module, (LayerNormGelu, ClassifierHead, RotaryAttention, Attention)):
            continue
        if isinstance(module, nn.Sequential) and _head_parts(module) is not None:
            found.append(_Candidate({name: ClassifierHead(module)}, name, name, kind))
        elif isinstance(module, nn.Sequential):
            found.extend(_norms(name, module))
        elif _is_rotary(module):
            found.append(_Candidate({name: RotaryAttention(module)}, name, name, kind))
        elif _is_attention(module):
            found.append(_Candidate({name: Attention(module)}, name, name, kind))
    return found


def _norms(name: str, layers: nn.Sequential) -> list[_Candidate]:
    children = list(layers.named_children())
    found = []
    for (first, norm), (second, gelu) in itertools.pairwise(children):
        if not isinstance(norm, nn.LayerNorm) or not isinstance(gelu, nn.GELU):
            continue
        if len(norm.normalized_shape) != 1:
            continue
        entry, exit_ = f"{name}.{first}", f"{name}.{second}"
        swaps: dict[str, nn.Module] = {entry: LayerNormGelu(norm, gelu), exit_: nn.Identity()}
        found.append(_Candidate(swaps, entry, exit_, "LayerNorm, GELU"))
    return found


def _head_parts(layers: nn.Sequential) -> tuple[Any, Any, Any, Any] | None:
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


def _is_rotary(module: nn.Module) -> bool:
    if next(module.parameters(recurse=False), None) is not None:
        return False  # parameters of its own would be missing from the state dict
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "num_heads", "head_dim", "scaling")
    if not all(hasattr(module, name) for name in names):
        return False
    return "position_embeddings" in inspect.signature(module.forward).parameters


def _is_attention(module: nn.Module) -> bool:
    if next(module.parameters(recurse=False), None) is not None:
        return False
    linear = (getattr(module, name, None) for name in ("qkv", "proj"))
    return all(isinstance(part, nn.Linear) for part in linear) and isinstance(
        getattr(module, "num_heads", None), int
    )


def _observe(
    model: nn.Module, candidates: Sequence[_Candidate], example: Sequence[Any] | Mapping[str, Any]
) -> Any:
    """Run the model and keep what went into and came out of every candidate, the first time."""
    handles = []
    for candidate in candidates:

        def enter(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], at: _Candidate = candidate
        ) -> None:
            if at.arguments is None:
                at.arguments = (args, kwargs)

        def leave(
            _: nn.Module, args: tuple[Any, ...], output: Any, at: _Candidate = candidate
        ) -> None:
            if at.output is None:
                at.output = output

        entry, exit_ = model.get_submodule(candidate.entry), model.get_submodule(candidate.exit)
        handles.append(entry.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(exit_.register_forward_hook(leave))
    try:
        return _call(model, example)
    finally:
        for handle in handles:
            handle.remove()


def _runs(candidate: _Candidate) -> bool:
    """Whether the replacement would do the work, and not hand it to the original."""
    assert candidate.arguments is not None
    args, kwargs = candidate.arguments
    runs = getattr(candidate.swaps[candidate.entry], "runs", None)
    return runs is None or bool(runs(*args, **kwargs))


def _compare(candidate: _Candidate, tolerance: float | None) -> tuple[float, float]:
    """As :func:`_distance`; infinite where the op does not take the arguments."""
    assert candidate.arguments is not None
    args, kwargs = candidate.arguments
    try:
        have = candidate.swaps[candidate.entry](*args, **kwargs)
    except KernelError:  # a head whose features have another dtype than its weights, say
        return float("inf"), 0.0
    return _distance(have, candidate.output, tolerance)


def _distance(have: Any, want: Any, tolerance: float | None) -> tuple[float, float]:
    """Largest error of the output tensors, and what is allowed.

    A tensor that the replacement leaves out (the weights of an attention) is not compared.
    """
    from torch.utils import _pytree as tree

    pairs = [
        (one, other)
        for one, other in zip(_flat(tree, have), _flat(tree, want), strict=False)
        if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)
    ]
    if not pairs or any(one.shape != other.shape for one, other in pairs):
        return float("inf"), 0.0
    if tolerance is None:
        tolerance = max(TOLERANCE.get(other.dtype, 0.0) for _, other in pairs)
    return max(error_ratio(one, other) for one, other in pairs), tolerance


def _flat(tree: Any, value: Any) -> list[Any]:
    leaves: list[Any] = tree.tree_leaves(value)
    return leaves


def _call(model: nn.Module, example: Sequence[Any] | Mapping[str, Any]) -> Any:
    return model(**example) if isinstance(example, Mapping) else model(*example)


def _trains(module: nn.Module, x: torch.Tensor) -> bool:
    """Whether dropout would act, or a gradient is wanted."""
    return module.training or _wants_gradient(module, x)


def _wants_gradient(module: nn.Module, x: torch.Tensor) -> bool:
    if not torch.is_grad_enabled():
        return False
    return x.requires_grad or any(p.requires_grad for p in module.parameters())
