"""PyTorch module -> ONNX file with a free batch axis, proven to compute the same."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sn72engine import _deps, graph_cleanup, onnx_file
from sn72engine.errors import ExportError
from sn72engine.model import OnnxModel
from sn72engine.progress import Progress
from sn72engine.quiet import quiet
from sn72engine.spec import ExportOptions, Preprocess

if TYPE_CHECKING:
    import torch

#: Name of the free axis.
BATCH = "batch"

#: How much farther from the exact result a float16 file may be than the float16 module is: the
#: two round at different places, so the errors of either are of one size, not equal.
HALF_SLACK = 4.0

_LOGGERS = ("torch.onnx", "torch.export", "torch.fx", "onnxscript", "onnx_ir")


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


def export(
    module: torch.nn.Module,
    options: ExportOptions,
    path: Path,
    *,
    example: torch.Tensor | tuple[torch.Tensor, ...],
    preprocess: Preprocess | None = None,
    progress: bool | None = None,
) -> OnnxModel:
    """Write ``module`` as an ONNX file and prove on random inputs that it computes the same.

    The module is run in evaluation mode without gradients; its training flags are as before
    afterwards. The file (and ``<name>.onnx.data`` for large weights) appears at ``path`` only when
    it is whole and has passed the comparison.

    Bounds of the comparison, for every element of every output: float32 modules,
    ``|onnx - torch| <= atol + rtol * |torch|``. Float16 modules are compared with a float32 copy
    of themselves, and the bound grows by four times the largest difference that the float16
    module itself shows: no result can be asked to be closer than its number format allows.

    Args:
        module: takes tensors by position, returns a tensor or any nesting of tensors.
        options: names, opset, bounds.
        path: of the ONNX file.
        example: one tensor per input, on the module's device, batch on axis 0. Only shape and
            dtype matter, and for integers the range from which parity inputs are drawn. One
            sample is enough.
        preprocess: how images become the input; stored in the file.
        progress: show a bar; None shows it on a terminal only.

    Raises:
        ExportError: wrong names or example, the exporter failed, the batch axis came out fixed,
            or the file does not compute what the module does.
        MissingDependencyError: onnx, onnxscript or onnx-graphsurgeon is absent.
    """
    torch = _deps.require("torch", purpose="export a module")
    _deps.require("onnxscript", purpose="export a module")
    path = Path(path)
    inputs = _samples(torch, example, options)
    batches = options.parity_batches if options.dynamic_batch else (inputs[0].shape[0],)
    record: dict[str, Any] = {"options": options.to_dict(), "torch": torch.__version__}
    with (
        Progress(f"export {path.name}", 3 + len(batches), unit="step", shown=progress) as bar,
        _evaluating(module),
        torch.no_grad(),
        onnx_file.replacing(path) as scratch,
    ):
        bar.note("trace")
        _check_names(torch, module, inputs, options)
        proto = _trace(torch, module, inputs, options)
        _check_batch_axis(proto, options)
        bar.step()
        bar.note("clean up")
        if options.clean:
            proto, report = graph_cleanup.clean(proto)
            record["cleanup"] = report.to_dict()
        bar.step()
        bar.note("compare")
        onnx_file.write(proto, scratch, options.external_data_bytes)
        parity = []
        for result in _compare(torch, module, inputs, scratch, batches, options):
            parity.append(result)
            bar.step()
        _refuse_mismatch(parity, options)
        record["parity"] = [asdict(result) for result in parity]
        whole: dict[str, Any] = {"export": record}
        if preprocess is not None:
            whole["preprocess"] = preprocess.to_dict()
        onnx_file.set_record(scratch, whole)
        bar.step()
    return OnnxModel.open(path)


def _samples(torch: Any, example: Any, options: ExportOptions) -> tuple[torch.Tensor, ...]:
    """The example as a tuple of tensors; two samples each where the batch axis is to be free.

    One sample will not do there: torch.export takes a size of 1 for a constant.
    """
    tensors = (example,) if isinstance(example, torch.Tensor) else tuple(example)
    if len(tensors) != len(options.input_names):
        raise ExportError(
            f"example has {len(tensors)} tensors but input_names={options.input_names!r} has "
            f"{len(options.input_names)}; give one tensor per input"
        )
    for name, tensor in zip(options.input_names, tensors, strict=True):
        if not isinstance(tensor, torch.Tensor):
            raise ExportError(f"example for {name!r} is {type(tensor).__name__}, not a tensor")
        if tensor.dim() == 0 or tensor.shape[0] == 0:
            raise ExportError(
                f"example for {name!r} has shape {tuple(tensor.shape)}; axis 0 must be the batch "
                "and hold at least one sample"
            )
        if tensor.dtype in (torch.bfloat16, torch.float64):
            raise ExportError(
                f"example for {name!r} is {tensor.dtype}; engines take float32 or float16: "
                "convert the module with .float() or .half()"
            )
    if not options.dynamic_batch:
        return tensors
    return tuple(tensor[:1].repeat_interleave(2, dim=0) for tensor in tensors)


@contextmanager
def _evaluating(module: torch.nn.Module) -> Iterator[None]:
    flags = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in flags:
            part.training = training


def _check_names(
    torch: Any, module: torch.nn.Module, inputs: Sequence[Any], options: ExportOptions
) -> None:
    """Run the module once and hold its real signature against the names."""
    signature = inspect.signature(module.forward)
    try:
        signature.bind(*inputs)
    except TypeError as error:
        raise ExportError(
            f"{type(module).__name__}.forward{signature} cannot be called with {len(inputs)} "
            f"inputs {options.input_names!r}: {error}; input_names and example must match it"
        ) from error
    try:
        result = module(*inputs)
    except Exception as error:
        shapes = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in inputs)
        raise ExportError(
            f"{type(module).__name__} fails on the example ({shapes}): {error}"
        ) from error
    count = len(_flatten(torch, result))
    if count != len(options.output_names):
        raise ExportError(
            f"{type(module).__name__} returns {count} tensors but output_names="
            f"{options.output_names!r} has {len(options.output_names)}; name each in order"
        )


def _trace(torch: Any, module: Any, inputs: tuple[Any, ...], options: ExportOptions) -> Any:
    dynamic = None
    if options.dynamic_batch:
        batch = torch.export.Dim(BATCH, min=1, max=options.max_batch)
        shapes: tuple[Any, ...] = tuple({0: batch} for _ in inputs)
        parameters = inspect.signature(module.forward).parameters.values()
        variadic = [i for i, p in enumerate(parameters) if p.kind is p.VAR_POSITIONAL]
        if variadic and variadic[0] < len(shapes):  # *args is one argument that holds a tuple
            shapes = (*shapes[: variadic[0]], shapes[variadic[0] :])
        dynamic = shapes
    with quiet(*_LOGGERS) as said:
        try:
            program = torch.onnx.export(
                module,
                inputs,
                dynamo=True,
                input_names=list(options.input_names),
                output_names=list(options.output_names),
                dynamic_shapes=dynamic,
                opset_version=options.opset,
                verbose=False,
            )
            return program.model_proto
        except Exception as error:
            raise ExportError(
                f"{type(module).__name__} cannot be exported to opset {options.opset}: "
                f"{_root_cause(error)}\n{said.getvalue()[-2000:]}".rstrip()
            ) from error


def _check_batch_axis(proto: Any, options: ExportOptions) -> None:
    """Refuse a graph that holds for the example's batch size only.

    The exporter accepts a module that fixes its batch and just writes the constant.
    """
    if not options.dynamic_batch:
        return
    fixed = []
    for value in [*proto.graph.input, *proto.graph.output]:
        axes = value.type.tensor_type.shape.dim
        first = (axes[0].dim_param or axes[0].dim_value) if axes else "no axis at all"
        if first != BATCH:
            fixed.append(f"{value.name!r} has {first}")
    if fixed:
        raise ExportError(
            f"the batch axis is not free: on axis 0, {'; '.join(fixed)} instead of {BATCH!r}. The "
            "module fixes its batch size or mixes samples: look for reshape/view/expand with a "
            "constant where x.shape[0] or -1 belongs, int(x.shape[0]), or a reduction over axis "
            "0; or export with dynamic_batch=False"
        )


def _compare(
    torch: Any,
    module: Any,
    inputs: Sequence[Any],
    path: Path,
    batches: Sequence[int],
    options: ExportOptions,
) -> Iterator[Parity]:
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
        feed = [_random(torch, tensor, batch, generator) for tensor in inputs]
        wanted = _flatten(torch, module(*feed))
        rounding = 0.0
        if exact is not None:
            own = wanted
            wanted = _flatten(torch, exact(*(_widen(torch, tensor) for tensor in feed)))
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


def _refuse_mismatch(parity: Sequence[Parity], options: ExportOptions) -> None:
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


def _random(torch: Any, like: Any, batch: int, generator: Any) -> Any:
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


def _flatten(torch: Any, result: Any) -> list[Any]:
    """Every tensor of a result, in the exporter's order, as NumPy arrays."""
    leaves = torch.utils._pytree.tree_leaves(result)
    return [leaf.detach().cpu().numpy() for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _distance(one: np.ndarray, other: np.ndarray) -> float:
    with np.errstate(invalid="ignore"):
        error = np.abs(one.astype(np.float64) - other.astype(np.float64))
    finite = error[np.isfinite(error)]
    return float(finite.max()) if finite.size else 0.0


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip()[:2000]}"
