"""OpenVINO: the other way to run on a CPU, faster than ONNX Runtime for many models.

The engine file is ONNX, opened and compiled each time. What was measured to decide how, with one
thread of an AVX-512 VNNI machine and OpenVINO 2026.4:

* OpenVINO fuses the symmetric int8 Q/DQ form by itself. The CPU form (see ``qdq``), which holds the
  results of convolutions in 8 bits too, is faster on a convolutional network (EfficientNet-Lite0:
  by 5 to 8 % at batch 1, by 2 to 19 % at batch 8) and as accurate. A transformer with few
  convolutions it makes slower, by 3 to 13 %. So the CPU form is for models with more convolutions
  than matrix products, and others stay as they are.
* OpenVINO's own file format opens no faster: reading either takes a tenth of what compiling takes.
* A cache of compiled models opens three times as fast, but is not used: it lies outside the engine
  folder, so that nothing would check its bytes before they run.

* Where a model has a fixed batch, shapes known ahead save a convolutional network a tenth of its
  time. In a transformer that is not in the CPU form, half to five sixths of the quantised products
  then run in float, which costs a third: its batch stays free.

Arithmetic is float32 where a model is float. OpenVINO by itself would choose bfloat16 on a CPU that
has it, which about halves the time of a float32 model but keeps three digits only; an engine must
not compute with less than what was asked for and verified.

The float layers of an int8 transformer (attention, normalisation, residual sums) are computed in
bfloat16 where the CPU that builds has it, as TensorRT computes them in float16. It saves 15 to 25 %
of the time. On 160 scenes that the small ViT was not calibrated on, its logits (of standard
deviation 3.7) are then off by 0.0138 on average: 0.0131 with bfloat16 alone, 0.0025 with int8 and
float32. ONNX Runtime is off by 0.0125, from the same file: of that, 0.0025 is the int8 products,
which both libraries compute alike (to 2e-5), and the rest the rounding of the pooled maximum, which
goes beyond its calibrated range and is not rounded here (see ``_leave_extremes_in_float``). Build
writes the decision into the engine file, so that a copy of the engine computes the same elsewhere
(or in float32, on a CPU without bfloat16).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sn72engine import _deps, onnx_file
from sn72engine.backends.advice import explain
from sn72engine.backends.base import Array, BuiltFiles
from sn72engine.engine import Engine
from sn72engine.errors import BuildError, SessionError
from sn72engine.graph_order import reads
from sn72engine.layers import is_convolutional
from sn72engine.model import OnnxModel, TensorSpec
from sn72engine.qdq import lower_for_cpu
from sn72engine.spec import BackendName, BuildOptions, RuntimeOptions, ShapeRange

_FILE = "model.onnx"
_DEVICE = "CPU"

#: Key in the ONNX file's metadata under which build says how the file is to be compiled.
_PLAN_KEY = "sn72engine.openvino"

_EXTREMES = ("ReduceMax", "ReduceMin")
#: Operators that leave values as they are, through which OpenVINO moves the rounding.
_MOVES = ("Concat", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")

#: What OpenVINO says -> what to do about it.
_ADVICE = (
    (
        r"No conversion rule found|OpConversionFailure",
        "an operator has no translation here: export without it, or choose another backend",
    ),
    (
        r"externally stored data",
        "a weight file is absent or cut short: keep it beside the ONNX file",
    ),
    (
        r"Unable to read the model|Could not open the file",
        "the file is damaged, or newer than this OpenVINO reads: export it again, or update "
        "openvino",
    ),
    (
        r"bad_alloc|[Oo]ut of memory|[Ff]ailed to allocate",
        "not enough memory: lower the batch size",
    ),
)


@dataclass(frozen=True, slots=True)
class _Plan:
    """How a file is compiled: type of its float layers, and whether one batch size is fixed."""

    float_layers: str = "f32"
    fix_batch: bool = True


class OpenVinoBackend:
    """Builds and opens engines for OpenVINO on a CPU."""

    name: BackendName = "openvino"

    def version(self) -> str:
        """Installed version, from its metadata.

        Raises:
            MissingDependencyError: it is not installed.
        """
        return _deps.installed_version("openvino")

    def target(self, options: BuildOptions) -> str:
        """``cpu``: the file holds no machine code, so no architecture is named."""
        return options.resolved_target

    def build(
        self,
        model: OnnxModel,
        options: BuildOptions,
        folder: Path,
        *,
        progress: bool | None = None,
    ) -> BuiltFiles:
        """Write ``model.onnx`` and its weight files, and check that OpenVINO compiles them.

        ``workspace_bytes`` and ``optimization_level`` have no meaning here.

        Raises:
            BuildError: float16 is asked for, or OpenVINO refuses the file.
        """
        openvino = _openvino()
        if options.precision == "fp16":
            raise BuildError(
                "precision='fp16' is not built for OpenVINO: few CPUs have float16 arithmetic, "
                "and the others would compute in float32; use precision='fp32', or quantise the "
                "model and use 'int8'"
            )
        if model.quantised and model.precision != "int8":
            # Its float8 conversions do not saturate, and fail inside fused arithmetic (2026.4).
            raise BuildError(
                f"{model.path.name} is {model.precision}, which OpenVINO computes wrongly or not "
                "at all on a CPU: build it with backend='onnxruntime', which emulates it"
            )
        target = folder / _FILE
        notes: tuple[str, ...] = ()
        plan = _Plan()
        if "int8" in model.formats and is_convolutional(onnx_file.skeleton(model.path)):
            notes = lower_for_cpu(model.path, target)
        else:
            onnx_file.copy(model, target)
            if model.precision == "int8":
                plan = _Plan("bf16" if _has_bfloat16(openvino.Core()) else "f32", fix_batch=False)
                notes = (f"layers that are not quantised compute in {plan.float_layers}",)
        if "int8" in model.formats:
            notes += _leave_extremes_in_float(target)
        if plan != _Plan():
            _write_plan(target, plan)
        built = OnnxModel.open(target)
        one = RuntimeOptions(threads=1)
        _compile(openvino, target, built.inputs, options.batch, one, BuildError)
        weights = [path.name for path in built.external_files()]
        return BuiltFiles((_FILE, *weights), built.inputs, built.outputs, notes)

    def open(self, engine: Engine, options: RuntimeOptions) -> OpenVinoRunner:
        """Load an engine; ``options.spinning`` has no meaning here, for its threads never spin.

        Raises:
            SessionError: OpenVINO refuses the file.
        """
        compiled = compile_engine(engine, options)
        return OpenVinoRunner(compiled, engine.manifest.inputs, engine.manifest.outputs)


def compile_engine(
    engine: Engine, options: RuntimeOptions, more: Mapping[str, Any] | None = None
) -> Any:
    """OpenVINO's own compiled model of an engine, for what a runner does not show.

    Args:
        engine: what to open.
        options: how it is run.
        more: properties of OpenVINO beside those that a runner's model is compiled with.

    Raises:
        SessionError: OpenVINO refuses the file.
    """
    manifest = engine.manifest
    return _compile(
        _openvino(), engine.path, manifest.inputs, manifest.batch, options, SessionError, more
    )


class OpenVinoRunner:
    """One compiled model with one inference request.

    Inputs are read where they lie; outputs are copied, because the request writes the next call's
    into the same memory.
    """

    def __init__(
        self, compiled: Any, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]
    ) -> None:
        self.inputs = inputs
        self.outputs = outputs
        self._compiled = compiled
        self._request = compiled.create_infer_request()
        self._names = [spec.name for spec in outputs]

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Execute on NumPy arrays; the arrays returned belong to the caller.

        Raises:
            SessionError: OpenVINO reported failure.
        """
        if self._request is None:
            raise SessionError("this engine was closed; load it again")
        try:
            results = self._request.infer(dict(inputs), share_inputs=True, share_outputs=False)
        except Exception as error:  # its exceptions share no base class
            raise SessionError(f"OpenVINO failed while running: {_explain(error)}") from error
        return {name: results[name] for name in self._names}

    def twin(self) -> OpenVinoRunner:
        """Another inference request of the same compiled model.

        Raises:
            SessionError: this one was closed.
        """
        if self._compiled is None:
            raise SessionError("this engine was closed; load it again")
        return OpenVinoRunner(self._compiled, self.inputs, self.outputs)

    def close(self) -> None:
        """Release the model."""
        self._request = self._compiled = None


def _openvino() -> Any:
    return _deps.require("openvino", purpose="build and run OpenVINO engines")


def _has_bfloat16(core: Any) -> bool:
    return "BF16" in core.get_property(_DEVICE, "OPTIMIZATION_CAPABILITIES")


def _write_plan(path: Path, plan: _Plan) -> None:
    onnx = _deps.require("onnx", purpose="prepare a quantised model for OpenVINO")
    proto = onnx.load(path, load_external_data=False)
    proto.metadata_props.add(key=_PLAN_KEY, value=json.dumps(asdict(plan)))
    path.write_bytes(proto.SerializeToString())


def _read_plan(model: Any) -> _Plan:
    """The plan of a model that OpenVINO has read; it keeps ONNX metadata under "framework"."""
    place = ["framework", _PLAN_KEY]
    if not model.has_rt_info(place):
        return _Plan()
    return _Plan(**json.loads(model.get_rt_info(place).astype(str)))


def _leave_extremes_in_float(path: Path) -> tuple[str, ...]:
    """Take Q/DQ pairs off maxima and minima, which OpenVINO gets wrong.

    It makes the rounding part of the reduction, which then keeps its running extreme in 8 bits too
    (2026.4: results off by a tenth; sums and means are right).

    Returns:
        A remark for the manifest where there were any.
    """
    onnx = _deps.require("onnx", purpose="prepare a quantised model for OpenVINO")
    proto = onnx.load(path, load_external_data=False)
    graph = proto.graph
    makers = {name: node for node in graph.node for name in node.output}
    needed = {value.name for value in graph.output}
    for node in graph.node:
        if any(a.g.node or a.graphs for a in node.attribute):
            needed.update(reads(node))  # names inside are left as they are

    def extreme(name: str) -> bool:
        node = makers.get(name)
        if node is None or node.op_type not in (*_EXTREMES, *_MOVES):
            return False
        parts = node.input if node.op_type == "Concat" else node.input[:1]
        return node.op_type in _EXTREMES or any(extreme(part) for part in parts)

    exact = {
        node.output[0]: node.input[0]
        for node in graph.node
        if node.op_type == "QuantizeLinear" and extreme(node.input[0])
    }
    pairs = {
        node.output[0]: exact[node.input[0]]
        for node in graph.node
        if node.op_type == "DequantizeLinear"
        and node.input[0] in exact
        and node.output[0] not in needed
    }
    if not pairs:
        return ()
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = pairs.get(name, name)
    kept = [node for node in graph.node if node.output[0] not in pairs]
    read = {name for node in kept for name in node.input} | needed
    kept = [node for node in kept if node.output[0] not in exact or node.output[0] in read]
    del graph.node[:]
    graph.node.extend(kept)
    read = {name for node in kept for name in node.input} | needed
    for index in reversed(range(len(graph.initializer))):
        if graph.initializer[index].name not in read:
            del graph.initializer[index]
    path.write_bytes(proto.SerializeToString())
    return (
        f"maxima and minima that stay in float, for OpenVINO rounds them wrongly: {len(pairs)}",
    )


def _compile(
    openvino: Any,
    path: Path,
    inputs: tuple[TensorSpec, ...],
    batch: ShapeRange,
    options: RuntimeOptions,
    error_type: type[BuildError] | type[SessionError],
    more: Mapping[str, Any] | None = None,
) -> Any:
    settings: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        # Nor may it quantise by itself what feeds a product of which only the weights are int8.
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        # Pinned threads of two sessions would share the first cores and leave the others idle.
        "ENABLE_CPU_PINNING": False,
        **(more or {}),
    }
    if options.threads is not None:
        settings["INFERENCE_NUM_THREADS"] = options.threads
    try:
        core = openvino.Core()
        model = core.read_model(path)
        plan = _read_plan(model)
        settings["INFERENCE_PRECISION_HINT"] = plan.float_layers if _has_bfloat16(core) else "f32"
        if batch.min == batch.max and plan.fix_batch:
            model.reshape({spec.name: _with_batch(spec, batch.max) for spec in inputs})
        return core.compile_model(model, _DEVICE, settings)
    except Exception as error:  # its exceptions share no base class
        raise error_type(f"OpenVINO refuses {path.name}: {_explain(error)}") from error


def _with_batch(spec: TensorSpec, batch: int) -> list[int]:
    """Shape of an input at one batch size; -1 stands for other free axes."""
    return [
        size if isinstance(size, int) else (batch if axis == 0 else -1)
        for axis, size in enumerate(spec.shape)
    ]


def _explain(error: Exception) -> str:
    # Each level of the library adds the line of source that it failed at.
    own = ("Exception from ", "Check '")
    lines = [line for line in str(error).splitlines() if not line.startswith(own)]
    return explain("\n".join(lines).strip() or str(error), _ADVICE)
