"""One race of one op at one size: what runs, what is right, and the record that is kept of it.

A record is JSON lines: a header (machine, versions, date, measured peaks), then one line a race,
written and flushed as each ends, so that whatever ends the run leaves all that was done before.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from sn72kernels import bench
from sn72kernels import device as devices
from sn72kernels.errors import ArgumentError

OURS = "sn72kernels"
EAGER = "PyTorch eager"
COMPILED = "torch.compile"

Call = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Case:
    """One op at one size.

    Attributes:
        op: name of the op.
        label: what distinguishes this case, for people.
        dtype: name of the main dtype.
        shape: sizes that plots put on their axes.
        ours: the op under test, called with ``arguments``.
        others: name -> what it is compared with, called likewise.
        absent: name -> why a peer is not among ``others``.
        arguments: tensors, and whatever else the calls take.
        correct: whether a result of ours is right.
        near: whether another's result is right; ``correct`` where None.
        work: what a call has to do.
    """

    op: str
    label: str
    dtype: str
    shape: tuple[int, ...]
    ours: Call
    others: Mapping[str, Call]
    absent: Mapping[str, str]
    arguments: tuple[Any, ...]
    correct: Callable[[Any], bool]
    work: bench.Work
    near: Callable[[Any], bool] | None = None

    @property
    def device(self) -> torch.device:
        """Where the arguments are."""
        return next(a.device for a in self.arguments if isinstance(a, torch.Tensor))


@dataclass(frozen=True, slots=True)
class Race:
    """What came of a case; :meth:`to_dict` is a line of the record.

    Attributes:
        op: as in the case, like the next four.
        label: for people.
        dtype: name.
        shape: sizes.
        gpu: whether it ran on a GPU; if not, ours is the reference path.
        cold: whether the L2 cache was cold; only tiny arguments on a GPU stay in it.
        work: bytes, operations and the dtype of the bound.
        timings: ours first.
        speedups: name -> its time over ours; only where both results were right.
        absent: name -> why a peer did not take part.
    """

    op: str
    label: str
    dtype: str
    shape: tuple[int, ...]
    gpu: bool
    cold: bool
    work: dict[str, Any]
    timings: list[dict[str, Any]]
    speedups: dict[str, float]
    absent: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {"kind": "race", **asdict(self)}

    @property
    def wrong(self) -> str:
        """Why ours was not timed; empty where it was."""
        return str(self.timings[0]["note"])


def run(case: Case, peaks: bench.Peaks) -> tuple[Race, str]:
    """Race a case; the second value is the table for the terminal.

    A wrong result of ours is in the record, not an exception.
    """
    candidates = {OURS: case.ours, **case.others}
    gpu = case.device.type == "cuda"
    try:
        timings = bench.compare(
            candidates,
            case.arguments,
            correct=case.correct,
            near=case.near,
            work=case.work,
            peaks=peaks,
        )
    except ArgumentError as error:  # nobody was right
        timings = [bench.Timing(name, note=str(error)) for name in candidates]
    race = Race(
        op=case.op,
        label=case.label,
        dtype=case.dtype,
        shape=case.shape,
        gpu=gpu,
        cold=gpu and _cold(case),
        work=asdict(case.work),
        timings=[asdict(timing) for timing in timings],
        speedups=bench.speedups(timings),
        absent=dict(case.absent),
    )
    title = f"{case.op} {case.label} {case.dtype}"
    if not gpu:
        title += ": no GPU is present; sn72kernels is the reference path on the CPU"
    elif not race.cold:
        title += " (arguments too small to leave the L2 cache)"
    lines = [bench.format_timings(title, timings)]
    lines += [f"  {name} did not take part: {why}" for name, why in case.absent.items()]
    return race, "\n".join(lines)


def header(peaks: bench.Peaks) -> dict[str, Any]:
    """First line of a record: when, on what, with what."""
    return {
        "kind": "header",
        **machine.describe(),
        "device": peaks.device,
        "peaks": {"copy_gb_s": peaks.copy_gb_s, "tflop_s": dict(peaks.tflop_s)},
    }


class Record:
    """Appends JSON lines to a file; None keeps nothing."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("")

    def add(self, line: Mapping[str, Any]) -> None:
        """Write one line through to the file."""
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")


def read(path: Path) -> dict[str, Any]:
    """A record as ``{"header": ..., "races": [...]}``, from JSON lines or from that very form.

    A last line that was cut off in the middle is left out.

    Raises:
        ValueError: the file is neither; the message names it.
    """
    text = path.read_text()
    try:
        whole = json.loads(text)
    except ValueError:
        whole = None
    if isinstance(whole, dict) and whole.get("header") and "races" in whole:
        return whole
    lines = []
    for line in text.splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    if not lines or lines[0].get("kind") != "header":
        raise ValueError(f"{path} is no record of kernel benchmarks: its first line is no header")
    return {"header": lines[0], "races": [line for line in lines if line.get("kind") == "race"]}


def _cold(case: Case) -> bool:
    facts = devices.facts(case.device)
    size = bench.bytes_of(*bench.tensors_of(case.arguments))
    return bench.is_cold(size, facts.l2_bytes, facts.memory_bytes)
