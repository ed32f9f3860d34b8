"""Resize and normalise: checks, launcher and registration."""

from __future__ import annotations

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
    them on the device. So call once for each size before capturing a graph, or before a compiled
    function that captures by itself (``mode="reduce-overhead"``).

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
    _check(images, size, mean, std, fit, crop_fraction, interpolation, dtype)
    out: torch.Tensor = _preprocess(
        images if images.dim() == 4 else images[None],
        list(size), list(mean), list(std), fit, crop_fraction, interpolation, dtype,
    )  # fmt: skip
    return out


def explain(images: torch.Tensor, *_: Any, **__: Any) -> library.Choice:
    """Which implementation a call with these arguments would run, and why."""
    choice = library.choose(PREPROCESS, images.device, images)
    if choice.implementation == "reference":
        return choice
    config = PIXELS.explain(images.device)
    return library.Choice(choice.op, choice.implementation, choice.reason, config)


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
    size: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    fit: str,
    crop_fraction: float,
    interpolation: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Triton counterpart of :func:`reference.preprocess`, same arguments and result."""
    from sn72kernels.ops.preprocess import kernel

    count, source_height, source_width, _ = images.shape
    height, width = size
    out = torch.empty((count, 3, height, width), dtype=dtype, device=images.device)
    if out.numel() == 0:
        return out
    where = geometry.place((source_height, source_width), (height, width), fit, crop_fraction)
    across, down = geometry.taps(images, where, interpolation)
    weights = (across.first, across.weights, down.first, down.weights)
    (scale0, bias0), (scale1, bias1), (scale2, bias2) = reference.scale_and_bias(mean, std)
    config = PIXELS.config(images.device)
    tiles = -(-height // config.rows) * -(-width // config.cols)
    library.launch(
        kernel.preprocess, (tiles * 3 * count,),
        images, *weights, out, scale0, scale1, scale2, bias0, bias1, bias2,
        source_height, source_width, where.height, where.width, height, width,
        where.top, where.left, *images.stride(),
        X_TAPS=across.weights.shape[1], Y_TAPS=down.weights.shape[1],
        ROWS=config.rows, COLS=config.cols,
        # A fused multiply-add would round once where the definition rounds twice.
        num_warps=config.warps, enable_fp_fusion=False,
    )  # fmt: skip
    return out


# --- registration --------------------------------------------------------------------------


def _fake_preprocess(images: torch.Tensor, size: Sequence[int], *arguments: Any) -> torch.Tensor:
    return images.new_empty((images.shape[0], 3, *size), dtype=arguments[-1])


PREPROCESS = library.OpSpec(
    name="preprocess",
    schema=(
        "(Tensor images, SymInt[] size, float[] mean, float[] std, str fit, float crop_fraction, "
        "str interpolation, ScalarType dtype) -> Tensor"
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
    mean: Sequence[float],
    std: Sequence[float],
    fit: str,
    crop_fraction: float,
    interpolation: str,
    dtype: torch.dtype,
) -> None:
    shape = (None,) * (images.dim() - 1) if images.dim() in (3, 4) else (None, None, None)
    check_tensor("images", images, shape=(*shape, 3), dtype=torch.uint8)
    h, w = images.shape[-3:-1]
    if h == 0 or w == 0:
        raise ShapeError(f"Invalid shape of images: no pixels in {tuple(images.shape)}")
    if len(size) != 2 or any(int(n) != n or n < 1 for n in size):
        raise ArgumentError(f"size is {tuple(size)}; give a positive height and width")
    if len(mean) != 3 or len(std) != 3 or any(not s > 0.0 for s in std):
        raise ArgumentError(
            f"mean is {list(mean)} and std is {list(std)}; give three numbers each, std positive"
        )
    geometry.check_fit(fit, crop_fraction)
    if interpolation not in geometry.FILTERS:
        raise ArgumentError(f"interpolation is {interpolation!r}; give 'bilinear' or 'bicubic'")
    if dtype not in DTYPES:
        raise ArgumentError(f"dtype is {dtype}; give one of {', '.join(map(str, DTYPES))}")


_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "center_crop", 1.0, "bicubic")


def compile_cases() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Launcher calls that between them reach every kernel, for compile-only checks."""
    images = torch.empty(8, 720, 1280, 3, dtype=torch.uint8, device="meta")
    arguments = (images, [224, 224], *_IMAGENET, torch.float16)
    return {"1280x720 to 224x224 float16": (launch_preprocess, arguments)}


def tuning_cases(device: torch.device, rows: int = 720) -> list[tuning.Case]:
    """Calls to measure the configurations with; ``rows`` are those of an image."""

    shape = (16, rows, rows * 16 // 9, 3)
    images = torch.randint(0, 256, shape, device=device, dtype=torch.uint8)
    args = (images, [224, 224], *_IMAGENET, torch.float16)
    return [tuning.Case(PIXELS, (), launch_preprocess, reference.preprocess, args)]
