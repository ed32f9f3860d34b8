"""Build options become a TensorRT builder configuration; what cannot be built is refused first.

Enumerators are looked up by name in the tables below, for their numbers move between releases
and some exist in one library only. The builder takes several of its settings without a word and
drops them, so each flag is read back.
"""

from __future__ import annotations

from typing import Any

from sn72engine.backends.tensorrt_log import explain
from sn72engine.errors import BuildError
from sn72engine.model import OnnxModel
from sn72engine.spec import BackendName, BuildOptions, ShapeRange, TensorRTOptions

#: Option -> member of ``BuilderFlag``.
FLAGS = {
    "version_compatible": "VERSION_COMPATIBLE",
    "exclude_lean_runtime": "EXCLUDE_LEAN_RUNTIME",
    "weight_streaming": "WEIGHT_STREAMING",
    "strip_weights": "STRIP_PLAN",
    "user_allocation": "REQUIRE_USER_ALLOCATION",
}
#: Value of ``refit`` -> member of ``BuilderFlag``.
REFIT = {"identical": "REFIT_IDENTICAL", "any": "REFIT"}
#: Value of an option -> member of the enumeration of that name.
TILING = {"none": "NONE", "fast": "FAST", "moderate": "MODERATE", "full": "FULL"}
HARDWARE = {"ampere_plus": "AMPERE_PLUS", "same_compute_capability": "SAME_COMPUTE_CAPABILITY"}
PROFILING = {"none": "NONE", "layer_names": "LAYER_NAMES_ONLY", "detailed": "DETAILED"}


def refuse(backend: BackendName, options: BuildOptions, present: str | None) -> None:
    """Refuse what this library, or a machine without the card, cannot build.

    Without this the builder would fail minutes later with a message about something else, or
    leave the option out.

    Args:
        backend: ``tensorrt`` or ``tensorrt_rtx``.
        options: what is asked for.
        present: architecture of the CUDA device here; None where there is none.

    Raises:
        BuildError: an option cannot be had.
    """
    asked = options.tensorrt
    if asked.refit != "none" and present is None:
        raise BuildError(
            f"refit={asked.refit!r}: the builder compiles refittable engines on the card, and no "
            "CUDA device is present; build on a machine with the card, or leave refit at 'none'"
        )
    if backend == "tensorrt":
        if asked.user_allocation:
            raise BuildError(
                "user_allocation=True is for backend='tensorrt_rtx'; engines of 'tensorrt' can be "
                "captured as they are"
            )
        return
    if asked.hardware_compatibility != "none":
        raise BuildError(
            f"hardware_compatibility={asked.hardware_compatibility!r} is not known to "
            "tensorrt_rtx: name every card that shall run the engine, target='sm_86,sm_89' say"
        )
    if asked.version_compatible and not asked.exclude_lean_runtime:
        raise BuildError(
            "version_compatible=True: tensorrt_rtx has no lean runtime to put into the engine; "
            "give exclude_lean_runtime=True too"
        )
    if asked.plugins:
        raise BuildError(
            f"plugins={asked.plugins}: tensorrt_rtx takes no plugins; leave them out, or use "
            "backend='tensorrt'"
        )


def configure(
    trt: Any, config: Any, backend: BackendName, options: BuildOptions, target: str, log: Any
) -> None:
    """Carry every build option over to an ``IBuilderConfig``.

    Args:
        trt: the library.
        config: the configuration to fill.
        backend: ``tensorrt`` or ``tensorrt_rtx``.
        options: what is asked for.
        target: the resolved target, such as ``sm_89`` or ``sm_86,sm_89``.
        log: the logger of the builder, for what it says of a setting that it refuses.

    Raises:
        BuildError: the library does not know an option's value, or refuses it.
    """
    asked = options.tensorrt
    for pool, limit in (
        (trt.MemoryPoolType.WORKSPACE, options.workspace_bytes),
        (trt.MemoryPoolType.TACTIC_DRAM, asked.tactic_bytes),
    ):
        if limit is not None:
            config.set_memory_pool_limit(pool, limit)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if asked.max_tactics is not None:
        config.max_num_tactics = asked.max_tactics
    if asked.l2_tiling_bytes is not None:
        config.l2_limit_for_tiling = asked.l2_tiling_bytes
    if asked.aux_streams is not None:
        config.max_aux_streams = asked.aux_streams
    config.profiling_verbosity = _member(trt.ProfilingVerbosity, PROFILING[asked.profiling])
    if asked.tiling != "none":
        config.tiling_optimization_level = _member(
            trt.TilingOptimizationLevel, TILING[asked.tiling]
        )
    if asked.hardware_compatibility != "none":
        config.hardware_compatibility_level = _member(
            trt.HardwareCompatibilityLevel, HARDWARE[asked.hardware_compatibility]
        )
    if asked.tactic_sources is not None:
        sources = [_member(trt.TacticSource, name) for name in asked.tactic_sources]
        if not config.set_tactic_sources(sum(1 << int(source) for source in sources)):
            raise BuildError(f"tactic_sources={asked.tactic_sources}: {explain(log.messages)}")
    for name in _flags(asked):
        flag = _member(trt.BuilderFlag, name)
        config.set_flag(flag)
        if not config.get_flag(flag):
            raise BuildError(f"the builder refuses {name}: {explain(log.messages)}")
    if backend == "tensorrt_rtx" and options.resolved_target != "cuda":
        _name_cards(trt, config, target.split(","))


def add_profiles(
    builder: Any, network: Any, config: Any, model: OnnxModel, options: BuildOptions, log: Any
) -> None:
    """Add one optimization profile per range of batch sizes; none when the batch is fixed.

    Raises:
        BuildError: an axis other than the batch is free, or the builder refuses a range.
    """
    for batch in options.profiles or (options.batch,):
        profile = builder.create_optimization_profile()
        if not _fill(profile, network, model, batch):
            return
        if config.add_optimization_profile(profile) < 0:
            raise BuildError(
                f"batch={batch}: TensorRT refuses this range for {model.path.name}: "
                f"{explain(log.messages)}"
            )


def _flags(asked: TensorRTOptions) -> list[str]:
    names = [FLAGS[option] for option in FLAGS if getattr(asked, option)]
    # The order matters: the lean runtime can be left out only of a version-compatible engine.
    return names if asked.refit == "none" else [*names, REFIT[asked.refit]]


def _member(enumeration: Any, name: str) -> Any:
    member = enumeration.__members__.get(name)
    if member is None:
        raise BuildError(
            f"{enumeration.__name__}.{name} is not known to this release, which has "
            f"{', '.join(enumeration.__members__)}"
        )
    return member


def _name_cards(trt: Any, config: Any, targets: list[str]) -> None:
    members = trt.ComputeCapability.__members__
    config.num_compute_capabilities = len(targets)
    for index, target in enumerate(targets):
        capability = members.get(target.replace("_", "").upper())
        if capability is None:
            numbers = sorted(int(name[2:]) for name in members if name.startswith("SM"))
            known = ", ".join(f"sm_{number}" for number in numbers)
            raise BuildError(
                f"target={target!r}: this TensorRT-RTX builds for {known}; for other "
                "cards use backend='tensorrt' on a machine that has one"
            )
        if not config.set_compute_capability(capability, index):
            raise BuildError(f"target={target!r}: TensorRT-RTX refuses this compute capability")


def _fill(profile: Any, network: Any, model: OnnxModel, batch: ShapeRange) -> bool:
    """Set the batch range of every input with a free batch; whether there was one."""
    free = False
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shape = tuple(tensor.shape)
        if -1 in shape[1:]:
            raise BuildError(
                f"{model.path.name}: input {model.inputs[index]} has a free axis other than the "
                "batch; export it with fixed sizes"
            )
        if -1 in shape:
            free = True
            sizes = (batch.min, batch.opt, batch.max)
            profile.set_shape(tensor.name, *[(size, *shape[1:]) for size in sizes])
    return free
