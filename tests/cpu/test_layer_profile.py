"""Layer times are the library's own, and a trace is what its viewers read."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sn72engine import cli
from sn72engine.builder import build
from sn72engine.cascade import Cascade
from sn72engine.cascade.report import StageCounts
from sn72engine.cascade.spec import CascadeSpec, StageSpec
from sn72engine.engine import Engine
from sn72engine.errors import InputError, OptionError, SessionError
from sn72engine.events import BatchEvent, CallEvent
from sn72engine.introspection import layers_of
from sn72engine.introspection.layer import LayerRun, TimedRun
from sn72engine.layer_profile import ProfileOptions, _medians, profile
from sn72engine.spec import BuildOptions, RuntimeOptions, ShapeRange
from sn72engine.store import Store
from sn72engine.trace import Span, TraceRecorder, write_trace
from tests import tiny_models

ONE = RuntimeOptions(threads=1)

#: Stages of one group, and the seconds that each took of a call of 0.01.
SIDE_BY_SIDE = (("a", 0.008), ("b", 0.007), ("c", 0.002))


@pytest.fixture(scope="module", params=["onnxruntime", "openvino"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp("profile")
    model = tiny_models.transformer(folder / "m.onnx")
    options = BuildOptions(backend=request.param, batch=ShapeRange(1, 2, 4))
    return build(model, options, store=Store(folder / "store"))


def checked_trace(path: Path) -> list[dict[str, Any]]:
    """The spans of a trace file, after what the Trace Event Format asks for was checked."""
    document = json.loads(path.read_text())
    events = document["traceEvents"]
    for event in events:
        assert isinstance(event["name"], str)
        assert event["ph"] in ("X", "M")
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "thread_name")
            assert isinstance(event["args"]["name"], str)
        else:
            assert isinstance(event["cat"], str)
            assert event["ts"] >= 0
            assert event["dur"] >= 0
    spans = [event for event in events if event["ph"] == "X"]
    named = {event["tid"] for event in events if event["name"] == "thread_name"}
    assert {span["tid"] for span in spans} <= named
    for track in named:
        open_ends: list[float] = []
        for span in (span for span in spans if span["tid"] == track):
            while open_ends and open_ends[-1] <= span["ts"] + 2e-3:
                open_ends.pop()
            end = span["ts"] + span["dur"]
            assert not open_ends or end <= open_ends[-1] + 2e-3  # in it, or apart from it
            open_ends.append(end)
    return spans


def test_layers_are_those_that_the_library_runs(engine: Engine, tmp_path: Path) -> None:
    found = profile(engine, ProfileOptions(batch=2, warmup=1, repeats=5), runtime=ONE)
    assert found.runs == 5
    assert found.batch == 2
    assert sum(layer.share for layer in found.layers) == pytest.approx(1)
    assert sum(found.by_op.values()) == pytest.approx(found.layers_ms)
    assert found.layers_ms > 0
    ops = {layer.op.rpartition(".")[2] for layer in layers_of(engine)}
    kinds = {"MatMul", "FusedMatMul", "Softmax"} if "MatMul" in ops else {"FullyConnected"}
    assert kinds <= set(found.by_op)
    assert [layer.ms for layer in found.top(3)] == sorted(
        (layer.ms for layer in found.layers), reverse=True
    )[:3]
    assert "medians of 5 runs" in found.render()
    assert "more)" in found.render(2)
    json.dumps(found.to_dict())
    spans = checked_trace(found.save_trace(tmp_path / "t.json"))
    assert len(spans) == 1 + len(found.last.layers)
    assert spans[0]["cat"] == "call"
    assert found.save_plot(tmp_path / "p.png", 4).read_bytes().startswith(b"\x89PNG")


def test_profile_refuses_what_does_not_fit(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"batch=9 lies outside the engine's range, 1\.\.4"):
        profile(engine, ProfileOptions(batch=9))
    with pytest.raises(InputError, match="'pixel_values' is missing; given: x"):
        profile(engine, inputs={"x": np.zeros(1)})
    given = {"pixel_values": np.zeros((2, 3, 16, 16), np.float32)}
    with pytest.raises(InputError, match=r"shape \(2, 3, 16, 16\), and batch=1"):
        profile(engine, inputs=given)
    assert profile(engine, ProfileOptions(batch=2, warmup=0, repeats=1), inputs=given).batch == 2
    with pytest.raises(OptionError, match="repeats=0"):
        ProfileOptions(repeats=0)


def test_a_gpu_engine_without_the_gpu_is_refused(tmp_path: Path) -> None:
    options = BuildOptions(
        backend="tensorrt_rtx", target="sm_75", precision="fp16", batch=ShapeRange(1, 1, 1)
    )
    model = tiny_models.convolution(tmp_path / "m.onnx")
    engine = build(model, options, store=Store(tmp_path / "store"))
    with pytest.raises(SessionError, match="sm_75"):
        profile(engine)


def test_medians_over_runs_and_sums_within_one(engine: Engine) -> None:
    def run(*times: float) -> TimedRun:
        layers = [LayerRun("a", "Conv", t) for t in times] + [LayerRun("b", "Add", 10.0)]
        return TimedRun(tuple(layers), 100.0)

    first, second = _medians(engine, [run(1.0, 2.0), run(500.0), run(4.0, 1.0)])
    assert (first.name, first.op, first.ms) == ("a", "Conv", 0.005)
    assert (second.name, second.ms) == ("b", 0.010)
    assert first.share == pytest.approx(1 / 3)


def test_a_cascade_shows_stages_decoding_and_waiting(tmp_path: Path) -> None:
    def stage(images: Sequence[Any]) -> np.ndarray:
        time.sleep(0.002)
        return np.full(len(images), 0.5, np.float32)

    recorder = TraceRecorder()
    spec = CascadeSpec((StageSpec("small", low=0.2, high=0.8), StageSpec("large")))
    images = np.zeros((3, 8, 8, 3), np.uint8)
    with Cascade(spec, {"small": stage, "large": stage}, observe=recorder) as cascade:
        for _ in range(2):
            cascade(images)
    spans = checked_trace(recorder.save(tmp_path / "c.json"))
    assert [span["name"] for span in spans if span["cat"] == "cascade"] == ["call of 3"] * 2
    stages = [span for span in spans if span["cat"] == "stage"]
    assert [span["name"] for span in stages] == ["small", "large"] * 2
    assert all(span["dur"] >= 2000 for span in stages)
    assert stages[0]["args"]["escalated"] == 3
    assert {span["name"] for span in spans if span["cat"] == "decode"} >= {"decode for small"}
    assert "wait" in {span["cat"] for span in spans}


def test_stages_side_by_side_keep_their_times_in_a_trace(tmp_path: Path) -> None:
    recorder = TraceRecorder()
    counts = [StageCounts(seconds=s, decode_seconds=0.001) for _, s in SIDE_BY_SIDE]
    recorder(CallEvent(0.01, (), tuple(name for name, _ in SIDE_BY_SIDE), counts))
    spans = checked_trace(recorder.save(tmp_path / "t.json"))
    stages = [span for span in spans if span["cat"] == "stage"]
    found = {span["name"]: span["dur"] for span in stages}
    assert found == pytest.approx({name: s * 1e6 for name, s in SIDE_BY_SIDE}, abs=0.01)
    assert len({span["tid"] for span in stages}) == 3


def test_the_recorder_keeps_no_more_than_its_limit() -> None:
    recorder = TraceRecorder(limit=2)
    for _ in range(5):
        recorder(BatchEvent(size=4, seconds=0.01, waits=(0.0,) * 4, waiting=0))
    assert len(recorder.spans) == 2
    assert recorder.dropped == 3
    assert recorder.spans[0].name == "batch of 4"


@given(
    st.lists(
        st.tuples(st.floats(0, 1e6), st.floats(0, 1e3), st.sampled_from(["a", "b"])), max_size=8
    )
)
def test_any_spans_make_a_valid_file(
    tmp_path_factory: pytest.TempPathFactory, parts: list[tuple[float, float, str]]
) -> None:
    # Laid one after the other, so that they do not overlap within a track.
    spans, at = [], 5e6
    for gap, duration, track in parts:
        at += gap
        spans.append(Span("x", "kind", at, duration, track))
        at += duration
    path = write_trace(tmp_path_factory.mktemp("trace") / "t.json", spans)
    found = checked_trace(path)
    assert len(found) == len(spans)
    if spans:
        assert min(span["ts"] for span in found) == 0


def test_the_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SN72_CACHE_DIR", str(tmp_path / "cache"))
    model = tiny_models.convolution(tmp_path / "m.onnx")
    engine = build(model, BuildOptions(batch=ShapeRange(1, 2, 4)))
    key, picture, trace = engine.manifest.key, tmp_path / "p.png", tmp_path / "t.json"
    words = ["profile", key, "--batch", "2", "--repeats", "3", "--plot", picture, "--trace", trace]
    assert cli.main([*map(str, words), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["runs"] == 3
    assert picture.exists()
    checked_trace(trace)
    assert cli.main(["inspect", key, "--layers"]) == 0
    assert "ONNX Runtime's optimised graph" in capsys.readouterr().out
    assert cli.main(["diff", key, str(model.path)]) == 0
    shown = capsys.readouterr().out
    assert cli.main(["inspect", key, "--diff", str(model.path)]) == 0
    assert capsys.readouterr().out == shown
    assert "kind: engine -> onnx" in shown

    from PIL import Image

    photos = tmp_path / "photos"
    photos.mkdir()
    for index in range(3):
        Image.new("RGB", (20, 20), (index * 60,) * 3).save(photos / f"{index}.png")
    road = tmp_path / "road.yaml"
    stage = {"name": "only", "engine": str(engine.folder), "score": "top1"}
    road.write_text(json.dumps({"stages": [{**stage, "low": 0.0, "high": 0.0}]}))
    assert cli.main(["profile", str(road), "--data", str(photos), "--trace", str(trace)]) == 0
    assert "only" in capsys.readouterr().out
    assert {"cascade", "stage"} <= {span["cat"] for span in checked_trace(trace)}
    assert cli.main(["profile", str(road)]) == 2
    assert cli.main(["profile", key, "--data", str(photos)]) == 2
