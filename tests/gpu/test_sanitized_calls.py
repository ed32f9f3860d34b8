"""One small launch of every kernel, for compute-sanitizer: awkward sizes, nothing poisoned.

``python -m benchmarks.sanitize`` runs this file under memcheck, racecheck, initcheck and synccheck;
by itself it shows that every kernel is among the launches and that the calls work. Results are
checked elsewhere. Sizes are odd, so that every kernel has a tail to mask.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from sn72kernels import OPS, library
from sn72kernels.ops.attention import op as attention
from sn72kernels.ops.cascade_route import op as cascade_route
from sn72kernels.ops.classifier_head import op as classifier_head
from sn72kernels.ops.ensemble_vote import op as ensemble_vote
from sn72kernels.ops.layernorm_gelu import op as layernorm_gelu
from sn72kernels.ops.linear import op as linear
from sn72kernels.ops.preprocess import op as preprocess
from sn72kernels.ops.quantize import op as quantize
from sn72kernels.ops.quantize_blocks import op as quantize_blocks
from sn72kernels.ops.rope import op as rope
from sn72kernels.ops.rope import tables
from tests.gpu.support import DEVICE, seeded, sizes

HALF = torch.float16
WIDE = sizes(20001, 16500)


def normal(*shape: int, dtype: torch.dtype = HALF) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(0)).to(dtype).to(DEVICE)


def norm(rows: int, cols: int) -> None:
    x, w = normal(rows, cols), normal(cols)
    _, total, stats = layernorm_gelu.launch_forward(x, x, w, w, 1e-5, False, True, True)
    layernorm_gelu.launch_backward(x, x, total, stats, w, w, False)


def route(n: int) -> None:
    scores, lows = normal(n, dtype=torch.float32), normal(n, dtype=torch.float32)
    cascade_route.launch_route(scores, None, None, 0.2, 0.8, True, [8, 1 << 20])
    cascade_route.launch_route(scores, lows, lows + 1, 0.0, 0.0, False, [])


def head() -> None:
    x, w1, one = normal(5, 100), normal(37, 100), normal(37)
    rest = (None, None, 0.2, 0.8, True, 1e-5, False)
    classifier_head.launch_head(x, normal(100), normal(100), w1, one, one, normal(), *rest)


def vote() -> None:
    ensemble_vote.launch_vote([normal(1001)] * 3, normal(3, dtype=torch.float32).abs(), True)


def rotate() -> None:
    q = normal(2, 3, 17, 80)
    cos, sin = (t.to(DEVICE).expand(2, -1, -1) for t in tables.axial(3, 4, 80))
    rope.launch_rope(q, q[:, :1], cos, sin)
    rope.launch_rope_(q, normal(2, 1, 17, 80), cos, sin)


def attend() -> None:
    q = normal(1, 2, 37, 72)
    attention.launch_triton(q, q, q, 0.1)


def resize() -> None:
    images = torch.randint(
        0, 256, (2, *sizes((31, 43), (5, 6)), 3), generator=seeded(0), dtype=torch.uint8
    )
    rest = (
        list(sizes((13, 17), (4, 5))),
        (0.5,) * 3,
        (0.25,) * 3,
        "center_crop",
        1.0,
        "bicubic",
        HALF,
    )
    preprocess.launch_preprocess(images.to(DEVICE), *rest)


def codes(fp8: bool) -> None:
    for rows, cols in ((7, 1001), (2, WIDE)):
        x = normal(rows, cols)
        values, scale = quantize.launch_token(x, fp8)
        quantize.launch_static(x, scale, "token", fp8)
        quantize.launch_dequantize(values, scale, "token", HALF)


def blocks() -> None:
    x, overall = normal(7, 96), torch.ones((), device=DEVICE)
    fours = quantize_blocks.launch_quantize_nvfp4(x, overall)
    quantize_blocks.launch_dequantize_nvfp4(*fours, overall, HALF)
    eights = quantize_blocks.launch_quantize_mxfp8(x)
    quantize_blocks.launch_dequantize_mxfp8(*eights, HALF)


def product(fp8: bool) -> None:
    one, bias = torch.ones((), device=DEVICE), normal(37)
    for rows in (5, sizes(200, 70)):
        x, w = (normal(n, 100).to(torch.float8_e4m3fn if fp8 else torch.int8) for n in (rows, 37))
        linear.launch_linear(x, one, w, one, bias, "gelu", HALF)


CALLS: dict[str, Callable[[], None]] = {
    "layernorm_gelu": lambda: norm(5, 1000),
    "layernorm_gelu, wide": lambda: norm(sizes(3, 1), WIDE),
    "cascade_route": lambda: route(1001),
    "cascade_route, two launches": lambda: route(WIDE),
    "classifier_head": head,
    "ensemble_vote": vote,
    "rope": rotate,
    "attention": attend,
    "preprocess": resize,
    "quantize int8": lambda: codes(False),
    "quantize fp8": lambda: codes(True),
    "quantize_blocks": blocks,
    "linear int8": lambda: product(False),
    "linear fp8": lambda: product(True),
}

LAUNCHED: set[str] = set()


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of the kernels as they are launched."""
    plain = library.launch

    def launch(kernel: Any, *arguments: Any, **options: Any) -> None:
        LAUNCHED.add(kernel.fn.__name__)
        plain(kernel, *arguments, **options)

    monkeypatch.setattr(library, "launch", launch)


def test_calls() -> None:
    """Every kernel is among the launches."""
    for call in CALLS.values():
        call()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    assert kernels() == LAUNCHED


def kernels() -> set[str]:
    """Names of all kernels of the library."""
    found = set()
    for op in set(OPS.values()):
        module = importlib.import_module(f"sn72kernels.ops.{op}.kernel")
        found |= {
            name
            for name, value in vars(module).items()
            if hasattr(value, "fn")
            and value.fn.__module__ == module.__name__
            and not name.startswith("_")
        }
    return found
