from __future__ import annotations

import csv
import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sn72engine.errors import OptionError
from sn72engine.roadscenes import (
    SceneOptions,
    TrainOptions,
    dataset,
    render,
    scene,
    trained,
    write_dataset,
)
from sn72engine.roadscenes.dice import Dice
from sn72engine.roadscenes.train import train
from sn72engine.roadscenes.weather import DAYLIGHT, roll

if TYPE_CHECKING:
    from torch import nn

ROOT = Path(__file__).resolve().parents[2]
TINY = TrainOptions(scenes=32, passes=32, joint_passes=16, batch=16)


def logits(model: nn.Module, images: np.ndarray) -> np.ndarray:
    import torch

    pixels = (torch.from_numpy(images).permute(0, 3, 1, 2).float() - 127.5) / 64.0
    with torch.inference_mode():
        return torch.cat([model(part) for part in pixels.split(64)])[:, 0].numpy()


def accuracy(model: nn.Module, sets: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    right = [((logits(model, images) > 0) == labels).mean() for images, labels in sets]
    return float(np.mean(right))


# Scenes.


@given(
    st.integers(0, 2**40), st.integers(0, 1), st.floats(0, 1), st.sampled_from([32, 48, 96, 131])
)
@settings(max_examples=40, deadline=None)
def test_every_scene_is_a_picture_and_the_same_again(
    seed: int, label: int, difficulty: float, size: int
) -> None:
    options = SceneOptions(difficulty=difficulty, size=size)
    drawn = render(seed, label, options)
    assert drawn.picture.shape == (size, size, 3)
    assert drawn.picture.dtype == np.uint8
    assert drawn.picture.std() > 1
    assert bool(drawn.boxes) == bool(label)
    for left, top, right, bottom in drawn.boxes:
        assert left < right
        assert top < bottom
        assert right > 0
        assert left < 1
    again = scene(seed, label, difficulty=difficulty, size=size)
    np.testing.assert_array_equal(drawn.picture, again)


def test_scenes_are_the_same_in_another_process() -> None:
    code = (
        "import hashlib\n"
        "from sn72engine.roadscenes import dataset\n"
        "images, labels = dataset(24, 5, difficulty=(0.0, 1.0), size=64)\n"
        "print(hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    images, labels = dataset(24, 5, difficulty=(0.0, 1.0), size=64)
    ours = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    assert done.stdout.strip() == ours


def test_random_choices_are_pinned() -> None:
    # A change here changes every scene, and with them all trained weights.
    dice = Dice(7, "pin")
    assert [dice.count(0, 99) for _ in range(5)] == [23, 41, 38, 62, 65]
    assert dice.shuffled(range(5)) == [3, 0, 1, 4, 2]
    noise = Dice(7, "noise").noise((4,))
    np.testing.assert_allclose(noise, [1.99978948, 0.20093578, 0.88985848, -0.64108086], atol=1e-6)


def test_noise_has_unit_spread() -> None:
    noise = Dice(1).noise((200, 200, 3))
    assert noise.dtype == np.float32
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01


def test_the_label_changes_the_objects_and_nothing_far_from_them() -> None:
    # In the sky and the far corners both scenes of a seed agree but for noise.
    same = 0
    for seed in range(20):
        pair = [scene(seed, label, difficulty=0.0, size=64).astype(int) for label in (0, 1)]
        assert (pair[0] != pair[1]).any()
        same += abs(pair[0][:4].mean() - pair[1][:4].mean()) < 3
    assert same >= 18


def test_difficulty_shrinks_roadwork_and_worsens_conditions() -> None:
    def area(difficulty: float) -> float:
        options = SceneOptions(difficulty=difficulty, size=32)
        return float(
            np.mean(
                [
                    sum((b[2] - b[0]) * (b[3] - b[1]) for b in render(seed, 1, options).boxes)
                    for seed in range(60)
                ]
            )
        )

    assert area(0.9) < 0.5 * area(0.1)
    dark = [
        sum(roll(Dice(seed), difficulty).daylight == "night" for seed in range(400))
        for difficulty in (0.0, 1.0)
    ]
    assert dark[0] < dark[1]


def test_every_time_of_day_and_weather_occurs() -> None:
    rolls = [roll(Dice(seed), 0.7) for seed in range(300)]
    assert {r.daylight for r in rolls} == set(DAYLIGHT)
    for name in ("fog", "rain", "blur"):
        drawn = [getattr(r, name) for r in rolls]
        assert 0 in drawn
        assert max(drawn) > 0


@pytest.mark.parametrize(
    "call",
    [
        lambda: scene(-1, 1),
        lambda: scene(0, 2),
        lambda: scene(0, 1, difficulty=1.5),
        lambda: scene(0, 1, size=8),
        lambda: dataset(0, 1),
        lambda: dataset(10, 1, difficulty=(0.8, 0.2)),
        lambda: dataset(10, 1, size=0),
        lambda: TrainOptions(difficulty=(0.9, 0.1)),
        lambda: TrainOptions(scenes=8),
        lambda: trained("resnet"),
        lambda: train("resnet"),
    ],
)
def test_bad_arguments_are_refused(call: object) -> None:
    with pytest.raises(OptionError):
        call()  # type: ignore[operator]


# Sets.


@given(st.integers(1, 30), st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_a_set_is_balanced(count: int, seed: int) -> None:
    images, labels = dataset(count, seed, size=32)
    assert images.shape == (count, 32, 32, 3)
    assert images.dtype == np.uint8
    assert labels.dtype == np.int64
    assert labels.sum() == count // 2


def test_a_set_is_shuffled_and_sets_of_other_seeds_differ() -> None:
    images, labels = dataset(60, 1, size=32)
    assert 10 < np.abs(np.diff(labels)).sum() < 50
    others, other_labels = dataset(60, 2, size=32)
    assert not (labels == other_labels).all()
    seen = {image.tobytes() for image in images}
    assert len(seen) == 60
    assert not seen & {image.tobytes() for image in others}


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_a_written_set_matches_its_table(tmp_path: Path, suffix: str) -> None:
    table = write_dataset(tmp_path / "set", 10, 3, size=48, train_share=0.6, suffix=suffix)
    images, labels = dataset(10, 3, size=48)
    with table.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [int(row["label"]) for row in rows] == labels.tolist()
    assert [row["split"] for row in rows] == ["train"] * 6 + ["test"] * 4
    for row, image in zip(rows, images, strict=True):
        with Image.open(table.parent / row["file"]) as picture:
            difference = np.abs(np.asarray(picture).astype(int) - image)
        assert difference.mean() < (1e-9 if suffix == ".png" else 12)


def test_a_set_is_not_written_over_a_file(tmp_path: Path) -> None:
    (tmp_path / "set").write_text("")
    with pytest.raises(OptionError, match="is a file"):
        write_dataset(tmp_path / "set", 2, 0)


# Models and training.


@pytest.mark.parametrize("name", ["small_cnn", "small_vit"])
def test_models_give_one_logit_per_image(name: str) -> None:
    import torch

    from sn72engine.roadscenes import models

    model = getattr(models, name)().eval()
    size = models.PREPROCESS.height
    with torch.inference_mode():
        batch = torch.randn(3, 3, size, size)
        together = model(batch)
        assert together.shape == (3, 1)
        torch.testing.assert_close(model(batch[1:2]), together[1:2], atol=1e-5, rtol=1e-4)
    parameters = sum(p.numel() for p in model.parameters())
    assert {"small_cnn": 50_000, "small_vit": 900_000}[name] < parameters
    assert parameters < {"small_cnn": 150_000, "small_vit": 1_300_000}[name]


def test_a_new_block_is_the_identity() -> None:
    import torch

    from sn72engine.roadscenes.models import SmallVit

    model = SmallVit(depth=2).eval()
    pixels = torch.randn(2, 3, 96, 96)
    with torch.inference_mode():
        torch.testing.assert_close(model.features(pixels), model.features(pixels, joint=False))


def test_training_learns_in_seconds() -> None:
    options = TrainOptions(
        scenes=480, passes=2400, batch=16, rate=8e-3, difficulty=(0.0, 0.1), seed=3
    )
    model = train("small_cnn", options, shown=False)
    assert accuracy(model, [dataset(200, 77, difficulty=0.05)]) > 0.65


def test_training_is_repeatable_and_leaves_the_generator_alone() -> None:
    import torch

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, second = (train("small_vit", TINY, shown=False).state_dict() for _ in range(2))
    torch.testing.assert_close(torch.rand(3), expected)
    for key, value in first.items():
        torch.testing.assert_close(value, second[key], atol=0, rtol=0)


def test_trained_weights_come_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SN72_CACHE_DIR", str(tmp_path))
    first = trained("small_vit", TINY)
    (path,) = tmp_path.glob("roadscenes/*.npz")
    stamp = path.stat().st_mtime_ns
    second = trained("small_vit", TINY)
    assert path.stat().st_mtime_ns == stamp
    images, _ = dataset(4, 9)
    np.testing.assert_array_equal(logits(first, images), logits(second, images))
    assert not second.training
    assert not any(p.requires_grad for p in second.parameters())
    # The cache is read: other numbers in the file are other numbers in the model.
    with np.load(path) as stored:
        weights = {key: stored[key] for key in stored.files}
    weights["head.2.bias"] = weights["head.2.bias"] + 1
    np.savez(path, **weights)
    moved = logits(trained("small_vit", TINY), images) - logits(first, images)
    np.testing.assert_allclose(moved, 1, atol=1e-4)
    # Other options have weights of their own.
    trained("small_cnn", TINY)
    assert len(list(tmp_path.glob("roadscenes/*.npz"))) == 2


def test_processes_wait_for_one_another_and_train_once(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from sn72engine.roadscenes import TrainOptions, trained\n"
        "from sn72engine.roadscenes import train as module\n"
        "original = module.train\n"
        "def loud(*arguments, **keywords):\n"
        "    print('trained', flush=True)\n"
        "    return original(*arguments, **keywords)\n"
        "module.train = loud\n"
        "options = TrainOptions(scenes=32, passes=32, batch=16)\n"
        "print(float(trained('small_cnn', options).head.bias))\n"
    )
    environment = {**os.environ, "SN72_CACHE_DIR": str(tmp_path)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        for _ in range(2)
    ]
    lines = [process.communicate(timeout=120)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sorted(len(printed) for printed in lines) == [1, 2]
    assert lines[0][-1] == lines[1][-1]


def test_the_second_stage_is_better_and_both_beat_chance(
    trained_cnn: nn.Module, trained_vit: nn.Module
) -> None:
    hard = [dataset(500, 501, difficulty=0.6)]
    cnn, vit = accuracy(trained_cnn, hard), accuracy(trained_vit, hard)
    assert cnn > 0.75
    assert vit > cnn + 0.02
