"""AWQ's scales, settled so that a server need not know of them.

AWQ multiplies each input channel of a linear layer by a scale and divides the weights by it before
they are rounded (Lin et al. 2023). ModelOpt finds one scale per layer, ``pre_quant_scale``. Where
several layers read one normalisation it can be folded into that, if it is the same for all of
them; ModelOpt's export takes their mean and does so. Elsewhere it leaves it beside the weight.
Here:

- ``down_proj`` reads ``act(gate_proj(x)) * up_proj(x)``: its scale goes into ``up_proj``'s rows;
- ``o_proj`` reads weighted means of values: its scale goes into ``v_proj``'s rows. With
  grouped-query attention several query heads read one value head, so they must share a scale: the
  mean is taken and ``o_proj`` rounded anew. AutoAWQ leaves the scale out there. In a random
  Qwen3-VL of two layers whose value channels differ by a factor of e (one standard deviation), the
  output of ``o_proj`` is off by 11.6 % with no scale, 9.6 % with one per channel and 9.4 % with the
  mean, so the mean keeps what the scale is for;
- layers that read one normalisation get the mean before anything is measured, so that what is
  measured is what is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sn72engine import _deps
from sn72engine.checkpoint_layout import BLOCK, FUSED
from sn72engine.errors import QuantizationError

if TYPE_CHECKING:
    from torch import Tensor

#: A layer whose output channels are the input channels of the other, up to a factor and to groups.
_BEFORE = (("v_proj", "o_proj"), ("up_proj", "down_proj"))


def settle(model: Any) -> None:
    """Fold or share every ``pre_quant_scale`` of a model quantised with ModelOpt's INT4-AWQ.

    Works on modules that have the children above, by their names; others stay as they are.

    Raises:
        QuantizationError: ``o_proj`` has grouped inputs and its module has no ``head_dim``.
    """
    torch = _deps.require("torch", purpose="quantise a checkpoint")
    with torch.no_grad():
        for name, block in model.named_modules():
            for first, second in _BEFORE:
                before, after = getattr(block, first, None), getattr(block, second, None)
                if before is not None and _scale(after) is not None:
                    _fold(block, name, before, after)
            for names in FUSED:
                layers = [getattr(block, name, None) for name in names]
                _share([layer for layer in layers if _scale(layer) is not None])


def grouped_mean(scale: Tensor, heads: int, head_dim: int) -> Tensor:
    """Mean over the query heads that read one value head.

    Args:
        scale: (queries * head_dim,), per input channel of ``o_proj``; query heads that read the
            same values are neighbours.
        heads: value heads.
        head_dim: channels of a head.

    Returns:
        (heads * head_dim,), per output channel of ``v_proj``.
    """
    mean: Tensor = scale.reshape(heads, -1, head_dim).mean(1)
    return mean.flatten()


def repeated(scale: Tensor, queries: int, head_dim: int) -> Tensor:
    """The scale of each value head, once for every query head that reads it.

    Args:
        scale: (heads * head_dim,).
        queries: query heads.
        head_dim: channels of a head.

    Returns:
        (queries * head_dim,).
    """
    heads = scale.reshape(-1, 1, head_dim)
    return heads.expand(-1, queries // heads.shape[0], -1).flatten()


def _scale(layer: Any) -> Any:
    """Its ``pre_quant_scale``; None where it has none or is no quantised layer."""
    return getattr(getattr(layer, "input_quantizer", None), "pre_quant_scale", None)


def _fold(block: Any, name: str, before: Any, after: Any) -> None:
    scale = _scale(after)
    if before.out_features != after.in_features:
        head_dim = getattr(block, "head_dim", None)
        if head_dim is None:
            raise QuantizationError(
                f"{name}: {after.in_features} channels read {before.out_features}, and the module "
                f"has no head_dim to tell which; exclude its output layer"
            )
        scale = grouped_mean(scale, before.out_features // head_dim, head_dim)
        _set_scale(after, repeated(scale, after.in_features // head_dim, head_dim))
    _multiply(before.weight, scale[:, None])
    if before.bias is not None:
        _multiply(before.bias, scale)
    _refit(before)
    del after.input_quantizer._pre_quant_scale


def _share(layers: list[Any]) -> None:
    if len(layers) > 1:
        scales = [_scale(layer) for layer in layers]
        mean = sum(scales[1:], scales[0]) / len(scales)
        for layer in layers:
            _set_scale(layer, mean)


def _set_scale(layer: Any, scale: Tensor) -> None:
    """Replace the scale; what the layer computes without rounding stays the same."""
    _multiply(layer.weight, _scale(layer).float() / scale.float())
    layer.input_quantizer.pre_quant_scale = scale
    _refit(layer)


def _multiply(parameter: Any, factor: Tensor) -> None:
    parameter.copy_(parameter.float() * factor.float())


def _refit(layer: Any) -> None:
    """The ranges of weights that were changed: the largest of each block."""
    quantizer = getattr(layer, "weight_quantizer", None)
    if quantizer is not None and quantizer.is_enabled:
        ranges = layer.weight.abs().reshape(-1, BLOCK).amax(1)
        quantizer.amax = ranges.reshape(quantizer.amax.shape).to(quantizer.amax.dtype)


@contextmanager
def unrounded(layers: Iterable[Any]) -> Iterator[None]:
    """These quantised layers compute with their weights as they are before rounding."""
    layers = list(layers)
    for layer in layers:
        layer.weight_quantizer.disable()
    try:
        yield
    finally:
        for layer in layers:
            layer.weight_quantizer.enable()
