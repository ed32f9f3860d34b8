"""Runs TensorRT and TensorRT-RTX engines: contexts, buffers and one stream of one CUDA device."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from sn72engine.backends.base import Array, DeviceMemory
from sn72engine.backends.tensorrt_bound import BoundRun
from sn72engine.backends.tensorrt_device import Device
from sn72engine.backends.tensorrt_engine import LoadedEngine
from sn72engine.engine import Engine
from sn72engine.errors import SessionError
from sn72engine.spec import RuntimeOptions

if TYPE_CHECKING:
    import torch

#: TensorRT's DataType by name -> NumPy's name, which is PyTorch's as well.
_NUMPY_NAMES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT8": "int8",
    "INT32": "int32",
    "INT64": "int64",
    "UINT8": "uint8",
    "BOOL": "bool",
}


def numpy_name(dtype: Any) -> str:
    """NumPy's name of a TensorRT ``DataType``; the type's own name where NumPy has none."""
    name: str = dtype.name
    return _NUMPY_NAMES.get(name, name)


def open_runner(trt: Any, engine: Engine, options: RuntimeOptions) -> TensorRTRunner:
    """Load an engine on the device that ``options`` names.

    Raises:
        SessionError: TensorRT refuses it.
    """
    device = Device(options.device_index)
    return TensorRTRunner(LoadedEngine(trt, engine, device, options), device)


class TensorRTRunner:
    """One stream with one execution context per optimization profile.

    A context keeps its profile for life: switching would wait for the device, and one that was
    captured in a CUDA graph must not change. They run one after the other on one stream, so they
    share one scratch memory, which grows to the largest that was needed. :meth:`run` copies NumPy
    arrays in and out through device buffers that grow likewise; :meth:`run_device` takes and gives
    PyTorch tensors on the device and copies nothing.
    """

    def __init__(self, loaded: LoadedEngine, device: Device) -> None:
        self.inputs = loaded.manifest.inputs
        self.outputs = loaded.manifest.outputs
        self._loaded: LoadedEngine | None = loaded
        self._device = device
        self._contexts: dict[int, Any] = {}
        #: Address and size of the scratch memory that each context has been given.
        self._given: dict[int, tuple[int, int]] = {}
        #: By profile and output: one for good, for a context never lets go of an allocator.
        self._allocators: dict[tuple[int, str], Any] = {}
        self._buffers: dict[str, torch.Tensor] = {}
        self._scratch: torch.Tensor | None = None
        self._bound_scratch: torch.Tensor | None = None
        with device.current():
            # The first is made now, so that an engine that cannot run fails when it is opened.
            self._context(loaded, 0)

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self._device.torch_device

    def twin(self) -> TensorRTRunner:
        """Another runner of the same engine, with a stream of its own and the weights shared."""
        return TensorRTRunner(self._open(), Device(self._device.torch_device.index))

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Execute on contiguous NumPy arrays; the arrays returned belong to the caller.

        Raises:
            SessionError: TensorRT reported failure.
        """
        import torch

        loaded = self._open()
        with self._device.queued():
            bound = {}
            try:
                for name, array in inputs.items():
                    host = torch.from_numpy(array) if array.flags.writeable else torch.tensor(array)
                    bound[name] = self._buffer(name, tuple(host.shape), array.dtype.name)
                    bound[name].copy_(host, non_blocking=True)
                results = self._enqueue(loaded, bound, self._buffer)
                # Copying to the host waits for the stream, and gives memory that is not reused.
                return {name: tensor.cpu().numpy() for name, tensor in results.items()}
            except RuntimeError as error:  # of PyTorch, or of a binding that raises
                raise _failed(error, loaded) from error

    def run_device(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Execute on contiguous tensors of this device, in order with the current stream.

        Returns before the work is done, as PyTorch operators do. The tensors returned are new.

        Raises:
            SessionError: TensorRT refused the launch.
        """
        loaded = self._open()
        with self._device.in_order():
            try:
                results = self._enqueue(loaded, inputs, self._fresh)
            except RuntimeError as error:
                raise _failed(error, loaded) from error
        # Both streams use these blocks: the allocator must not hand them on before both are done.
        self._device.used_here(inputs.values())
        self._device.used_by_caller(results.values())
        return results

    def bind(self, inputs: Mapping[str, torch.Tensor]) -> BoundRun:
        """A launch on contiguous tensors of this device that stay where they are, for a graph.

        All bindings of one runner share scratch memory: those that run at the same time must be of
        twins.

        Raises:
            SessionError: TensorRT refuses, or the engine cannot be captured.
        """
        loaded = self._open()
        with self._device.queued():
            try:
                if self._bound_scratch is None:
                    size = max(1, loaded.largest_scratch_bytes)
                    self._bound_scratch = self._device.empty((size,), "uint8")
                return BoundRun(loaded, self._device, inputs, self._bound_scratch)
            except RuntimeError as error:
                raise _failed(error, loaded) from error

    def device_memory(self) -> DeviceMemory:
        """Device memory that is held now, and the most that scratch can come to."""
        loaded = self._open()
        return DeviceMemory(
            engine=loaded.plan_bytes,
            scratch=sum(
                held.numel() for held in (self._scratch, self._bound_scratch) if held is not None
            ),
            scratch_limit=loaded.largest_scratch_bytes,
            buffers=sum(b.numel() * b.element_size() for b in self._buffers.values()),
        )

    def describe(self) -> str:
        """The engine's layers in JSON, by TensorRT's engine inspector."""
        loaded = self._open()
        with self._device.current():
            return loaded.describe()

    def report_times_to(self, take: Callable[[str, float], None]) -> None:
        """Have ``take`` told the name and milliseconds of each layer, in every call that follows.

        It concerns the profiles that were used so far: run it once before.
        """
        profiler = make_profiler(self._open().trt, take)
        for context in self._contexts.values():
            context.profiler = profiler

    def close(self) -> None:
        """Wait for work under way, then release the contexts, the buffers and the engine."""
        loaded, self._loaded = self._loaded, None
        if loaded is None:
            return
        self._device.synchronize()
        loaded.keep_kernels()
        # Before the engine: a context must not outlive it.
        self._contexts.clear()
        self._allocators.clear()
        self._buffers.clear()
        self._scratch = self._bound_scratch = None  # bindings hold on to theirs

    def _enqueue(
        self,
        loaded: LoadedEngine,
        inputs: Mapping[str, Any],
        allocate: Callable[[str, tuple[int, ...], str], Any],
    ) -> dict[str, Any]:
        profile = loaded.nearest(inputs)
        context, check = self._context(loaded, profile), loaded.check
        loaded.set_inputs(context, inputs)
        results, open_ended = {}, {}
        for spec in self.outputs:
            shape = tuple(context.get_tensor_shape(spec.name))
            if -1 in shape:  # it depends on values: known only once the engine has run
                open_ended[spec] = self._allocator(loaded, profile, spec.name)
                continue
            results[spec.name] = allocate(spec.name, shape, spec.dtype)
            loaded.set_output(context, spec.name, results[spec.name])
        self._give_scratch(loaded, profile, context)
        launched = context.execute_async_v3(self._device.stream)
        failures = [allocator.failure for allocator in open_ended.values() if allocator.failure]
        if failures:
            raise SessionError(f"no memory for an output: {failures[0]}")
        check(launched, "the launch")
        for spec, allocator in open_ended.items():
            results[spec.name] = allocator.take(spec.dtype)
        return {spec.name: results[spec.name] for spec in self.outputs}

    def _context(self, loaded: LoadedEngine, profile: int) -> Any:
        if profile not in self._contexts:
            self._contexts[profile] = loaded.new_context(profile, self._device)
        return self._contexts[profile]

    def _allocator(self, loaded: LoadedEngine, profile: int, output: str) -> Any:
        allocator = self._allocators.get((profile, output))
        if allocator is None:
            allocator = make_allocator(loaded.trt, self._device)
            context = self._context(loaded, profile)
            loaded.check(context.set_output_allocator(output, allocator), f"output {output!r}")
            self._allocators[profile, output] = allocator
        allocator.forget()
        return allocator

    def _give_scratch(self, loaded: LoadedEngine, profile: int, context: Any) -> None:
        if loaded.streams:
            return
        size = max(1, loaded.scratch_bytes(profile))
        if self._scratch is None or self._scratch.numel() < size:
            # Let go first: both together may not fit. The allocator keeps the old block from
            # others until the work queued on this stream is done with it.
            self._scratch = None
            self._scratch = self._device.empty((size,), "uint8")
        memory = (self._scratch.data_ptr(), self._scratch.numel())
        if self._given.get(profile) != memory:
            context.set_device_memory(memory[0], memory[1])
            self._given[profile] = memory

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: str) -> Any:
        """View of ``shape`` at the start of the tensor's own buffer, grown when too small."""
        count = math.prod(shape)
        held = self._buffers.get(name)
        if held is None or held.numel() < count:
            held = self._buffers[name] = self._device.empty((count,), dtype)
        return held[:count].view(shape)

    def _fresh(self, _name: str, shape: tuple[int, ...], dtype: str) -> Any:
        return self._device.empty(shape, dtype)

    def _open(self) -> LoadedEngine:
        if self._loaded is None:
            raise SessionError("this engine was closed; load it again")
        return self._loaded


def _failed(error: RuntimeError, loaded: LoadedEngine) -> SessionError:
    """The error to raise in place of one of PyTorch or of TensorRT's bindings."""
    text = " ".join(str(error).split())[:400]
    if type(error).__name__ == "OutOfMemoryError":
        return SessionError(
            f"not enough device memory to run: lower the batch, or hold fewer sessions ({text})"
        )
    return SessionError(f"TensorRT failed while running: {text}; {loaded.explain()}")


def make_profiler(trt: Any, take: Callable[[str, float], None]) -> Any:
    """An ``IProfiler`` that hands on the name and the milliseconds of each layer."""

    class Profiler(trt.IProfiler):  # type: ignore[misc]
        def report_layer_time(self, layer_name: str, ms: float) -> None:
            take(layer_name, ms)

    return Profiler()


def make_allocator(trt: Any, device: Device) -> Any:
    """An ``IOutputAllocator`` for one output whose shape depends on values."""

    class Allocator(trt.IOutputAllocator):  # type: ignore[misc]
        """Gives TensorRT the memory it asks for, and holds the shape that it reports."""

        def __init__(self) -> None:
            super().__init__()
            self.forget()

        def forget(self) -> None:
            """Hold nothing of an earlier launch."""
            self.failure = ""
            self._memory: Any = None
            self._shape: tuple[int, ...] | None = None

        def reallocate_output_async(
            self, tensor_name: str, memory: int, size: int, alignment: int, stream: int
        ) -> int:
            # An exception must not travel through the library: it takes a null address for one.
            try:
                self._memory = device.empty((max(1, size),), "uint8")
            except RuntimeError as error:
                self.failure = f"{tensor_name} needs {size} bytes ({error})"
                return 0
            address: int = self._memory.data_ptr()
            return address

        def reallocate_output(
            self, tensor_name: str, memory: int, size: int, alignment: int
        ) -> int:
            return self.reallocate_output_async(tensor_name, memory, size, alignment, 0)

        def notify_shape(self, tensor_name: str, shape: Any) -> None:
            self._shape = tuple(shape)

        def take(self, dtype: str) -> Any:
            """The output, once the engine was launched; it is the caller's from then on."""
            import torch

            memory, shape = self._memory, self._shape
            self.forget()
            if shape is None or memory is None:
                raise SessionError("TensorRT reported no shape for an output")
            kind = getattr(torch, dtype)
            return memory[: math.prod(shape) * kind.itemsize].view(kind).view(shape)

    return Allocator()
