"""Reading and writing ONNX files together with their external weights."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sn72engine import _deps
from sn72engine.errors import BuildError
from sn72engine.model import OnnxModel, write_record
from sn72kernels import atomic

#: Weights above this many bytes go to a second file; protobuf holds less than 2 GiB.
EXTERNAL_DATA_BYTES = 1_500_000_000


def load(path: Path) -> Any:
    """The ModelProto at ``path`` with every external weight loaded into memory."""
    onnx = _deps.require("onnx", purpose="read an ONNX file")
    return onnx.load(path)


def skeleton(path: Path) -> Any:
    """The ModelProto at ``path`` without the weights that lie in another file."""
    onnx = _deps.require("onnx", purpose="read an ONNX file")
    return onnx.load(path, load_external_data=False)


def weight_bytes(proto: Any) -> int:
    """Bytes of all initializers of the main graph that are held in memory."""
    return sum(len(tensor.raw_data) or tensor.ByteSize() for tensor in proto.graph.initializer)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a scratch path of the same name in a folder beside; on success move it to ``path``.

    The external weights that :func:`write` left beside the scratch file move along. If the body
    raises, what was at ``path`` stays. A reader never sees a model with another model's
    weights: for a moment there may be none.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        scratch = Path(folder) / path.name
        yield scratch
        atomic.fsync_path(scratch)
        weights = data_path(scratch)
        if weights.exists():
            atomic.fsync_path(weights)
            path.unlink(missing_ok=True)
            weights.replace(data_path(path))
            scratch.replace(path)
        else:
            scratch.replace(path)
            data_path(path).unlink(missing_ok=True)
    atomic.fsync_path(path.parent)


def write(proto: Any, path: Path, external_data_bytes: int = EXTERNAL_DATA_BYTES) -> None:
    """Write a ModelProto, and its weights beside it when they exceed ``external_data_bytes``.

    Not atomic by itself: see :func:`replacing`. The ModelProto is used up, for its weights may
    be moved out of memory.
    """
    onnx = _deps.require("onnx", purpose="write an ONNX file")
    if weight_bytes(proto) <= external_data_bytes:
        onnx.save_model(proto, path)
        return
    onnx.save_model(
        proto,
        path,
        save_as_external_data=True,
        all_tensors_to_one_file=True,
        location=data_path(path).name,
        size_threshold=1024,
    )


def save(proto: Any, path: Path, external_data_bytes: int = EXTERNAL_DATA_BYTES) -> None:
    """Write a ModelProto to ``path`` atomically; see :func:`write` and :func:`replacing`."""
    with replacing(path) as scratch:
        write(proto, scratch, external_data_bytes)


def copy(model: OnnxModel, target: Path) -> None:
    """Copy an ONNX file and its weight files; weights keep their names, which the file holds.

    Raises:
        BuildError: a weight file is absent, lies elsewhere, or is named like ``target``.
    """
    shutil.copyfile(model.path, target)
    for weights in model.external_files():
        if weights.parent != model.path.parent or weights.name in (target.name, ".."):
            raise BuildError(
                f"{model.path.name}: weight file {weights} must lie beside the ONNX file, under "
                f"another name than {target.name!r}; save the model again"
            )
        if not weights.is_file():
            raise BuildError(
                f"{model.path.name}: weight file {weights.name!r} is absent; keep it beside the "
                "ONNX file"
            )
        shutil.copyfile(weights, target.parent / weights.name)


def set_record(path: Path, record: Mapping[str, Any]) -> None:
    """Replace the sn72engine record of the file at ``path``; its weight file is not touched."""
    onnx = _deps.require("onnx", purpose="write an ONNX file")
    proto = onnx.load(path, load_external_data=False)
    write_record(proto, record)
    atomic.write_bytes(path, proto.SerializeToString())


def data_path(path: Path) -> Path:
    """Where the external weights of the model at ``path`` are kept."""
    return path.with_name(path.name + ".data")
