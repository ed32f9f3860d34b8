"""Resize and normalise: checks, launcher and registration."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from sn72kernels import library, tuning
from sn72kernels.errors import ArgumentError, ShapeError, check_tensor
from sn72kernels.ops.preprocess import geometry, reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

Fit = Literal["center_crop", "squash", "pad"]
Interpolation = Literal["bilinear", "bicubic"]


def preprocess(
    images: torch.Tensor,
    size: tuple[int, int],
    *,
    mean: Sequence[float] = (0.485, 0.456, 0.406),
    std: Sequence[float] = (0.229, 0.224, 0.225),
    fit: Fit = "center_crop",
    crop_fraction: float = 1.0,
    interpolation: Interpolation = "bicubic",
    dtype: torch.dtype = torch.float16,
) -> torch.Tensor:
    """Crop, resize with antialiasing, and normalise images of one size into a batch.

    Pixels are those of Pillow's ``Image.resize(size, interpolation, box)``: fixed-point weights,
    rows then columns, each rounded to 8 bits. Then ``(pixel / 255 - mean) / std``, computed as
    ``pixel * (1 / (255 std)) + (-mean / std)`` in float32 and rounded to ``dtype``. The first call
    for a size of image computes the filter's weights on the CPU and copies them; later calls find
    them on the device, so call once before capturing a graph.

    Args:
        images: uint8, shape (N, h, w, 3) or (h, w, 3), any strides.
        size: height and width of the output.
        mean: per channel, for pixels in [0, 1].
        std: likewise, positive.
        fit: ``"center_crop"``: the centred box of the output's aspect ratio; ``"squash"``: the
            whole image; ``"pad"``: the whole image inside the output, with a border of zeros.
        crop_fraction: share of the largest such box that ``"center_crop"`` keeps, in (0, 1].
        interpolation: ``"bilinear"`` or ``"bicubic"``; both are widened when they shrink.
        dtype: float32, float16 or bfloat16.

    Returns:
        Shape (N, 3, *size), contiguous; N is 1 for one image.

    Raises:
        ShapeError, DtypeError: ``images`` does not fit.
        ArgumentError: another argument is not usable; the message names it.
    """
    place = _check(images, size, fit, crop_fraction, interpolation, dtype)
    batch = images if images.dim() == 4 else images[None]
    x_taps, y_taps = _taps(place, batch, interpolation)
    scale, bias = _normalisation(tuple(mean), tuple(std), images.device)
    border = [place.top, place.left]
    out: torch.Tensor = _preprocess(batch, *x_taps, *y_taps, scale, bias, list(size), border, dtype)
    return out


def explain(images: torch.Tensor, *_: Any, **__: Any) -> library.Choice:
    """Which implementation a call with these arguments would run, and why."""
    choice = library.choose(PREPROCESS, images.device, images)
    if choice.implementation == "reference":
        return choice
    config = PIXELS.explain(images.device)
    return library.Choice(choice.op, choice.implementation, choice.reason, config)


def _taps(
    place: geometry.Geometry, batch: torch.Tensor, interpolation: str
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    _, h, w, _ = batch.shape
    left, top, right, bottom = place.box
    return (
        geometry.taps(w, left, right, place.width, interpolation, batch.device),
        geometry.taps(h, top, bottom, place.height, interpolation, batch.device),
    )


def _scale_and_bias(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and bias for pixels in [0, 255], computed in float64 and rounded once."""
    if len(mean) != 3 or len(std) != 3 or any(not s > 0.0 for s in std):
        raise ArgumentError(
            f"mean is {list(mean)} and std is {list(std)}; give three numbers each, std positive"
        )
    spread = torch.tensor(std, dtype=torch.float64)
    middle = torch.tensor(mean, dtype=torch.float64)
    scale, bias = 1.0 / (255.0 * spread), -middle / spread
    return scale.float().to(device), bias.float().to(device)


_remembered = functools.lru_cache(maxsize=64)(_scale_and_bias)


def _normalisation(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`_scale_and_bias`, remembered; not while tracing, whose tensors hold no numbers."""
    if torch.compiler.is_compiling():
        return _scale_and_bias(mean, std, device)
    return _remembered(mean, std, device)


# --- configuration and launcher ------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PixelTile:
    """How the output is cut.

    Attributes:
        rows: rows of output pixels per program.
        cols: columns, likewise.
        warps: warps per program.
    """

    rows: int
    cols: int
    warps: int


def pixel_tile() -> PixelTile:
    """Wide in the row, for whole cache lines in and out."""
    return PixelTile(4, 64, 4)


PIXELS = tuning.Tunable(
    "preprocess.pixels",
    pixel_tile,
    {"rows": (1, 2, 4, 8), "cols": (32, 64, 128), "warps": (2, 4, 8)},
)


def launch_preprocess(
    images: torch.Tensor,
    x_first: torch.Tensor,
    x_weights: torch.Tensor,
    y_first: torch.Tensor,
    y_weights: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    size: Sequence[int],
    border: Sequence[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """Triton counterpart of :func:`reference.preprocess`, same arguments and result."""
    from sn72kernels.ops.preprocess import kernel

    count, source_height, source_width, _ = images.shape
    height, width = size
    out = torch.empty((count, 3, height, width), dtype=dtype, device=images.device)
    if out.numel() == 0:
        return out
    config = PIXELS.config(images.device)
    blocks = -(-height // config.rows) * -(-width // config.cols)
    library.launch(
        kernel.preprocess, (blocks, 3, count),
        images, x_first, x_weights, y_first, y_weights, scale, bias, out,
        source_height, source_width, y_first.shape[0], x_first.shape[0], height, width, *border,
        *images.stride(),
        X_TAPS=x_weights.shape[1], Y_TAPS=y_weights.shape[1], ROWS=config.rows, COLS=config.cols,
        # A fused multiply-add would round once where the definition rounds twice.
        num_warps=config.warps, enable_fp_fusion=False,
    )  # fmt: skip
    return out


# --- registration --------------------------------------------------------------------------


def _fake_preprocess(images: torch.Tensor, *arguments: Any) -> torch.Tensor:
    size, _, dtype = arguments[-3:]
    return images.new_empty((images.shape[0], 3, *size), dtype=dtype)


PREPROCESS = library.OpSpec(
    name="preprocess",
    schema=(
        "(Tensor images, Tensor x_first, Tensor x_weights, Tensor y_first, Tensor y_weights, "
        "Tensor scale, Tensor bias, SymInt[] size, SymInt[] border, ScalarType dtype) -> Tensor"
    ),
    reference=reference.preprocess,
    launch=launch_preprocess,
    fake=_fake_preprocess,
)
_preprocess = library.register(PREPROCESS)


# --- checks --------------------------------------------------------------------------------


def _check(
    images: torch.Tensor,
    size: tuple[int, int],
    fit: str,
    crop_fraction: float,
    interpolation: str,
    dtype: torch.dtype,
) -> geometry.Geometry:
    """Where the output comes from."""
    shape = (None,) * (images.dim() - 1) if images.dim() in (3, 4) else (None, None, None)
    check_tensor("images", images, shape=(*shape, 3), dtype=torch.uint8)
    h, w = images.shape[-3:-1]
    if h == 0 or w == 0:
        raise ShapeError(f"Invalid shape of images: no pixels in {tuple(images.shape)}")
    if len(size) != 2 or any(int(n) != n or n < 1 for n in size):
        raise ArgumentError(f"size is {tuple(size)}; give a positive height and width")
    if interpolation not in geometry.FILTERS:
        raise ArgumentError(f"interpolation is {interpolation!r}; give 'bilinear' or 'bicubic'")
    if dtype not in DTYPES:
        raise ArgumentError(f"dtype is {dtype}; give one of {', '.join(map(str, DTYPES))}")
    return geometry.place((h, w), (int(size[0]), int(size[1])), fit, crop_fraction)


def compile_cases() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Launcher calls that between them reach every kernel, for compile-only checks."""

    def tensor(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    images, vector = tensor(8, 720, 1280, 3, dtype=torch.uint8), tensor(3, dtype=torch.float32)
    axis = (tensor(224), tensor(224, 15))
    arguments = (images, *axis, *axis, vector, vector, [224, 224], [0, 0], torch.float16)
    return {"1280x720 to 224x224 float16": (launch_preprocess, arguments)}


def tuning_cases(device: torch.device, rows: int = 720) -> list[tuning.Case]:
    """Calls to measure the configurations with; ``rows`` are those of an image."""

    shape = (16, rows, rows * 16 // 9, 3)
    images = torch.randint(0, 256, shape, device=device, dtype=torch.uint8)
    place = geometry.place((shape[1], shape[2]), (224, 224), "center_crop", 1.0)
    x_taps, y_taps = _taps(place, images, "bicubic")
    scale, bias = _normalisation((0.5, 0.5, 0.5), (0.25, 0.25, 0.25), device)
    args = (images, *x_taps, *y_taps, scale, bias, [224, 224], [0, 0], torch.float16)
    return [tuning.Case(PIXELS, (), launch_preprocess, reference.preprocess, args)]
