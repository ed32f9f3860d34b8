"""Ranges and means of the inputs of a PyTorch module's layers, collected by ModelOpt while it runs.

ModelOpt turns layers into quantised ones in place. That is done to a copy which shares every
tensor with the module, so the module stays as it is and memory hardly grows. Each quantizer is
switched on by the exact path of its layer and counted afterwards: ModelOpt's ready-made
configurations match name patterns and silently leave out layers such as ``*vision_tower*``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sn72engine import _deps
from sn72engine.errors import CalibrationError, QuantizationError, Sn72Error
from sn72engine.quiet import quiet
from sn72engine.spec import CalibrationMethod

if TYPE_CHECKING:
    import torch

#: Share of the outliers that SmoothQuant moves from activations to weights.
ALPHA = 0.5

#: Ends of the histogram's 2048 bins that the search for the least divergence tries: every 16th.
#: All of them take ten seconds a layer and change a range by less than a hundredth.
STRIDE = 16

#: How ModelOpt writes each format; scales of blocks come from the data, not from calibration.
NUMERICS: Mapping[str, Mapping[str, Any]] = {
    "int8": {"num_bits": 8, "axis": None},
    "fp8": {"num_bits": (4, 3), "axis": None},
    "nvfp4": {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}},
    "mxfp8": {"num_bits": (4, 3), "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}},
}


@dataclass(frozen=True, slots=True)
class LayerRange:
    """What calibration found of one layer's input.

    Attributes:
        amax: largest magnitude to hold; 0 where the format needs none.
        mean: of each input channel, over all calls of the layer, float64 (inputs,).
        smooth: factor of each input channel, float32 (inputs,); None but for SmoothQuant, which
            is for matrix products.
    """

    amax: float
    mean: np.ndarray
    smooth: np.ndarray | None = None


def quantisable(module: torch.nn.Module) -> dict[str, bool]:
    """Path of every submodule to whether ModelOpt has a quantised form of it."""
    mtq = _modelopt()
    return {name: mtq.QuantModuleRegistry.get(type(m)) is not None for name, m in _named(module)}


def collect(
    module: torch.nn.Module,
    wanted: Mapping[str, str],
    batches: Iterable[np.ndarray],
    method: CalibrationMethod,
) -> dict[str, LayerRange]:
    """Run ``module`` over the data and return what each wanted layer's input held.

    Args:
        module: as it was exported; unchanged afterwards.
        wanted: path of a layer to its format.
        batches: float32 arrays, as the module's only input.
        method: ``max``; ``entropy`` and ``smoothquant`` apply to int8 layers.

    Raises:
        QuantizationError: the module cannot be copied, ModelOpt failed, or it did not switch on
            exactly the quantizers that were asked for.
        CalibrationError: an input became NaN or infinite, or the module failed on a batch.
        MissingDependencyError: nvidia-modelopt is absent.
    """
    torch = _deps.require("torch", purpose="quantise a module")
    mtq = _modelopt()
    with quiet("modelopt") as said, torch.no_grad():
        twin = _shadow(module, own_weights=wanted if method == "smoothquant" else ())
        try:
            mtq.quantize(twin.eval(), {"quant_cfg": _config(wanted, method), "algorithm": None})
            _check_enabled(mtq, twin, wanted)
            return _run(mtq, twin, wanted, batches, method)
        except Sn72Error:
            raise
        except Exception as error:  # ModelOpt raises assertions and more
            raise QuantizationError(
                f"ModelOpt failed: {type(error).__name__}: {error}; it said:\n"
                f"{said.getvalue()[-2000:]}".rstrip()
            ) from error


def _modelopt() -> Any:
    with quiet():
        return _deps.require(
            "modelopt", purpose="quantise a module", submodule="torch.quantization"
        )


def _named(module: Any) -> Iterable[tuple[str, Any]]:
    """Every path of every submodule; one that is used in two places has two."""
    named: Iterable[tuple[str, Any]] = module.named_modules(remove_duplicate=False)
    return named


def _shadow(module: Any, own_weights: Iterable[str]) -> Any:
    """A copy that shares parameters and buffers, but for the weights of some layers."""
    shared = {id(t): t for t in (*module.parameters(), *module.buffers())}
    for path in own_weights:
        # SmoothQuant scales weights in place.
        shared.pop(id(module.get_submodule(path).weight), None)
    try:
        return copy.deepcopy(module, dict(shared))
    except Exception as error:  # whatever the module's parts raise
        raise QuantizationError(
            f"{type(module).__name__} cannot be copied for calibration ({error}); give quantize "
            "no module: ranges are then taken from the ONNX file"
        ) from error


def _config(wanted: Mapping[str, str], method: CalibrationMethod) -> list[dict[str, Any]]:
    """Everything off; then the input quantizer of each wanted layer on, by its exact path."""
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for path, precision in wanted.items():
        numerics = dict(NUMERICS[precision])
        if precision == "int8" and method == "entropy":
            numerics["calibrator"] = "histogram"
        entries.append({"quantizer_name": f"{_exactly(path)}input_quantizer", "cfg": numerics})
    return entries


def _exactly(path: str) -> str:
    """Pattern that matches the names below one module only; names may hold no wildcards."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in path) + ("." if path else "")


def _check_enabled(mtq: Any, twin: Any, wanted: Mapping[str, str]) -> None:
    quantizer = mtq.nn.TensorQuantizer
    enabled = {
        name for name, part in _named(twin) if isinstance(part, quantizer) and part.is_enabled
    }
    asked = {f"{path}.input_quantizer" if path else "input_quantizer" for path in wanted}
    # One layer under two paths has one quantizer under both.
    same = {id(twin.get_submodule(name)) for name in asked & enabled}
    surplus = {name for name in enabled - asked if id(twin.get_submodule(name)) not in same}
    if asked - enabled or surplus:
        raise QuantizationError(
            f"ModelOpt enabled {len(enabled & asked)} of the {len(asked)} quantizers that were "
            f"asked for and {len(surplus)} others: missing "
            f"{', '.join(sorted(asked - enabled)[:5]) or 'none'}; surplus "
            f"{', '.join(sorted(surplus)[:5]) or 'none'}"
        )


def _run(
    mtq: Any,
    twin: Any,
    wanted: Mapping[str, str],
    batches: Iterable[np.ndarray],
    method: CalibrationMethod,
) -> dict[str, LayerRange]:
    torch = _deps.require("torch", purpose="quantise a module")
    first = next(twin.parameters(), None)
    device = first.device if first is not None else "cpu"

    def forward(model: Any) -> None:
        seen = 0
        for batch in batches:
            given = torch.from_numpy(batch).to(device)
            try:
                model(given)
            except Exception as error:  # whatever the module's parts raise
                raise CalibrationError(
                    f"the module fails on calibration batch {seen}, {given.dtype}"
                    f"{list(given.shape)}: {type(error).__name__}: {error}"
                ) from error
            seen += 1
        if not seen:
            raise CalibrationError("calibration data holds no batch; no range can be collected")

    calibration = _deps.require(
        "modelopt", purpose="quantise a module", submodule="torch.quantization.model_calib"
    )
    means = {path: _Mean(twin.get_submodule(path)) for path in wanted}
    if method == "smoothquant":
        calibration.smoothquant(twin, forward, alpha=ALPHA)
    else:
        calibration.enable_stats_collection(twin)
        forward(twin)
    found = {}
    for path, precision in wanted.items():
        mean = means[path].value()
        if mean is None:
            raise QuantizationError(
                f"layer {path!r} was not called while the module ran: it has no range"
            )
        if not np.isfinite(mean).all():
            raise CalibrationError(f"the input of layer {path!r} became NaN or infinite")
        quantizer = twin.get_submodule(path).input_quantizer
        largest, smooth = _range_of(torch, path, precision, quantizer, method)
        found[path] = LayerRange(largest, mean, smooth)
    return found


class _Mean:
    """Watches the input of a layer of the twin, which nobody else holds.

    The layer hands it to its quantizer by position, however it was called itself.
    """

    def __init__(self, layer: Any) -> None:
        self._sum: Any = 0.0
        self._rows = 0
        # Counted from the end: a convolution takes an image without a batch, too.
        self._axis = -1 - len(getattr(layer, "kernel_size", ()))
        layer.input_quantizer.register_forward_pre_hook(self._see)

    def _see(self, _quantizer: Any, inputs: tuple[Any, ...]) -> None:
        last = inputs[0].detach().movedim(self._axis, -1)
        rows = last.reshape(-1, last.shape[-1]).float()
        # The sum of a batch's mean: float32 would lose small values in long sums.
        self._sum = self._sum + rows.mean(0).double() * len(rows)
        self._rows += len(rows)

    def value(self) -> np.ndarray | None:
        """float64 (inputs,); None where the layer never ran."""
        if not self._rows:
            return None
        mean: np.ndarray = (self._sum / self._rows).cpu().numpy()
        return mean


def _range_of(
    torch: Any, path: str, precision: str, quantizer: Any, method: CalibrationMethod
) -> tuple[float, np.ndarray | None]:
    """Largest magnitude, and the factors of SmoothQuant."""
    if precision == "mxfp8":
        return 0.0, None
    smooth = None
    if method == "smoothquant":
        amax = quantizer.amax
        scale = quantizer.pre_quant_scale  # a convolution has none
        if precision == "int8" and scale is not None:
            smooth = scale.detach().float().cpu().numpy().reshape(-1).copy()
    elif method == "entropy" and precision == "int8":
        amax = quantizer._calibrator.compute_amax("entropy", stride=STRIDE)
    else:
        amax = quantizer._calibrator.compute_amax()
    largest = float(torch.as_tensor(amax).max())
    if not np.isfinite(largest):
        raise CalibrationError(f"the input of layer {path!r} became NaN or infinite")
    return largest, smooth
