"""TensorRT and TensorRT-RTX, which share one API: one code path for both.

Networks are strongly typed: types are what the ONNX file says, so half precision means a float16
file and INT8 means Q/DQ nodes. The builder flags and calibrators that did this otherwise are gone
in TensorRT 11. Enumerators are used by name, for their numbers move between versions.

TensorRT-RTX also builds for cards that are not present (``target="sm_86,sm_89"``). TensorRT builds
for the card it finds.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from sn72engine import _deps
from sn72engine.backends.base import BuiltFiles
from sn72engine.backends.tensorrt_build import attach_timing_cache, merge, run_builder
from sn72engine.backends.tensorrt_config import add_profiles, configure, refuse
from sn72engine.backends.tensorrt_log import advise, explain, make_logger, warnings
from sn72engine.backends.tensorrt_plugin import fuse, register
from sn72engine.backends.tensorrt_refit import refitted
from sn72engine.backends.tensorrt_runner import TensorRTRunner, numpy_name, open_runner
from sn72engine.cards import device_target, runs_on
from sn72engine.engine import Engine
from sn72engine.errors import BuildError, SessionError
from sn72engine.half import to_half
from sn72engine.model import OnnxModel, TensorSpec
from sn72engine.progress import Progress
from sn72engine.spec import BackendName, BuildOptions, RuntimeOptions

_FILE = "model.engine"


class TensorRTBackend:
    """Builds and opens engines of ``tensorrt`` or ``tensorrt_rtx``, whichever ``name`` says."""

    def __init__(self, name: BackendName) -> None:
        self.name: BackendName = name

    def version(self) -> str:
        """Installed version, from its metadata.

        Raises:
            MissingDependencyError: it is not installed.
        """
        return _deps.installed_version(self.name)

    def target(self, options: BuildOptions) -> str:
        """What the engine is for: ``sm_89``, several as ``sm_86,sm_89``, or ``sm_80+``.

        Raises:
            BuildError: ``cuda`` is asked for and no CUDA device is present.
        """
        if options.resolved_target != "cuda":
            return options.resolved_target
        present = device_target()
        if present is None:
            way_out = (
                "name the card to build for, target='sm_89' for example"
                if self.name == "tensorrt_rtx"
                else "build on a machine with the card, or use backend='tensorrt_rtx' with "
                "target='sm_89', which needs none"
            )
            raise BuildError(f"target='cuda': no CUDA device is present; {way_out}")
        if options.tensorrt.hardware_compatibility != "ampere_plus":
            return present
        if not runs_on("sm_80+", present):
            raise BuildError(
                f"hardware_compatibility='ampere_plus' needs a card from sm_80 on to build on; "
                f"this one is {present}"
            )
        return "sm_80+"

    def build(
        self,
        model: OnnxModel,
        options: BuildOptions,
        folder: Path,
        *,
        progress: bool | None = None,
    ) -> BuiltFiles:
        """Write ``model.engine``.

        ``precision="fp16"`` and a Q/DQ model both convert what is float32 to float16 first;
        inputs and outputs keep their types. Ctrl-C stops the builder at its next step.

        Raises:
            BuildError: an option cannot be had, or the parser or the builder refused.
            KeyboardInterrupt: the user cancelled; nothing is left in ``folder``.
        """
        target, present = self.target(options), device_target()
        refuse(self.name, options, present)
        trt = self._library()
        logger = make_logger(trt)
        builder = trt.Builder(logger)
        config = builder.create_builder_config()
        configure(trt, config, self.name, options, target, logger)
        with tempfile.TemporaryDirectory(prefix="sn72-") as scratch:
            source, notes = as_typed(model, options, Path(scratch))
            flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
            if options.tensorrt.plugins:
                source, more = self._with_plugins(source, Path(scratch), present)
                notes += more
                flags |= 1 << int(trt.NetworkDefinitionCreationFlag.PREFER_AOT_PYTHON_PLUGINS)
            network = builder.create_network(flags)
            # The network may point into the parser's weights: it lives until the build is done.
            parser = trt.OnnxParser(network, logger)
            _parse(parser, source, model.path.name, logger)
            _check_signature(network, model)
            add_profiles(builder, network, config, model, options, logger)
            cache = attach_timing_cache(config, self.name, self.version(), present or target)
            with Progress(f"build {target}", None, unit="step", shown=progress) as bar:
                plan = run_builder(trt, builder, network, config, bar)
            if plan is None:
                raise BuildError(
                    f"{model.path.name} cannot be built for {target} with "
                    f"precision={options.precision!r}: {explain(logger.messages)}"
                )
            (folder / _FILE).write_bytes(memoryview(plan))
        if cache is not None:
            cache.update(lambda stored: merge(config, stored))
        notes = (*notes, *warnings(logger.messages))
        return BuiltFiles((_FILE,), model.inputs, model.outputs, notes)

    def refit(
        self, engine: Engine, model: OnnxModel, options: BuildOptions, folder: Path
    ) -> BuiltFiles:
        """Write ``model.engine`` with the weights of ``model`` in it.

        Args:
            engine: built with ``refit``.
            model: whose weights to take.
            options: how the engine was built.
            folder: where to write.

        Raises:
            BuildError: the card is not here, or TensorRT refuses the engine or the weights.
        """
        wanted, present = engine.manifest.target, device_target()
        if not runs_on(wanted, present):
            raise BuildError(
                f"an engine for {wanted} is refitted on that card, and this machine has "
                f"{present or 'none'}; refit it there"
            )
        with tempfile.TemporaryDirectory(prefix="sn72-") as scratch:
            source, notes = as_typed(model, options, Path(scratch))
            (folder / _FILE).write_bytes(refitted(self._library(), engine, source))
        return BuiltFiles((_FILE,), model.inputs, model.outputs, notes)

    def open(self, engine: Engine, options: RuntimeOptions) -> TensorRTRunner:
        """Load an engine on a CUDA device.

        Raises:
            SessionError: there is no such device, it is of another architecture than the
                engine's, or TensorRT refuses the file.
        """
        wanted = engine.manifest.target
        present = device_target(options.device_index)
        if present is None:
            raise SessionError(
                f"an engine for {wanted} cannot run here: there is no CUDA device "
                f"{options.device_index}; build with backend='onnxruntime' to run on the CPU"
            )
        if not runs_on(wanted, present):
            raise SessionError(
                f"an engine for {wanted} cannot run on CUDA device {options.device_index}, which "
                f"is {present}; build it again with target='cuda' on this machine"
            )
        return open_runner(self._library(), engine, options)

    def _with_plugins(
        self, source: Path, folder: Path, present: str | None
    ) -> tuple[Path, tuple[str, ...]]:
        """The ONNX file with its patterns replaced, each made known to the library."""
        if present is None:  # the target would have been refused
            raise BuildError("plugins are compiled for the card, and no CUDA device is present")
        fused = folder / "fused.onnx"
        plugins = fuse(source, fused, int(present[3:]))
        if not plugins:
            return source, ("no plugin fits this model: it has no LayerNormalization before Gelu",)
        trtp = _deps.require(self.name, purpose="build plugins", submodule="plugin")
        names = [register(trtp, plugin) for plugin in plugins]
        return fused, (f"plugins: {', '.join(names)}",)

    def _library(self) -> Any:
        return _deps.require(self.name, purpose=f"build and run {self.name} engines")


def as_typed(model: OnnxModel, options: BuildOptions, folder: Path) -> tuple[Path, tuple[str, ...]]:
    """The ONNX file whose types are those that the engine shall compute in.

    Returns:
        The model's own file, or one in ``folder``, and remarks for the manifest.

    Raises:
        BuildError: it cannot be converted.
    """
    if options.precision in ("fp32", "bf16") or model.weights == "float16":
        return model.path, ()
    target = folder / "half.onnx"
    return target, to_half(model.path, target)


def _parse(parser: Any, source: Path, name: str, logger: Any) -> None:
    if parser.parse_from_file(str(source)):
        return
    reasons = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        node = (
            f"node {error.node_name()!r} ({error.node_operator()}): " if error.node_name() else ""
        )
        advice = advise(error.desc())
        reasons.append(
            f"{node}{error.desc()} [{error.code().name}]" + (f": {advice}" if advice else "")
        )
    raise BuildError(
        f"TensorRT cannot read {name}: {'; '.join(reasons[:3]) or explain(logger.messages)}"
    )


def _check_signature(network: Any, model: OnnxModel) -> None:
    """Refuse a network whose inputs and outputs are not what the ONNX file declares."""

    def declared(specs: tuple[TensorSpec, ...]) -> list[tuple[str, str]]:
        return [(spec.name, spec.dtype) for spec in specs]

    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    for kind, specs, tensors in (
        ("inputs", model.inputs, inputs),
        ("outputs", model.outputs, outputs),
    ):
        found = [(tensor.name, numpy_name(tensor.dtype)) for tensor in tensors]
        if found != declared(specs):
            raise BuildError(
                f"{model.path.name}: TensorRT reads the {kind} as {found}, but the file declares "
                f"{declared(specs)}; export it again with float32 or float16 {kind}"
            )
