"""Model to engine: fingerprint it, take it from the store, or build it, try it and keep it."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from sn72engine import fingerprint
from sn72engine.backends import get_backend
from sn72engine.backends.base import BuiltFiles
from sn72engine.engine import Engine, Manifest
from sn72engine.errors import BuildError
from sn72engine.fingerprint import Fingerprint
from sn72engine.model import OnnxModel
from sn72engine.program import TorchProgram
from sn72engine.spec import PROGRAM_BACKENDS, BuildOptions
from sn72engine.store import Store, describe
from sn72engine.trial import try_engine

Model = OnnxModel | TorchProgram


def build(
    model: Model,
    options: BuildOptions | None = None,
    *,
    store: Store | None = None,
    progress: bool | None = None,
) -> Engine:
    """Build an engine, or take it from the store when it was built before.

    What identifies a build is its fingerprint: the model with its weights, the preprocessing, the
    options, the backend with its version, and the target. A stored engine is returned at once.
    A new one is tried before it is kept, where this machine can run it: outputs must have the
    declared shapes and be finite. An engine for a card that is not here is kept untried, and its
    manifest says so.

    Args:
        model: the ONNX file; a Q/DQ file for ``precision="int8"``. A program for the backend
            ``inductor``.
        options: how to build; the defaults of :class:`BuildOptions` when None.
        store: where engines are kept; the default store when None.
        progress: show a progress bar; None shows it on a terminal.

    Returns:
        The engine in the store.

    Raises:
        BuildError: the options do not fit the model, the backend refused, or the new engine
            computes nonsense. Nothing is kept then.
        MissingDependencyError: the backend's library is not installed.
        StoreError: the store cannot be written.
    """
    options = options if options is not None else BuildOptions()
    store = store if store is not None else Store()
    check_kind(model, options)
    options = resolve_precision(model, options)
    check_batch(model, options)
    backend = get_backend(options.backend)
    wanted = fingerprint.of(model, options, backend)

    def make(folder: Path) -> Manifest:
        started = time.perf_counter()
        built = backend.build(model, options, folder, progress=progress)
        seconds = time.perf_counter() - started
        target = backend.target(options)
        return describe_build(model, options, wanted, target, folder, built, seconds)

    return store.get_or_build(wanted, make)


def describe_build(
    model: Model,
    options: BuildOptions,
    wanted: Fingerprint,
    target: str,
    folder: Path,
    built: BuiltFiles,
    seconds: float,
) -> Manifest:
    """Try a new engine and write its manifest.

    Args:
        model: what it was made from.
        options: with the precision resolved.
        wanted: its fingerprint.
        target: what it runs on.
        folder: where its files lie.
        built: what the backend wrote there.
        seconds: that this took.

    Raises:
        BuildError: it computes nonsense.
    """
    manifest = Manifest(
        key=wanted.key,
        backend=options.backend,
        backend_version=wanted.backend_version,
        target=target,
        precision=options.precision,
        batch=options.batch,
        inputs=built.inputs,
        outputs=built.outputs,
        files=describe(folder, built.names),
        fingerprint=wanted.to_dict(),
        preprocess=model.preprocess,
        quantization=model.quantization,
        build_seconds=round(seconds, 3),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    notes = (*built.notes, *_unrecorded(model), *try_engine(Engine(folder, manifest)))
    return replace(manifest, notes=notes)


def _unrecorded(model: Model) -> tuple[str, ...]:
    if model.quantised and model.quantization is None:
        return ("quantised by another tool: nothing is recorded of its calibration",)
    return ()


def check_kind(model: Model, options: BuildOptions) -> None:
    """Refuse an ONNX file where a program is needed, and the other way round.

    Raises:
        BuildError: the backend does not build from that.
    """
    needs = options.backend in PROGRAM_BACKENDS
    if isinstance(model, TorchProgram) != needs:
        raise BuildError(
            f"backend={options.backend!r} builds from "
            + (
                "a program: write one with sn72engine.export_program"
                if needs
                else "an ONNX file: write one with sn72engine.export"
            )
            + f", and {model.path.name} is not one"
        )


def resolve_precision(model: Model, options: BuildOptions) -> BuildOptions:
    """The options with the precision that the engine will have.

    The option speaks of float models. A Q/DQ file is built as what it is, whoever quantised it;
    the default then resolves to that, so that one engine has one fingerprint.

    Raises:
        BuildError: a quantised format that the model is not in, ``fp16`` for a quantised one, or
            another type than its own for a float16 or bfloat16 file, or for a program.
    """
    asked, held = options.precision, model.precision
    if isinstance(model, TorchProgram):
        if asked not in ("fp32", held):
            raise BuildError(
                f"precision={asked!r}: {model.path.name} is a program in {held}; export the module "
                f"with ProgramOptions(precision={asked!r}), where that is one of its choices"
            )
        return replace(options, precision=held)
    if asked == "bf16" and asked != held:
        raise BuildError(
            f"precision='bf16' needs a bfloat16 model, and {model.path.name} is {held}: export the "
            "module in that type (module.bfloat16())"
        )
    if asked not in ("fp32", "fp16") and asked != held:
        raise BuildError(
            f"precision={asked!r} needs a quantised model of that kind, and {model.path.name} is "
            f"{held}: run quantize first"
        )
    if model.quantised and asked == "fp16":
        raise BuildError(
            f"{model.path.name} is quantised: build it with precision={held!r}, which keeps the "
            "other layers in float16 on TensorRT and in float32 on a CPU"
        )
    if held in ("fp16", "bf16") and asked != held:
        raise BuildError(
            f"{model.path.name} is {model.weights}: build it with precision={held!r}, or export it "
            "in float32"
        )
    return replace(options, precision=held) if model.quantised else options


def check_batch(model: Model, options: BuildOptions) -> None:
    """Refuse a range of batch sizes that the model's shape rules out.

    Raises:
        BuildError: the batch axis is fixed, and the range holds another size.
    """
    batch = options.batch
    if any(spec.shape and isinstance(spec.shape[0], str) for spec in model.inputs):
        return
    fixed = model.inputs[0].shape[0] if model.inputs and model.inputs[0].shape else None
    if (batch.min, batch.max) != (fixed, fixed):
        raise BuildError(
            f"{model.path.name}: input {model.inputs[0]} takes batch {fixed} only, and "
            f"batch={batch} asks for others; export with dynamic_batch=True, or build with "
            f"batch=ShapeRange({fixed}, {fixed}, {fixed})"
        )
