"""Small arguments for every registered operator, and other ways to lay them out in memory."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from sn72kernels import OPS, library

FP8, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu


def specs() -> dict[str, library.OpSpec]:
    """Every operator of the package by its registered name."""
    for folder in OPS.values():
        importlib.import_module(f"sn72kernels.ops.{folder}.op")
    return library.registered()


def examples() -> dict[str, list[tuple[Any, ...]]]:
    """Arguments of every operator by its registered name: all kernels, options on and off.

    Sizes are odd wherever the op allows it, so that every kernel has a tail to mask.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    def unit(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator) * 0.9 + 0.05

    def int8(*shape: int) -> torch.Tensor:
        return torch.randint(-99, 99, shape, generator=generator).to(torch.int8)

    def stats(rows: int) -> torch.Tensor:
        return torch.stack((normal(rows, dtype=torch.float32), unit(rows) + 0.5))

    def head(dtype: torch.dtype, norm: bool, *tail: Any) -> tuple[Any, ...]:
        vector = normal(43, dtype=dtype) if norm else None
        weights = (normal(37, 43, dtype=dtype), normal(37, dtype=dtype), normal(37, dtype=dtype))
        rest = (normal(dtype=dtype), *tail, norm, 1e-5, not norm)
        return (normal(5, 43, dtype=dtype), vector, vector, *weights, *rest)

    x, w, wide = normal(5, 67), normal(67), normal(3, 8195, dtype=torch.float32)
    long = normal(8195, dtype=torch.float32)
    q, k, v = normal(3, 3, 37, 72), normal(3, 3, 41, 72), normal(3, 3, 41, 72)
    turned, shared = normal(3, 3, 17, 10), normal(3, 1, 17, 10)
    tables = (unit(3, 12, 10), unit(3, 12, 10))
    images = torch.randint(0, 256, (3, 3, 4, 3), generator=generator, dtype=torch.uint8)
    colours = ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4])
    blocks, one = normal(3, 96), torch.ones(())
    fours = torch.randint(0, 256, (3, 48), generator=generator).to(torch.uint8)
    eights = torch.randint(120, 130, (3, 3), generator=generator).to(torch.uint8)
    per_sample = (unit(70), unit(70))
    return {
        "attention": [(q, k, v, 0.1, "auto"), (*(t.bfloat16() for t in (q, k, v)), 0.1, "auto")],
        "cascade_route": [
            (unit(70), None, None, 0.3, 0.7, False, [8, 70]),
            (normal(70), *per_sample, 0.0, 0.0, True, []),
            (unit(16390), None, None, 0.3, 0.7, False, [1 << 15]),
        ],
        "classifier_head": [
            head(torch.float16, True, None, None, 0.3, 0.7),
            head(torch.float32, False, unit(5), unit(5), 0.0, 0.0),
        ],
        "dequantize": [
            (int8(5, 67), unit(67), "channel", torch.float16),
            (normal(5, 67).to(FP8), unit(5), "token", torch.float32),
        ],
        "dequantize_mxfp8": [(normal(3, 96).to(FP8), eights.view(E8M0), torch.float16)],
        "dequantize_nvfp4": [(fours, unit(3, 6).to(FP8), one, torch.float16)],
        "ensemble_vote": [([unit(70), unit(70).half(), unit(70)], unit(3), False)],
        "layernorm_gelu_backward": [
            (x, normal(5, 67), normal(5, 67), stats(5), w, normal(67), False),
            (wide, wide + 1, wide * 2, stats(3), long, long + 1, True),
        ],
        "layernorm_gelu_forward": [
            (x, normal(5, 67), w, normal(67), 1e-5, False, True, True),
            (normal(3, 16390), None, None, normal(16390), 1e-5, True, False, False),
        ],
        "linear": [
            (int8(5, 67), unit(5), int8(35, 67), unit(35), normal(35), "gelu", torch.float16),
            (x.to(FP8), one, normal(35, 67).to(FP8), one, None, "none", torch.bfloat16),
        ],
        "preprocess": [(images, [4, 6], *colours, "pad", 1.0, "bilinear", torch.float16)],
        "quantize_mxfp8": [(blocks,)],
        "quantize_nvfp4": [(blocks, one)],
        "quantize_static": [
            (x, unit(67), "channel", False),
            (x.float(), unit(5), "token", True),
            (x, one, "tensor", False),
        ],
        "quantize_token": [(x, False), (normal(3, 16390), True)],
        "rope": [(turned, shared, *tables)],
        "rope_": [(turned.float(), shared.float(), *tables)],
    }


# --- other ways to lie in memory -----------------------------------------------------------


def misaligned(x: torch.Tensor) -> torch.Tensor:
    """The same numbers one element after a 16-byte border."""
    memory = torch.zeros(x.numel() + 1, dtype=x.dtype, device=x.device)
    view = memory[1:].view(x.shape)
    view.copy_(x)
    assert x.dim() == 0 or view.data_ptr() % 16
    return view


def apart(x: torch.Tensor) -> torch.Tensor:
    """The same numbers with others between the rows, or between the elements of a vector."""
    if x.dim() == 0:
        return x
    step = torch.stack((x, torch.ones_like(x)), -1) if x.dim() == 1 else torch.cat((x, x), -1)
    return step[:, 0] if x.dim() == 1 else step[..., : x.shape[-1]]


def turned(x: torch.Tensor) -> torch.Tensor:
    """The same numbers with the last two dimensions exchanged in memory."""
    return x if x.dim() < 2 else x.transpose(-1, -2).contiguous().transpose(-1, -2)


def tokens_first(x: torch.Tensor) -> torch.Tensor:
    """The same numbers with the first two dimensions exchanged in memory."""
    return x if x.dim() < 2 else x.transpose(0, 1).contiguous().transpose(0, 1)


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "misaligned": misaligned,
    "apart": apart,
    "turned": turned,
    "tokens first": tokens_first,
}


def each_tensor(change: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """``value``, a tree of lists and tuples, with every tensor changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)(each_tensor(change, part) for part in value)
    return value


def listed(value: Any) -> list[torch.Tensor]:
    """The tensors of a tree, those of one byte as bytes, which can be compared."""
    found: list[torch.Tensor] = []

    def take(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor)
        return tensor

    each_tensor(take, value)
    return found
