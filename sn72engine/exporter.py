"""PyTorch module -> ONNX file or program with a free batch axis, proven to compute the same."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sn72engine import _deps, fp8_linear, graph_cleanup, onnx_file, parity
from sn72engine.errors import ExportError
from sn72engine.model import OnnxModel, TensorSpec
from sn72engine.program import RECORD_NAME, ProgramOptions, TorchProgram
from sn72engine.progress import Progress
from sn72engine.quiet import quiet
from sn72engine.spec import ExportOptions, Preprocess
from sn72kernels import atomic

if TYPE_CHECKING:
    import torch

#: Name of the free axis.
BATCH = "batch"

_LOGGERS = ("torch.onnx", "torch.export", "torch.fx", "onnxscript", "onnx_ir")


def export(
    module: torch.nn.Module,
    options: ExportOptions,
    path: str | Path,
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
        del proto  # ONNX Runtime holds the weights as well from here on
        found = []
        for result in parity.compare(torch, module, inputs, scratch, batches, options):
            found.append(result)
            bar.step()
        parity.refuse_mismatch(found, options)
        record["parity"] = [asdict(result) for result in found]
        whole: dict[str, Any] = {"export": record}
        if preprocess is not None:
            whole["preprocess"] = preprocess.to_dict()
        onnx_file.set_record(scratch, whole)
        bar.step()
    return OnnxModel.open(path)


def export_program(
    module: torch.nn.Module,
    options: ProgramOptions,
    path: str | Path,
    *,
    example: torch.Tensor | tuple[torch.Tensor, ...],
    preprocess: Preprocess | None = None,
    progress: bool | None = None,
) -> TorchProgram:
    """Write ``module`` as a torch.export program, which the backend ``inductor`` builds from.

    The module is run in evaluation mode without gradients and is not changed. The program is
    compared with it on random inputs, ``bf16`` and ``fp8`` programs with what the module computes
    in its own type.

    Args:
        module: takes float32 tensors by position, returns a tensor or any nesting of tensors.
        options: names, precision, bounds.
        path: of the file, ending in ``.pt2``.
        example: one tensor per input, batch on axis 0. Only shape and dtype matter.
        preprocess: how images become the input; stored in the file.
        progress: show a bar; None shows it on a terminal only.

    Raises:
        ExportError: wrong names or example, torch.export failed, or the program does not compute
            what the module does.
    """
    torch = _deps.require("torch", purpose="export a module")
    path = Path(path)
    if path.suffix != ".pt2":
        raise ExportError(f"{path.name}: a program's name must end in .pt2")
    inputs = _samples(torch, example, options)
    batches = options.parity_batches if options.dynamic_batch else (inputs[0].shape[0],)
    with (
        Progress(f"export {path.name}", 3, unit="step", shown=progress) as bar,
        _evaluating(module),
        torch.no_grad(),
    ):
        _check_names(torch, module, inputs, options)
        changed, quantization = _in_precision(torch, module, options)
        bar.step()
        with quiet(*_LOGGERS) as said:
            try:
                program = torch.export.export(
                    changed, inputs, dynamic_shapes=_dynamic_shapes(torch, changed, inputs, options)
                )
            except Exception as error:
                raise ExportError(
                    f"{type(module).__name__} cannot be exported: {_root_cause(error)}\n"
                    f"{said.getvalue()[-2000:]}".rstrip()
                ) from error
        bar.step()
        record: dict[str, Any] = {
            "export": {
                "options": options.to_dict(),
                "torch": torch.__version__,
                "parity": _program_parity(
                    torch, module, program.module(), inputs, batches, options
                ),
            },
            "signature": _signature(torch, module, inputs, options),
        }
        if quantization is not None:
            record["quantization"] = quantization
        if preprocess is not None:
            record["preprocess"] = preprocess.to_dict()
        with atomic.replacing(path) as scratch, scratch.open("wb") as stream, quiet(*_LOGGERS):
            torch.export.save(program, stream, extra_files={RECORD_NAME: json.dumps(record)})
        bar.step()
    return TorchProgram.open(path)


def _in_precision(
    torch: Any, module: Any, options: ProgramOptions
) -> tuple[Any, dict[str, Any] | None]:
    """The module to export, and for fp8 the record of what was quantised."""
    if options.precision == "fp32":
        return module, None

    class InBfloat16(torch.nn.Module):  # type: ignore[misc]
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *inputs: Any) -> Any:
            result = self.inner(
                *(x.to(torch.bfloat16) if x.is_floating_point() else x for x in inputs)
            )
            return torch.utils._pytree.tree_map_only(
                torch.Tensor, lambda y: y.float() if y.is_floating_point() else y, result
            )

    inner = copy.deepcopy(module).to(torch.bfloat16)
    if options.precision == "bf16":
        return InBfloat16(inner).eval(), None
    layers = fp8_linear.quantise(inner, module)
    if not layers:
        raise ExportError(
            f"{type(module).__name__} has no linear layer besides its last one whose sizes are "
            "multiples of 16, so nothing would be fp8; export it in bf16"
        )
    return InBfloat16(inner).eval(), {
        "method": "per token, dynamic",
        "precision": "fp8",
        "layers_quantized": len(layers),
        "layers": list(layers),
    }


def _program_parity(
    torch: Any,
    module: Any,
    program: Any,
    inputs: Sequence[Any],
    batches: Sequence[int],
    options: ProgramOptions,
) -> list[dict[str, float]]:
    """Compare a program with the module; a record for each batch size.

    Raises:
        ExportError: it breaks a bound.
    """
    generator = torch.Generator().manual_seed(options.seed)
    record = []
    for batch in batches:
        feed = [parity.random_like(torch, tensor, batch, generator) for tensor in inputs]
        got, wanted = (parity.tensors(torch, call(*feed)) for call in (program, module))
        error, excess, cosine = 0.0, -np.inf, 1.0
        for one, other in zip(got, wanted, strict=True):
            one, other = one.astype(np.float64), other.astype(np.float64)
            difference = np.abs(one - other)
            bound = options.parity_atol + options.parity_rtol * np.abs(other)
            error = max(error, float(difference.max(initial=0.0)))
            excess = max(excess, float((difference - bound).max(initial=-np.inf)))
            size = float(np.linalg.norm(one) * np.linalg.norm(other))
            if size:
                cosine = min(cosine, float((one * other).sum()) / size)
        record.append({"batch": batch, "max_abs_error": error, "cosine": cosine})
        exact = options.precision == "fp32"
        # Not-a-number breaks either bound.
        if not (excess <= 0 if exact else cosine >= options.parity_cosine):
            raise ExportError(
                f"the {options.precision} program does not compute what the module does at batch "
                f"{batch}: max abs error {error:.3g}, cosine {cosine:.4f}; bounds "
                + (
                    f"parity_atol={options.parity_atol:g}, parity_rtol={options.parity_rtol:g}"
                    if exact
                    else f"parity_cosine={options.parity_cosine:g}"
                )
            )
    return record


def _signature(
    torch: Any, module: Any, inputs: Sequence[Any], options: ProgramOptions
) -> dict[str, list[dict[str, Any]]]:
    """Inputs and outputs as a session sees them."""

    def specs(names: Sequence[str], arrays: Sequence[Any]) -> list[dict[str, Any]]:
        free: tuple[int | str, ...] = (BATCH,) if options.dynamic_batch else ()
        return [
            TensorSpec(name, array.dtype.name, (*free, *array.shape[len(free) :])).to_dict()
            for name, array in zip(names, arrays, strict=True)
        ]

    given = [tensor.cpu().numpy() for tensor in inputs]
    return {
        "inputs": specs(options.input_names, given),
        "outputs": specs(options.output_names, parity.tensors(torch, module(*inputs))),
    }


def _samples(
    torch: Any, example: Any, options: ExportOptions | ProgramOptions
) -> tuple[torch.Tensor, ...]:
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
    torch: Any,
    module: torch.nn.Module,
    inputs: Sequence[Any],
    options: ExportOptions | ProgramOptions,
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
    count = len(parity.tensors(torch, result))
    if count != len(options.output_names):
        raise ExportError(
            f"{type(module).__name__} returns {count} tensors but output_names="
            f"{options.output_names!r} has {len(options.output_names)}; name each in order"
        )


def _trace(torch: Any, module: Any, inputs: tuple[Any, ...], options: ExportOptions) -> Any:
    dynamic = _dynamic_shapes(torch, module, inputs, options)
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


def _dynamic_shapes(
    torch: Any, module: Any, inputs: tuple[Any, ...], options: ExportOptions | ProgramOptions
) -> tuple[Any, ...] | None:
    """Axis 0 of every input as one free size, as torch.export takes it; None for fixed sizes."""
    if not options.dynamic_batch:
        return None
    batch = torch.export.Dim(BATCH, min=1, max=options.max_batch)
    shapes: tuple[Any, ...] = tuple({0: batch} for _ in inputs)
    parameters = inspect.signature(module.forward).parameters.values()
    variadic = [i for i, p in enumerate(parameters) if p.kind is p.VAR_POSITIONAL]
    if variadic and variadic[0] < len(shapes):  # *args is one argument that holds a tuple
        shapes = (*shapes[: variadic[0]], shapes[variadic[0] :])
    return shapes


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


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip()[:2000]}"
