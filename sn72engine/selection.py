"""The fastest engine for this machine that is right: build all, verify all, time them.

Which backend and precision is fastest depends on the model and on the device, so it is measured.
Every model is built with every backend, held to the bounds of the gate against one reference, and
those that keep them are timed with their calls taking turns. The choice is kept beside the engines,
under ``selections/<key>.json``, and taken from there the next time.

TensorRT builds a float32 model in float16, which is what a card is for; the bounds say whether that
will do. Times are those of calls with NumPy arrays, copies to a card included.

The key covers the models, the options, the processor with its number of cores, the card where one
is here, and the versions of the backends (absent ones too, so that installing one means choosing
again). It does not cover the
reference and the data, which would have to be read first: ``SelectOptions(fresh=True)`` chooses
again when they change.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import platform
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, get_args

import numpy as np

from sn72engine import _deps, fingerprint
from sn72engine.builder import build
from sn72engine.cards import card_name, device_target
from sn72engine.doctor import cpu_name
from sn72engine.errors import (
    BuildError,
    InputError,
    MissingDependencyError,
    QuantizationError,
    SessionError,
    VerificationError,
)
from sn72engine.latency import interleave
from sn72engine.model import OnnxModel
from sn72engine.samples import head
from sn72engine.session import Session
from sn72engine.spec import (
    CPU_BACKENDS,
    PROGRAM_BACKENDS,
    TENSORRT_BACKENDS,
    BackendName,
    BuildOptions,
    SelectOptions,
)
from sn72engine.store import Store
from sn72engine.text import wrapped
from sn72engine.verifier import verify
from sn72kernels import atomic

if TYPE_CHECKING:
    from sn72engine.engine import Engine
    from sn72engine.verifier import Model

_Array: TypeAlias = "np.ndarray[Any, Any]"

#: Layout of the remembered choice; another one is ignored.
_FORMAT = 1
_WARMUP = 5

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One engine that was considered.

    ``key`` is the engine's in the store, empty when it was not built. ``milliseconds`` is the
    median of its timed calls, None when it was refused; ``refused`` says why. ``cosine`` and
    ``agreement`` are figures of the gate (mean cosine of the worst output), None when it was not
    reached or does not apply.
    """

    model: str
    backend: BackendName
    key: str = ""
    cosine: float | None = None
    agreement: float | None = None
    milliseconds: float | None = None
    refused: str = ""

    @property
    def name(self) -> str:
        """Backend and model."""
        return f"{self.backend} {self.model}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        if self.refused:
            return f"{self.name}: refused, {self.refused}"
        timed = "not timed" if self.milliseconds is None else f"{self.milliseconds:.3f} ms"
        cosine = "" if self.cosine is None else f", mean cosine {self.cosine:.5f}"
        agreement = "" if self.agreement is None else f", agreement {self.agreement:.2%}"
        return f"{self.name}: {timed}{cosine}{agreement}"


@dataclass(frozen=True, slots=True)
class Selection:
    """The engine that was chosen, and the others with why not.

    ``candidates`` holds the fastest first, those refused last. ``remembered`` says that an
    earlier choice was taken and nothing was measured now.
    """

    engine: Engine
    candidates: tuple[Candidate, ...]
    options: SelectOptions
    remembered: bool = False

    @property
    def chosen(self) -> Candidate:
        """The candidate that ``engine`` is."""
        return self.candidates[0]

    @property
    def reason(self) -> str:
        """Why this one, in one sentence."""
        best, *rest = self.candidates
        others = [c for c in rest if c.milliseconds is not None]
        refused = len(rest) - len(others)
        aside = f"; {refused} refused" if refused else ""
        if not others:
            return f"{best.name} is the only one that keeps the bounds{aside}"
        second = others[0]
        gain = (second.milliseconds or 0.0) / (best.milliseconds or 1.0)
        return (
            f"{best.name} is the fastest that keeps the bounds: {best.milliseconds:.3f} ms at "
            f"batch {self.options.verify.batch}, {gain:.2f} times as fast as {second.name}{aside}"
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "engine": str(self.engine.folder),
            "chosen": self.chosen.name,
            "reason": self.reason,
            "remembered": self.remembered,
            "candidates": [candidate.to_dict() for candidate in self.candidates],
            "options": self.options.to_dict(),
        }

    def render(self) -> str:
        """The report as text, a line per candidate."""
        origin = " (remembered)" if self.remembered else ""
        lines = [wrapped("", f"{self.reason}{origin}", 0)]
        return "\n".join([*lines, *(wrapped("  ", str(c), 2) for c in self.candidates)])


def backends_here() -> tuple[BackendName, ...]:
    """Backends that can run on this machine: those for a CPU, and the others where a card is."""
    names: tuple[BackendName, ...] = get_args(BackendName)
    card = device_target() is not None
    return tuple(
        name
        for name in names
        if name not in PROGRAM_BACKENDS
        and (name in CPU_BACKENDS or (card and _deps.available(name)))
    )


def select(
    models: OnnxModel | Mapping[str, OnnxModel],
    reference: Model,
    batches: Iterable[_Array],
    *,
    labels: _Array | None = None,
    options: SelectOptions | None = None,
    store: Store | None = None,
) -> Selection:
    """Choose the fastest engine for this machine among those that answer as the reference does.

    Args:
        models: forms of one model to choose from, by name, such as
            ``{"fp32": exported, "int8": quantized}``; or a single one.
        reference: whose answers are right: a session, or a callable from a batch to its outputs.
        batches: arrays with samples on axis 0, read once for each candidate: a list or
            :class:`~sn72engine.calibration.CalibrationData`, not a generator.
        labels: shape (samples,), integer class of every sample, in the order of ``batches``.
        options: backends, bounds and threads; None takes the defaults.
        store: where engines and choices are kept; the default store when None.

    Returns:
        The selection; ``load(selection.engine, options.runtime)`` opens the engine.

    Raises:
        InputError: there are no models, no data, or data that can be read only once.
        VerificationError: no candidate is left; the message says why each one was refused.
        StoreError: the store cannot be written.
    """
    options = options if options is not None else SelectOptions()
    store = store if store is not None else Store()
    named: dict[str, OnnxModel] = (
        {models.precision: models} if isinstance(models, OnnxModel) else dict(models)
    )
    if not named:
        raise InputError("models={} holds nothing to choose from")
    path = store.root / "selections" / f"{_key(named, options)}.json"
    if not options.fresh and (remembered := _recall(path)):
        best = remembered[0]
        if best.model in named:
            engine = _build(named[best.model], best.backend, options, store)
            return Selection(engine, remembered, options, remembered=True)
    if isinstance(batches, Iterator):
        raise InputError(
            "batches can be read only once, but each candidate reads them: give a list of arrays "
            "or what sn72engine.batches returns"
        )
    engines, considered = _examine(named, reference, batches, labels, options, store)
    if not engines:
        reasons = "; ".join(str(candidate) for candidate in considered)
        raise VerificationError(f"no engine keeps the bounds: {reasons}")
    timed = _time(engines, considered, head(batches, options.verify.batch), options)
    _remember(path, timed)
    return Selection(engines[timed[0].name], timed, options)


def _examine(
    models: Mapping[str, OnnxModel],
    reference: Model,
    batches: Iterable[_Array],
    labels: _Array | None,
    options: SelectOptions,
    store: Store,
) -> tuple[dict[str, Engine], list[Candidate]]:
    """Build and verify every candidate; the engines of those that passed, by candidate name."""
    engines: dict[str, Engine] = {}
    considered = []
    for backend in options.backends:
        for model_name, model in models.items():
            candidate = Candidate(model_name, backend)
            if backend in _deps.DEPENDENCIES and not _deps.available(backend):
                hint = _deps.DEPENDENCIES[backend].hint
                reason = f"{backend} is not installed or too old; run: {hint}"
                considered.append(dataclasses.replace(candidate, refused=reason))
                continue
            try:
                engine = _build(model, backend, options, store)
                # One at a time, so that memory holds one engine while the data is read.
                with Session(engine, options.runtime) as session:
                    report = verify(
                        session, reference, batches, labels=labels, options=options.verify
                    )
            except (BuildError, QuantizationError, SessionError, MissingDependencyError) as error:
                considered.append(dataclasses.replace(candidate, refused=str(error)))
                continue
            engine = store.update_manifest(engine, verification=report.to_dict())
            candidate = dataclasses.replace(
                candidate,
                key=engine.manifest.key,
                cosine=_finite(min(output.cosine_mean for output in report.outputs)),
                agreement=report.classes.agreement,
                refused="; ".join(report.failures),
            )
            considered.append(candidate)
            if report.passed:
                engines[candidate.name] = engine
    return engines, considered


def _time(
    engines: Mapping[str, Engine],
    considered: list[Candidate],
    samples: _Array,
    options: SelectOptions,
) -> tuple[Candidate, ...]:
    """The candidates with their medians, fastest first and those refused last."""
    batch = samples[np.arange(options.verify.batch) % len(samples)]  # repeated when data is short
    with ExitStack() as stack:
        calls = {}
        for name, engine in engines.items():
            session = stack.enter_context(Session(engine, options.runtime))
            calls[name] = partial(session, batch.astype(session.inputs[0].dtype, copy=False))
        found = interleave(calls, warmup=_WARMUP, repeats=options.verify.repeats)
    timed = [
        dataclasses.replace(c, milliseconds=found[c.name].p50) if c.name in found else c
        for c in considered
    ]
    return tuple(sorted(timed, key=_by_time))


def _by_time(candidate: Candidate) -> float:
    return float("inf") if candidate.milliseconds is None else candidate.milliseconds


def _build(model: OnnxModel, backend: BackendName, options: SelectOptions, store: Store) -> Engine:
    precision = model.precision
    if precision == "fp32" and backend in TENSORRT_BACKENDS:
        precision = "fp16"
    wanted = BuildOptions(backend=backend, batch=options.batch, precision=precision)
    return build(model, wanted, store=store, progress=False)


def _key(models: Mapping[str, OnnxModel], options: SelectOptions) -> str:
    wanted = options.to_dict()
    del wanted["fresh"]
    return fingerprint.sha256_json(
        {
            "models": {name: model.sha256() for name, model in models.items()},
            "options": wanted,
            "processor": [cpu_name(), os.cpu_count(), platform.system(), platform.machine()],
            "card": card_name(),
            "versions": {
                backend: _deps.version(backend)
                for backend in options.backends
                if backend in _deps.DEPENDENCIES
            },
        }
    )[:32]


def _remember(path: Path, candidates: tuple[Candidate, ...]) -> None:
    rows = [candidate.to_dict() for candidate in candidates]
    text = json.dumps({"format": _FORMAT, "candidates": rows}, indent=2, allow_nan=False)
    atomic.write_text(path, text + "\n")


def _recall(path: Path) -> tuple[Candidate, ...]:
    """What was remembered; empty when there is nothing or it cannot be read."""
    try:
        values = json.loads(path.read_bytes())
        if values["format"] != _FORMAT:
            return ()
        found = tuple(Candidate(**row) for row in values["candidates"])
        if not found or not found[0].milliseconds:
            raise ValueError("no candidate was timed")
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, KeyError, TypeError) as error:
        _log.warning("%s: cannot be read (%r); choosing again", path, error)
        return ()
    return found


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
