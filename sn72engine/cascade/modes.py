"""Which executor runs a cascade, and why.

========  =========================================================================================
mode      what runs
========  =========================================================================================
cpu       every stage as an object on the host, whatever device it uses itself
host      the first stages as CUDA graphs, one launch per stage; the host reads each decision
device    the first stages as one CUDA graph launch per batch
auto      ``host`` where that is possible, else ``cpu``
========  =========================================================================================

``auto`` does not choose ``device``: it has not been proven on a GPU yet.

The captured stages are the first ones that offer it. The first stage that does not, such as OCR or
a VLM, and all after it, run as with ``cpu``. A parallel group is captured as a whole or not at all,
and only where its stages wait for the same trigger.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from sn72engine.cascade.buckets import BucketOptions, BucketPlan
from sn72engine.cascade.device import DeviceLaunches
from sn72engine.cascade.executor import CpuExecutor, Executor
from sn72engine.cascade.graphed import GraphExecutor, Launches
from sn72engine.cascade.host import HostLaunches
from sn72engine.cascade.lane import CapturedStage, Lane
from sn72engine.cascade.report import ExecutorReport
from sn72engine.cascade.sizing import measured_plans, with_plans
from sn72engine.cascade.spec import CascadeSpec
from sn72engine.cuda.api import Driver
from sn72engine.cuda.bindings import open_driver
from sn72engine.cuda.driver import driver_available
from sn72engine.cuda.layout import FAILURE_BITS, MAX_BUCKETS
from sn72engine.errors import (
    CascadeError,
    CudaUnavailableError,
    OptionError,
    Sn72Error,
    described,
)
from sn72engine.graphs import Capturer, GraphStore, TorchCapturer
from sn72engine.spec import Options, check_int, check_number
from sn72engine.stages.base import Stage
from sn72engine.stages.capture import Capturable, Offers

log = logging.getLogger("sn72engine.cascade")

Mode = Literal["auto", "cpu", "host", "device"]

OpenGpu = Callable[[int], tuple[Driver, Capturer]]
"""From the number of a GPU to what drives it and what captures on it."""

_UNPROVEN = "mode='auto' does not choose 'device', which has not been proven on a GPU yet"


@dataclass(frozen=True, slots=True)
class GraphOptions(Options):
    """How stages are captured.

    Args:
        lanes: batches that can be on the GPU at a time. Each lane has its own memory and graphs;
            with one, nothing hides the time in which the host prepares the next batch.
        buckets: numbers of rows that each stage is captured for, ascending; the largest batch is
            added. Empty takes :func:`default_buckets`. ``measured`` times each stage at these when
            the cascade opens and chooses among them, see :mod:`sn72engine.cascade.sizing`: fewer
            graphs and less memory, for a longer opening, and not the same ones on every machine.
        max_buckets: most that ``measured`` chooses for a stage.
        memory_bytes: most that the graphs which ``measured`` chooses may add to PyTorch's device
            memory, all stages and lanes together; None for no limit. What TensorRT's contexts and
            the driver allocate for themselves is not counted.
        shares: of the samples that escalate from the first stage, the second, and so on, as
            ``measured`` expects them; the last one holds for later stages. A parallel group counts
            as one stage. A cascade's report has them as ``escalated`` of ``asked``.
    """

    lanes: int = 2
    buckets: tuple[int, ...] | Literal["measured"] = ()
    max_buckets: int = 6
    memory_bytes: int | None = None
    shares: tuple[float, ...] = (0.3,)

    def __post_init__(self) -> None:
        check_int("lanes", self.lanes, 1, 16)
        check_int("max_buckets", self.max_buckets, 1, MAX_BUCKETS)
        if not self.shares:
            raise OptionError("shares=() must hold at least one share")
        for share in self.shares:
            check_number("shares", share, 0.0, 1.0)
        if self.memory_bytes is not None:
            check_int("memory_bytes", self.memory_bytes, 0)
        if self.buckets != "measured":
            self._check_buckets(self.buckets)

    def _check_buckets(self, buckets: tuple[int, ...]) -> None:
        if not isinstance(buckets, tuple):
            raise OptionError(f"buckets={buckets!r} must be a tuple of numbers or 'measured'")
        for bucket in buckets:
            check_int("buckets", bucket, 1)
        if any(a >= b for a, b in itertools.pairwise(buckets)):
            raise OptionError(f"buckets={buckets!r} must be ascending")
        if len(buckets) >= MAX_BUCKETS:
            raise OptionError(f"buckets={buckets!r} must be fewer than {MAX_BUCKETS}")
        if self.memory_bytes is not None:
            raise OptionError(
                f"memory_bytes={self.memory_bytes!r} is a limit for buckets='measured', not for "
                f"buckets={buckets!r}"
            )


def default_buckets(capacity: int) -> tuple[int, ...]:
    """1, 2, 4, 8, and on in equal steps of 8 or, for large batches, more.

    Rows without a sample cost more than further graphs do: with powers of two nearly half of the
    rows would be padding at some batch sizes.
    """
    step = 8
    while capacity // step > MAX_BUCKETS - 5:
        step += 8
    small = [bucket for bucket in (1, 2, 4, 8) if bucket < min(capacity, step + 1)]
    return tuple(sorted({*small, *range(step, capacity, step), capacity}))


def open_gpu(device: int) -> tuple[Driver, Capturer]:
    """The GPU itself, captured by PyTorch.

    Raises:
        CudaUnavailableError: it cannot be used; says why.
    """
    capturer = TorchCapturer(device)  # first, so that PyTorch has made its context
    return open_driver(device), capturer


def make_executor(
    spec: CascadeSpec,
    stages: Sequence[Stage],
    mode: Mode,
    options: GraphOptions,
    *,
    device: int = 0,
    gpu: OpenGpu | None = None,
) -> tuple[Executor, Callable[[], ExecutorReport]]:
    """Choose an executor and make it.

    Args:
        spec, stages: of the cascade.
        mode: see the module.
        options: how stages are captured.
        device: number of the GPU.
        gpu: opens it; None looks for a driver first, and takes :func:`open_gpu`.

    Returns:
        The executor, and what says which one it is and why.

    Raises:
        CudaUnavailableError: ``host`` or ``device`` was asked for, and there is no usable GPU.
        CascadeError: one of them was asked for, and the first stage cannot be captured.
    """
    cpu = CpuExecutor(spec, stages)

    def plain(reason: str) -> tuple[Executor, Callable[[], ExecutorReport]]:
        return cpu, lambda: ExecutorReport("cpu", reason)

    if mode == "cpu":
        return plain("mode='cpu' was asked for")
    if gpu is None:
        found = driver_available()  # before anything else of CUDA, parts of which may hang
        if not found.ok:
            if mode == "auto":
                return plain(found.reason)
            raise CudaUnavailableError(
                f"mode={mode!r} needs a GPU: {found.reason}; use mode='cpu' or 'auto'"
            )
        gpu = open_gpu
    offers, why_rest = _offers(spec, stages, device)
    if not offers:
        if mode == "auto":
            return plain(why_rest)
        raise CascadeError(f"mode={mode!r} cannot capture the first stage: {why_rest}")
    try:
        captured = _captured(spec, offers, options)
        driver, capturer = gpu(device)
        with driver.current():
            return _graphed(spec, captured, cpu, mode, options, driver, capturer, why_rest)
    except Exception as error:  # also PyTorch's own: out of memory, no GPU of that number
        if mode == "auto":
            log.warning("stages run on the host: %s", described(error))
            return plain(described(error))
        if isinstance(error, Sn72Error):
            raise
        raise CudaUnavailableError(f"mode={mode!r} is not possible: {described(error)}") from error


def _offers(
    spec: CascadeSpec, stages: Sequence[Stage], device: int
) -> tuple[list[Capturable], str]:
    """What the first groups of stages offer, and why the next does not; empty if all do."""
    offers: list[Capturable] = []
    for group in spec.groups:
        try:
            offers += [_offer(spec, stages, group, at, device) for at in group]
        except CudaUnavailableError as error:
            return offers, str(error)
    return offers, ""


def _offer(
    spec: CascadeSpec, stages: Sequence[Stage], group: tuple[int, ...], at: int, device: int
) -> Capturable:
    """What stage ``at`` of a group offers.

    Raises:
        CudaUnavailableError: it cannot be captured; says why.
    """
    own, first, stage = spec.stages[at], spec.stages[group[0]], stages[at]
    if own.when != first.when:
        raise CudaUnavailableError(
            f"stage {own.name!r} waits for {own.when!r} and {first.name!r} beside it for "
            f"{first.when!r}"
        )
    if any(stages[other] is stage for other in group if other < at):
        # Its lanes would share memory that is written, on branches that run at the same time.
        raise CudaUnavailableError(f"stage {own.name!r} is the same object as one beside it")
    if not isinstance(stage, Offers):
        raise CudaUnavailableError(
            f"stage {own.name!r}, a {type(stage).__name__}, cannot be captured"
        )
    if at >= FAILURE_BITS:
        raise CudaUnavailableError(f"at most {FAILURE_BITS} stages can be captured")
    try:
        return stage.offer_capture(device)
    except CudaUnavailableError as error:
        raise CudaUnavailableError(f"stage {own.name!r} cannot be captured: {error}") from error


def _captured(
    spec: CascadeSpec, offers: Sequence[Capturable], options: GraphOptions
) -> list[CapturedStage]:
    """The stages with their buckets, or candidates for them, within what each can run."""
    capacity = spec.max_batch
    given = () if options.buckets == "measured" else options.buckets
    buckets = given or default_buckets(capacity)
    buckets = (*(bucket for bucket in buckets if bucket < capacity), capacity)
    captured = []
    for stage, offer in zip(spec.stages, offers, strict=False):
        least, most = offer.limits
        if not least <= capacity <= most:
            raise CascadeError(
                f"stage {stage.name!r} takes batches of {least} to {most}, and max_batch="
                f"{capacity} is outside; change one of them"
            )
        own = tuple(sorted({max(bucket, least) for bucket in buckets}))
        captured.append(CapturedStage(stage, offer, own))
    return captured


def _graphed(
    spec: CascadeSpec,
    captured: Sequence[CapturedStage],
    cpu: CpuExecutor,
    mode: Mode,
    options: GraphOptions,
    driver: Driver,
    capturer: Capturer,
    why_rest: str,
) -> tuple[Executor, Callable[[], ExecutorReport]]:
    plans: list[BucketPlan] = []
    if options.buckets == "measured":
        plans = measured_plans(
            driver,
            capturer,
            captured,
            lanes=options.lanes,
            shares=options.shares,
            options=BucketOptions(options.max_buckets, options.memory_bytes),
        )
        captured = with_plans(captured, plans)
    store = GraphStore(driver, capturer)
    lanes: list[Lane] = []
    try:
        for number in range(options.lanes):
            # One by one: those that were made are released when the next one fails.
            lanes.append(Lane(driver, store, captured, number))  # noqa: PERF401
        chosen, reason, launches = _launches(mode, lanes, store)
    except BaseException:
        for lane in lanes:
            lane.close()
        store.close()
        raise
    if why_rest:
        reason = f"{reason}; captured up to where {why_rest}" if reason else why_rest
    memory = store.bytes_by_bucket()
    executor = GraphExecutor(spec, list(zip(lanes, launches, strict=True)), cpu, store.close)
    names = tuple(stage.spec.name for stage in captured)
    chosen_by = dict(zip(names, plans, strict=False))  # none where nothing was measured

    def report() -> ExecutorReport:
        if executor.failure:
            return ExecutorReport("cpu", f"the GPU failed: {executor.failure}")
        return ExecutorReport(chosen, reason, names, options.lanes, memory, chosen_by)

    return executor, report


def _launches(
    mode: Mode, lanes: Sequence[Lane], store: GraphStore
) -> tuple[Literal["host", "device"], str, list[Launches]]:
    """The graphs of each lane, with the mode that they are for and the reason for it."""
    if mode != "device":
        reason = _UNPROVEN if mode == "auto" else "mode='host' was asked for"
        return "host", reason, _of_all(HostLaunches, lanes)
    objection = store.objection()
    if not objection:
        try:
            return "device", "mode='device' was asked for", _of_all(DeviceLaunches, lanes)
        except CudaUnavailableError as error:
            objection = str(error)
    log.warning("mode='device' is not possible, 'host' is used: %s", objection)
    reason = f"mode='device' is not possible: {objection}"
    return "host", reason, _of_all(HostLaunches, lanes)


def _of_all(kind: Callable[[Lane], Launches], lanes: Sequence[Lane]) -> list[Launches]:
    """The graphs of all lanes, or of none."""
    made: list[Launches] = []
    try:
        for lane in lanes:
            made.append(kind(lane))  # noqa: PERF401 - those that were made are needed below
    except BaseException:
        for launches in made:
            launches.close()
        raise
    return made
