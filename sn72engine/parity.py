"""Whether an ONNX file computes what the PyTorch module does, and by how much it differs."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sn72engine import _deps
from sn72engine.errors import ExportError
from sn72engine.spec import ExportOptions

#: How much farther from the exact result a float16 file may be than the float16 module is: the
#: two round at different places, so the errors of either are of one size, not equal.
HALF_SLACK = 4.0


@dataclass(frozen=True, slots=True)
class Parity:
    """Comparison of the ONNX file with the module at one batch size.

    ``max_abs_error`` and ``max_rel_error`` are over all outputs; the relative error is
    ``|onnx - torch| / max(|torch|, atol)``. ``worst_excess`` is the largest amount by which an
    element breaks its bound; 0 or less is a pass. ``rounding`` is the float16 module's own
    distance from its float32 copy, which the bound allows for; 0 for float32 modules.
    """

    batch: int
    max_abs_error: float
    max_rel_error: float
    worst_excess: float
    rounding: float = 0.0


def compare(
    torch: Any,
    module: Any,
    inputs: Sequence[Any],
    path: Path,
    batches: Sequence[int],
    options: ExportOptions,
) -> Iterator[Parity]:
    """Run module and file on the same seeded inputs, one batch size after the other.

    Args:
        torch: the torch package.
        module: in evaluation mode.
        inputs: one example tensor per input, for shape and dtype.
        path: the ONNX file.
        batches: batch sizes.
        options: names, bounds and seed.

    Raises:
        ExportError: ONNX Runtime refuses the file or an input, or a shape differs.
    """
    ort = _deps.require("onnxruntime", purpose="compare the ONNX file with the module")
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    try:
        session = ort.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(f"ONNX Runtime refuses the exported file: {error}") from error
    generator = torch.Generator().manual_seed(options.seed)
    half = any(tensor.dtype == torch.float16 for tensor in [*inputs, *module.parameters()])
    exact = copy.deepcopy(module).float() if half else None
    for batch in batches:
        feed = [random_like(torch, tensor, batch, generator) for tensor in inputs]
        wanted = tensors(torch, module(*feed))
        rounding = 0.0
        if exact is not None:
            own = wanted
            wanted = tensors(torch, exact(*(_widen(torch, tensor) for tensor in feed)))
            rounding = max(_distance(a, b) for a, b in zip(own, wanted, strict=True))
        arrays = {
            name: tensor.cpu().numpy()
            for name, tensor in zip(options.input_names, feed, strict=True)
        }
        try:
            got = session.run(list(options.output_names), arrays)
        except Exception as error:
            raise ExportError(
                f"the exported file fails at batch {batch} though its batch axis is free: {error}"
            ) from error
        yield _parity(batch, got, wanted, rounding, options)


def _parity(
    batch: int,
    got: Sequence[np.ndarray],
    wanted: Sequence[np.ndarray],
    rounding: float,
    options: ExportOptions,
) -> Parity:
    absolute, relative, excess = 0.0, 0.0, -np.inf
    for name, one, other in zip(options.output_names, got, wanted, strict=True):
        if one.shape != other.shape:
            raise ExportError(
                f"output {name!r} at batch {batch} has shape {one.shape}, the module gives "
                f"{other.shape}"
            )
        one, other = one.astype(np.float64), other.astype(np.float64)
        # Equal infinities and NaNs in the same place agree; any other one must fail.
        same = (one == other) | (np.isnan(one) & np.isnan(other))
        with np.errstate(invalid="ignore"):
            error = np.where(same, 0.0, np.abs(one - other))
        error = np.where(np.isnan(error), np.inf, error)
        size = np.where(np.isfinite(other), np.abs(other), 0.0)
        bound = options.parity_atol + options.parity_rtol * size + HALF_SLACK * rounding
        if error.size:
            absolute = max(absolute, float(error.max()))
            floor = max(options.parity_atol, 1e-12)
            relative = max(relative, float((error / np.maximum(size, floor)).max()))
            excess = max(excess, float((error - bound).max()))
    return Parity(batch, absolute, relative, excess if np.isfinite(excess) else 0.0, rounding)


def refuse_mismatch(parity: Sequence[Parity], options: ExportOptions) -> None:
    """Raise ExportError with the figures of every batch that broke its bounds."""
    broken = [p for p in parity if p.worst_excess > 0 or not np.isfinite(p.max_abs_error)]
    if broken:
        figures = "; ".join(
            f"batch {p.batch}: max abs error {p.max_abs_error:.3g}, max rel {p.max_rel_error:.3g}, "
            f"{p.worst_excess:.3g} over its bound"
            for p in broken
        )
        raise ExportError(
            f"the exported file does not compute what the module does ({figures}; bounds "
            f"parity_atol={options.parity_atol:g}, parity_rtol={options.parity_rtol:g}). A module "
            "that is random in evaluation mode, or branches on values, cannot be exported; "
            "raise the bounds only if these errors are rounding. Nothing was written"
        )


def random_like(torch: Any, like: Any, batch: int, generator: Any) -> Any:
    """Seeded input shaped like one sample of ``like``: normal, or integers in its range."""
    shape = (batch, *like.shape[1:])
    if like.dtype == torch.bool:
        tensor = torch.randint(0, 2, shape, generator=generator).bool()
    elif like.dtype.is_floating_point:
        tensor = torch.randn(shape, generator=generator).to(like.dtype)
    else:
        low, high = int(like.min()), int(like.max())
        tensor = torch.randint(low, high + 1, shape, generator=generator).to(like.dtype)
    return tensor.to(like.device)


def _widen(torch: Any, tensor: Any) -> Any:
    return tensor.float() if tensor.dtype == torch.float16 else tensor


def tensors(torch: Any, result: Any) -> list[Any]:
    """Every tensor of a module's result, in the exporter's order, as NumPy arrays."""
    leaves = torch.utils._pytree.tree_leaves(result)
    return [leaf.detach().cpu().numpy() for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _distance(one: np.ndarray, other: np.ndarray) -> float:
    with np.errstate(invalid="ignore"):
        error = np.abs(one.astype(np.float64) - other.astype(np.float64))
    finite = error[np.isfinite(error)]
    return float(finite.max()) if finite.size else 0.0
