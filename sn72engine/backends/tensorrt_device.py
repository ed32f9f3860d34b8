"""The CUDA device as TensorRT's runners use it: a stream, and memory on it.

This is all that the backend asks of the driver, by way of PyTorch, whose allocator and streams
the rest of a program shares.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class Device:
    """One CUDA device with a stream of its own, on which everything here is queued."""

    def __init__(self, index: int) -> None:
        import torch

        self._torch = torch
        self.torch_device = torch.device("cuda", index)
        self._stream = torch.cuda.Stream(self.torch_device)  # type: ignore[no-untyped-call]

    @property
    def stream(self) -> int:
        """Handle of the stream."""
        handle: int = self._stream.cuda_stream
        return handle

    @property
    def callers_stream(self) -> int:
        """Handle of PyTorch's current stream of this device."""
        handle: int = self._torch.cuda.current_stream(self.torch_device).cuda_stream
        return handle

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make this device current, as TensorRT expects for every one of its calls."""
        with self._torch.cuda.device(self.torch_device):
            yield

    @contextmanager
    def queued(self) -> Iterator[None]:
        """Make this device and its stream current."""
        with self.current(), self._torch.cuda.stream(self._stream):
            yield

    @contextmanager
    def in_order(self) -> Iterator[None]:
        """As :meth:`queued`, after the caller's work so far and before what it queues next."""
        with self.current():
            callers = self._torch.cuda.current_stream(self.torch_device)
            self._stream.wait_stream(callers)
            with self._torch.cuda.stream(self._stream):
                yield
            callers.wait_stream(self._stream)

    def empty(self, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        """Uninitialised tensor; ``dtype`` by PyTorch's name."""
        return self._torch.empty(shape, dtype=getattr(self._torch, dtype), device=self.torch_device)

    def used_here(self, tensors: Any) -> None:
        """Tell the allocator that tensors of other streams are read on this one."""
        for tensor in tensors:
            tensor.record_stream(self._stream)

    def used_by_caller(self, tensors: Any) -> None:
        """Tell the allocator that tensors made here are read on the caller's stream."""
        callers = self._torch.cuda.current_stream(self.torch_device)
        for tensor in tensors:
            tensor.record_stream(callers)

    def synchronize(self) -> None:
        """Wait until the stream is idle."""
        self._stream.synchronize()
