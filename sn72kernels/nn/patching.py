"""Puts the modules of this package into a model, checks what they compute, and takes them out."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from sn72kernels.errors import ArgumentError, KernelError, PatchError
from sn72kernels.nn.modules import (
    Attention,
    ClassifierHead,
    LayerNormGelu,
    RotaryAttention,
    head_parts,
)
from sn72kernels.testing import error_ratio

# Root mean square of the difference over that of the original's output: a few roundings of the
# dtype that a module computes in, which add up along a model.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 5e-3,
    torch.bfloat16: 4e-2,
}


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
        if isinstance(module, nn.Sequential) and head_parts(module) is not None:
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
