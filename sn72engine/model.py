"""The artefact that export and quantize hand on: an ONNX file that knows where it came from."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sn72engine import _deps
from sn72engine.errors import InputError
from sn72engine.spec import Precision, Preprocess, QuantizedPrecision, WeightType

#: Key under which the record is kept in the ONNX file's own metadata, so it travels with it.
RECORD_KEY = "sn72engine"

#: TensorRT's operators that quantise activations by block.
_BLOCK_QUANTIZERS: Mapping[str, QuantizedPrecision] = {
    "TRT_FP4DynamicQuantize": "nvfp4",
    "TRT_MXFP8DynamicQuantize": "mxfp8",
}

_PRECISIONS: Mapping[WeightType, Precision] = {
    "float32": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
}

_CHUNK = 1 << 22


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, NumPy dtype name and shape of a graph input or output; a free axis is its name."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TensorSpec:
        """Inverse of :meth:`to_dict`."""
        return cls(values["name"], values["dtype"], tuple(values["shape"]))

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True, slots=True)
class OnnxModel:
    """An ONNX file, its signature, and the record of how it was made.

    ``record`` holds ``export`` (options, parity errors) and, once quantised, ``quantization``
    (method, sample count, batch size, data hash, layers). ``preprocess`` is how images become
    its input; None when the model does not take images. ``formats`` are those that the graph
    quantises activations to, sorted, whichever tool did that. ``weights`` is the float type of most
    of its weights, in which it computes; inputs and outputs may be of another.
    """

    path: Path
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    preprocess: Preprocess | None = None
    record: Mapping[str, Any] = field(default_factory=dict)
    formats: tuple[QuantizedPrecision, ...] = ()
    weights: WeightType = "float32"

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        """The quantisation record; None for a float model, and for one that others quantised."""
        return self.record.get("quantization")

    @property
    def quantised(self) -> bool:
        """Whether activations are quantised in the graph."""
        return bool(self.formats)

    @property
    def precision(self) -> Precision:
        """The format of a Q/DQ model, ``mixed`` for several; else that of its weights."""
        if self.quantised:
            return self.formats[0] if len(self.formats) == 1 else "mixed"
        return _PRECISIONS[self.weights]

    def external_files(self) -> tuple[Path, ...]:
        """Weight files beside the ONNX file, sorted by name."""
        onnx = _deps.require("onnx", purpose="read an ONNX file")
        proto = onnx.load(self.path, load_external_data=False)
        names = {
            entry.value
            for tensor in tensors(proto)
            for entry in tensor.external_data
            if entry.key == "location"
        }
        return tuple(self.path.parent / name for name in sorted(names))

    def size(self) -> int:
        """Bytes of the ONNX file and every external weight file.

        Raises:
            InputError: a weight file is absent.
        """
        try:
            return sum(path.stat().st_size for path in (self.path, *self.external_files()))
        except FileNotFoundError as error:
            raise InputError(
                f"{self.path}: weight file {error.filename} is absent; keep it beside the ONNX file"
            ) from error

    def sha256(self) -> str:
        """Hash of the ONNX file and every external weight file."""
        digest = hashlib.sha256()
        for path in (self.path, *self.external_files()):
            digest.update(file_sha256(path).encode())
        return digest.hexdigest()

    @classmethod
    def open(cls, path: str | Path) -> OnnxModel:
        """Read the signature and record of an ONNX file; weights are not loaded.

        A file made by other tools has an empty record and no preprocessing.

        Raises:
            InputError: the file is absent or is not ONNX.
        """
        onnx = _deps.require("onnx", purpose="read an ONNX file")
        path = Path(path)
        if not path.is_file():
            raise InputError(f"{path}: no such ONNX file")
        try:
            proto = onnx.load(path, load_external_data=False)
        except Exception as error:  # protobuf raises its own DecodeError
            raise InputError(f"{path}: not a readable ONNX file ({error})") from error
        if not proto.graph.output:
            raise InputError(f"{path}: not a readable ONNX file (no graph outputs)")
        weights = {tensor.name for tensor in proto.graph.initializer}
        record = read_record(proto)
        preprocess = record.pop("preprocess", None)
        return cls(
            path=path,
            inputs=tuple(_spec(onnx, v) for v in proto.graph.input if v.name not in weights),
            outputs=tuple(_spec(onnx, v) for v in proto.graph.output),
            preprocess=Preprocess.from_dict(preprocess) if preprocess else None,
            record=record,
            formats=_formats(onnx, proto),
            weights=_weight_type(onnx, proto),
        )


def tensors(proto: Any) -> Iterator[Any]:
    """Every stored tensor of a ModelProto: weights and attributes, subgraphs and functions too."""
    nodes = [node for function in proto.functions for node in function.node]
    graphs = [proto.graph]
    while graphs or nodes:
        if graphs:
            graph = graphs.pop()
            yield from graph.initializer
            for sparse in graph.sparse_initializer:
                yield from (sparse.values, sparse.indices)
            nodes.extend(graph.node)
            continue
        for attribute in nodes.pop().attribute:
            yield from (attribute.t, *attribute.tensors)
            if attribute.HasField("g"):
                graphs.append(attribute.g)
            graphs.extend(attribute.graphs)


def read_record(proto: Any) -> dict[str, Any]:
    """The sn72engine record of a ModelProto; empty when it has none."""
    for entry in proto.metadata_props:
        if entry.key == RECORD_KEY:
            record: dict[str, Any] = json.loads(entry.value)
            return record
    return {}


def write_record(proto: Any, record: Mapping[str, Any]) -> None:
    """Replace the sn72engine record of a ModelProto."""
    kept = [(e.key, e.value) for e in proto.metadata_props if e.key != RECORD_KEY]
    del proto.metadata_props[:]
    for key, value in [*kept, (RECORD_KEY, json.dumps(record, sort_keys=True))]:
        proto.metadata_props.add(key=key, value=value)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _formats(onnx: Any, proto: Any) -> tuple[QuantizedPrecision, ...]:
    """Formats that activations are turned into, sorted."""
    stored = {tensor.name: tensor.data_type for tensor in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type == "Constant":
            stored.update(
                (node.output[0], a.t.data_type) for a in node.attribute if a.HasField("t")
            )
    types = onnx.TensorProto
    names: dict[int, QuantizedPrecision] = {
        types.INT8: "int8",
        types.UINT8: "int8",
        types.FLOAT8E4M3FN: "fp8",
    }
    found: set[QuantizedPrecision] = set()
    for node in proto.graph.node:
        if node.op_type in _BLOCK_QUANTIZERS:
            found.add(_BLOCK_QUANTIZERS[node.op_type])
        if node.op_type != "QuantizeLinear" or node.input[0] in stored:
            continue  # a weight that is quantised where it is read says nothing of activations
        told = next((a.i for a in node.attribute if a.name == "output_dtype"), 0)
        zero_point = node.input[2] if len(node.input) > 2 else ""
        # Without either, the operator gives uint8.
        kind = told or stored.get(zero_point, types.UINT8)
        if kind in names:
            found.add(names[kind])
    return tuple(sorted(found))


def _weight_type(onnx: Any, proto: Any) -> WeightType:
    """Float type of the most numbers that are stored; that of the first input where none are."""
    names: dict[int, WeightType] = {
        onnx.TensorProto.FLOAT: "float32",
        onnx.TensorProto.FLOAT16: "float16",
        onnx.TensorProto.BFLOAT16: "bfloat16",
    }
    counts: dict[WeightType, int] = {}
    for tensor in tensors(proto):
        if tensor.data_type in names:
            kind = names[tensor.data_type]
            counts[kind] = counts.get(kind, 0) + math.prod(tensor.dims)
    if counts:
        return max(counts, key=lambda kind: counts[kind])
    stored = {tensor.name for tensor in proto.graph.initializer}
    kinds = [v.type.tensor_type.elem_type for v in proto.graph.input if v.name not in stored]
    return names.get(kinds[0], "float32") if kinds else "float32"


def _spec(onnx: Any, value: Any) -> TensorSpec:
    tensor = value.type.tensor_type
    shape = tuple(
        d.dim_value if d.HasField("dim_value") else (d.dim_param or f"axis{axis}")
        for axis, d in enumerate(tensor.shape.dim)
    )
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    return TensorSpec(value.name, dtype, shape)
