"""A stand-in for TensorRT and for the CUDA device, for the runner's tests where there is no card.

It is put in at the driver's boundary only: memory is the host's, a stream does its work at once,
and an engine computes with NumPy what a few lines describe. Its classes have the names and
parameters of the real ones, which a test holds against the recorded surfaces.
"""

from __future__ import annotations

import ctypes
import enum
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

Arrays = dict[str, np.ndarray]


@dataclass
class Plan:
    """What an engine file of the fake holds.

    ``profiles`` map input names to smallest, tuned and largest shapes; ``outputs`` output names to
    shapes where "batch" stands for the batch and -1 for what depends on values. ``refuse`` names
    methods that report failure, ``missing`` weights that no model has; ``weights`` is the file
    that an engine was refitted from.
    """

    profiles: list[dict[str, list[list[int]]]]
    outputs: dict[str, list[Any]]
    scratch: list[int] = field(default_factory=lambda: [64])
    streamable: int = 0
    refuse: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    weights: str = ""

    def to_bytes(self) -> bytes:
        """The engine file."""
        return json.dumps(vars(self)).encode()


class HostDevice:
    """Device of the fake: host memory, and a record of what was asked."""

    def __init__(self, index: int | None) -> None:
        self.torch_device = torch.device("cpu")
        self.stream = id(self)
        self.callers_stream = 7
        self.waits = 0

    @contextmanager
    def current(self) -> Iterator[None]:
        """Note that it is current, which launches ask for."""
        before, HostDevice._is_current = HostDevice._is_current, True
        try:
            yield
        finally:
            HostDevice._is_current = before

    _is_current = False
    queued = in_order = current

    def empty(self, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        """Host memory, filled so that what is not written shows; too much is refused."""
        count = int(np.prod(shape))
        if count > 1 << 30:
            raise torch.OutOfMemoryError(f"{count} elements")
        return torch.full((count,), 77, dtype=torch.float32).to(getattr(torch, dtype)).view(shape)

    def used_here(self, tensors: Any) -> None:
        """Host memory has no streams."""

    def used_by_caller(self, tensors: Any) -> None:
        """Host memory has no streams."""

    def synchronize(self) -> None:
        """Count the wait; work is done at once."""
        self.waits += 1


def at(address: int, shape: tuple[int, ...]) -> np.ndarray:
    """float32 array over memory at an address."""
    count = int(np.prod(shape))
    kind = ctypes.c_float * count
    return np.frombuffer(kind.from_address(address), np.float32).reshape(shape)


class Library:
    """The fake's ``import tensorrt``; ``compute`` is what every engine of it does."""

    def __init__(self, compute: Callable[[Arrays], Arrays]) -> None:
        self.contexts: list[IExecutionContext] = []
        self.engines: list[ICudaEngine] = []
        self.compute = compute
        library = self

        class Runtime:
            """Deserialises engines."""

            engine_host_code_allowed = False

            def __init__(self, logger: Any) -> None:
                self.logger = logger

            def deserialize_cuda_engine(self, serialized_engine: bytes) -> Any:
                """The engine, or None where the file is not the fake's."""
                try:
                    plan = Plan(**json.loads(serialized_engine))
                except ValueError:
                    self.logger.log(SimpleNamespace(name="ERROR"), "bad magic number")
                    return None
                engine = ICudaEngine(library, plan, self.logger)
                library.engines.append(engine)
                return engine

            def load_runtime(self, path: str) -> Any:
                """No lean runtime loads here."""
                self.logger.log(SimpleNamespace(name="ERROR"), "not a runtime")

        self.Runtime = Runtime

    class SerializationFlag(enum.Enum):
        """What to leave out of a file."""

        EXCLUDE_WEIGHTS = 0
        EXCLUDE_LEAN_RUNTIME = 1

    class ILogger:
        """Base of the application's logger."""

    class IOutputAllocator:
        """Base of the application's allocator."""

    class IProfiler:
        """Base of what is told the time of each layer."""

    class LayerInformationFormat(enum.Enum):
        """How the inspector writes."""

        ONELINE = 0
        JSON = 1

    class ExecutionContextAllocationStrategy(enum.Enum):
        """Who gives a context its memory."""

        STATIC = 0
        ON_PROFILE_CHANGE = 1
        USER_MANAGED = 2

    class CudaGraphStrategy(enum.Enum):
        """Whether launches are captured."""

        DISABLED = 0
        WHOLE_GRAPH_CAPTURE = 1

    class DynamicShapesKernelSpecializationStrategy(enum.Enum):
        """When kernels for exact shapes are compiled."""

        LAZY = 0
        EAGER = 1
        NONE = 2


class Refitter:
    """Takes weights for an engine."""

    def __init__(self, engine: ICudaEngine, logger: Any) -> None:
        self._engine, self._logger = engine, logger

    def get_missing_weights(self) -> list[str]:
        """Those that were not given."""
        return self._engine._plan.missing

    def refit_cuda_engine(self) -> bool:
        """Put them in."""
        if "refit_cuda_engine" not in self._engine._plan.refuse:
            return True
        self._logger.log(SimpleNamespace(name="ERROR"), "refit failed")
        return False


class OnnxParserRefitter:
    """Reads weights from an ONNX file."""

    num_errors = 1

    def __init__(self, refitter: Refitter, logger: Any) -> None:
        self._engine = refitter._engine

    def refit_from_file(self, model: str) -> bool:
        """Note the file."""
        self._engine._plan.weights = model
        return "refit_from_file" not in self._engine._plan.refuse

    def get_error(self, index: int) -> Any:
        """The one reason there is."""
        return SimpleNamespace(desc=lambda: "weight w has another shape")


class ISerializationConfig:
    """What to write into an engine file."""

    def __init__(self) -> None:
        self._flags = set(Library.SerializationFlag)

    def clear_flag(self, flag: Any) -> bool:
        """Do not leave that out."""
        self._flags.discard(flag)
        return True


Library.Refitter = Refitter  # type: ignore[attr-defined]
Library.OnnxParserRefitter = OnnxParserRefitter  # type: ignore[attr-defined]


class IRuntimeCache:
    """Compiled kernels."""

    _held = b""

    def deserialize(self, blob: bytes) -> bool:
        """Take what was stored; only what the fake wrote is good."""
        good = blob.startswith(b"kernels")
        self._held = blob if good else self._held
        return good

    def serialize(self) -> bytes | None:
        """What is held, and one kernel more; None where that fails."""
        return None if self._broken else (self._held or b"kernels") + b"+1"

    _broken = False


class IRuntimeConfig:
    """How contexts of an engine run."""

    cuda_graph_strategy: Any = None
    dynamic_shapes_kernel_specialization_strategy: Any = None

    def __init__(self) -> None:
        self._strategy: Any = None
        self._cache: Any = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        """Keep it."""
        self._strategy = strategy

    def get_execution_context_allocation_strategy(self) -> Any:
        """Give it."""
        return self._strategy

    def create_runtime_cache(self) -> IRuntimeCache:
        """An empty one."""
        return IRuntimeCache()

    def set_runtime_cache(self, cache: IRuntimeCache) -> bool:
        """Keep it."""
        self._cache = cache
        return True


class EngineInspector:
    """Tells the layers: one for each output."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def get_engine_information(self, format: Any) -> str:
        """JSON where that is asked for."""
        layers = [{"Name": name, "LayerType": "Fake"} for name in self._plan.outputs]
        return json.dumps({"Layers": layers}) if format.name == "JSON" else "layers"


class ICudaEngine:
    """An engine with named inputs, outputs and profiles."""

    def __init__(self, library: Library, plan: Plan, logger: Any) -> None:
        self._library, self._plan, self._logger = library, plan, logger
        self._names = [*plan.profiles[0], *plan.outputs]
        self.num_io_tensors = len(self._names)
        self.num_optimization_profiles = len(plan.profiles)
        self.device_memory_size_v2 = max(plan.scratch)
        self.streamable_weights_size = plan.streamable
        self.weight_streaming_budget_v2 = plan.streamable

    def get_tensor_name(self, index: int) -> str:
        """Inputs first."""
        return self._names[index]

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[list[int]]:
        """Smallest, tuned, largest."""
        return self._plan.profiles[profile_index][name]

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        """Scratch memory."""
        return self._plan.scratch[profile_index % len(self._plan.scratch)]

    def get_weight_streaming_automatic_budget(self) -> int:
        """Half."""
        return self._plan.streamable // 2

    def create_engine_inspector(self) -> EngineInspector:
        """An inspector."""
        return EngineInspector(self._plan)

    def create_serialization_config(self) -> ISerializationConfig:
        """Everything left out that can be."""
        return ISerializationConfig()

    def serialize_with_config(self, arg0: ISerializationConfig) -> bytes:
        """The file, with weights where they are not left out."""
        plan = self._plan
        whole = Library.SerializationFlag.EXCLUDE_WEIGHTS not in arg0._flags
        return replace(plan, weights=plan.weights if whole else "").to_bytes()

    def create_runtime_config(self) -> IRuntimeConfig:
        """The defaults."""
        return IRuntimeConfig()

    def create_execution_context(self, runtime_config: IRuntimeConfig) -> Any:
        """A context, or None when that is to be refused."""
        if "create_execution_context" in self._plan.refuse:
            self._logger.log(SimpleNamespace(name="ERROR"), "Cuda Runtime (out of memory)")
            return None
        context = IExecutionContext(self._library, self._plan, self._logger, runtime_config)
        self._library.contexts.append(context)
        return context


class IExecutionContext:
    """Runs at once, on host memory, and only what was set for it."""

    profiler: Any = None

    def __init__(
        self, library: Library, plan: Plan, logger: Any, runtime_config: IRuntimeConfig
    ) -> None:
        self._library, self._plan, self._logger = library, plan, logger
        self._config = runtime_config
        self._profile: int | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._allocators: dict[str, Any] = {}
        #: As the real one's bindings do: what it was given once, it holds for life.
        self.kept: list[Any] = []
        self._memory = (0, 0)
        self.launches = 0
        self.streams: list[int] = []

    @property
    def active_optimization_profile(self) -> int:
        """As set."""
        return -1 if self._profile is None else self._profile

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        """Take a profile."""
        self._profile = profile_index
        return self._done("set_optimization_profile_async")

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        """Take a shape within the profile."""
        low, _, high = self._plan.profiles[self.active_optimization_profile][name]
        if not all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True)):
            return self._fail(f"{name} {shape} is outside the profile")
        self._shapes[name] = tuple(shape)
        return self._done("set_input_shape")

    def set_tensor_address(self, name: str, memory: int) -> bool:
        """Take an address."""
        self._addresses[name] = memory
        return self._done("set_tensor_address")

    def set_output_allocator(self, name: str, output_allocator: Any) -> bool:
        """Take an allocator."""
        self._allocators[name] = output_allocator
        self.kept.append(output_allocator)
        return self._done("set_output_allocator")

    def set_device_memory(self, memory: int, size: int) -> None:
        """Take scratch memory."""
        if "set_device_memory" in self._plan.refuse:
            raise RuntimeError("set_device_memory was told to fail")
        self._memory = (memory, size)

    def is_stream_capturable(self, stream: int) -> bool:
        """Whether the next launch could be recorded."""
        return "is_stream_capturable" not in self._plan.refuse

    def infer_shapes(self) -> list[str]:
        """Names of inputs whose shape is not set."""
        if "infer_shapes" in self._plan.refuse:
            self._fail("shapes clash")
            raise RuntimeError("infer_shapes")
        return [name for name in self._plan.profiles[0] if name not in self._shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        """The declared shape at the batch that was set."""
        batch = next(iter(self._shapes.values()))[0]
        return tuple(batch if size == "batch" else size for size in self._plan.outputs[name])

    def execute_async_v3(self, stream_handle: int) -> bool:
        """Compute, reading and writing the addresses that were set."""
        if not HostDevice._is_current:
            return self._fail("another device is current")
        if not self._use_scratch():
            return False
        inputs = {name: at(self._addresses[name], shape) for name, shape in self._shapes.items()}
        for name, value in self._library.compute(inputs).items():
            value = np.ascontiguousarray(value, np.float32)
            address = self._addresses.get(name, 0)
            if name in self._allocators:
                allocator = self._allocators[name]
                address = allocator.reallocate_output_async(
                    name, 0, value.nbytes, 256, stream_handle
                )
                if not address:
                    return self._fail("no memory for an output")
                allocator.notify_shape(name, value.shape)
            at(address, value.shape)[...] = value
            if self.profiler is not None:
                self.profiler.report_layer_time(name, 0.5)
        self.launches += 1
        self.streams.append(stream_handle)
        return self._done("execute_async_v3")

    def _use_scratch(self) -> bool:
        """Overwrite the memory that was given, where it is to be given."""
        strategy = self._config.get_execution_context_allocation_strategy()
        if strategy is not Library.ExecutionContextAllocationStrategy.USER_MANAGED:
            return self._memory == (0, 0) or self._fail("memory that was not asked for")
        if self._plan.streamable:
            return self._fail("streamed weights need memory of the library's own")
        needed = self._plan.scratch[self.active_optimization_profile % len(self._plan.scratch)]
        address, size = self._memory
        if size < needed or not address:
            return self._fail(f"{size} bytes of scratch, {needed} needed")
        ctypes.memset(address, 0xEE, needed)
        return True

    def _done(self, method: str) -> bool:
        return method not in self._plan.refuse or self._fail(f"{method} was told to fail")

    def _fail(self, text: str) -> bool:
        self._logger.log(SimpleNamespace(name="ERROR"), text)
        return False
