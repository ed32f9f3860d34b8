"""What each library tells about the engines it runs: its layers, and the time of each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sn72engine.errors import SessionError
from sn72engine.introspection.layer import Layer as Layer
from sn72engine.introspection.layer import TimedRun as TimedRun
from sn72engine.spec import TENSORRT_BACKENDS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sn72engine.engine import Engine
    from sn72engine.spec import RuntimeOptions


def layers_of(engine: Engine) -> tuple[Layer, ...]:
    """The layers that the library makes of an engine, after its own fusions, in order.

    Raises:
        SessionError: the engine cannot be opened here.
        MissingDependencyError: its library is not installed.
    """
    return tuple(_module(engine).layers(engine))


def timed_runs(
    engine: Engine, inputs: Mapping[str, Any], runs: int, options: RuntimeOptions
) -> list[TimedRun]:
    """Run an engine with the library's own profiler on.

    Args:
        engine: what to run.
        inputs: arrays by name, as a session takes them.
        runs: how often; each gives one entry.
        options: how to run it.

    Raises:
        SessionError: the engine cannot be opened or run here.
        MissingDependencyError: its library is not installed.
    """
    found: list[TimedRun] = _module(engine).timed_runs(engine, inputs, runs, options)
    return found


def _module(engine: Engine) -> Any:
    name: str = engine.manifest.backend
    if name == "onnxruntime":
        from sn72engine.introspection import onnxruntime

        return onnxruntime
    if name == "openvino":
        from sn72engine.introspection import openvino

        return openvino
    if name in TENSORRT_BACKENDS:
        from sn72engine.introspection import tensorrt

        return tensorrt
    raise SessionError(f"engines of {name} do not tell their layers")
