"""Puts the weights of an ONNX file into an engine that was built without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sn72engine.backends.tensorrt_engine import load_runtime
from sn72engine.backends.tensorrt_log import explain, make_logger
from sn72engine.engine import Engine
from sn72engine.errors import BuildError
from sn72engine.spec import RuntimeOptions


def refitted(trt: Any, engine: Engine, source: Path) -> bytes:
    """The engine file with the weights of ``source``, on the current CUDA device.

    Args:
        trt: the library.
        engine: built with ``refit``.
        source: ONNX file of the types that the engine was built from.

    Raises:
        BuildError: TensorRT refuses the engine or a weight, or a weight is missing.
    """
    log = make_logger(trt)
    asked = engine.manifest.build_options.get("tensorrt", {})
    # The runtime must outlive the engine, and the engine the refitter.
    runtime = load_runtime(trt, log, RuntimeOptions(), asked)
    loaded = runtime.deserialize_cuda_engine(engine.path.read_bytes())
    if loaded is None:
        raise BuildError(f"{engine.path} cannot be loaded: {explain(log.messages)}")
    refitter = trt.Refitter(loaded, log)
    parser = trt.OnnxParserRefitter(refitter, log)
    if not parser.refit_from_file(str(source)):
        reasons = [parser.get_error(index).desc() for index in range(parser.num_errors)]
        said = "; ".join(reasons[:3]) or explain(log.messages)
        raise BuildError(f"the weights do not fit {engine.folder}: {said}")
    missing = refitter.get_missing_weights()
    if missing:
        raise BuildError(
            f"{len(missing)} weights of {engine.folder} are not in the model: "
            f"{', '.join(sorted(missing)[:3])}; refit it with the model that it was built from"
        )
    if not refitter.refit_cuda_engine():
        raise BuildError(f"{engine.folder} cannot be refitted: {explain(log.messages)}")
    wanted = loaded.create_serialization_config()
    wanted.clear_flag(trt.SerializationFlag.EXCLUDE_WEIGHTS)
    plan = loaded.serialize_with_config(wanted)
    if plan is None:
        raise BuildError(f"{engine.folder} cannot be written: {explain(log.messages)}")
    return bytes(memoryview(plan))
