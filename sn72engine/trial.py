"""Run a new engine before it is kept: outputs of the declared shapes, every value finite."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from sn72engine.errors import BuildError, InputError, SessionError
from sn72engine.session import Session
from sn72engine.spec import CPU_BACKENDS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sn72engine.engine import Engine
    from sn72engine.model import TensorSpec

#: The largest batch is run too if that should take no longer than this.
LIMIT_SECONDS = 5.0


def try_engine(engine: Engine) -> tuple[str, ...]:
    """Run an engine on random input at its smallest batch and, if quick enough, its largest.

    Each optimization profile is run in between, at the batch that it is tuned for.

    Returns:
        Remarks for the manifest: what was not tried, and why.

    Raises:
        BuildError: it does not run, an output has another shape than declared, or an output is
            not finite.
    """
    manifest = engine.manifest
    batch = manifest.batch
    if manifest.stripped:
        return ("not run: it was built without its weights, which refit puts in",)
    if not _runs_here(manifest.backend, manifest.target):
        return (f"not run: it is for {manifest.target}, which this machine does not have",)
    try:
        inputs = random_inputs(manifest.inputs, batch.min)
    except InputError as error:
        return (f"not run: {error}",)
    try:
        session = Session(engine)
    except SessionError as error:
        raise BuildError(f"the new engine cannot be loaded: {error}") from error
    with session:
        seconds = _run(session, inputs, batch.min)
        tuned = {profile["opt"] for profile in manifest.build_options.get("profiles", ())}
        for size in sorted({*tuned, batch.max} - {batch.min}):
            estimate = seconds * size / batch.min
            if estimate > LIMIT_SECONDS:
                return (f"not run at batch {size} and more, which takes about {estimate:.0f} s",)
            _run(session, random_inputs(manifest.inputs, size), size)
    return ()


def random_inputs(
    inputs: Sequence[TensorSpec], batch: int, seed: int = 0
) -> dict[str, np.ndarray[Any, Any]]:
    """Input to run an engine with, not to judge it by: normal floats, zeros of other types.

    Args:
        inputs: what the engine takes; axis 0 is the batch where it is free.
        batch: samples per array.
        seed: of the generator.

    Raises:
        InputError: an axis other than the first is free, so no size can be chosen.
    """
    generator = np.random.default_rng(seed)
    arrays = {}
    for spec in inputs:
        if any(isinstance(size, str) for size in spec.shape[1:]):
            raise InputError(f"input {spec} has a free axis other than the batch; give inputs")
        sizes = [batch if isinstance(size, str) else size for size in spec.shape]
        dtype = np.dtype(spec.dtype)
        arrays[spec.name] = (
            generator.standard_normal(sizes, dtype=np.float32).astype(dtype)
            if dtype.kind == "f"
            else np.zeros(sizes, dtype)
        )
    return arrays


def _runs_here(backend: str, target: str) -> bool:
    if backend in CPU_BACKENDS or target.startswith("cpu"):
        return True
    from sn72engine.cards import device_target, runs_on

    return runs_on(target, device_target())


def _run(session: Session, inputs: dict[str, Any], batch: int) -> float:
    """Run once and check the outputs; returns the seconds it took."""
    started = time.perf_counter()
    try:
        outputs = session(inputs)
    except SessionError as error:
        raise BuildError(f"the new engine fails at batch {batch}: {error}") from error
    seconds = time.perf_counter() - started
    for spec in session.outputs:
        array = outputs[spec.name]
        # A free first axis is the batch; what another free axis should be is not known.
        wanted = [
            size if isinstance(size, int) else (batch if axis == 0 else None)
            for axis, size in enumerate(spec.shape)
        ]
        if len(wanted) != array.ndim or any(
            size not in (None, real) for size, real in zip(wanted, array.shape, strict=True)
        ):
            raise BuildError(
                f"the new engine gives output {spec.name!r} of shape {array.shape} at batch "
                f"{batch}, declared as {spec}: export the model again"
            )
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            share = float(np.mean(~np.isfinite(array)))
            half = session.manifest.precision == "fp16"
            raise BuildError(
                f"the new engine gives {share:.1%} NaN or infinite values in output "
                f"{spec.name!r} on random input at batch {batch}: check the model's weights"
                + (", and build with precision='fp32' to rule out overflow" if half else "")
            )
    return seconds
