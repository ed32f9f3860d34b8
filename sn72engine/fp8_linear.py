"""Linear layers in 8-bit floating point, in operators that torch.export and inductor know.

``torch._scaled_mm`` becomes one of inductor's matrix product templates or cuBLASLt on a card (sm_89
and newer); the CPU has a slow version, enough to check the numbers. It wants both dimensions to be
multiples of 16.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sn72engine import _deps

if TYPE_CHECKING:
    from torch import nn

_MULTIPLE = 16
_LARGEST = 448.0  # of e4m3


def quantise(module: nn.Module, exact: nn.Module) -> tuple[str, ...]:
    """Replace the linear layers of ``module`` in place; returns their names.

    Weights are quantised once, per output; activations when they come, per token, each with the
    scale that makes its largest value 448. The last linear layer, usually the head, stays.

    Args:
        module: in the type of the other layers.
        exact: the same module with weights that have not been rounded.
    """
    torch = _deps.require("torch", purpose="quantise linear layers")
    linears = [n for n, part in exact.named_modules() if type(part) is torch.nn.Linear]
    chosen = tuple(name for name in linears[:-1] if _fits(exact.get_submodule(name)))
    for name in chosen:
        parent, _, child = name.rpartition(".")
        layer = module.get_submodule(name)
        setattr(
            module.get_submodule(parent), child, _layer(torch, layer, exact.get_submodule(name))
        )
    return chosen


def _fits(layer: Any) -> bool:
    return not (layer.in_features % _MULTIPLE or layer.out_features % _MULTIPLE)


def _layer(torch: Any, layer: Any, exact: Any) -> Any:
    def scaled(values: Any) -> tuple[Any, Any]:
        """e4m3 codes of rows, and the scale of each, shape (rows, 1)."""
        values = values.float()
        scale = values.abs().amax(1, keepdim=True).clamp(min=1e-12) / _LARGEST
        return (values / scale).to(torch.float8_e4m3fn), scale

    class Fp8Linear(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            codes, scale = scaled(exact.weight.detach())
            self.register_buffer("codes", codes)
            self.register_buffer("scale", scale.reshape(1, -1).contiguous())
            self.bias = layer.bias

        def forward(self, x: Any) -> Any:
            codes, scale = scaled(x.reshape(-1, x.shape[-1]))
            # The codes lie row by row, so that their transpose is what cuBLASLt asks for. Fast
            # accumulation costs far less than e4m3 does, and Hopper is much slower without it.
            y = torch._scaled_mm(
                codes,
                self.codes.t(),
                scale,
                self.scale,
                out_dtype=torch.bfloat16,
                use_fast_accum=True,
            )
            if self.bias is not None:
                y = y + self.bias
            return y.reshape(*x.shape[:-1], -1)

    return Fp8Linear()
