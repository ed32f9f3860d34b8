"""A TensorRT engine bound to fixed addresses, so that a CUDA graph can capture its launch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sn72engine.backends.tensorrt_device import Device
from sn72engine.backends.tensorrt_engine import LoadedEngine
from sn72engine.errors import SessionError

if TYPE_CHECKING:
    import torch


class BoundRun:
    """One context with one profile, one set of shapes and one set of addresses, for good.

    A graph replays what was recorded, so nothing of that may change afterwards. The launch is made
    once before, because TensorRT does work on the first one that cannot be captured.

    Args:
        loaded: the engine.
        device: where it runs.
        inputs: contiguous tensors of the device by name; they are kept, and read at every launch.
        scratch: memory for intermediate results, of ``loaded.largest_scratch_bytes``. Bindings
            that never run at the same time may share it.

    Raises:
        SessionError: TensorRT refuses, or the engine cannot be captured.
    """

    def __init__(
        self,
        loaded: LoadedEngine,
        device: Device,
        inputs: Mapping[str, torch.Tensor],
        scratch: torch.Tensor,
    ) -> None:
        if loaded.streams:
            raise SessionError(
                "an engine that streams its weights cannot be captured in a graph: build it with "
                "weight_streaming=False"
            )
        self._loaded, self._device = loaded, device
        self._held = (dict(inputs), scratch)
        self._context = context = loaded.new_context(loaded.nearest(inputs), device)
        loaded.set_inputs(context, inputs)
        self.outputs: dict[str, torch.Tensor] = {}
        for spec in loaded.manifest.outputs:
            shape = tuple(context.get_tensor_shape(spec.name))
            if -1 in shape:
                raise SessionError(
                    f"output {spec} depends on values: its launch cannot be captured in a graph"
                )
            self.outputs[spec.name] = device.empty(shape, spec.dtype)
            loaded.set_output(context, spec.name, self.outputs[spec.name])
        context.set_device_memory(scratch.data_ptr(), scratch.numel())
        loaded.check(context.execute_async_v3(device.stream), "the first launch")
        device.synchronize()
        self._check_capturable()

    def __call__(self) -> None:
        """Queue the launch on PyTorch's current stream; it may be capturing.

        Raises:
            SessionError: TensorRT refused the launch.
        """
        with self._device.current():
            stream = self._device.callers_stream
            self._loaded.check(self._context.execute_async_v3(stream), "the launch")

    def _check_capturable(self) -> None:
        if self._loaded.manifest.backend != "tensorrt_rtx":
            return
        context: Any = self._context
        if self._loaded.options.cuda_graph or not context.is_stream_capturable(self._device.stream):
            raise SessionError(
                "this engine cannot be captured in a graph: build it with "
                "TensorRTOptions(user_allocation=True), and open it with cuda_graph=False and "
                "shape_kernels='eager' or 'none'"
            )
