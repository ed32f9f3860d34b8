"""Runs TensorRT and TensorRT-RTX engines: one execution context on one CUDA device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sn72engine.backends.base import Array
from sn72engine.backends.tensorrt_log import explain, make_logger
from sn72engine.engine import Engine
from sn72engine.errors import SessionError

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


class TensorRTRunner:
    """One execution context, its stream, and device buffers that grow to the largest batch seen.

    :meth:`run` copies NumPy arrays in and out through the buffers. :meth:`run_device` takes and
    gives PyTorch tensors on the device and copies nothing. Every status that the library returns
    is checked: a launch that failed would leave the results of an earlier call in place.
    """

    def __init__(self, trt: Any, engine: Engine, device_index: int) -> None:
        import torch

        self.inputs = engine.manifest.inputs
        self.outputs = engine.manifest.outputs
        self._torch = torch
        self.device = torch.device("cuda", device_index)
        # The runtime must outlive the engine, and the logger the runtime.
        self._logger = make_logger(trt)
        with torch.cuda.device(self.device):
            self._runtime = trt.Runtime(self._logger)
            self._engine = self._runtime.deserialize_cuda_engine(engine.path.read_bytes())
            if self._engine is None:
                raise SessionError(f"{engine.path.name} cannot be loaded: {self._explain()}")
            self._check_names()
            self._context = self._engine.create_execution_context()
            if self._context is None:
                raise SessionError(f"{engine.path.name} cannot be prepared: {self._explain()}")
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self._buffers: dict[str, torch.Tensor] = {}

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Execute on contiguous NumPy arrays; the arrays returned belong to the caller.

        Raises:
            SessionError: TensorRT reported failure.
        """
        torch = self._torch
        self._check_open()
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            bound = {}
            for name, array in inputs.items():
                host = torch.from_numpy(array) if array.flags.writeable else torch.tensor(array)
                bound[name] = self._buffer(name, tuple(host.shape), host.dtype)
                bound[name].copy_(host, non_blocking=True)
            results = self._enqueue(bound, self._buffer)
            # Copying to the host waits for the stream, and gives memory that is not reused.
            return {name: tensor.cpu().numpy() for name, tensor in results.items()}

    def run_device(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Execute on contiguous tensors of this device, in order with the current stream.

        Returns before the work is done, as PyTorch operators do. The tensors returned are new.

        Raises:
            SessionError: TensorRT refused the launch.
        """
        torch = self._torch
        self._check_open()
        with torch.cuda.device(self.device):
            current = torch.cuda.current_stream(self.device)
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                results = self._enqueue(inputs, self._fresh)
            current.wait_stream(self._stream)
        # Both streams use these blocks: the allocator must not hand them on before both are done.
        for tensor in inputs.values():
            tensor.record_stream(self._stream)
        for tensor in results.values():
            tensor.record_stream(current)
        return results

    def close(self) -> None:
        """Wait for work under way, then release the context, the engine and the buffers."""
        if self._context is None:
            return
        self._stream.synchronize()
        # In this order: a context must not outlive its engine, nor an engine its runtime.
        self._context = None
        self._engine = None
        self._runtime = None
        self._buffers.clear()

    def _enqueue(self, inputs: Mapping[str, Any], allocate: Any) -> dict[str, Any]:
        context = self._context
        for name, tensor in inputs.items():
            self._checked(context.set_input_shape(name, tuple(tensor.shape)), f"shape of {name!r}")
            self._checked(context.set_tensor_address(name, tensor.data_ptr()), f"input {name!r}")
        try:
            missing = context.infer_shapes()
        except RuntimeError as error:
            raise SessionError(f"TensorRT refused these shapes: {self._explain()}") from error
        if missing:
            raise SessionError(f"TensorRT cannot work out shapes without {', '.join(missing)}")
        results = {}
        for spec in self.outputs:
            shape = tuple(context.get_tensor_shape(spec.name))
            results[spec.name] = allocate(spec.name, shape, getattr(self._torch, spec.dtype))
            address = results[spec.name].data_ptr()
            self._checked(context.set_tensor_address(spec.name, address), f"output {spec.name!r}")
        self._checked(context.execute_async_v3(self._stream.cuda_stream), "the launch")
        return results

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: Any) -> Any:
        """View of ``shape`` at the start of the tensor's own buffer, grown when too small."""
        count = 1
        for size in shape:
            count *= size
        held = self._buffers.get(name)
        if held is None or held.numel() < count:
            held = self._torch.empty(count, dtype=dtype, device=self.device)
            self._buffers[name] = held
        return held[:count].view(shape)

    def _fresh(self, _name: str, shape: tuple[int, ...], dtype: Any) -> Any:
        return self._torch.empty(shape, dtype=dtype, device=self.device)

    def _checked(self, status: bool, what: str) -> None:
        if not status:
            raise SessionError(f"TensorRT refused {what}: {self._explain()}")

    def _check_open(self) -> None:
        if self._context is None:
            raise SessionError("this engine was closed; load it again")

    def _check_names(self) -> None:
        names = {self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)}
        declared = {spec.name for spec in (*self.inputs, *self.outputs)}
        if names != declared:
            raise SessionError(
                f"the engine holds tensors {sorted(names)}, its manifest {sorted(declared)}; "
                "build it again"
            )

    def _explain(self) -> str:
        """What TensorRT said since it was last asked."""
        text = explain(self._logger.messages)
        self._logger.messages.clear()
        return text
