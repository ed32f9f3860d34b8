"""TensorRT and TensorRT-RTX: the engine inspector and the layer profiler, on the engine's GPU.

How much the inspector tells is decided when the engine is built (``ProfilingVerbosity``): names
only, or types, shapes and kernels too. Not run on a GPU so far: what reads the inspector's JSON is
tested on documents in its published form.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from typing import Any

from sn72engine.backends.tensorrt import TensorRTBackend
from sn72engine.engine import Engine
from sn72engine.introspection.layer import Layer, LayerRun, TimedRun
from sn72engine.spec import RuntimeOptions

#: How the inspector writes a type -> NumPy's name. TensorRT 10 gives a sentence that ends in the
#: type ("Row major linear FP16 format"), TensorRT 11 the type by itself ("Half").
_TYPES = (
    (r"FP32|\bFloat\b", "float32"),
    (r"FP16|\bHalf\b", "float16"),
    (r"BF16|BFloat16", "bfloat16"),
    (r"FP8|Float8", "float8_e4m3fn"),
    (r"FP4|Float4", "float4_e2m1fn"),
    (r"INT8|Int8", "int8"),
    (r"INT64|Int64", "int64"),
    (r"INT32|Int32", "int32"),
    (r"Bool", "bool"),
)

#: Names of the layers of the file, as TensorRT keeps them in a layer's metadata.
_ORIGIN = re.compile(r"\[ONNX Layer: ([^\]]+)\]")


def layers(engine: Engine) -> list[Layer]:
    """Layers of the engine, with kernels and the layers of the file that each stands for."""
    runner = TensorRTBackend(engine.manifest.backend).open(engine, RuntimeOptions())
    try:
        return parse(runner.describe())
    finally:
        runner.close()


def parse(text: str) -> list[Layer]:
    """Layers of the inspector's JSON, of TensorRT 10 or 11.

    An engine built to tell names only has a list of names in place of objects.
    """
    found = []
    for entry in json.loads(text).get("Layers", ()):
        if isinstance(entry, str):
            found.append(Layer(entry, ""))
            continue
        outputs: list[dict[str, Any]] = entry.get("Outputs") or [{}]
        sources = tuple(_ORIGIN.findall(str(entry.get("Metadata", ""))))
        kind = str(entry.get("ParameterType") or entry.get("LayerType", ""))
        found.append(
            Layer(
                name=entry.get("Name", ""),
                op=kind,
                precision=_precision(outputs[0]),
                shape=tuple(outputs[0].get("Dimensions", ())),
                weight_bytes=_weight_bytes(entry),
                fused=sources if len(sources) > 1 else (),
                runs_on=str(entry.get("TacticName", "")),
            )
        )
    return found


def timed_runs(
    engine: Engine, inputs: Mapping[str, Any], runs: int, options: RuntimeOptions
) -> list[TimedRun]:
    """Times of TensorRT's profiler; it tells durations, not when each began."""
    runner = TensorRTBackend(engine.manifest.backend).open(engine, options)
    try:
        runner.run(dict(inputs))  # makes the context, and pays for what is set up lazily
        found, taken = [], list[LayerRun]()
        runner.report_times_to(lambda name, ms: taken.append(LayerRun(name, "", ms * 1e3)))
        for _ in range(runs):
            taken.clear()
            started = time.perf_counter()
            runner.run(dict(inputs))
            seconds = time.perf_counter() - started
            found.append(TimedRun(tuple(taken), seconds * 1e6))
        return found
    finally:
        runner.close()


def _precision(tensor: Mapping[str, Any]) -> str:
    told = str(tensor.get("DataType") or tensor.get("Format/Datatype") or "")
    return next((name for pattern, name in _TYPES if re.search(pattern, told)), told)


def _weight_bytes(entry: Mapping[str, Any]) -> int:
    sizes = {"Float": 4, "Half": 2, "BFloat16": 2, "Int8": 1, "FP8": 1, "Int32": 4}
    held = [entry[name] for name in ("Weights", "Bias") if isinstance(entry.get(name), dict)]
    return sum(int(part.get("Count", 0)) * sizes.get(str(part.get("Type")), 0) for part in held)
