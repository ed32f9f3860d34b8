"""AWQ's scales end up in the layers before, and change nothing but the rounding."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sn72engine import _deps
from sn72engine.checkpoint_layout import BLOCK
from sn72engine.checkpoint_scales import grouped_mean, repeated, settle, unrounded
from sn72engine.errors import QuantizationError
from sn72engine.quiet import quiet

if not _deps.available("modelopt"):
    pytest.skip("modelopt is not installed; extra 'quantize'", allow_module_level=True)

WIDTH, HEAD = 128, 32
NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Block(torch.nn.Module):
    """Grouped-query attention and a gated MLP, without normalisation."""

    def __init__(self, value_heads: int = 2) -> None:
        super().__init__()
        self.head_dim = HEAD
        values, wide = value_heads * HEAD, 2 * WIDTH
        outputs = (WIDTH, values, values, WIDTH, wide, wide, WIDTH)
        for name, out in zip(NAMES, outputs, strict=True):
            inputs = wide if name == "down_proj" else WIDTH
            self.add_module(name, torch.nn.Linear(inputs, out, bias=name in ("v_proj", "o_proj")))
        with torch.no_grad():
            for name in NAMES:
                getattr(self, name).weight.normal_(std=0.1)
            # Channels that differ, as they do in models that have learned something.
            self.v_proj.weight.mul_(torch.exp(torch.randn(values, 1)))
            self.v_proj.bias.normal_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def heads(name: str) -> torch.Tensor:
            return getattr(self, name)(x).unflatten(-1, (-1, HEAD)).transpose(-2, -3)

        mixed = torch.nn.functional.scaled_dot_product_attention(
            heads("q_proj"), heads("k_proj"), heads("v_proj"), enable_gqa=True
        )
        x = x + self.o_proj(mixed.transpose(-2, -3).flatten(-2))
        return self.down_proj(torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


def data() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    spread = torch.linspace(-2, 2, WIDTH).exp()
    return [torch.randn(2, 24, WIDTH, generator=generator) * spread for _ in range(3)]


@functools.cache
def _quantised(value_heads: int) -> Any:
    with quiet("modelopt"):
        mtq = _deps.require("modelopt", purpose="test", submodule="torch.quantization")
        made = original(value_heads)
        mtq.quantize(made, copy.deepcopy(mtq.INT4_AWQ_CFG), lambda m: [m(x) for x in data()])
    return made


def original(value_heads: int = 2) -> Block:
    torch.manual_seed(0)
    return Block(value_heads).eval()


def quantised(value_heads: int = 2) -> Any:
    """The same block, quantised by ModelOpt: blocks of 128 inputs, AWQ."""
    return copy.deepcopy(_quantised(value_heads))


def outputs(block: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return torch.stack([block(x) for x in data()])


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("value_heads", [2, 4], ids=["grouped", "one to one"])
def test_nothing_but_the_rounding_changes(value_heads: int) -> None:
    block, made = original(value_heads), quantised(value_heads)
    rounded = distance(outputs(made), outputs(block))
    settle(made)
    layers = [getattr(made, name) for name in NAMES]
    with unrounded(layers):
        assert distance(outputs(made), outputs(block)) < 1e-5
    # With the rounding on again it is as near as it was with a scale per channel.
    assert 0.01 < distance(outputs(made), outputs(block)) < 1.2 * rounded
    for name in ("o_proj", "down_proj"):
        assert getattr(made, name).input_quantizer.pre_quant_scale is None
    for names in (NAMES[:3], NAMES[4:6]):
        first, *rest = (getattr(made, name).input_quantizer.pre_quant_scale for name in names)
        assert first.std() > 0.01
        assert all(torch.equal(first, other) for other in rest)
    for layer in layers:
        largest = layer.weight.abs().unflatten(1, (-1, BLOCK)).amax(2)
        assert torch.equal(layer.weight_quantizer.amax.flatten(), largest.flatten())


def test_the_mean_over_a_group_keeps_what_the_scale_is_for() -> None:
    """The output of o_proj is nearer than if it had no scale."""
    block = original()
    read: list[torch.Tensor] = []
    handle = block.o_proj.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    outputs(block)
    handle.remove()
    x, weight = torch.cat(read), block.o_proj.weight.detach()

    def error(scale: torch.Tensor) -> float:
        scaled = (weight / scale).unflatten(1, (-1, BLOCK))
        step = scaled.abs().amax(2, keepdim=True) / 7
        got = ((scaled / step).round() * step).flatten(1) * scale
        return distance(x @ got.T, x @ weight.T)

    scale = quantised().o_proj.input_quantizer.pre_quant_scale
    shared = repeated(grouped_mean(scale, 2, HEAD), 4, HEAD)
    assert error(shared) < 0.95 * error(torch.ones(WIDTH))


def test_layers_left_in_float_take_a_scale_too() -> None:
    block, made = original(), quantised()
    made.v_proj.weight_quantizer.disable()
    made.up_proj.weight_quantizer.disable()
    ranges = made.v_proj.weight_quantizer.amax.clone()
    settle(made)
    with unrounded(getattr(made, name) for name in ("q_proj", "k_proj", "o_proj", "down_proj")):
        made.gate_proj.weight_quantizer.disable()
        assert distance(outputs(made), outputs(block)) < 1e-5
    assert torch.equal(made.v_proj.weight_quantizer.amax, ranges)


def test_ranges_follow_what_was_folded_in() -> None:
    """Also where no sharing with other layers renews them."""
    made = quantised()
    for layer in (made.q_proj, made.k_proj):
        del layer.input_quantizer._pre_quant_scale
    settle(made)
    largest = made.v_proj.weight.abs().unflatten(1, (-1, BLOCK)).amax(2)
    assert torch.equal(made.v_proj.weight_quantizer.amax.flatten(), largest.flatten())


def test_groups_of_unknown_heads_are_an_error() -> None:
    made = quantised()
    del made.head_dim
    with pytest.raises(QuantizationError, match="128 channels read 64, and the module has no head"):
        settle(made)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 8))
def test_heads_are_in_the_order_of_transformers(heads: int, group: int, head_dim: int) -> None:
    models = pytest.importorskip("transformers.models.qwen3_vl.modeling_qwen3_vl")
    channels = torch.arange(heads * head_dim).float()
    wanted = models.repeat_kv(channels.reshape(1, heads, 1, head_dim), group).flatten()
    got = repeated(channels, heads * group, head_dim)
    assert torch.equal(got, wanted)
    assert torch.equal(grouped_mean(got, heads, head_dim), channels)
