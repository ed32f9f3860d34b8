"""A two-stage cascade from images to results, against the ways that people run two models by hand.

    python -m benchmarks.end_to_end --batches 1,8,32,64 --out benchmarks/results

On a GPU: ViT-L/16 at 384 px in both stages, bfloat16, inductor engines. On a CPU: small ViTs at
96 px, float32, ONNX Runtime and inductor engines. 30% of the images escalate. The rivals:

- eager PyTorch with routing on the host: score, compare, index, score again;
- the same with ``torch.compile`` (``reduce-overhead`` on a GPU, the default on a CPU);
- both models on every image, as engines, with no cascade.

All take turns in one run; medians. Every contestant must give each image the route and, within
rounding, the probability of eager PyTorch in float32; one that does not has no speed-up.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import machine
from benchmarks.vit import LARGE, SMALL, TINY, Size, Vit, vit
from sn72engine import (
    BuildOptions,
    Cascade,
    CascadeSpec,
    Engine,
    ExportOptions,
    OnnxModel,
    Preprocess,
    ProgramOptions,
    ShapeRange,
    StageSpec,
    Store,
    TorchProgram,
    build,
    export,
    export_program,
    interleave,
    load,
    preprocess,
)
from sn72engine.errors import CudaUnavailableError
from sn72kernels import atomic

ESCALATED = 0.3
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
SIZES = (LARGE, LARGE) if GPU else (TINY, SMALL)
TYPE = torch.bfloat16 if GPU else torch.float32
#: Largest difference of a probability, and smallest share of equal routes.
TOLERANCE, AGREEMENT = (0.05, 0.95) if GPU else (1e-4, 1.0)
EAGER = "eager, host routing"

Answers = tuple[np.ndarray, np.ndarray]
"""Probability of each image, and whether the first stage decided it."""


@dataclass(frozen=True)
class Race:
    """Times of one batch size, and which contestants answered as they must.

    ``own_percent``: of each cascade on the CPU, its own time in percent of its stages' time.
    """

    batch: int
    p50_ms: dict[str, float]
    passed: dict[str, bool]
    own_percent: dict[str, float]

    @property
    def speedups(self) -> dict[str, float]:
        """Over eager PyTorch, of those that passed."""
        base = self.p50_ms[EAGER]
        return {name: base / ms for name, ms in self.p50_ms.items() if self.passed[name]}

    def to_dict(self) -> dict[str, Any]:
        return {
            "batch": self.batch,
            "p50_ms": self.p50_ms,
            "passed": self.passed,
            "speedup": self.speedups,
            "own_percent": self.own_percent,
        }


def pictures(batch: int, size: Size) -> list[np.ndarray]:
    """Random images of the size that the models take: uint8 (H, W, 3)."""
    rng = np.random.default_rng(batch)
    return list(rng.integers(0, 256, (batch, size.image, size.image, 3), np.uint8))


class Subjects:
    """The two models in every form, and their engines, kept in ``folder`` between runs."""

    def __init__(self, folder: Path, largest: int) -> None:
        self.preprocess = Preprocess(height=SIZES[0].image, width=SIZES[0].image)
        #: In float32, and in the type that is timed.
        self.modules = [self._spread(vit(size, n).to(DEVICE)) for n, size in enumerate(SIZES)]
        self.fast = [copy.deepcopy(module).to(TYPE) for module in self.modules]
        mode = {"mode": "reduce-overhead"} if GPU else {"dynamic": True}
        self.compiled = [torch.compile(module, **mode) for module in self.fast]  # type: ignore[call-overload]
        self.store, self.folder = Store(folder / "store"), folder
        self.batch = ShapeRange(1, min(8, largest), largest)
        kinds = ("inductor",) if GPU else ("onnxruntime", "inductor")
        self.engines = {kind: [self._engine(kind, n) for n in (0, 1)] for kind in kinds}

    def _spread(self, module: Vit) -> Vit:
        """The module with a head that tells random images apart, by far more than rounding does.

        Along a random direction the features of all images are nearly the same.
        """
        x = torch.from_numpy(preprocess(pictures(64, SIZES[0]), self.preprocess)).to(DEVICE)
        head, module.head = module.head, torch.nn.Identity()
        with torch.no_grad():
            features = torch.cat([module(rows) for rows in x.split(8)])
            mean = features.mean(0)
            direction = torch.linalg.svd(features - mean, full_matrices=False).Vh[0]
            direction /= ((features - mean) @ direction).std()
            head.weight.copy_(direction[None])
            head.bias.copy_(-(mean @ direction))
        module.head = head
        return module

    def _engine(self, kind: str, number: int) -> Engine:
        module, size = self.modules[number], SIZES[number]
        path = self.folder / f"stage{number}-{size.image}-{size.width}-{size.depth}"
        example = torch.zeros(1, 3, size.image, size.image)
        if kind == "onnxruntime":
            path = path.with_suffix(".onnx")
            model: OnnxModel | TorchProgram = (
                OnnxModel.open(path)
                if path.exists()
                else export(
                    module, ExportOptions(), path, example=example, preprocess=self.preprocess
                )
            )
            return build(model, BuildOptions(batch=self.batch), store=self.store)
        precision = "bf16" if GPU else "fp32"
        path = path.with_suffix(f".{precision}.pt2")
        model = (
            TorchProgram.open(path)
            if path.exists()
            else export_program(
                copy.deepcopy(module).cpu(),
                ProgramOptions(precision=precision),  # type: ignore[arg-type]
                path,
                example=example,
                preprocess=self.preprocess,
            )
        )
        options = BuildOptions(
            backend="inductor",
            batch=self.batch,
            precision=precision,  # type: ignore[arg-type]
            target=DEVICE.type,
            optimization_level=3,
        )
        return build(model, options, store=self.store)


def exact(subjects: Subjects, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of both models in float32."""
    with torch.no_grad():
        parts = torch.from_numpy(x).to(DEVICE).split(8)
        logits = [torch.cat([module(part)[:, 0] for part in parts]) for module in subjects.modules]
    first, second = (torch.sigmoid(one).cpu().numpy() for one in logits)
    return first, second


def race(subjects: Subjects, batch: int, repeats: int) -> Race:
    """Time every contestant on one batch, after holding each to the exact answer."""
    images = pictures(batch, SIZES[0])
    x = preprocess(images, subjects.preprocess)
    first, second = exact(subjects, x)
    # Thresholds halfway between scores, so that rounding turns no image over.
    ranks = np.sort(np.concatenate([[0.0], first, [1.0]]))
    kept = round(batch * (1 - ESCALATED))
    at = (kept + 1) // 2, batch - kept // 2
    low, high = (float((ranks[k] + ranks[k + 1]) / 2) for k in at)
    stays = (first < low) | (first > high)
    wanted = np.where(stays, first, second), stays

    def by_hand(models: Sequence[Callable[[torch.Tensor], torch.Tensor]]) -> Answers:
        rows = torch.from_numpy(preprocess(images, subjects.preprocess)).to(DEVICE, TYPE)
        with torch.no_grad():
            scores = torch.sigmoid(models[0](rows)[:, 0].float()).cpu().numpy()
            decided = (scores < low) | (scores > high)
            index = np.flatnonzero(~decided)
            if index.size:
                again = models[1](rows[torch.from_numpy(index).to(DEVICE)])
                scores[index] = torch.sigmoid(again[:, 0].float()).cpu().numpy()
        return scores, decided

    cascades: dict[str, Cascade] = {}
    with ExitStack() as opened:
        calls: dict[str, Callable[[], Answers]] = {
            EAGER: lambda: by_hand(subjects.fast),
            "torch.compile, host routing": lambda: by_hand(subjects.compiled),
        }
        for kind, engines in subjects.engines.items():
            sessions = [opened.enter_context(load(engine)) for engine in engines]

            def both(sessions: Any = sessions) -> Answers:
                rows = preprocess(images, subjects.preprocess)
                one, two = (1 / (1 + np.exp(-session(rows)[:, 0])) for session in sessions)
                decided = (one < low) | (one > high)
                return np.where(decided, one, two), decided

            calls[f"both models always, {kind}"] = both
            stages = (
                StageSpec(
                    "first", engine=str(engines[0].folder), score="sigmoid", low=low, high=high
                ),
                StageSpec("second", engine=str(engines[1].folder), score="sigmoid"),
            )
            for mode in ("host", "device", "cpu") if GPU else ("cpu",):
                spec = CascadeSpec(stages, max_batch=subjects.batch.max)
                try:
                    cascade = opened.enter_context(Cascade(spec, mode=mode))  # type: ignore[arg-type]
                except CudaUnavailableError as error:
                    print(f"no cascade with mode={mode!r}: {error}")
                    continue
                if cascade.report().executor.mode != mode:  # it fell back, and the other one runs
                    print(f"no cascade with mode={mode!r}: {cascade.report().executor.reason}")
                    continue

                def ours(cascade: Cascade = cascade) -> Answers:
                    results = cascade(images)
                    return (
                        np.array([r.probability for r in results], np.float32),
                        np.array([r.stage == "first" for r in results]),
                    )

                name = f"cascade {mode}, {kind}" if GPU else f"cascade, {kind}"
                calls[name], cascades[name] = ours, cascade
        passed = {name: _right(call(), wanted) for name, call in calls.items()}
        found = interleave(calls, warmup=3, repeats=repeats)
        own = {
            name: round(100 * report.own_seconds / sum(s.counts.seconds for s in report.stages), 2)
            for name, report in ((name, cascade.report()) for name, cascade in cascades.items())
            if report.executor.mode == "cpu"
        }
    return Race(batch, {name: round(f.p50, 3) for name, f in found.items()}, passed, own)


def _right(got: Answers, wanted: Answers) -> bool:
    same = got[1] == wanted[1]
    close = np.abs(got[0] - wanted[0])[same] <= TOLERANCE
    return bool(same.mean() >= AGREEMENT and close.all())


def save_plot(races: Sequence[Race], path: Path, title: str) -> Path:
    """Milliseconds an image of every contestant, a group of bars for each batch size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    names = list(races[0].p50_ms)
    width = 0.8 / len(names)
    for k, name in enumerate(names):
        heights = [race.p50_ms[name] / race.batch for race in races]
        places = np.arange(len(races)) + (k - (len(names) - 1) / 2) * width
        axes.bar(places, heights, width * 0.92, label=name)
    axes.set_xticks(range(len(races)), [f"batch {race.batch}" for race in races])
    axes.set_ylabel("milliseconds an image, median")
    axes.set_title(title, loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    with atomic.replacing(path) as scratch:
        figure.savefig(scratch, format="png")
    return path


def title(found: dict[str, Any]) -> str:
    """What was raced, on what and when."""
    return (
        f"two-stage cascade, {ESCALATED:.0%} of the images escalated (none at batch 1); "
        f"{found['device']}, {found['date']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batches", default="1,8,32,64")
    parser.add_argument("--repeats", type=int, default=30, help="rounds; fewer for large batches")
    parser.add_argument("--folder", type=Path, required=True, help="where engines are kept")
    parser.add_argument("--record", type=Path, required=True, help="JSON; batches are added to it")
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    subjects = Subjects(options.folder, largest=64)
    record: dict[str, Any] = {"machine": machine.describe(), "races": []}
    if options.record.exists():
        record["races"] = json.loads(options.record.read_text())["races"]
    for batch in map(int, options.batches.split(",")):
        done = race(subjects, batch, max(5, options.repeats // max(1, batch // 8)))
        print(f"batch {batch}")
        for name, ms in done.p50_ms.items():
            gain = f"{done.speedups[name]:.2f}x" if done.passed[name] else "wrong answers"
            own = f", {done.own_percent[name]}% its own" if name in done.own_percent else ""
            print(f"  {name:<36} {ms:>9.2f} ms  {gain}{own}")
        record["races"] = [r for r in record["races"] if r["batch"] != batch] + [done.to_dict()]
        record["races"].sort(key=lambda r: r["batch"])
        atomic.write_text(options.record, json.dumps(record, indent=1) + "\n")
    if options.picture:
        races = [Race(r["batch"], r["p50_ms"], r["passed"], {}) for r in record["races"]]
        save_plot(races, options.picture, title(record["machine"]))


if __name__ == "__main__":
    main()
