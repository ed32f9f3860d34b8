"""Weights into an engine that was built without them, or other weights of the same shape."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from sn72engine import fingerprint
from sn72engine.backends.base import BuiltFiles
from sn72engine.backends.tensorrt import TensorRTBackend
from sn72engine.builder import describe_build
from sn72engine.engine import Engine, Manifest
from sn72engine.errors import BuildError
from sn72engine.fingerprint import Fingerprint
from sn72engine.model import OnnxModel
from sn72engine.spec import TENSORRT_BACKENDS, BuildOptions
from sn72engine.store import Store


def refit(engine: Engine, model: OnnxModel, *, store: Store | None = None) -> Engine:
    """Put the weights of ``model`` into an engine that was built to take them.

    What comes out is what building ``model`` with the same options and its weights would give,
    and is kept in the store as that: refitting takes a fraction of the time. The engine given
    stays as it is, so that one weight-stripped engine can serve many sets of weights.

    Args:
        engine: built by TensorRT with ``TensorRTOptions(refit=...)``.
        model: the ONNX file; with ``refit="identical"`` the one that the engine was built from,
            with ``"any"`` one of the same graph.
        store: where engines are kept; the default store when None.

    Returns:
        The engine in the store.

    Raises:
        BuildError: the engine was not built for it, the model is not the one that it takes, there
            is no CUDA device of its architecture, or TensorRT refuses.
        MissingDependencyError: the library is not installed.
        StoreError: the store cannot be written.
    """
    store = store if store is not None else Store()
    manifest = engine.manifest
    kind = manifest.build_options.get("tensorrt", {}).get("refit", "none")
    if manifest.backend not in TENSORRT_BACKENDS or kind == "none":
        raise BuildError(
            f"{engine.folder} was not built to be refitted: build it for TensorRT with "
            "TensorRTOptions(refit='identical', strip_weights=True), or 'any'"
        )
    stored = Fingerprint.from_dict(manifest.fingerprint)
    sha256 = model.sha256()
    if kind == "identical" and sha256 != stored.model_sha256:
        raise BuildError(
            f"{model.path} is not the model that {engine.folder} was built from (SHA-256 "
            f"{sha256[:12]}, not {stored.model_sha256[:12]}): with refit='identical' other weights "
            "would give wrong answers; build with refit='any' for that"
        )
    backend = TensorRTBackend(manifest.backend)
    whole = BuildOptions.from_dict({**manifest.build_options, "backend": manifest.backend})
    whole = replace(whole, tensorrt=replace(whole.tensorrt, strip_weights=False))
    options = whole.to_dict()
    del options["backend"], options["target"]
    wanted = replace(
        stored,
        model_sha256=sha256,
        preprocess_sha256=fingerprint.of_preprocess(model),
        options=fingerprint.canonical_json(options),
    )

    def make(folder: Path) -> Manifest:
        started = time.perf_counter()
        built: BuiltFiles = backend.refit(engine, model, whole, folder)
        seconds = time.perf_counter() - started
        return describe_build(model, whole, wanted, manifest.target, folder, built, seconds)

    return store.get_or_build(wanted, make)
