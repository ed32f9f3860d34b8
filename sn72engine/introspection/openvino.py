"""OpenVINO: the model that it compiled, and its performance counters."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from sn72engine.backends.openvino import compile_engine
from sn72engine.engine import Engine
from sn72engine.introspection.layer import Layer, LayerRun, TimedRun
from sn72engine.spec import RuntimeOptions

#: OpenVINO's name of a type -> NumPy's.
_TYPES = {
    "f32": "float32",
    "f16": "float16",
    "bf16": "bfloat16",
    "i8": "int8",
    "u8": "uint8",
    "i32": "int32",
    "i64": "int64",
    "boolean": "bool",
}

#: Entries that are there to hold data, not to compute.
_DATA = ("Const", "Input", "Output")


def layers(engine: Engine) -> list[Layer]:
    """Layers of the compiled model, with kernels and the layers of the file each stands for."""
    compiled = compile_engine(engine, RuntimeOptions())
    found = []
    for node in compiled.get_runtime_model().get_ordered_ops():
        facts = node.get_rt_info()
        told = {name: str(facts[name].astype(str)) for name in facts}
        if told["layerType"] in _DATA:
            continue
        sources = tuple(name for name in told["originalLayersNames"].split(",") if name)
        precision = told["outputPrecisions"].split(",")[0]
        shape = node.output(0).get_partial_shape() if node.get_output_size() else []
        found.append(
            Layer(
                name=node.get_friendly_name(),
                op=told["layerType"],
                precision=_TYPES.get(precision, precision),
                shape=tuple(d.get_length() if d.is_static else "?" for d in shape),
                fused=sources if len(sources) > 1 else (),
                runs_on=told["primitiveType"],
            )
        )
    return found


def timed_runs(
    engine: Engine, inputs: Mapping[str, Any], runs: int, options: RuntimeOptions
) -> list[TimedRun]:
    """Times of the performance counters; OpenVINO tells durations, not when each began."""
    request = compile_engine(engine, options, {"PERF_COUNT": True}).create_infer_request()
    found = []
    for _ in range(runs):
        started = time.perf_counter()
        request.infer(dict(inputs), share_inputs=True)
        seconds = time.perf_counter() - started
        found.append(
            TimedRun(
                tuple(
                    LayerRun(
                        entry.node_name,
                        entry.node_type,
                        entry.real_time.total_seconds() * 1e6,
                        runs_on=entry.exec_type,
                    )
                    for entry in request.profiling_info
                    if entry.status == entry.Status.EXECUTED
                ),
                seconds * 1e6,
            )
        )
    return found
