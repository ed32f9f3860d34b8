from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch

from sn72engine import nvtx
from sn72engine.cascade import Cascade
from sn72engine.cascade.spec import CascadeSpec, StageSpec


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    nvtx._nvtx.cache_clear()
    yield
    nvtx._nvtx.cache_clear()


def run() -> None:
    spec = CascadeSpec((StageSpec("small"), StageSpec("large")))
    with Cascade(spec, {"small": lambda images: [0.5], "large": lambda images: [0.9]}) as cascade:
        cascade([torch.zeros(2, 2, 3, dtype=torch.uint8).numpy()])


def test_switched_off_a_range_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SN72_NVTX", raising=False)
    assert nvtx.span("a") is nvtx.span("b")
    with nvtx.span("a"), nvtx.span("b"):
        pass


def test_ranges_nest_and_close_when_a_stage_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    marks: list[str] = []
    monkeypatch.setenv("SN72_NVTX", "1")
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", marks.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: marks.append("end"))
    run()
    stage = ["decode", "end", "{}", "end", "route", "end"]
    assert marks[2:] == [m.format("small") for m in stage] + [m.format("large") for m in stage]
    del marks[:]
    with pytest.raises(ZeroDivisionError), nvtx.span("a"):
        raise ZeroDivisionError
    assert marks == ["a", "end"]


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has NVTX")
def test_a_build_without_nvtx_says_so_once_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SN72_NVTX", "1")
    with caplog.at_level(logging.WARNING):
        run()
    assert [r.message for r in caplog.records if "CUDA build of torch" in r.message] == [
        caplog.records[0].message
    ]
