"""ONNX Runtime: runs everywhere, and is the reference that the other backends are held to.

The engine file is the ONNX file itself, optimised each time it is opened. A file that ONNX
Runtime has optimised ahead is no better choice: the levels that keep it portable do not shorten
opening, and the level that does rearranges weights for the instruction set of the machine that
wrote it, so that the file would be wrong or slow elsewhere. (Timed on EfficientNet-Lite0 with one
thread: 18 ms to open the plain file, 18 ms the portable one, 11 ms the one tied to the machine.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sn72engine import _deps, onnx_file
from sn72engine.backends import onnxruntime_providers as providers
from sn72engine.backends.advice import explain
from sn72engine.backends.base import Array, BuiltFiles
from sn72engine.backends.onnxruntime_providers import Setting
from sn72engine.engine import Engine
from sn72engine.errors import BuildError, SessionError
from sn72engine.half import to_half
from sn72engine.model import OnnxModel, TensorSpec
from sn72engine.qdq import lower_for_cpu
from sn72engine.spec import BackendName, BuildOptions, RuntimeOptions

_FILE = "model.onnx"

#: ONNX Runtime's log level "error"; warnings about its own optimiser are of no use to callers.
_LOG_ERRORS = 3

#: What ONNX Runtime says -> what to do about it.
_ADVICE = (
    (
        r"Unsupported model IR version",
        "the file is newer than this ONNX Runtime reads: update onnxruntime, or export with an "
        "older onnx",
    ),
    (
        r"opset \d+ is under development|Opset .* is not supported|opset version",
        "the file's operator set is newer than this ONNX Runtime: export with a lower opset",
    ),
    (
        r"tensor\(bfloat16\)",
        "bfloat16 files are for GPUs: export the model in float32 for this backend",
    ),
    (
        r"NOT_IMPLEMENTED|Could not find an implementation|is not a registered function/op",
        "an operator has no kernel here: export without it, or choose another backend",
    ),
    (
        r"external data|External data|file_size|cannot get file size",
        "a weight file is absent or cut short: keep it beside the ONNX file",
    ),
    (
        r"Failed to allocate|bad allocation|out of memory",
        "not enough memory: lower the batch size",
    ),
)


class OnnxRuntimeBackend:
    """Builds and opens engines for ONNX Runtime, on the CPU or with a provider for CUDA."""

    name: BackendName = "onnxruntime"

    def version(self) -> str:
        """Installed version, from its metadata.

        Raises:
            MissingDependencyError: it is not installed.
        """
        return _deps.installed_version("onnxruntime")

    def target(self, options: BuildOptions) -> str:
        """``cpu`` or ``cuda``: the file holds no machine code, so no architecture is named."""
        return options.resolved_target

    def build(
        self,
        model: OnnxModel,
        options: BuildOptions,
        folder: Path,
        *,
        progress: bool | None = None,
    ) -> BuiltFiles:
        """Write ``model.onnx`` and its weight files, and check that ONNX Runtime takes them.

        On a CPU a Q/DQ model is rewritten for its 8-bit kernels (see ``qdq``); a float model is
        copied as it is. ``workspace_bytes`` and ``optimization_level`` go to the TensorRT provider
        and have no meaning for the others.

        Raises:
            BuildError: float16 is asked for on a CPU, the provider is absent or does not load, or
                ONNX Runtime refuses the file.
        """
        ort = _onnxruntime()
        target, device = folder / _FILE, self.target(options)
        setting = Setting.of(device, options.precision, options.batch, options.to_dict())
        providers.check(ort, setting.kind, BuildError)
        convert = options.precision == "fp16" and model.precision == "fp32"
        if convert and device == "cpu":
            raise BuildError(
                "precision='fp16' on a CPU would run float32 kernels between casts, slower than "
                "float32: use precision='fp32', or quantise the model and use 'int8'"
            )
        notes: tuple[str, ...] = ()
        if convert:
            notes = to_half(model.path, target)
        elif model.quantised and device == "cpu":
            notes = lower_for_cpu(model.path, target)
        else:
            onnx_file.copy(model, target)
        built = OnnxModel.open(target)
        _open(ort, built, setting, RuntimeOptions(threads=1), BuildError)
        weights = [path.name for path in built.external_files()]
        return BuiltFiles((_FILE, *weights), built.inputs, built.outputs, notes)

    def open(self, engine: Engine, options: RuntimeOptions) -> OnnxRuntimeRunner:
        """Load an engine.

        Raises:
            SessionError: ONNX Runtime refuses the file, or lacks the provider for it.
        """
        manifest = engine.manifest
        session = open_session(engine, options)
        return OnnxRuntimeRunner(session, manifest.inputs, manifest.outputs)


def open_session(
    engine: Engine, options: RuntimeOptions, adjust: Callable[[Any], None] | None = None
) -> Any:
    """ONNX Runtime's own session of an engine, for what a runner does not show.

    Args:
        engine: what to open.
        options: how it is run.
        adjust: may change the ``SessionOptions``, to switch the profiler on, say.

    Raises:
        SessionError: ONNX Runtime refuses the file, or lacks the provider for it.
    """
    ort = _onnxruntime()
    manifest = engine.manifest
    setting = Setting.of(
        manifest.target, manifest.precision, manifest.batch, manifest.build_options
    )
    providers.check(ort, setting.kind, SessionError)
    model = OnnxModel(engine.path, manifest.inputs, manifest.outputs)
    return _open(ort, model, setting, options, SessionError, adjust)


class OnnxRuntimeRunner:
    """One ONNX Runtime session.

    Outputs are handed over, not copied: each call's arrays wrap the memory that the session
    allocated for that call. Binding preallocated buffers was measured and is no faster, and its
    results would be overwritten by the next call.
    """

    def __init__(
        self, session: Any, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]
    ) -> None:
        self.inputs = inputs
        self.outputs = outputs
        self._session = session
        self._names = [spec.name for spec in outputs]

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Execute on NumPy arrays; the arrays returned belong to the caller.

        Raises:
            SessionError: ONNX Runtime reported failure.
        """
        if self._session is None:
            raise SessionError("this engine was closed; load it again")
        try:
            results = self._session.run(self._names, inputs)
        except Exception as error:  # its exceptions share no base class
            raise SessionError(
                f"ONNX Runtime failed while running: {explain(str(error), _ADVICE)}"
            ) from error
        return dict(zip(self._names, results, strict=True))

    def twin(self) -> OnnxRuntimeRunner:
        """Another runner of the same session, whose ``run`` several threads may call at once.

        Raises:
            SessionError: this one was closed.
        """
        if self._session is None:
            raise SessionError("this engine was closed; load it again")
        return OnnxRuntimeRunner(self._session, self.inputs, self.outputs)

    def close(self) -> None:
        """Release the session."""
        self._session = None


def _onnxruntime() -> Any:
    return _deps.require("onnxruntime", purpose="build and run ONNX Runtime engines")


def _open(
    ort: Any,
    model: OnnxModel,
    setting: Setting,
    options: RuntimeOptions,
    error_type: providers.Failure,
    adjust: Callable[[Any], None] | None = None,
) -> Any:
    settings = ort.SessionOptions()
    settings.log_severity_level = _LOG_ERRORS
    settings.intra_op_num_threads = options.threads or 0  # 0: one per core
    spinning = "1" if options.spinning else "0"
    settings.add_session_config_entry("session.intra_op.allow_spinning", spinning)
    settings.add_session_config_entry("session.inter_op.allow_spinning", spinning)
    if adjust is not None:
        adjust(settings)
    try:
        session = ort.InferenceSession(
            str(model.path),
            settings,
            providers=providers.listed(setting, model, options),
            enable_fallback=0,  # nor when a later call fails
        )
    except Exception as error:  # its exceptions share no base class
        raise error_type(
            f"ONNX Runtime refuses {model.path.name}: {explain(str(error), _ADVICE)}"
        ) from error
    providers.confirm(session, setting, options, error_type)
    return session
