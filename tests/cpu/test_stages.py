from __future__ import annotations

import base64
import contextlib
import json
import logging
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from sn72engine import _deps
from sn72engine.builder import build
from sn72engine.cascade import Cascade
from sn72engine.cascade.opening import open_stages
from sn72engine.cascade.result import Status
from sn72engine.cascade.spec import CascadeSpec, StageSpec
from sn72engine.engine import Engine
from sn72engine.errors import InputError, MissingDependencyError, OptionError, SessionError
from sn72engine.miner import RoadworkDetector
from sn72engine.preprocessing import preprocess
from sn72engine.session import Session
from sn72engine.spec import BuildOptions, Preprocess, ShapeRange
from sn72engine.stages.base import Stage
from sn72engine.stages.engine import EngineStage
from sn72engine.stages.function import FunctionStage
from sn72engine.stages.ocr import OcrOptions, OcrStage, keyword_confidence, keyword_pattern, squeeze
from sn72engine.stages.scoring import to_scores
from sn72engine.stages.vlm import VlmOptions, VlmStage, parse_answer
from sn72engine.store import Store
from tests import tiny_models


def pictures(count: int, size: tuple[int, int] = (40, 30)) -> list[np.ndarray]:
    rng = np.random.default_rng(count)
    return [rng.integers(0, 256, (*size, 3), np.uint8) for _ in range(count)]


# ---------------------------------------------------------------- scores

logits = st.lists(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=3, max_size=3),
    min_size=1,
    max_size=8,
)


@settings(max_examples=150)
@given(logits)
def test_softmax_and_top1_against_the_formula(rows: list[list[float]]) -> None:
    soft = to_scores(np.array(rows), "softmax", positive=2)
    top = to_scores(np.array(rows), "top1")
    assert top.labels is not None
    for i, row in enumerate(rows):
        powers = [math.exp(x - max(row)) for x in row]
        assert soft.probabilities[i] == pytest.approx(powers[2] / sum(powers), rel=1e-5, abs=1e-37)
        assert top.probabilities[i] == pytest.approx(max(powers) / sum(powers), rel=1e-5)
        assert top.labels[i] == row.index(max(row))
    for scores in (soft, top):
        assert ((scores.probabilities >= 0) & (scores.probabilities <= 1)).all()


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_single_column_scores(shape: tuple[int, ...]) -> None:
    values = np.array([-2.0, 0.0, 2.0, math.nan]).reshape(shape)
    expected = [1 / (1 + math.exp(2)), 0.5, 1 / (1 + math.exp(-2)), math.nan]
    assert to_scores(values, "sigmoid").probabilities == pytest.approx(expected, nan_ok=True)
    np.testing.assert_array_equal(
        to_scores(values, "probability").probabilities, values.ravel().astype(np.float32)
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_with_a_bad_logit_is_not_scored(bad: float) -> None:
    rows = np.array([[1.0, 2.0], [bad, 0.0], [0.0, 1.0]])
    for score in ("softmax", "top1"):
        assert np.isnan(to_scores(rows, score).probabilities).tolist() == [False, True, False]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shape", "score", "positive", "message"),
    [
        ((3, 2), "sigmoid", 1, r"needs outputs of shape \(n,\) or \(n, 1\), got \(3, 2\)"),
        ((3, 2, 1), "probability", 1, "got"),
        ((3,), "softmax", 1, "two classes or more"),
        ((3, 1), "top1", 1, "two classes or more"),
        ((3, 2), "softmax", 2, "positive=2 is not a class of outputs with 2 classes"),
    ],
)
def test_outputs_that_do_not_fit(
    shape: tuple[int, ...], score: Any, positive: int, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        to_scores(np.zeros(shape), score, positive=positive)


# ---------------------------------------------------------------- functions


def test_a_function_gets_images_or_a_tensor() -> None:
    seen: list[Any] = []

    def call(inputs: Any) -> np.ndarray:
        seen.append(inputs)
        return np.zeros(len(inputs))

    images = pictures(3)
    FunctionStage(call).score(images)
    assert seen[0] is images
    spec = Preprocess(height=16, width=8)
    stage = FunctionStage(call, transform=spec, score="sigmoid")
    assert stage.score(images).probabilities.tolist() == [0.5] * 3
    np.testing.assert_array_equal(seen[1], preprocess(images, spec))
    assert stage.needs == (16, 8)
    assert FunctionStage(call, needs=(5, 6)).needs == (5, 6)
    assert isinstance(stage, Stage)


# ---------------------------------------------------------------- engines


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    model = tiny_models.convolution(tmp_path / "m.onnx")
    options = BuildOptions(batch=ShapeRange(2, 2, 3))
    return build(model, options, store=Store(tmp_path / "store"), progress=False)


def test_an_engine_stage_is_preprocessing_engine_and_score(engine: Engine) -> None:
    images = pictures(7)
    with Session(engine) as session:
        stage = EngineStage(session, "top1")
        stage.prepare()
        assert stage.needs == (16, 16)
        assert stage.target == "cpu"
        assert isinstance(stage, Stage)
        scores = stage.score(images)
        # Seven images through an engine that takes two or three at a time.
        rows = preprocess(images, tiny_models.IMAGES)
        raw = np.concatenate([session(rows[:3]), session(rows[3:5]), session(rows[5:])])
    expected = to_scores(raw, "top1")
    np.testing.assert_allclose(scores.probabilities, expected.probabilities, rtol=1e-5)
    np.testing.assert_array_equal(scores.labels, expected.labels)


def test_engines_in_a_cascade_from_yaml(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "road.yaml"
    folder = engine.folder.relative_to(tmp_path)
    path.write_text(
        f"stages:\n"
        f"  - {{name: a, engine: {folder}, score: softmax, positive: 0, low: 0.5, high: 0.5}}\n"
        f"  - {{name: b, engine: {folder}, score: softmax, positive: 4}}\n"
    )
    images = pictures(9)
    with Cascade(CascadeSpec.from_yaml(path)) as cascade, Session(engine) as session:
        results = cascade(images)
        stage = EngineStage(session, "softmax", positive=0)
        expected = stage.score(images).probabilities
    for result, probability in zip(results, expected, strict=True):
        assert result.stage == "a"
        assert result.probability == pytest.approx(probability, rel=1e-5)
        assert result.label == int(probability > 0.5)
    with RoadworkDetector(path) as detector:
        value = detector(Image.fromarray(images[0]))
    assert value == pytest.approx(expected[0], rel=1e-5)
    with pytest.raises(OptionError, match=r"stage 'a': .* was built for cpu, but device='cuda'"):
        RoadworkDetector(path, device="cuda")


def test_stages_by_themselves(engine: Engine) -> None:
    folder = str(engine.folder)
    spec = CascadeSpec((StageSpec("a", engine=folder, score="softmax"), StageSpec("b")))
    given = FunctionStage(lambda images: np.zeros(len(images)))
    with open_stages(spec, given={"b": given}) as stages:
        assert list(stages) == ["a", "b"]
        assert stages["b"] is given
        assert stages["a"].score(pictures(2)).probabilities.shape == (2,)
    with pytest.raises(SessionError, match="closed"):
        stages["a"].score(pictures(2))


def test_what_was_opened_is_closed_when_a_later_stage_fails(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[EngineStage] = []
    real = EngineStage.close
    monkeypatch.setattr(EngineStage, "close", lambda self: (closed.append(self), real(self)))
    folder = str(engine.folder)
    good = StageSpec("a", engine=folder, score="softmax")
    with pytest.raises(InputError, match="needs outputs"):
        Cascade(CascadeSpec((good, StageSpec("b", engine=folder, score="sigmoid"))))
    assert len(closed) == 2
    with Cascade(CascadeSpec((good,))):
        assert len(closed) == 2
    assert len(closed) == 3


def test_a_score_that_does_not_fit_the_engine_fails_at_construction(engine: Engine) -> None:
    spec = CascadeSpec((StageSpec("a", engine=str(engine.folder), score="sigmoid"),))
    with pytest.raises(InputError, match=r"needs outputs of shape \(n,\)"):
        Cascade(spec)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (tiny_models.linear, "1 inputs and no preprocessing"),
        (tiny_models.two_by_two, "2 inputs and no preprocessing"),
    ],
)
def test_an_engine_that_takes_no_images_is_refused(
    make: Callable[[Path], Any], message: str, tmp_path: Path
) -> None:
    engine = build(make(tmp_path / "m.onnx"), store=Store(tmp_path / "store"), progress=False)
    with Session(engine) as session, pytest.raises(OptionError, match=message):
        EngineStage(session, "sigmoid")


def test_an_engine_with_two_outputs_is_refused(tmp_path: Path) -> None:
    graph = """two (float[N, 3, 16, 16] x) => (float[N, 3, 16, 16] a, float[N, 3, 16, 16] b) {
        a = Relu(x)
        b = Neg(x)
    }"""
    record = {"preprocess": tiny_models.IMAGES.to_dict()}
    model = tiny_models.save(tmp_path / "m.onnx", graph, {}, record=record)
    engine = build(model, store=Store(tmp_path / "store"), progress=False)
    with Session(engine) as session, pytest.raises(OptionError, match="outputs a, b"):
        EngineStage(session, "sigmoid")


# ---------------------------------------------------------------- reading signs


@pytest.mark.parametrize(
    ("text", "squeezed"),
    [
        ("Road-Work ", "roadwork"),
        ("TRAVAUX RÉPÉTÉS!", "travauxrepetes"),
        ("…", ""),
        ("道路", "道路"),
    ],
)
def test_squeeze(text: str, squeezed: str) -> None:
    assert squeeze(text) == squeezed


def confidence(lines: list[tuple[str, float]], keyword: str, minimum: float = 0.5) -> float:
    return keyword_confidence(lines, [keyword_pattern(keyword)], minimum)


def test_the_surest_reading_of_a_keyword_counts() -> None:
    lines = [("ROAD", 0.99), ("ROAD WORK", 0.8), ("roadworks ahead", 0.9), ("Road work", 0.3)]
    assert confidence(lines, "road work") == 0.9
    assert confidence(lines, "road-work", 0.95) == 0.0
    assert confidence(lines, "detour", 0.0) == 0.0
    assert confidence([("roadwork", 1.0000001)], "Road Work") == 1.0
    assert confidence([], "roadwork") == 0.0
    assert keyword_confidence(lines, [], 0.5) == 0.0


def test_a_keyword_may_go_over_lines_between_its_words() -> None:
    lines = [("MEN", 0.9), ("at", 0.7), ("Work!", 0.8), ("WO", 0.9), ("RK", 0.9)]
    assert confidence(lines, "men at work") == 0.7
    assert confidence(lines, "at work") == 0.7
    assert confidence(lines, "men work") == 0.0
    assert confidence(lines[3:], "work") == 0.0
    # A line that is left out does not stand between the others.
    assert confidence(lines, "men work", 0.75) == 0.8
    assert confidence([("", 0.6), ("men", 0.9)], "men") == 0.9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keywords": ()}, "at least one keyword"),
        ({"keywords": "road"}, "must be a list"),
        ({"keywords": ("ab",)}, "'ab' must have at least 3"),
        ({"keywords": ("---",)}, "'---' must have at least 3"),
        ({"keywords": (3,)}, "3 must have at least 3"),
        ({"keywords": ("road",), "min_confidence": 2}, "min_confidence=2"),
        ({"keywords": ("road",), "min_size": 8}, "min_size=8"),
    ],
)
def test_bad_ocr_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        OcrOptions(**options)


def sign(text: str) -> np.ndarray:
    image = Image.new("RGB", (480, 160), (240, 130, 20))
    font = ImageFont.load_default(64)
    ImageDraw.Draw(image).text((30, 40), text, fill=(0, 0, 0), font=font)
    return np.asarray(image)


@pytest.mark.skipif(not _deps.available("rapidocr"), reason="rapidocr is not installed")
def test_signs_are_read() -> None:
    stage = OcrStage(OcrOptions(("road work",)))
    stage.prepare()
    blank = np.zeros((64, 64, 3), np.uint8)
    scores = stage.score([sign("ROAD WORK"), sign("SPEED LIMIT"), blank]).probabilities
    assert scores[0] > 0.85
    assert scores[1:].tolist() == [0, 0]


def test_what_ocr_needs() -> None:
    assert OcrStage(OcrOptions(("road",))).needs is None
    assert OcrStage(OcrOptions(("road",), min_size=960)).needs == (960, 960)


@pytest.mark.skipif(_deps.available("rapidocr"), reason="rapidocr is installed")
def test_without_the_reader_the_cascade_is_not_made() -> None:
    spec = CascadeSpec(
        (StageSpec("a"), StageSpec("b", ocr=OcrOptions(("road",)), combine="positive_only"))
    )
    with pytest.raises(MissingDependencyError, match=r"pip install 'sn72engine\[ocr\]'"):
        Cascade(spec, {"a": lambda images: np.zeros(len(images))})


# ---------------------------------------------------------------- asking a model over HTTP


class Server:
    """A chat-completions server on the loopback interface that answers as it is told."""

    def __init__(self) -> None:
        self.answer: Callable[[dict[str, Any]], tuple[int, bytes]] = lambda _: (200, b"")
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.inside = 0
        self.most_inside = 0
        self.lock = threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with owner.lock:
                    owner.inside += 1
                    owner.most_inside = max(owner.most_inside, owner.inside)
                    owner.requests.append(body)
                    owner.headers.append(dict(self.headers))
                    owner.paths.append(self.path)
                status, data = owner.answer(body)
                with owner.lock:
                    owner.inside -= 1
                try:
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:  # the client has left
                    pass

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.thread.join(30)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("SN72_VLM_API_KEY", raising=False)
    running = Server()
    yield running
    running.close()


def reply(text: Any, tokens: Any = None) -> bytes:
    choice: dict[str, Any] = {"message": {"role": "assistant", "content": text}}
    if tokens is not None:
        choice["logprobs"] = {"content": tokens}
    return json.dumps({"choices": [choice]}).encode()


def token(text: str, **alternatives: float) -> dict[str, Any]:
    top = [{"token": t, "logprob": math.log(p)} for t, p in alternatives.items()]
    return {"token": text, "logprob": top[0]["logprob"] if top else -0.1, "top_logprobs": top}


def brightness(body: dict[str, Any]) -> float:
    """Mean pixel of the picture in a request, which proves that it arrived."""
    url = body["messages"][0]["content"][0]["image_url"]["url"]
    assert url.startswith("data:image/jpeg;base64,")
    return float(np.asarray(Image.open(BytesIO(base64.b64decode(url.split(",")[1])))).mean())


def grey(value: int, size: tuple[int, int] = (20, 30)) -> np.ndarray:
    return np.full((*size, 3), value, np.uint8)


def test_each_image_is_asked_about_and_answers_keep_their_order(server: Server) -> None:
    server.answer = lambda body: (200, reply("Yes." if brightness(body) > 128 else "no"))
    stage = VlmStage(VlmOptions(server.url, "m", certainty=0.8))
    scores = stage.score([grey(v) for v in (10, 250, 20, 240, 230)])
    stage.close()
    assert scores.probabilities == pytest.approx([0.2, 0.8, 0.2, 0.8, 0.8])
    assert scores.errors == {}
    assert set(server.paths) == {"/v1/chat/completions"}
    body = server.requests[0]
    assert (body["model"], body["temperature"], body["logprobs"]) == ("m", 0, True)
    assert "yes or no" in body["messages"][0]["content"][1]["text"]
    assert "Authorization" not in server.headers[0]


def test_token_probabilities_are_used(server: Server) -> None:
    tokens = [token("Yes", Yes=0.6, yes=0.1, No=0.2, Maybe=0.1)]
    server.answer = lambda body: (200, reply("Yes", tokens))
    stage = VlmStage(VlmOptions(server.url, "m"))
    assert stage.score([grey(0)]).probabilities == pytest.approx([0.7 / 0.9])
    stage.close()


@pytest.mark.parametrize(
    ("status", "data", "reason"),
    [
        (200, reply("Perhaps"), "neither yes nor no: 'Perhaps'"),
        (200, reply("nothing to see"), "neither yes nor no"),
        (200, reply(None), "neither yes nor no: None"),
        (200, b'{"choices": []}', "no choices[0]"),
        (200, b"[]", "no choices[0]"),
        (200, b"<html>", "not JSON"),
        (200, b"\xff\xfe", "not JSON"),
        (200, b"1" * (2 << 20), "longer than"),
        (500, b"out of memory", "answered 500: out of memory"),
        (404, b"no such model", "answered 404: no such model"),
    ],
)
def test_an_answer_that_cannot_be_used_is_a_reason(
    server: Server, status: int, data: bytes, reason: str
) -> None:
    server.answer = lambda body: (status, data) if brightness(body) < 128 else (200, reply("yes"))
    stage = VlmStage(VlmOptions(server.url, "m"))
    scores = stage.score([grey(0), grey(255)])
    stage.close()
    assert np.isnan(scores.probabilities).tolist() == [True, False]
    assert list(scores.errors) == [0]
    assert reason in scores.errors[0]


def test_a_slow_server_is_given_up(server: Server) -> None:
    release = threading.Event()

    def slow(body: dict[str, Any]) -> tuple[int, bytes]:
        release.wait(60)
        return 200, reply("yes")

    server.answer = slow
    stage = VlmStage(VlmOptions(server.url, "m", timeout=0.1))
    scores = stage.score([grey(0)])
    release.set()
    stage.close()
    assert np.isnan(scores.probabilities).all()
    assert "timed out" in scores.errors[0]


def test_no_more_requests_at_once_than_allowed(server: Server) -> None:
    gate = threading.Barrier(3, timeout=60)

    def together(body: dict[str, Any]) -> tuple[int, bytes]:
        gate.wait()  # passes only if three requests are under way together
        return 200, reply("yes")

    server.answer = together
    stage = VlmStage(VlmOptions(server.url, "m", concurrency=3, timeout=60))
    scores = stage.score([grey(0)] * 9)
    stage.close()
    assert not scores.errors
    assert server.most_inside == 3


def test_the_key_is_sent_and_the_picture_is_shrunk(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SN72_VLM_API_KEY", "secret")
    sizes: list[tuple[int, int]] = []

    def answer(body: dict[str, Any]) -> tuple[int, bytes]:
        url = body["messages"][0]["content"][0]["image_url"]["url"]
        sizes.append(Image.open(BytesIO(base64.b64decode(url.split(",")[1]))).size)
        return 200, reply("yes")

    server.answer = answer
    options = VlmOptions(server.url + "/", "m", max_side=100, logprobs=False)
    stage = VlmStage(options)
    stage.score([grey(0, (300, 600))])
    stage.score([grey(0, (30, 20))])
    stage.close()
    assert sizes == [(100, 50), (20, 30)]
    assert server.headers[0]["Authorization"] == "Bearer secret"
    assert "logprobs" not in server.requests[0]
    assert "secret" not in json.dumps(options.to_dict())


def test_in_a_cascade_an_unusable_answer_leaves_the_answer_before_it(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "sn72engine.cascade")
    server.answer = lambda body: (200, reply("yes" if brightness(body) > 128 else "hm"))
    spec = CascadeSpec((StageSpec("a"), StageSpec("vlm", vlm=VlmOptions(server.url, "m"))))
    with Cascade(spec, {"a": lambda images: np.full(len(images), 0.4)}) as cascade:
        unsure, sure = cascade([grey(0), grey(255)])
    assert (unsure.probability, unsure.stage) == (pytest.approx(0.4), "a")
    assert unsure.status is Status.STAGE_FAILED
    assert "vlm: InputError: the answer is neither" in unsure.error
    assert (sure.stage, sure.status) == ("vlm", Status.DONE)


def test_a_server_that_is_down_is_a_reason(server: Server) -> None:
    server.close()
    stage = VlmStage(VlmOptions(server.url, "m"))
    stage.prepare()
    scores = stage.score([grey(0)])
    stage.close()
    assert "refused" in scores.errors[0]


@pytest.mark.parametrize(
    ("text", "tokens", "probability"),
    [
        ("yes", None, 0.9),
        ("  **No**, the road is clear", None, pytest.approx(0.1)),
        ("YES", [], 0.9),
        ("Yes", "odd", 0.9),
        ("Yes", [{"token": "Yes"}], 0.9),
        ("Yes", [{"token": "Yes", "logprob": "x"}], 0.9),
        ("Yes", [{"token": "Yes", "logprob": math.nan}], 0.9),
        ("Yes", [{"token": 5}], 0.9),
        ("Yes", [{"token": "Yes", "logprob": -9999.0}], 0.9),
        ("Yes", [{"token": "Yes", "logprob": math.log(0.7)}], 1.0),
        ("No", [token(" ", **{" ": 1.0}), token("No", No=0.75, yes=0.25)], 0.25),
        ("No", [token("No", No=0.75, Not=0.25)], 0.0),
    ],
)
def test_parsing(text: str, tokens: Any, probability: Any) -> None:
    answer = json.loads(reply(text, tokens))
    assert parse_answer(answer, 0.9) == pytest.approx(probability)


plain = st.recursive(
    st.none() | st.booleans() | st.floats() | st.sampled_from(["yes", "No", "x"]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(
                ["choices", "message", "content", "logprobs", "token", "logprob", "top_logprobs"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=15,
)


@settings(max_examples=200)
@given(st.sampled_from(["yes", "no"]), plain)
def test_any_answer_is_a_probability_or_an_input_error(text: str, rest: Any) -> None:
    for answer in (rest, {"choices": [{"message": {"content": text}, "logprobs": rest}]}):
        with contextlib.suppress(InputError):
            assert 0.0 <= parse_answer(answer, 0.9) <= 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "file:///etc/passwd"}, "must start with http"),
        ({"url": "http://"}, "must start with http"),
        ({"url": None}, "must start with http"),
        ({"model": " "}, "model=' ' must be text"),
        ({"question": 3}, "question=3 must be text"),
        ({"timeout": 0}, "timeout=0"),
        ({"concurrency": 0}, "concurrency=0"),
        ({"max_side": 1}, "max_side=1"),
        ({"jpeg_quality": 101}, "jpeg_quality=101"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"logprobs": "yes"}, "logprobs='yes'"),
        ({"certainty": 0.5}, "certainty=0.5"),
    ],
)
def test_bad_vlm_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        VlmOptions(**{"url": "http://127.0.0.1/v1", "model": "m", **options})


def test_stages_keep_to_the_protocol() -> None:
    stages: Sequence[object] = (
        OcrStage(OcrOptions(("road",))),
        VlmStage(VlmOptions("http://127.0.0.1/v1", "m")),
    )
    assert all(isinstance(stage, Stage) for stage in stages)
