"""A loaded engine: checks what it is given, runs it, and gives back what the caller uses.

NumPy arrays in, NumPy arrays out; PyTorch tensors in, PyTorch tensors out. On the CPU neither is
copied. Anything else with ``__dlpack__`` is taken as an array.
"""

from __future__ import annotations

import copy
import logging
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from sn72engine import fingerprint
from sn72engine.backends import get_backend
from sn72engine.backends.base import (
    Array,
    Bindable,
    Bound,
    DeviceMemory,
    OnDevice,
    Shareable,
)
from sn72engine.closing import Closing
from sn72engine.engine import Engine, Manifest
from sn72engine.engine_folder import mark_used, open_engine
from sn72engine.errors import InputError, SessionError
from sn72engine.fingerprint import Fingerprint
from sn72engine.model import TensorSpec
from sn72engine.spec import Preprocess, RuntimeOptions

if TYPE_CHECKING:
    from sn72engine.decode import Source

log = logging.getLogger(__name__)


@runtime_checkable
class DeviceRunner(Protocol):
    """A runner that also takes and gives PyTorch tensors on its own device, without copies."""

    device: Any

    def run_device(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Execute on checked, contiguous tensors of ``device``; returns tensors of it."""
        ...


class Session(Closing):
    """One engine, opened, with one execution context.

    Threads may share a session: calls are serialised by a lock. To run calls side by side give
    each thread its own :meth:`clone`, or use a :class:`sn72engine.pool.SessionPool`. Use as a
    context manager, or call :meth:`close`.

    Args:
        engine: an engine, or the folder of one, which is hash-checked.
        options: how to run it.

    Raises:
        SessionError: the library refuses the engine, or lacks a device for it.
        EngineCorruptError: a file in the folder does not match its recorded hash.
        EngineMismatchError: it was built with a release of the library, or on a platform, whose
            engines this machine cannot be trusted to run; differences that do not matter are
            logged. The table is in :mod:`sn72engine.fingerprint`.
        MissingDependencyError: the library is not installed.
    """

    def __init__(self, engine: Engine | str | Path, options: RuntimeOptions | None = None) -> None:
        if not isinstance(engine, Engine):
            engine = open_engine(Path(engine))
            mark_used(engine.folder)  # so that a store does not take it for forgotten
        self._engine = engine
        self._options = options if options is not None else RuntimeOptions()
        self._lock = threading.Lock()
        backend = get_backend(engine.manifest.backend)
        stored, name = Fingerprint.from_dict(engine.manifest.fingerprint), f"engine {engine.folder}"
        wanted = fingerprint.here(stored, backend)
        for difference in fingerprint.check(stored, wanted, name=name):
            log.info("%s: %s", name, difference)
        self._runner: Any = backend.open(engine, self._options)
        self._specs = {spec.name: spec for spec in engine.manifest.inputs}

    @property
    def manifest(self) -> Manifest:
        """What is recorded about the engine."""
        return self._engine.manifest

    @property
    def engine(self) -> Engine:
        """The engine that this session runs."""
        return self._engine

    @property
    def options(self) -> RuntimeOptions:
        """How this session runs it."""
        return self._options

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Name, dtype and shape of each input, in positional order."""
        return self.manifest.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Name, dtype and shape of each output, in the order of a returned tuple."""
        return self.manifest.outputs

    @property
    def preprocess(self) -> Preprocess | None:
        """How images become this engine's input; None when it does not take images."""
        return self.manifest.preprocess

    def __call__(self, *arrays: Any) -> Any:
        """Run the engine.

        Args:
            arrays: one mapping of input name to array, or one array per input in the order of
                :attr:`inputs`. Arrays are NumPy arrays, PyTorch tensors, or objects with
                ``__dlpack__``, of exactly the declared dtype; those that are not contiguous are
                copied. Tensors on the engine's CUDA device are taken as they are.

        Returns:
            For a mapping, a dict of output name to array. For positional arrays, the output
            itself when there is one, else a tuple in the order of :attr:`outputs`. The arrays
            are PyTorch tensors when every input was one, on the inputs' device, and NumPy arrays
            otherwise. They belong to the caller: later calls do not touch them.

        Raises:
            InputError: an input is missing, unknown, or of the wrong type, dtype or shape, or the
                batch lies outside the engine's range.
            SessionError: the session is closed or the library reported failure.
        """
        by_name = len(arrays) == 1 and isinstance(arrays[0], Mapping)
        given = dict(arrays[0]) if by_name else self._named(arrays)
        self._check_names(given)
        outputs = self._run(given)
        if by_name:
            return outputs
        values = tuple(outputs[spec.name] for spec in self.outputs)
        return values[0] if len(values) == 1 else values

    def infer_images(self, images: Source | Sequence[Source]) -> Any:
        """Preprocess images as the manifest says and run them in chunks of the largest batch.

        Args:
            images: one image, a sequence of images, or a uint8 array (N, H, W, C), as
                :func:`sn72engine.preprocessing.preprocess` takes them. Memory use grows with the
                largest batch, not with their number.

        Returns:
            NumPy arrays with one row per image: one array for one output, else a tuple.

        Raises:
            InputError: the engine has no preprocessing or several inputs, there are no images,
                or one of them cannot be decoded.
            SessionError: as for a call.
        """
        from sn72engine.preprocessing import as_sequence, preprocess

        spec = self.preprocess
        if spec is None or len(self.inputs) != 1:
            raise InputError(
                f"this engine does not take images (inputs {_listed(self.inputs)}, "
                f"preprocessing {'recorded' if spec else 'not recorded'}): preprocess them and "
                "call the session with arrays"
            )
        sources, _ = as_sequence(images)
        if len(sources) == 0:
            raise InputError("images is empty: give at least one image")
        return self._joined(
            preprocess(sources[start : start + self.manifest.batch.max], spec)
            for start in range(0, len(sources), self.manifest.batch.max)
        )

    def infer_rows(self, rows: Array) -> Any:
        """Run any number of samples, in chunks of the largest batch.

        Args:
            rows: NumPy array of the one input's dtype, samples on axis 0.

        Returns:
            NumPy arrays with one row per sample: one array for one output, else a tuple.

        Raises:
            InputError: the engine has several inputs, there are no samples, or they do not fit.
            SessionError: as for a call.
        """
        if len(self.inputs) != 1 or len(rows) == 0:
            raise InputError(
                f"infer_rows takes at least one sample for an engine with one input; got "
                f"{len(rows)} for {_listed(self.inputs)}"
            )
        most = self.manifest.batch.max
        return self._joined(rows[start : start + most] for start in range(0, len(rows), most))

    @property
    def device_memory(self) -> DeviceMemory | None:
        """Device memory that this session holds; None for an engine that runs on the CPU.

        Raises:
            SessionError: the session is closed.
        """
        with self._lock:
            runner = self._open_runner()
            return runner.device_memory() if isinstance(runner, OnDevice) else None

    @property
    def bindable(self) -> bool:
        """Whether engines of this backend can be bound, see :meth:`bind`.

        Raises:
            SessionError: the session is closed.
        """
        with self._lock:
            return isinstance(self._open_runner(), Bindable)

    def bind(self, inputs: Mapping[str, Any]) -> Bound:
        """Bind the engine to tensors that stay where they are, to capture it in a CUDA graph.

        Every binding has a context of its own; all of one session share scratch memory, so that
        those that may run at the same time must be of clones. The session must stay open as long
        as its bindings are used.

        Args:
            inputs: contiguous PyTorch tensors of the engine's device, by name of the input. Fill
                them before each launch.

        Returns:
            A callable that queues the launch on PyTorch's current stream, with the tensors that
            it writes as ``outputs`` by name. It has been run once when it is returned.

        Raises:
            InputError: a tensor does not fit, or is not contiguous.
            SessionError: the engine cannot be captured, or the session is closed.
        """
        self._check_names(inputs)
        with self._lock:
            runner = self._open_runner()
            if not isinstance(runner, Bindable):
                raise SessionError(
                    f"engines of {self.manifest.backend} cannot be captured in a CUDA graph; build "
                    "for TensorRT, or for a card with backend='inductor'"
                )
            tensors = self._check_tensors(runner, inputs)
            for name, tensor in tensors.items():
                if not tensor.is_contiguous():
                    raise InputError(f"input {name!r} is not contiguous, so it cannot be bound")
            return runner.bind(tensors)

    def clone(self) -> Session:
        """Another session of the same engine, to be used at the same time by another thread.

        The weights are shared where the backend can do that, and held once more where it cannot.
        Either session may be closed first.

        Raises:
            SessionError: this session is closed.
        """
        with self._lock:
            runner = self._open_runner()
            if not isinstance(runner, Shareable):
                return Session(self._engine, self._options)
            twin = copy.copy(self)
            twin._lock = threading.Lock()
            twin._runner = runner.twin()
            return twin

    def close(self) -> None:
        """Release the context, after a call under way; calling it twice is allowed."""
        with self._lock:
            if self._runner is not None:
                self._runner.close()
                self._runner = None

    def __repr__(self) -> str:
        manifest = self.manifest
        state = "closed" if self._runner is None else manifest.target
        return (
            f"Session({manifest.backend} {manifest.precision}, {state}: "
            f"{_listed(self.inputs)} -> {_listed(self.outputs)}, batch {manifest.batch})"
        )

    def _joined(self, chunks: Iterable[Array]) -> Any:
        """Outputs of an engine with one input, of all chunks, none larger than it takes."""
        least = self.manifest.batch.min
        parts: list[list[Any]] = []
        for rows in chunks:
            count = len(rows)
            if count < least:
                # The engine takes no smaller batch; the repeated rows are cut off again.
                rows = np.concatenate([rows, np.repeat(rows[-1:], least - count, axis=0)])
            outputs = self({self.inputs[0].name: rows})
            parts.append([outputs[output.name][:count] for output in self.outputs])
        joined = tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return joined[0] if len(joined) == 1 else joined

    def _named(self, arrays: tuple[Any, ...]) -> dict[str, Any]:
        if len(arrays) != len(self.inputs):
            raise InputError(
                f"got {len(arrays)} positional arrays, but the engine takes {len(self.inputs)}: "
                f"{_listed(self.inputs)}"
            )
        return {spec.name: array for spec, array in zip(self.inputs, arrays, strict=True)}

    def _check_names(self, given: Mapping[Any, Any]) -> None:
        unknown = [name for name in given if name not in self._specs]
        if unknown:
            raise InputError(
                f"unknown input {unknown[0]!r}; the engine takes {_listed(self.inputs)}"
            )
        missing = [name for name in self._specs if name not in given]
        if missing:
            raise InputError(
                f"input {missing[0]!r} is missing; the engine takes {_listed(self.inputs)}"
            )

    def _run(self, given: dict[str, Any]) -> dict[str, Any]:
        torch = sys.modules.get("torch")  # not loaded: then no input is a tensor
        tensors = torch is not None and all(isinstance(a, torch.Tensor) for a in given.values())
        on_device = tensors and all(a.device.type == "cuda" for a in given.values())
        if on_device:
            return self._run_device(given)
        arrays = {name: _as_numpy(name, array, torch) for name, array in given.items()}
        self._check_shapes({name: (a.dtype.name, a.shape) for name, a in arrays.items()})
        for name, array in arrays.items():
            if not array.dtype.isnative:
                raise InputError(f"input {name!r} has swapped bytes; give it in native byte order")
        contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        with self._lock:
            outputs: dict[str, Array] = self._open_runner().run(contiguous)
        if tensors and torch is not None:
            return {name: torch.from_numpy(array) for name, array in outputs.items()}
        return outputs

    def _run_device(self, given: Mapping[str, Any]) -> dict[str, Any]:
        with self._lock:
            runner = self._open_runner()
            tensors = self._check_tensors(runner, given)
            contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
            outputs: dict[str, Any] = runner.run_device(contiguous)
            return outputs

    def _check_tensors(self, runner: Any, given: Mapping[str, Any]) -> dict[str, Any]:
        """The tensors without gradients, all of the declared shapes and on the runner's device."""
        tensors = {name: tensor.detach() for name, tensor in given.items()}
        self._check_shapes(
            {n: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in tensors.items()}
        )
        for name, tensor in tensors.items():
            if not isinstance(runner, DeviceRunner) or tensor.device != runner.device:
                where = runner.device if isinstance(runner, DeviceRunner) else "the CPU"
                raise InputError(
                    f"input {name!r} is on {tensor.device}, but the engine runs on {where}; "
                    f"move it there"
                )
        return tensors

    def _open_runner(self) -> Any:
        if self._runner is None:
            raise SessionError("this session was closed; load the engine again")
        return self._runner

    def _check_shapes(self, found: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        axes: dict[str, tuple[str, int]] = {}
        for name, (dtype, shape) in found.items():
            spec = self._specs[name]
            if dtype != spec.dtype:
                raise InputError(
                    f"input {name!r} has dtype {dtype}, but the engine takes {spec.dtype}; convert "
                    f"it, with .astype({spec.dtype!r}) for a NumPy array"
                )
            if len(shape) != len(spec.shape):
                raise InputError(
                    f"input {name!r} has shape {shape}, but the engine takes {spec}"
                    + ("; add the batch axis" if len(shape) + 1 == len(spec.shape) else "")
                )
            for axis, (size, declared) in enumerate(zip(shape, spec.shape, strict=True)):
                if isinstance(declared, int) and size != declared:
                    raise InputError(
                        f"input {name!r} has shape {shape}, but axis {axis} must be {declared} "
                        f"({spec})"
                    )
                if isinstance(declared, str):
                    if axis == 0 and size not in self.manifest.batch:
                        raise InputError(_batch_advice(name, size, self.manifest))
                    first, agreed = axes.setdefault(declared, (name, size))
                    if size != agreed:
                        raise InputError(
                            f"inputs {first!r} and {name!r} share axis {declared!r}, but have "
                            f"{agreed} and {size} there"
                        )


def load(engine: Engine | str | Path, options: RuntimeOptions | None = None) -> Session:
    """Open an engine for execution.

    Args:
        engine: an engine, or the folder of one, which is hash-checked.
        options: how to run it; the defaults of :class:`RuntimeOptions` when None.

    Raises:
        SessionError, StoreError, MissingDependencyError: as for :class:`Session`.
    """
    return Session(engine, options)


def _as_numpy(name: str, value: Any, torch: Any) -> np.ndarray[Any, Any]:
    """A NumPy view of an array, tensor or DLPack object, copied only where it must be."""
    if isinstance(value, np.ndarray):
        return value
    if torch is not None and isinstance(value, torch.Tensor):
        if value.device.type != "cpu":
            raise InputError(
                f"input {name!r} is on {value.device}; give all inputs on the CPU, or all as "
                "tensors on the engine's CUDA device"
            )
        try:
            array: np.ndarray[Any, Any] = value.detach().resolve_conj().resolve_neg().numpy()
        except (TypeError, RuntimeError) as error:
            raise InputError(
                f"input {name!r} is a tensor of {value.dtype}, layout {value.layout}, which NumPy "
                "cannot hold; convert it first"
            ) from error
        return array
    if hasattr(value, "__dlpack__"):
        try:
            return np.from_dlpack(value)
        except (BufferError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(
                f"input {name!r} ({type(value).__name__}) cannot be read as an array: {error}"
            ) from error
    raise InputError(
        f"input {name!r} is a {type(value).__name__}; give a NumPy array, a PyTorch tensor or an "
        "object with __dlpack__"
    )


def _batch_advice(name: str, size: int, manifest: Manifest) -> str:
    batch = manifest.batch
    problem = f"input {name!r} has batch {size}, but the engine was built for {batch}"
    if size == 0:
        return f"{problem}; leave out calls without samples"
    if size > batch.max:
        return f"{problem}; split it, or build with batch.max={size}"
    return f"{problem}; pad it to {batch.min}, or build with batch.min={size}"


def _listed(specs: Sequence[TensorSpec]) -> str:
    return "; ".join(map(str, specs))
