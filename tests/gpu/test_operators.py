"""Every operator on the device: PyTorch's own checks of schema, fake function and tracing.

The arguments are those that the op is tuned with, at a small size. The launcher is also compared
with the reference of the same call.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from sn72kernels import OPS, library, tune
from sn72kernels.ops.layernorm_gelu import op as layernorm_gelu
from sn72kernels.ops.quantize import op as quantize
from sn72kernels.ops.quantize_blocks import op as quantize_blocks
from sn72kernels.ops.rope import tables
from sn72kernels.testing import poisoned
from tests.gpu.support import DEVICE, seeded, sizes

ROWS = sizes(48, 6)


@pytest.mark.parametrize("folder", sorted(set(OPS.values())))
def test_launcher_agrees_with_the_reference(folder: str) -> None:
    """On the device, both of them."""
    cases = tune.cases(folder, DEVICE, rows=ROWS)
    assert cases
    for case in cases[: sizes(len(cases), 1)]:
        wanted = case.reference(*case.args)
        with poisoned():
            assert tune.agrees(case, wanted), case.tunable.name


def half(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(0)).half().to(DEVICE)


def examples() -> dict[str, tuple[Any, ...]]:
    """Arguments of every operator, by its registered name."""
    x, w = half(4, 96), half(96)
    float32 = torch.rand(50, generator=seeded(1)).to(DEVICE)
    one = torch.ones((), device=DEVICE)
    codes, scale = quantize.launch_token(x, False)
    fours = quantize_blocks.launch_quantize_nvfp4(x, one)
    eights = quantize_blocks.launch_quantize_mxfp8(x)
    _, total, stats = layernorm_gelu.launch_forward(x, x, w, w, 1e-5, False, True, True)
    q, k = half(1, 2, 17, 64), half(1, 1, 17, 64)
    cos, sin = (t.to(DEVICE)[None] for t in tables.axial(3, 4, 64))
    images = torch.randint(0, 256, (2, 20, 30, 3), generator=seeded(2), dtype=torch.uint8)
    mean, std = [0.5] * 3, [0.25] * 3
    return {
        "attention": (q, q, q, 0.125, "auto"),
        "cascade_route": (float32, None, None, 0.2, 0.8, True, [8, 64]),
        "classifier_head": (
            x, w, w, half(16, 96), half(16), half(16), half(), None, None, 0.2, 0.8, True, 1e-5,
            False,
        ),
        "dequantize": (codes, scale, "token", torch.float16),
        "dequantize_mxfp8": (*eights, torch.float16),
        "dequantize_nvfp4": (*fours, one, torch.float16),
        "ensemble_vote": ([float32, float32], float32[:2].clone(), False),
        "layernorm_gelu_backward": (x, x, total, stats, w, w, False),
        "layernorm_gelu_forward": (x, None, w, w, 1e-5, False, False, True),
        "linear": (codes, scale, codes.clone(), scale.clone(), None, "gelu", torch.float16),
        "preprocess": (
            images.to(DEVICE), [8, 8], mean, std, "center_crop", 1.0, "bicubic", torch.float16,
        ),
        "quantize_mxfp8": (x,),
        "quantize_nvfp4": (x, one),
        "quantize_static": (x, one, "tensor", False),
        "quantize_token": (x, False),
        "rope": (q, k, cos, sin),
        "rope_": (q.clone(), k.clone(), cos, sin),
    }  # fmt: skip


FP8 = {"quantize_mxfp8", "quantize_nvfp4", "dequantize_mxfp8", "dequantize_nvfp4"}


def test_opcheck_of_every_operator() -> None:
    found = examples()
    modules = [importlib.import_module(f"sn72kernels.ops.{each}.op") for each in OPS.values()]
    specs = [value for module in modules for value in vars(module).values()]
    assert set(found) == {spec.name for spec in specs if isinstance(spec, library.OpSpec)}
    for name, arguments in found.items():
        # The check of the schema multiplies what it gets, which no fp8 tensor can be.
        utils = ("test_faketensor",) if name in FP8 else ("test_schema", "test_faketensor")
        operator = getattr(torch.ops.sn72, name).default
        checks = torch.library.opcheck(operator, arguments, test_utils=utils)
        assert set(checks.values()) == {"SUCCESS"}, (name, checks)
