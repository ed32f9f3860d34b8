"""TensorRT and TensorRT-RTX, which share one API: one code path for both.

Networks are strongly typed: types are what the ONNX file says, so half precision means a float16
file and INT8 means Q/DQ nodes. The builder flags and calibrators that did this otherwise are gone
in TensorRT 11. Enumerators are used by name, for their numbers move between versions.

TensorRT-RTX also builds for a card that is not present (``target="sm_89"``). TensorRT builds for
the card it finds.
"""

from __future__ import annotations

import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from sn72engine import _deps
from sn72engine.backends.base import BuiltFiles
from sn72engine.backends.tensorrt_log import advise, explain, make_logger, warnings
from sn72engine.backends.tensorrt_runner import TensorRTRunner, numpy_name
from sn72engine.engine import Engine
from sn72engine.errors import BuildError, SessionError
from sn72engine.half import to_half
from sn72engine.model import OnnxModel, TensorSpec
from sn72engine.progress import Progress
from sn72engine.spec import BackendName, BuildOptions, RuntimeOptions
from sn72engine.timing_cache import TimingCache

_FILE = "model.engine"

#: How often the waiting thread looks up: a signal that another thread received wakes nobody.
_POLL_SECONDS = 0.2


class TensorRTBackend:
    """Builds and opens engines of ``tensorrt`` or ``tensorrt_rtx``, whichever ``name`` says."""

    def __init__(self, name: BackendName) -> None:
        self.name: BackendName = name

    def version(self) -> str:
        """Installed version, from its metadata.

        Raises:
            MissingDependencyError: it is not installed.
        """
        return _deps.installed_version(self.name)

    def target(self, options: BuildOptions) -> str:
        """Compute capability that the engine is for, such as ``sm_89``.

        Raises:
            BuildError: ``cuda`` is asked for and no CUDA device is present.
        """
        if options.resolved_target != "cuda":
            return options.resolved_target
        present = device_target()
        if present is None:
            way_out = (
                "name the card to build for, target='sm_89' for example"
                if self.name == "tensorrt_rtx"
                else "build on a machine with the card, or use backend='tensorrt_rtx' with "
                "target='sm_89', which needs none"
            )
            raise BuildError(f"target='cuda': no CUDA device is present; {way_out}")
        return present

    def build(
        self,
        model: OnnxModel,
        options: BuildOptions,
        folder: Path,
        *,
        progress: bool | None = None,
    ) -> BuiltFiles:
        """Write ``model.engine``.

        ``precision="fp16"`` and a Q/DQ model both convert what is float32 to float16 first;
        inputs and outputs keep their types. Ctrl-C stops the builder at its next step.

        Raises:
            BuildError: the parser or the builder refused.
            KeyboardInterrupt: the user cancelled; nothing is left in ``folder``.
        """
        trt = self._library()
        target = self.target(options)
        notes: list[str] = []
        with tempfile.TemporaryDirectory(prefix="sn72-") as scratch:
            source = model.path
            if options.precision in ("fp16", "int8") and model.inputs[0].dtype != "float16":
                source = Path(scratch) / "half.onnx"
                notes += to_half(model.path, source)
            logger = make_logger(trt)
            builder = trt.Builder(logger)
            network = builder.create_network(
                1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
            )
            # The network may point into the parser's weights: it lives until the build is done.
            parser = trt.OnnxParser(network, logger)
            _parse(parser, source, model.path.name, logger)
            _check_signature(network, model)
            config = builder.create_builder_config()
            self._configure(trt, config, options, target)
            profile = _profile(builder, network, model, options)
            if profile is not None and config.add_optimization_profile(profile) < 0:
                raise BuildError(
                    f"batch={options.batch}: TensorRT refuses this range for {model.path.name}: "
                    f"{explain(logger.messages)}"
                )
            cache = self._attach_timing_cache(config, target)
            with Progress(f"build {target}", None, unit="step", shown=progress) as bar:
                plan = _run_builder(trt, builder, network, config, bar)
            if plan is None:
                raise BuildError(
                    f"{model.path.name} cannot be built for {target} with "
                    f"precision={options.precision!r}: {explain(logger.messages)}"
                )
            (folder / _FILE).write_bytes(memoryview(plan))
        if cache is not None:
            cache.update(lambda stored: _merge(config, stored))
        notes += warnings(logger.messages)
        return BuiltFiles((_FILE,), model.inputs, model.outputs, tuple(notes))

    def open(self, engine: Engine, options: RuntimeOptions) -> TensorRTRunner:
        """Load an engine on a CUDA device.

        Raises:
            SessionError: there is no such device, it is of another architecture than the
                engine's, or TensorRT refuses the file.
        """
        wanted = engine.manifest.target
        present = device_target(options.device_index)
        if present is None:
            raise SessionError(
                f"an engine for {wanted} cannot run here: there is no CUDA device "
                f"{options.device_index}; build with backend='onnxruntime' to run on the CPU"
            )
        if present != wanted:
            raise SessionError(
                f"an engine for {wanted} cannot run on CUDA device {options.device_index}, which "
                f"is {present}; build it again with target='cuda' on this machine"
            )
        return TensorRTRunner(self._library(), engine, options.device_index)

    def _library(self) -> Any:
        return _deps.require(self.name, purpose=f"build and run {self.name} engines")

    def _configure(self, trt: Any, config: Any, options: BuildOptions, target: str) -> None:
        if options.workspace_bytes is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
        if options.optimization_level is not None:
            config.builder_optimization_level = options.optimization_level
        if self.name != "tensorrt_rtx" or options.resolved_target == "cuda":
            return  # the default is the card that is present
        name = target.replace("_", "").upper()
        capability = trt.ComputeCapability.__members__.get(name)
        if capability is None:
            known = sorted(
                f"sm_{member[2:]}"
                for member in trt.ComputeCapability.__members__
                if member.startswith("SM")
            )
            raise BuildError(
                f"target={target!r}: TensorRT-RTX {self.version()} builds for {', '.join(known)}; "
                "for other cards use backend='tensorrt' on a machine that has one"
            )
        config.num_compute_capabilities = 1
        if not config.set_compute_capability(capability, 0):
            raise BuildError(f"target={target!r}: TensorRT-RTX refuses this compute capability")

    def _attach_timing_cache(self, config: Any, target: str) -> TimingCache | None:
        if self.name == "tensorrt_rtx":
            return None  # it compiles for the card at run time: its timing cache does nothing
        cache = TimingCache.of(self.name, self.version(), target)
        held = config.create_timing_cache(cache.read())
        if held is None or not config.set_timing_cache(held, False):
            # Entries that this library refuses are replaced, not used.
            config.set_timing_cache(config.create_timing_cache(b""), False)
        return cache


def device_target(index: int | None = None) -> str | None:
    """Architecture of a CUDA device, such as ``sm_90``; None where there is none.

    Args:
        index: of the device; None for PyTorch's current one.
    """
    import torch

    if not torch.cuda.is_available() or (index or 0) >= torch.cuda.device_count():
        return None
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def _parse(parser: Any, source: Path, name: str, logger: Any) -> None:
    if parser.parse_from_file(str(source)):
        return
    reasons = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        node = (
            f"node {error.node_name()!r} ({error.node_operator()}): " if error.node_name() else ""
        )
        advice = advise(error.desc())
        reasons.append(
            f"{node}{error.desc()} [{error.code().name}]" + (f": {advice}" if advice else "")
        )
    raise BuildError(
        f"TensorRT cannot read {name}: {'; '.join(reasons[:3]) or explain(logger.messages)}"
    )


def _check_signature(network: Any, model: OnnxModel) -> None:
    """Refuse a network whose inputs and outputs are not what the ONNX file declares."""

    def declared(specs: tuple[TensorSpec, ...]) -> list[tuple[str, str]]:
        return [(spec.name, spec.dtype) for spec in specs]

    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    for kind, specs, tensors in (
        ("inputs", model.inputs, inputs),
        ("outputs", model.outputs, outputs),
    ):
        found = [(tensor.name, numpy_name(tensor.dtype)) for tensor in tensors]
        if found != declared(specs):
            raise BuildError(
                f"{model.path.name}: TensorRT reads the {kind} as {found}, but the file declares "
                f"{declared(specs)}; export it again with float32 or float16 {kind}"
            )


def _profile(builder: Any, network: Any, model: OnnxModel, options: BuildOptions) -> Any:
    """One profile that spans ``options.batch`` for every input with a free batch axis, or None."""
    profile, batch, free = builder.create_optimization_profile(), options.batch, False
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shape = tuple(tensor.shape)
        if -1 in shape[1:]:
            raise BuildError(
                f"{model.path.name}: input {model.inputs[index]} has a free axis other than the "
                "batch; export it with fixed sizes"
            )
        if -1 in shape:
            free = True
            profile.set_shape(
                tensor.name, *[(size, *shape[1:]) for size in (batch.min, batch.opt, batch.max)]
            )
    return profile if free else None


def _run_builder(trt: Any, builder: Any, network: Any, config: Any, bar: Progress) -> Any:
    """Serialized engine, or None when the builder failed.

    The builder runs in a second thread: Python delivers Ctrl-C to the main thread, which could
    not take it while inside the library.
    """
    monitor = _make_monitor(trt, bar)
    config.progress_monitor = monitor
    # The current CUDA device belongs to a thread; the builder must see the caller's.
    device: Any = nullcontext()
    current = device_target()
    if current is not None:
        import torch

        device = torch.cuda.device(torch.cuda.current_device())

    def work() -> Any:
        with device:
            return builder.build_serialized_network(network, config)

    try:
        with ThreadPoolExecutor(max_workers=1) as pool:
            try:
                future = pool.submit(work)
                while not future.done():
                    wait([future], timeout=_POLL_SECONDS)
                return future.result()
            except KeyboardInterrupt:
                monitor.cancelled.set()
                raise
    finally:
        config.progress_monitor = None


def _make_monitor(trt: Any, bar: Progress) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Shows the outermost phase's steps and the name of the innermost phase."""

        def __init__(self) -> None:
            super().__init__()
            self.cancelled = threading.Event()
            self._lock = threading.Lock()
            self._outermost, self._left = "", 0

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            with self._lock:
                if parent is None:
                    self._outermost, self._left = phase, steps
                    bar.resize(steps)
                bar.note(phase)

        def step_complete(self, phase: str, step: int) -> bool:
            with self._lock:
                if phase == self._outermost and self._left:
                    self._left -= 1
                    bar.step()
            return not self.cancelled.is_set()

        def phase_finish(self, phase: str) -> None:
            with self._lock:
                # A phase may finish without reporting all of its steps.
                if phase == self._outermost and not self.cancelled.is_set():
                    bar.step(self._left)
                    self._left = 0

    return Monitor()


def _merge(config: Any, stored: bytes) -> bytes:
    """Timing cache entries of this build together with what is on disk now."""
    ours = config.get_timing_cache()
    if ours is None:
        return b""
    theirs = config.create_timing_cache(stored) if stored else None
    if theirs is not None:
        ours.combine(theirs, False)
    serialized = ours.serialize()
    return bytes(memoryview(serialized)) if serialized is not None else b""
