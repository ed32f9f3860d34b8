"""Inductor engines on a card: as accurate as eager PyTorch, and fit for a CUDA graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sn72engine import BuildOptions, ProgramOptions, ShapeRange, Store, build, export_program, load
from sn72engine.engine import Engine
from sn72engine.program import ProgramPrecision
from tests import tiny_modules

pytestmark = pytest.mark.gpu

COSINE = {"fp32": 0.9999, "bf16": 0.999, "fp8": 0.99}


def made(folder: Path, precision: ProgramPrecision, effort: int = 0) -> Engine:
    if precision == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this card has no 8-bit floating point")
    program = export_program(
        tiny_modules.transformer(),
        ProgramOptions(precision=precision, max_batch=64),
        folder / "vit.pt2",
        example=torch.zeros(1, 3, 16, 16),
    )
    options = BuildOptions(
        backend="inductor",
        target="cuda",
        precision=precision,
        batch=ShapeRange(1, 8, 64),
        optimization_level=effort,
    )
    return build(program, options, store=Store(folder / "store"))


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0))


@pytest.mark.parametrize("effort", [0, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_an_engine_answers_as_eager_pytorch_does(
    tmp_path: Path, precision: ProgramPrecision, effort: int
) -> None:
    module = tiny_modules.transformer().cuda()
    with load(made(tmp_path, precision, effort)) as session:
        assert session.manifest.target == "sm_{}{}".format(*torch.cuda.get_device_capability())
        for batch in (1, 7, 64):
            x = torch.randn(batch, 3, 16, 16, device="cuda")
            with torch.no_grad():
                exact = module(x)
            y = session(x)
            assert y.device == x.device
            assert y.dtype == torch.float32
            assert cosine(y, exact) > COSINE[precision]
            host = session(x.cpu().numpy())
            np.testing.assert_array_equal(host, y.cpu().numpy())


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_a_bound_engine_is_captured_and_replayed(
    tmp_path: Path, precision: ProgramPrecision
) -> None:
    with load(made(tmp_path, precision)) as session:
        x = torch.randn(8, 3, 16, 16, device="cuda")
        bound = session.bind({"pixel_values": x})
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(2):
                bound()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            bound()
        for seed in range(20):
            torch.manual_seed(seed)
            x.copy_(torch.randn_like(x))
            bound.outputs["logits"].fill_(float("nan"))
            graph.replay()
            torch.cuda.synchronize()
            torch.testing.assert_close(bound.outputs["logits"], session(x), rtol=0, atol=0)
