"""Training of the two road-scene models on the CPU, from a seed, and the cache of their weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sn72engine.errors import OptionError
from sn72engine.progress import Progress
from sn72engine.roadscenes.sets import scenes
from sn72engine.spec import Options, check_int, check_number
from sn72kernels import atomic
from sn72kernels.env import cache_dir

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sn72engine.roadscenes.models import SceneModel

#: Cells per side of the grid on which places of roadwork are learned: one per patch.
_CELLS = 12

#: Weight of the loss on places against the loss on the answer.
_PLACES = 1.0


@dataclass(frozen=True, slots=True)
class TrainOptions(Options):
    """How a model is trained. Two phases share one set of scenes.

    Args:
        scenes: number of scenes drawn.
        passes: scenes shown to the convolutional part and the head.
        joint_passes: scenes then shown to the whole model, of which the convolutional part no
            longer learns; 0 for a model that is convolutional alone.
        batch: scenes per step.
        rate, joint_rate: peak learning rates of the two phases.
        decay: weight decay.
        difficulty: range of the scenes' difficulty.
        seed: of scenes, weights and order.
    """

    scenes: int = 6000
    passes: int = 24_000
    joint_passes: int = 0
    batch: int = 32
    rate: float = 3e-3
    joint_rate: float = 5e-4
    decay: float = 0.02
    difficulty: tuple[float, float] = (0.0, 0.9)
    seed: int = 1

    def __post_init__(self) -> None:
        check_int("batch", self.batch, 2)
        check_int("scenes", self.scenes, self.batch)
        check_int("passes", self.passes, self.batch)
        check_int("joint_passes", self.joint_passes, 0)
        for name in ("rate", "joint_rate"):
            check_number(name, getattr(self, name), 1e-8, 1.0)
        check_number("decay", self.decay, 0.0, 1.0)
        if not isinstance(self.difficulty, tuple) or len(self.difficulty) != 2:
            raise OptionError(f"difficulty={self.difficulty!r} must be a pair of numbers")
        check_number("difficulty", self.difficulty[0], 0.0, 1.0)
        check_number("difficulty", self.difficulty[1], self.difficulty[0], 1.0)
        check_int("seed", self.seed, 0)


#: The options that make the cached models.
DEFAULTS: dict[str, TrainOptions] = {
    "small_cnn": TrainOptions(passes=24_000, rate=4e-3),
    "small_vit": TrainOptions(passes=24_000, joint_passes=1_500),
}


def train(
    name: str, options: TrainOptions | None = None, *, shown: bool | None = None
) -> nn.Module:
    """Train a model from a seed; on one machine the same options give the same weights.

    Runs on one thread: layers this small gain little from a second one, lose much when the
    machine is busy, and sums would depend on the number of cores.

    The generator knows where it drew roadwork, so besides the answer each cell of a 12 x 12 grid
    learns whether roadwork is in it, through a linear layer that is thrown away afterwards. That
    needs far fewer scenes than the answer alone. The ViT's convolutional stem learns first and
    alone, which is cheap; then it rests, and the transformer blocks, which begin as the identity,
    learn with the head.

    Args:
        name: ``small_cnn`` or ``small_vit``.
        options: None for the defaults of that model.
        shown: show a progress bar; None only on a terminal.

    Returns:
        The model in evaluation mode, without gradients.

    Raises:
        OptionError: no model has that name.
    """
    import torch

    from sn72engine.roadscenes.models import MODELS

    options = _chosen(name, options)
    images, places = _data(options, shown)
    with torch.random.fork_rng(devices=[]), _one_thread():
        torch.manual_seed(options.seed)
        model = MODELS[name]()
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        probe = torch.nn.Linear(model.dim, 1)
        steps = (options.passes + options.joint_passes) // options.batch
        with Progress(f"training {name}", steps, unit="step", shown=shown) as bar:
            _fit(model, probe, images, places, options, bar, joint=False)
            if options.joint_passes:
                _fit(model, probe, images, places, options, bar, joint=True)
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return model.eval().requires_grad_(False)


def trained(name: str, options: TrainOptions | None = None) -> nn.Module:
    """The trained model, from the cache or else trained now; processes wait for one another.

    Weights lie in ``roadscenes/<name>-<hash>.npz`` below the cache folder; the hash is of the
    options and of this package's source, so changed code never meets old weights.

    Raises:
        OptionError: no model has that name.
    """
    import torch
    from filelock import FileLock

    from sn72engine.roadscenes.models import MODELS

    options = _chosen(name, options)
    path = cache_dir() / "roadscenes" / f"{name}-{_fingerprint(name, options)}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.is_file():
            weights = train(name, options).state_dict()
            with atomic.replacing(path) as scratch, scratch.open("wb") as stream:
                np.savez(stream, **{key: value.numpy() for key, value in weights.items()})
    model = MODELS[name]()
    with np.load(path, allow_pickle=False) as stored:
        model.load_state_dict({key: torch.from_numpy(stored[key]) for key in stored.files})
    return model.eval().requires_grad_(False)


@contextmanager
def _one_thread() -> Iterator[None]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _chosen(name: str, options: TrainOptions | None) -> TrainOptions:
    if name not in DEFAULTS:
        raise OptionError(f"name={name!r} is not a road-scene model; known: {', '.join(DEFAULTS)}")
    return options or DEFAULTS[name]


def _fingerprint(name: str, options: TrainOptions) -> str:
    digest = hashlib.sha256(json.dumps([name, options.to_dict()], sort_keys=True).encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _data(options: TrainOptions, shown: bool | None) -> tuple[Tensor, Tensor]:
    """Images, uint8 (n, 3, 96, 96), and places, float32 (n, 12, 12): 1 where roadwork is."""
    import torch

    from sn72engine.roadscenes.models import PREPROCESS

    size = PREPROCESS.height
    images = np.empty((options.scenes, size, size, 3), np.uint8)
    places = np.zeros((options.scenes, _CELLS, _CELLS), np.float32)
    drawn = scenes(options.scenes, options.seed, difficulty=options.difficulty, size=size)
    with Progress("drawing scenes", options.scenes, unit="img", shown=shown) as bar:
        for index, (scene, _) in enumerate(drawn):
            images[index] = scene.picture
            for box in scene.boxes:
                left, top, right, bottom = (
                    min(_CELLS - 1, max(0, int(edge * _CELLS))) for edge in box
                )
                places[index, top : bottom + 1, left : right + 1] = 1
            bar.step()
    return torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(places)


def _fit(
    model: SceneModel,
    probe: nn.Linear,
    images: Tensor,
    places: Tensor,
    options: TrainOptions,
    bar: Progress,
    *,
    joint: bool,
) -> None:
    """One phase: AdamW with a one-cycle rate, mirrored scenes, both losses."""
    import torch
    from torch.nn import functional

    from sn72engine.roadscenes.models import PREPROCESS

    mean, std = PREPROCESS.mean[0], PREPROCESS.std[0]
    rate = options.joint_rate if joint else options.rate
    steps = (options.joint_passes if joint else options.passes) // options.batch
    settled = model.settled() if joint else []
    for module in settled:
        module.requires_grad_(False)
    parameters = [p for p in (*model.parameters(), *probe.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=options.decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=max(2, steps), pct_start=0.2
    )
    model.train()
    for module in settled:
        module.eval()
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < options.batch:
            order = torch.randperm(len(images))
        index, order = order[: options.batch], order[options.batch :]
        batch, wanted = images[index], places[index]
        if torch.rand(()) < 0.5:
            batch, wanted = batch.flip(3), wanted.flip(2)
        pixels = (batch.float() - mean) / std
        features = model.features(pixels, joint)
        answer = model.classify(features)[:, 0]
        cells = probe(features)[..., 0]
        wanted = wanted.flatten(1)
        loss = functional.binary_cross_entropy_with_logits(answer, wanted.amax(1))
        loss = loss + _PLACES * functional.binary_cross_entropy_with_logits(cells, wanted)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        bar.step()
