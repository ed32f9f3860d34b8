"""The artefact that build hands on: engine files with a manifest that says what they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sn72engine.model import TensorSpec
from sn72engine.spec import BackendName, Precision, Preprocess, ShapeRange

#: Version of the manifest's own layout. Raise it when a field changes meaning.
MANIFEST_FORMAT = 1


@dataclass(frozen=True, slots=True)
class EngineFile:
    """One file of an engine: name relative to its folder, size in bytes, SHA-256."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything that is recorded about a built engine. Plain JSON on disk, never a pickle.

    ``fingerprint`` holds the fields that identify the build (see ``fingerprint.py``), ``files``
    the engine files with ``files[0]`` the one a backend opens, ``target`` what it runs on
    (``cpu``, ``sm_89``), ``quantization`` and ``verification`` the records of those steps.
    """

    key: str
    backend: BackendName
    backend_version: str
    target: str
    precision: Precision
    batch: ShapeRange
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    files: tuple[EngineFile, ...]
    fingerprint: Mapping[str, Any]
    preprocess: Preprocess | None = None
    quantization: Mapping[str, Any] | None = None
    verification: Mapping[str, Any] | None = None
    build_seconds: float = 0.0
    created: str = ""
    notes: tuple[str, ...] = field(default=())

    @property
    def build_options(self) -> dict[str, Any]:
        """The recorded build options, as :meth:`BuildOptions.to_dict` writes them.

        Without backend and target; options that are younger than the engine are absent.
        """
        options: dict[str, Any] = json.loads(self.fingerprint.get("options", "{}"))
        return options

    @property
    def stripped(self) -> bool:
        """Whether the engine lacks its weights, and must be refitted before it can run."""
        return bool(self.build_options.get("tensorrt", {}).get("strip_weights"))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values, with the layout version."""
        return {
            "format": MANIFEST_FORMAT,
            "key": self.key,
            "backend": self.backend,
            "backend_version": self.backend_version,
            "target": self.target,
            "precision": self.precision,
            "batch": self.batch.to_dict(),
            "inputs": [spec.to_dict() for spec in self.inputs],
            "outputs": [spec.to_dict() for spec in self.outputs],
            "files": [{"name": f.name, "bytes": f.bytes, "sha256": f.sha256} for f in self.files],
            "fingerprint": dict(self.fingerprint),
            "preprocess": self.preprocess.to_dict() if self.preprocess else None,
            "quantization": dict(self.quantization) if self.quantization else None,
            "verification": dict(self.verification) if self.verification else None,
            "build_seconds": self.build_seconds,
            "created": self.created,
            "notes": list(self.notes),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Manifest:
        """Inverse of :meth:`to_dict`; the caller has checked ``format`` and the hash.

        Raises:
            KeyError, TypeError, ValueError: a field is absent or of the wrong kind.
        """
        preprocess = values["preprocess"]
        return cls(
            key=values["key"],
            backend=values["backend"],
            backend_version=values["backend_version"],
            target=values["target"],
            precision=values["precision"],
            batch=ShapeRange.from_dict(values["batch"]),
            inputs=tuple(TensorSpec.from_dict(v) for v in values["inputs"]),
            outputs=tuple(TensorSpec.from_dict(v) for v in values["outputs"]),
            files=tuple(EngineFile(v["name"], v["bytes"], v["sha256"]) for v in values["files"]),
            fingerprint=values["fingerprint"],
            preprocess=Preprocess.from_dict(preprocess) if preprocess else None,
            quantization=values["quantization"],
            verification=values["verification"],
            build_seconds=values["build_seconds"],
            created=values["created"],
            notes=tuple(values["notes"]),
        )


@dataclass(frozen=True, slots=True)
class Engine:
    """A built engine on disk: its folder and its manifest."""

    folder: Path
    manifest: Manifest

    @property
    def path(self) -> Path:
        """The file that the backend opens."""
        return self.folder / self.manifest.files[0].name
