"""What a backend must do. Each one lives in its own module and imports its library lazily."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from sn72engine.engine import Engine
from sn72engine.model import TensorSpec
from sn72engine.spec import BackendName, BuildOptions, RuntimeOptions

Array = Any
"""A NumPy array or a torch tensor; which one is said where it matters."""


@dataclass(frozen=True, slots=True)
class BuiltFiles:
    """What a backend wrote into the scratch folder, the file to open first, and its remarks."""

    names: tuple[str, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    notes: tuple[str, ...] = ()


class Runner(Protocol):
    """One execution context. Not thread-safe: the session that owns it serialises calls."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Execute on checked, contiguous NumPy arrays; returns NumPy arrays by output name.

        Raises:
            SessionError: the library reported failure.
        """
        ...

    def close(self) -> None:
        """Release the context; calling it twice is allowed."""
        ...


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Device memory of a runner, in bytes.

    Args:
        engine: the engine with its weights, which runners of one engine share.
        scratch: what intermediate results have taken so far.
        scratch_limit: what they can come to, at the largest shapes.
        buffers: inputs and outputs of calls with arrays of the host.
    """

    engine: int
    scratch: int
    scratch_limit: int
    buffers: int


@runtime_checkable
class Shareable(Protocol):
    """A runner that can give another one of the same engine, without loading it again."""

    def twin(self) -> Runner:
        """Another runner that may be used at the same time, by another thread."""
        ...


@runtime_checkable
class OnDevice(Protocol):
    """A runner that says how much device memory it holds."""

    def device_memory(self) -> DeviceMemory:
        """What is held now."""
        ...


class Bound(Protocol):
    """A launch of an engine on fixed addresses, which may be captured in a CUDA graph."""

    outputs: dict[str, Any]

    def __call__(self) -> None:
        """Queue it on PyTorch's current stream; the outputs are tensors that are overwritten."""
        ...


@runtime_checkable
class Bindable(Protocol):
    """A runner whose launches can be captured."""

    def bind(self, inputs: Mapping[str, Any]) -> Bound:
        """Bind to checked, contiguous tensors of the device, which the caller fills.

        Raises:
            SessionError: this engine cannot be captured.
        """
        ...


class Backend(Protocol):
    """Builds and opens engines of one kind."""

    name: BackendName

    def version(self) -> str:
        """Version of the library, without loading it where that can be had."""
        ...

    def target(self, options: BuildOptions) -> str:
        """What the engine will run on, resolved: ``cpu``, ``sm_90``. Part of the fingerprint."""
        ...

    def build(
        self,
        model: Any,
        options: BuildOptions,
        folder: Path,
        *,
        progress: bool | None = None,
    ) -> BuiltFiles:
        """Write the engine files for ``model`` into ``folder``.

        ``model`` is an OnnxModel, or a TorchProgram for ``PROGRAM_BACKENDS``.

        ``progress`` shows (True), hides (False) or, on a terminal only (None), shows a bar.

        Raises:
            BuildError: the builder refused, with what to do about it.
        """
        ...

    def open(self, engine: Engine, options: RuntimeOptions) -> Runner:
        """Load an engine for execution.

        Raises:
            SessionError: the library refused the file or lacks a device for it.
        """
        ...
