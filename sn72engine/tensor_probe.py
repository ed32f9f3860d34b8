"""Reads tensors inside a graph while a backend runs it, by marking them as its outputs.

A copy of the ONNX file is made once, with its weights beside it; only the list of outputs changes
from one set of tensors to the next. A marked tensor must exist, so nothing is fused across it:
what runs is closer to the graph as written than an unmarked run is.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from sn72engine import _deps, emulation, onnx_file
from sn72engine.backends import get_backend
from sn72engine.closing import Closing
from sn72engine.engine import Engine, EngineFile, Manifest
from sn72engine.errors import InputError, SessionError
from sn72engine.model import OnnxModel, TensorSpec
from sn72engine.spec import CPU_BACKENDS, BackendName, BuildOptions, RuntimeOptions, ShapeRange

if TYPE_CHECKING:
    from sn72engine.backends.base import Runner

_Array: TypeAlias = "np.ndarray[Any, Any]"

_FILE = "model.onnx"

#: Types of tensors that every backend hands out as NumPy arrays.
FLOATS = ("float32", "float16", "float64")


class TensorProbe(Closing):
    """An ONNX file, or the ONNX file of an engine, opened for looking inside.

    Use as a context manager, or call :meth:`close`: it keeps a copy of the weights on disk.

    Args:
        subject: an engine of a CPU backend, which runs as it was built; or an ONNX file, which
            runs as it is written, with FP8 and FP4 emulated on a CPU.
        backend: what runs an ONNX file. TensorRT builds a new engine for each set of tensors and
            needs a GPU.
        batch: samples per call.
        runtime: how it is run.

    Attributes:
        name: what to call it in reports.
        backend: what runs it.
        precision: of the file.
        proto: the ModelProto with shapes inferred for this batch; large weights are left out.
        inputs, outputs: as the file declares them.

    Raises:
        InputError: the subject is neither, or its batch range does not hold ``batch``.
        SessionError: TensorRT, and no GPU for it.
    """

    def __init__(
        self,
        subject: Engine | OnnxModel | str | Path,
        *,
        backend: BackendName = "onnxruntime",
        batch: int = 1,
        runtime: RuntimeOptions | None = None,
    ) -> None:
        self._manifest = _manifest_of(subject, backend, batch)
        self._runtime = runtime if runtime is not None else RuntimeOptions()
        source = subject.path if isinstance(subject, (Engine, OnnxModel)) else Path(subject)
        folder = subject.folder.name[:12] if isinstance(subject, Engine) else source.name
        self.name = f"{folder} ({self._manifest.backend})"
        self.backend = self._manifest.backend
        self.precision = self._manifest.precision
        self.inputs = self._manifest.inputs
        self.outputs = self._manifest.outputs
        with ExitStack() as opened:
            self._folder = Path(
                opened.enter_context(tempfile.TemporaryDirectory(prefix="sn72-probe-"))
            )
            self._proto = onnx_file.load(source)
            if self.backend in CPU_BACKENDS:
                emulation.emulate(self._proto)  # formats that no CPU computes in; others stay
            # With the weights in a file of their own, marking other tensors rewrites little.
            onnx_file.write(self._proto, self._folder / _FILE, external_data_bytes=0)
            self.proto = _inferred(self._proto, batch)
            self._opened = opened.pop_all()
        self._specs = {v.name: v for v in (*self.proto.graph.value_info, *self.proto.graph.output)}

    def run(
        self, tensors: Sequence[str], batches: Iterable[Mapping[str, _Array]]
    ) -> Iterator[dict[str, _Array]]:
        """Yield, for each batch of inputs, the tensors by name.

        Args:
            tensors: names of tensors that nodes of the graph compute; empty stands for the
                outputs that the file has.
            batches: arrays by input name; they are cast to the types that the file declares.

        Raises:
            InputError: a batch does not fit the inputs.
            SessionError: the backend refused the marked file, or failed.
        """
        runner = self._open(tensors)
        try:
            for batch in batches:
                yield runner.run(self._fitted(batch))
        finally:
            runner.close()

    def shape(self, tensor: str) -> tuple[int, ...] | None:
        """Shape of a tensor at this batch; None where it is not known ahead."""
        spec = self._specs.get(tensor)
        if spec is None or not spec.type.tensor_type.HasField("shape"):
            return None
        dims = spec.type.tensor_type.shape.dim
        if not all(d.HasField("dim_value") for d in dims):
            return None
        return tuple(int(d.dim_value) for d in dims)

    def dtype(self, tensor: str) -> str | None:
        """NumPy's name of a tensor's type; None where it is not known ahead."""
        spec = self._specs.get(tensor)
        if spec is None or not spec.type.tensor_type.elem_type:
            return None
        onnx = _deps.require("onnx", purpose="read an ONNX file")
        name: str = onnx.helper.tensor_dtype_to_np_dtype(spec.type.tensor_type.elem_type).name
        return name

    def close(self) -> None:
        """Remove the copy; calling it twice is allowed."""
        self._opened.close()

    def _fitted(self, batch: Mapping[str, _Array]) -> dict[str, _Array]:
        fitted = {}
        for spec in self.inputs:
            if spec.name not in batch:
                raise InputError(
                    f"{self.name} takes input {spec.name!r}; the inputs given are "
                    f"{', '.join(batch)}"
                )
            array = np.ascontiguousarray(batch[spec.name], spec.dtype)
            fits = array.ndim == len(spec.shape) and all(
                isinstance(wanted, str) or wanted == size
                for wanted, size in zip(spec.shape, array.shape, strict=True)
            )
            if not fits:
                raise InputError(
                    f"input {spec.name!r} has shape {array.shape}, but {self.name} takes {spec}"
                )
            fitted[spec.name] = array
        return fitted

    def _open(self, tensors: Sequence[str]) -> Runner:
        onnx = _deps.require("onnx", purpose="mark tensors of an ONNX file")
        marked = onnx.ModelProto()
        marked.CopyFrom(self._proto)
        if tensors:
            del marked.graph.output[:]
            marked.graph.output.extend(
                self._specs.get(name) or onnx.ValueInfoProto(name=name) for name in tensors
            )
        (self._folder / _FILE).write_bytes(marked.SerializeToString())
        outputs = tuple(TensorSpec(name, "", ()) for name in tensors) or self.outputs
        backend = get_backend(self.backend)
        folder = self._folder
        if self.backend not in CPU_BACKENDS:
            folder = self._folder / "built"
            folder.mkdir(exist_ok=True)
            options = BuildOptions(
                backend=self.backend, batch=self._manifest.batch, precision=self.precision
            )
            built = backend.build(
                OnnxModel.open(self._folder / _FILE), options, folder, progress=False
            )
            files = tuple(EngineFile(name, 0, "") for name in built.names)
        else:
            files = (EngineFile(_FILE, 0, ""),)
        manifest = replace(self._manifest, outputs=outputs, files=files)
        return backend.open(Engine(folder, manifest), self._runtime)


def _manifest_of(
    subject: Engine | OnnxModel | str | Path, backend: BackendName, batch: int
) -> Manifest:
    """The manifest of an engine, or one made up for an ONNX file that runs as it is."""
    if isinstance(subject, Engine):
        manifest = subject.manifest
        if subject.path.suffix != ".onnx":
            raise InputError(
                f"{subject.folder} is a finished {manifest.backend} engine, which shows no tensors "
                "but its outputs: give the ONNX file that it was built from and name the backend"
            )
        if batch not in manifest.batch:
            raise InputError(
                f"batch={batch} lies outside the range of {subject.folder}, {manifest.batch}"
            )
        return manifest
    model = subject if isinstance(subject, OnnxModel) else OnnxModel.open(subject)
    fixed = model.inputs[0].shape[0] if model.inputs and model.inputs[0].shape else batch
    if isinstance(fixed, int) and fixed != batch:
        raise InputError(f"{model.path.name} takes batch {fixed} only; compare with batch={fixed}")
    if backend == "openvino" and set(model.formats) - {"int8"}:
        raise InputError(
            f"{model.path.name} is {model.precision}, which OpenVINO computes wrongly or not at "
            "all on a CPU: compare it with 'onnxruntime', where it is emulated"
        )
    target = "cpu"
    if backend not in CPU_BACKENDS:
        from sn72engine.cards import device_target

        present = device_target()
        if present is None:
            raise SessionError(
                f"backend={backend!r} runs on a GPU and there is none; compare with 'onnxruntime' "
                "or 'openvino'"
            )
        target = present
    return Manifest(
        key="",
        backend=backend,
        backend_version="",
        target=target,
        precision=model.precision,
        batch=ShapeRange(batch, batch, batch),
        inputs=model.inputs,
        outputs=model.outputs,
        files=(),
        fingerprint={},
    )


def _inferred(proto: Any, batch: int) -> Any:
    """A copy with the batch filled in and the shape of every tensor that can be worked out."""
    onnx = _deps.require("onnx", purpose="work out the shapes of an ONNX file")
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    # Recorded shapes may name the batch, or be stale after a conversion.
    del copy.graph.value_info[:]
    stored = {tensor.name for tensor in copy.graph.initializer}
    for value in copy.graph.input:
        dims = value.type.tensor_type.shape.dim
        if value.name not in stored and dims and not dims[0].HasField("dim_value"):
            dims[0].dim_value = batch
    for value in copy.graph.output:
        value.type.tensor_type.ClearField("shape")
    return onnx.shape_inference.infer_shapes(copy, data_prop=True)
