"""The contract of a detector: one picture in, one finite number in [0, 1] out, whatever happens."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import random
import threading
import time
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from sn72engine.batching import BatchingOptions
from sn72engine.errors import OptionError, Sn72Error
from sn72engine.miner import DEFAULT_DEADLINE, RoadworkDetector, rounding_to_label

MODES = ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB"]
MODES += ["HSV", "I", "F", "I;16", "I;16B", "I;16L"]


def brightness(images: Sequence[np.ndarray]) -> np.ndarray:
    """A stage that has to look at every pixel."""
    return np.array([image.mean() / 255 for image in images])


@pytest.fixture(params=[None, BatchingOptions()], ids=["by itself", "batched"])
def make(tmp_path: Path, request: pytest.FixtureRequest) -> Callable[..., RoadworkDetector]:
    def build(*stages: Any, extra: str = "", device: str = "cpu") -> RoadworkDetector:
        path = tmp_path / "road.yaml"
        names = [f"s{i}" for i in range(len(stages))]
        path.write_text(extra + "stages:\n" + "".join(f"  - name: {n}\n" for n in names))
        given = dict(zip(names, stages, strict=True))
        return RoadworkDetector(str(path), device, stages=given, batching=request.param)

    return build


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "sn72engine")


def check(value: object) -> float:
    """What the client does with the answer: JSON and a comparison."""
    assert type(value) is float
    assert math.isfinite(value)
    assert 0.0 <= value <= 1.0
    assert json.loads(json.dumps(value, allow_nan=False)) == value
    return value


def picture(mode: str = "RGB", size: tuple[int, int] = (64, 48)) -> Image.Image:
    grey = Image.fromarray(
        np.linspace(0, 255, size[0] * size[1]).astype(np.uint8).reshape(size[::-1])
    )
    if mode in ("La", "RGBa"):
        return grey.convert({"La": "LA", "RGBa": "RGBA"}[mode]).convert(mode)
    if mode == "LAB":
        return Image.new("LAB", size, (128, 0, 0))
    if mode == "PA":
        return grey.convert("P").convert("PA")
    if mode == "HSV":
        return grey.convert("RGB").convert("HSV")
    if mode.startswith("I;16"):
        return Image.new(mode, size, 30000)
    return grey.convert(mode)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode(make: Callable[..., RoadworkDetector], mode: str) -> None:
    with make(brightness) as detector:
        check(detector(picture(mode)))


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "CMYK"])
def test_common_modes_are_really_scored(make: Callable[..., RoadworkDetector], mode: str) -> None:
    with make(brightness) as detector:
        detector(picture(mode))
        assert detector.report().stages[0].counts.failed == 0


@pytest.mark.parametrize("size", [(4032, 3024), (224, 224), (1, 1), (1, 3000), (3000, 1)])
def test_sizes(make: Callable[..., RoadworkDetector], size: tuple[int, int]) -> None:
    with make(brightness) as detector:
        assert check(detector(Image.new("RGB", size, (51, 51, 51)))) == pytest.approx(0.2, abs=1e-6)


def encoded(kind: str = "JPEG", size: tuple[int, int] = (320, 240)) -> bytes:
    stream = BytesIO()
    Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    ).save(stream, kind)
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP"])
@pytest.mark.parametrize("kept", [0.9, 0.5, 0.1])
def test_a_truncated_picture(make: Callable[..., RoadworkDetector], kind: str, kept: float) -> None:
    data = encoded(kind)
    image = Image.open(BytesIO(data[: int(kept * len(data))]))
    with make(brightness) as detector:
        assert check(detector(image)) == 0.5


def test_flipped_bytes(make: Callable[..., RoadworkDetector]) -> None:
    data = encoded()
    rng = random.Random(0)
    opened = 0
    with make(brightness) as detector:
        for _ in range(40):
            damaged = bytearray(data)
            for _ in range(20):
                damaged[rng.randrange(200, len(damaged))] = rng.randrange(256)
            try:
                image = Image.open(BytesIO(bytes(damaged)))
            except OSError:
                continue
            opened += 1
            check(detector(image))
    assert opened > 20


def closed_image() -> Image.Image:
    image = Image.open(BytesIO(encoded()))
    image.close()
    return image


@pytest.mark.parametrize(
    "image",
    [None, 5, "no such file", b"", b"GIF8", np.zeros(3), np.zeros((4, 4, 3)), object(), [], {}],
    ids=lambda thing: "object" if type(thing) is object else repr(thing),
)
def test_things_that_are_no_pictures(make: Callable[..., RoadworkDetector], image: Any) -> None:
    with make(brightness) as detector:
        assert check(detector(image)) == 0.5


def test_a_closed_picture(make: Callable[..., RoadworkDetector]) -> None:
    with make(brightness) as detector:
        assert check(detector(closed_image())) == 0.5


def test_the_picture_is_neither_changed_nor_closed(make: Callable[..., RoadworkDetector]) -> None:
    image = picture("RGBA")
    before = image.tobytes()
    with make(brightness) as detector:
        detector(image)
    assert (image.mode, image.tobytes()) == ("RGBA", before)


def raising(images: Any) -> Any:
    raise RuntimeError("broken stage")


@pytest.mark.parametrize(
    "answer",
    [math.nan, math.inf, -math.inf, 1.5, -0.5],
)
def test_a_stage_that_answers_nonsense(
    make: Callable[..., RoadworkDetector], answer: float
) -> None:
    with make(lambda images: np.full(len(images), answer)) as detector:
        assert check(detector(picture())) == 0.5


def test_a_stage_that_raises_leaves_the_answer_before_it(
    make: Callable[..., RoadworkDetector],
) -> None:
    with make(lambda images: np.full(len(images), 0.7), raising) as detector:
        assert check(detector(picture())) == pytest.approx(0.7)
    with make(raising) as detector:
        assert check(detector(picture())) == 0.5


def test_a_stage_that_hangs_is_left_at_the_deadline(
    make: Callable[..., RoadworkDetector],
) -> None:
    release = threading.Event()

    def hanging(images: Any) -> Any:
        release.wait(60)
        return np.full(len(images), 0.0)

    with make(
        lambda images: np.full(len(images), 0.7), hanging, extra="deadline: 0.1\n"
    ) as detector:
        begin = time.monotonic()
        assert check(detector(picture())) == pytest.approx(0.7)
        assert check(asyncio.run(detector.predict(picture()))) == pytest.approx(0.7)
        assert time.monotonic() - begin < 30  # the stage itself would take 60
        release.set()


def test_the_default_deadline_is_within_the_validators(
    make: Callable[..., RoadworkDetector],
) -> None:
    assert DEFAULT_DEADLINE < 9.0
    with make(brightness) as detector:
        assert detector._cascade.spec.deadline == DEFAULT_DEADLINE
    with make(brightness, extra="deadline: 3\n") as detector:
        assert detector._cascade.spec.deadline == 3


def test_after_closing(make: Callable[..., RoadworkDetector]) -> None:
    detector = make(brightness)
    detector.close()
    assert check(detector(picture())) == 0.5
    assert check(asyncio.run(detector.predict(picture()))) == 0.5


def test_requests_overlap_when_awaited(make: Callable[..., RoadworkDetector]) -> None:
    entered = threading.Event()
    release = threading.Event()

    def slow(images: Any) -> Any:
        entered.set()
        release.wait(60)
        return np.full(len(images), 0.9)

    async def main(detector: RoadworkDetector) -> tuple[float, float]:
        first = asyncio.create_task(detector.predict(picture()))
        while not entered.is_set():
            await asyncio.sleep(0.001)
        second = asyncio.create_task(detector.predict(picture()))
        release.set()
        return await first, await second

    with make(slow) as detector:
        assert asyncio.run(main(detector)) == (pytest.approx(0.9), pytest.approx(0.9))


def test_concurrent_calls_share_a_batch(tmp_path: Path) -> None:
    sizes: list[int] = []

    def counting(images: Sequence[np.ndarray]) -> np.ndarray:
        sizes.append(len(images))
        return brightness(images)

    path = tmp_path / "road.yaml"
    path.write_text("stages: [{name: a}]")
    batching = BatchingOptions(max_batch=3, max_wait=3600)

    async def main(detector: RoadworkDetector) -> list[float]:
        shades = (Image.new("RGB", (8, 8), (51 * k,) * 3) for k in range(3))
        return await asyncio.gather(*(detector.predict(image) for image in shades))

    with RoadworkDetector(path, stages={"a": counting}, batching=batching) as detector:
        answers = asyncio.run(main(detector))
    assert answers == [pytest.approx(k / 5, abs=1e-6) for k in range(3)]
    assert sizes == [3]


@settings(max_examples=200)
@given(st.floats(0, 1, width=32), st.integers(0, 1), st.floats(0, 1))
@example(0.5, 1, 0.5)
@example(0.43, 0, 0.43)
@example(0.0, 0, 0.0)
@example(1.0, 1, 1.0)
@example(1.0, 1, 0.0)
@example(5e-324, 1, 5e-324)
def test_rounding_gives_the_label(probability: float, label: int, threshold: float) -> None:
    value = check(float(rounding_to_label(probability, label, threshold)))
    assert round(value) == label


@given(st.floats(0, 1, width=32))
def test_nothing_moves_at_the_usual_threshold(probability: float) -> None:
    moved = rounding_to_label(probability, int(probability > 0.5), 0.5)
    assert moved == pytest.approx(probability, abs=1e-15)


def test_the_decision_threshold_is_what_rounding_sees(
    make: Callable[..., RoadworkDetector],
) -> None:
    with make(
        lambda images: np.full(len(images), 0.45), extra="decision_threshold: 0.43\n"
    ) as detector:
        assert round(check(detector(picture()))) == 1


def test_construction_errors_raise(tmp_path: Path, make: Callable[..., RoadworkDetector]) -> None:
    with pytest.raises(OptionError, match=r"absent\.yaml: cannot read"):
        RoadworkDetector(str(tmp_path / "absent.yaml"))
    with pytest.raises(OptionError, match="device='tpu' is not one of cpu, cuda"):
        make(brightness, device="tpu")
    make(brightness).close()
    with pytest.raises(OptionError, match="stage 's0' has no engine"):
        RoadworkDetector(tmp_path / "road.yaml")
    path = tmp_path / "top1.yaml"
    path.write_text("stages: [{name: a, score: top1}]")
    with pytest.raises(OptionError, match="class indices"):
        RoadworkDetector(path, stages={"a": brightness})
    path.write_text("stages: [{name: a, engine: nowhere, score: sigmoid}]")
    with pytest.raises(Sn72Error, match="nowhere"):
        RoadworkDetector(path)


def test_a_stage_that_will_never_run_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "road.yaml"
    path.write_text("stages:\n  - {name: first}\n  - {name: night, when: dark}\n")
    caplog.set_level(logging.WARNING, "sn72engine")
    with RoadworkDetector(path, stages={"first": brightness, "night": brightness}):
        assert "stage night waits for 'dark'" in caplog.text


def test_the_suffix_may_be_left_out(tmp_path: Path, make: Callable[..., RoadworkDetector]) -> None:
    make(brightness).close()
    with RoadworkDetector(tmp_path / "road", stages={"s0": brightness}) as detector:
        check(detector(picture()))
