"""A TensorRT engine in the memory of one device: its weights, and the contexts that share them."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sn72engine.backends.tensorrt_device import Device
from sn72engine.backends.tensorrt_log import explain, make_logger
from sn72engine.cache_file import CacheFile
from sn72engine.cards import device_target
from sn72engine.engine import Engine
from sn72engine.errors import SessionError
from sn72engine.spec import RuntimeOptions

if TYPE_CHECKING:
    import torch

#: Value of ``shape_kernels`` -> member of ``DynamicShapesKernelSpecializationStrategy``.
SHAPE_KERNELS = {"lazy": "LAZY", "eager": "EAGER", "none": "NONE"}

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Profile:
    """An optimization profile: smallest, tuned and largest shape of each input by name."""

    ranges: Mapping[str, tuple[Shape, Shape, Shape]]

    def takes(self, shapes: Mapping[str, Shape]) -> bool:
        """Whether every shape lies within its range."""
        return all(
            low <= size <= high
            for name, shape in shapes.items()
            for low, size, high in zip(
                self.ranges[name][0], shape, self.ranges[name][2], strict=True
            )
        )

    def distance(self, shapes: Mapping[str, Shape]) -> int:
        """How far the shapes are from those that the profile is tuned for, over all axes."""
        return sum(
            abs(size - tuned)
            for name, shape in shapes.items()
            for size, tuned in zip(shape, self.ranges[name][1], strict=True)
        )


def nearest(profiles: Sequence[Profile], shapes: Mapping[str, Shape]) -> int:
    """Index of the profile that takes ``shapes`` and is tuned nearest to them; first of equals.

    Raises:
        SessionError: no profile takes them.
    """
    taking = [index for index, profile in enumerate(profiles) if profile.takes(shapes)]
    if not taking:
        given = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise SessionError(f"no optimization profile takes {given}; build with profiles that do")
    return min(taking, key=lambda index: profiles[index].distance(shapes))


class LoadedEngine:
    """A deserialised engine; its execution contexts share the weights.

    Args:
        trt: the library.
        engine: what to load.
        device: where to.
        options: how it will be run.

    Raises:
        SessionError: TensorRT refuses it, or it lacks its weights.
    """

    def __init__(self, trt: Any, engine: Engine, device: Device, options: RuntimeOptions) -> None:
        self.trt = trt
        self.manifest = engine.manifest
        self.options = options
        self.logger = make_logger(trt)
        self.plan_bytes = engine.path.stat().st_size
        # The library's engines are not for use by several threads; contexts are made under a lock.
        self._lock = threading.Lock()
        asked = engine.manifest.build_options.get("tensorrt", {})
        if engine.manifest.stripped:
            raise SessionError(
                f"{engine.folder} was built without its weights: put them in with refit(engine, "
                "model) and load what that returns"
            )
        with device.current():
            # The runtime must outlive the engine, and the logger the runtime.
            self._runtime = load_runtime(trt, self.logger, options, asked)
            self._engine = self._runtime.deserialize_cuda_engine(engine.path.read_bytes())
            if self._engine is None:
                raise SessionError(f"{engine.path.name} cannot be loaded: {self.explain()}")
            self._check_names()
            self._stream_weights()
            self.profiles = self._read_profiles()
            self._cache: CacheFile | None = None
            self._cached: Any = None
            self._config = self._configure()

    def new_context(self, profile: int, device: Device) -> Any:
        """A context for one profile.

        It takes its scratch memory from the caller, unless weights are streamed: that needs memory
        of TensorRT's own while it runs.

        Raises:
            SessionError: TensorRT cannot prepare it.
        """
        with self._lock:
            context = self._engine.create_execution_context(self._config)
            if context is None:
                raise SessionError(f"the engine cannot be prepared: {self.explain()}")
            self.check(
                context.set_optimization_profile_async(profile, device.stream),
                f"profile {profile}",
            )
        device.synchronize()  # what it copies must be there before other streams read it
        return context

    def set_inputs(self, context: Any, inputs: Mapping[str, torch.Tensor]) -> None:
        """Give a context the shapes and addresses of all inputs, and let it work out the others.

        Raises:
            SessionError: TensorRT refuses one, or cannot tell a shape.
        """
        for name, tensor in inputs.items():
            self.check(context.set_input_shape(name, tuple(tensor.shape)), f"shape of {name!r}")
            self.check(context.set_tensor_address(name, tensor.data_ptr()), f"input {name!r}")
        missing = context.infer_shapes()
        if missing:
            raise SessionError(f"TensorRT cannot work out shapes without {', '.join(missing)}")

    def set_output(self, context: Any, name: str, tensor: torch.Tensor) -> None:
        """Give a context the address of an output.

        Raises:
            SessionError: TensorRT refuses it.
        """
        self.check(context.set_tensor_address(name, tensor.data_ptr()), f"output {name!r}")

    def nearest(self, inputs: Mapping[str, torch.Tensor]) -> int:
        """Index of the profile for these inputs: see :func:`nearest`."""
        return nearest(self.profiles, {name: tuple(t.shape) for name, t in inputs.items()})

    @property
    def streams(self) -> bool:
        """Whether weights are streamed from host memory."""
        return bool(self._engine.streamable_weights_size)

    def scratch_bytes(self, profile: int) -> int:
        """Device memory that a context for ``profile`` needs while it runs."""
        size: int = self._engine.get_device_memory_size_for_profile_v2(profile)
        return size

    @property
    def largest_scratch_bytes(self) -> int:
        """The same for the most demanding profile."""
        size: int = self._engine.device_memory_size_v2
        return size

    def describe(self) -> str:
        """The layers in JSON, as far as ``ProfilingVerbosity`` had them kept at build time."""
        inspector = self._engine.create_engine_inspector()
        text: str = inspector.get_engine_information(self.trt.LayerInformationFormat.JSON)
        return text

    def keep_kernels(self) -> None:
        """Write the kernels compiled so far to the runtime cache."""
        if self._cache is None:
            return
        serialized = self._cached.serialize()
        if serialized is not None:  # a cache saves time, and its loss must not fail a close
            self._cache.update(lambda stored: bytes(memoryview(serialized)))

    def check(self, status: bool, what: str) -> None:
        """Raise what TensorRT said when it refused something.

        A call that failed without notice would leave the results of an earlier one in place.
        """
        if not status:
            raise SessionError(f"TensorRT refused {what}: {self.explain()}")

    def explain(self) -> str:
        """What TensorRT said since it was last asked."""
        text = explain(self.logger.messages)
        self.logger.messages.clear()
        return text

    def _check_names(self) -> None:
        names = {
            self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)
        }
        declared = {spec.name for spec in (*self.manifest.inputs, *self.manifest.outputs)}
        if names != declared:
            raise SessionError(
                f"the engine holds tensors {sorted(names)}, its manifest {sorted(declared)}; "
                "build it again"
            )

    def _stream_weights(self) -> None:
        """Set how much of the weights stays on the device; before any context is made."""
        budget = self.options.weight_streaming_bytes
        if not self.streams:
            if budget is not None:
                raise SessionError(
                    f"weight_streaming_bytes={budget}: this engine cannot stream its weights; "
                    "build it with TensorRTOptions(weight_streaming=True)"
                )
            return
        if budget is None:
            budget = self._engine.get_weight_streaming_automatic_budget()
        budget = min(budget, self._engine.streamable_weights_size)
        try:
            self._engine.weight_streaming_budget_v2 = budget
        except RuntimeError as error:
            raise SessionError(
                f"TensorRT refused a weight budget of {budget} bytes: {self.explain()}"
            ) from error
        self.check(
            self._engine.weight_streaming_budget_v2 == budget, f"a weight budget of {budget} bytes"
        )

    def _read_profiles(self) -> tuple[Profile, ...]:
        return tuple(
            Profile({spec.name: self._range(spec.name, index) for spec in self.manifest.inputs})
            for index in range(self._engine.num_optimization_profiles)
        )

    def _range(self, name: str, profile: int) -> tuple[Shape, Shape, Shape]:
        low, tuned, high = self._engine.get_tensor_profile_shape(name, profile)
        return tuple(low), tuple(tuned), tuple(high)

    def _configure(self) -> Any:
        trt, config = self.trt, self._engine.create_runtime_config()
        if not self.streams:
            config.set_execution_context_allocation_strategy(
                trt.ExecutionContextAllocationStrategy.USER_MANAGED
            )
        if self.manifest.backend == "tensorrt_rtx":
            self._configure_rtx(config)
        return config

    def _configure_rtx(self, config: Any) -> None:
        trt, options = self.trt, self.options
        kernels = trt.DynamicShapesKernelSpecializationStrategy.__members__
        config.dynamic_shapes_kernel_specialization_strategy = kernels[
            SHAPE_KERNELS[options.shape_kernels]
        ]
        if options.cuda_graph:
            config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        manifest = self.manifest
        if options.runtime_cache and manifest.key:
            self._cache = CacheFile.of(
                "runtime",
                manifest.backend,
                manifest.backend_version,
                device_target(options.device_index) or manifest.target,
                manifest.key,
            )
            self._cached = config.create_runtime_cache()
            stored = self._cache.read()
            if stored and not self._cached.deserialize(stored):
                # Another driver or a damaged file: it is filled anew.
                self.logger.messages.clear()
            self.check(config.set_runtime_cache(self._cached), "the runtime cache")


def load_runtime(trt: Any, logger: Any, options: RuntimeOptions, asked: Mapping[str, Any]) -> Any:
    """The runtime that deserialises an engine built with the TensorRT options ``asked``.

    Raises:
        SessionError: the lean runtime cannot be loaded.
    """
    runtime = trt.Runtime(logger)
    if asked.get("version_compatible"):
        # Such an engine carries code of the release that built it, which the library asks leave
        # to run. The file was checked against its recorded hash.
        runtime.engine_host_code_allowed = True
    if not options.lean_runtime:
        return runtime
    if not Path(options.lean_runtime).is_file():
        raise SessionError(f"lean_runtime={options.lean_runtime!r}: no such file")
    lean = runtime.load_runtime(options.lean_runtime)
    if lean is None:
        raise SessionError(
            f"lean_runtime={options.lean_runtime!r} cannot be loaded: {explain(logger.messages)}"
        )
    return lean
