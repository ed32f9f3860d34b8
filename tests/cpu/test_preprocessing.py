"""Preprocessing against an independent float64 resampler, and the contract of its arguments."""

from __future__ import annotations

import concurrent.futures
import io
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sn72engine.decode import DecodeLimits
from sn72engine.errors import ImageError, InputError
from sn72engine.preprocessing import preprocess, required_size, transform
from sn72engine.spec import Preprocess

#: Normalisation that does nothing, so that results are the 8-bit pixels.
PIXELS = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def jpeg(array: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "JPEG", **options)
    return buffer.getvalue()


# --- the oracle: textbook resampling in float64, no Pillow ---------------------------------------


def cubic(x: float) -> float:
    """Keys' cubic convolution kernel with a = -1/2 (IEEE Trans. ASSP 29(6), 1981)."""
    x = abs(x)
    if x < 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def sinc(x: float) -> float:
    return 1.0 if x == 0 else math.sin(math.pi * x) / (math.pi * x)


KERNELS: dict[str, tuple[Callable[[float], float], float]] = {
    "bilinear": (lambda x: max(0.0, 1 - abs(x)), 1.0),
    "bicubic": (cubic, 2.0),
    "lanczos": (lambda x: sinc(x) * sinc(x / 3) if abs(x) < 3 else 0.0, 3.0),
    "box": (lambda x: 1.0 if -0.5 < x <= 0.5 else 0.0, 0.5),
}


def weights(filter_name: str, size: int, start: float, stop: float, outputs: int) -> np.ndarray:
    """Matrix (outputs, size) that resamples [start, stop) of ``size`` pixels to ``outputs``."""
    kernel, support = KERNELS[filter_name]
    scale = (stop - start) / outputs
    stretch = max(scale, 1.0)
    matrix = np.zeros((outputs, size))
    for row in range(outputs):
        centre = start + (row + 0.5) * scale
        first = max(int(centre - support * stretch + 0.5), 0)
        last = min(int(centre + support * stretch + 0.5), size)
        for column in range(first, last):
            matrix[row, column] = kernel((column + 0.5 - centre) / stretch)
        matrix[row] /= matrix[row].sum()
    return matrix


def error_beyond_rounding(
    result: np.ndarray,
    rgb: np.ndarray,
    filter_name: str,
    box: tuple[float, float, float, float],
) -> float:
    """How much farther ``result`` is from exact resampling than 8-bit arithmetic explains.

    There are two passes, across and then down, and each clips and rounds to 8 bits. The first
    rounding, at most 1/2, reaches the result through the weights of the second pass, whose
    absolute values sum to more than 1 for kernels with negative lobes. The second adds 1/2,
    fixed-point weights under 1/100.
    """
    left, top, right, bottom = box
    across = weights(filter_name, rgb.shape[1], left, right, result.shape[1])
    down = weights(filter_name, rgb.shape[0], top, bottom, result.shape[0])
    rows = np.clip(np.einsum("ow,hwc->hoc", across, rgb.astype(np.float64)), 0, 255)
    expected = np.clip(np.einsum("oh,hwc->owc", down, rows), 0, 255)
    allowed = 0.5 * np.abs(down).sum(axis=1).max() + 0.51
    return float(np.abs(result - expected).max() - allowed)


def cropped_box(
    height: int, width: int, out_height: int, out_width: int, fraction: float
) -> tuple[float, float, float, float]:
    """The largest centred box of the output's aspect ratio, shrunk by ``fraction``."""
    if width * out_height > height * out_width:  # too wide: full height
        box_height, box_width = float(height), height * out_width / out_height
    else:
        box_height, box_width = width * out_height / out_width, float(width)
    box_height, box_width = box_height * fraction, box_width * fraction
    centre_y, centre_x = height / 2, width / 2
    return (
        centre_x - box_width / 2,
        centre_y - box_height / 2,
        centre_x + box_width / 2,
        centre_y + box_height / 2,
    )


SIDES = st.integers(1, 40)
FILTERS = st.sampled_from(["bilinear", "bicubic", "lanczos"])


@given(SIDES, SIDES, SIDES, SIDES, FILTERS, st.floats(0.3, 1.0), st.integers(0, 9))
@settings(max_examples=80, deadline=None)
def test_center_crop_matches_the_oracle(
    height: int, width: int, out_height: int, out_width: int, name: str, fraction: float, seed: int
) -> None:
    rgb = noise(height, width, seed)
    spec = Preprocess(
        out_height, out_width, crop_fraction=fraction, interpolation=name, layout="nhwc", **PIXELS
    )
    box = cropped_box(height, width, out_height, out_width, fraction)
    assert error_beyond_rounding(transform(rgb, spec), rgb, name, box) <= 0


@given(SIDES, SIDES, SIDES, SIDES, FILTERS, st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_squash_matches_the_oracle(
    height: int, width: int, out_height: int, out_width: int, name: str, seed: int
) -> None:
    rgb = noise(height, width, seed)
    spec = Preprocess(
        out_height, out_width, fit="squash", interpolation=name, layout="nhwc", **PIXELS
    )
    box = (0.0, 0.0, float(width), float(height))
    assert error_beyond_rounding(transform(rgb, spec), rgb, name, box) <= 0


@given(SIDES, SIDES, SIDES, SIDES, FILTERS, st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_pad_matches_the_oracle(
    height: int, width: int, out_height: int, out_width: int, name: str, seed: int
) -> None:
    rgb = noise(height, width, seed)
    mean = (10.0, 20.0, 30.0)
    spec = Preprocess(
        out_height, out_width, fit="pad", interpolation=name, layout="nhwc",
        mean=mean, std=(1.0, 1.0, 1.0),
    )  # fmt: skip
    result = transform(rgb, spec)
    scale = min(out_height / height, out_width / width)
    inner_height = min(max(round(height * scale), 1), out_height)
    inner_width = min(max(round(width * scale), 1), out_width)
    assert inner_height == out_height or inner_width == out_width
    top, left = (out_height - inner_height) // 2, (out_width - inner_width) // 2
    box = (0.0, 0.0, float(width), float(height))
    inside = result[top : top + inner_height, left : left + inner_width] + np.array(mean)
    assert error_beyond_rounding(inside, rgb, name, box) <= 1e-4
    border = np.ones((out_height, out_width), bool)
    border[top : top + inner_height, left : left + inner_width] = False
    assert (result[border] == 0).all()


@given(
    st.integers(1, 8), st.integers(1, 8), st.integers(1, 5), st.integers(1, 5), st.integers(0, 9)
)
@settings(max_examples=40, deadline=None)
def test_box_filter_averages_whole_pixels(
    out_height: int, out_width: int, down: int, across: int, seed: int
) -> None:
    rgb = noise(out_height * down, out_width * across, seed)
    spec = Preprocess(
        out_height, out_width, fit="squash", interpolation="box", layout="nhwc", **PIXELS
    )
    blocks = rgb.reshape(out_height, down, out_width, across, 3).astype(np.float64)
    # Two roundings to 8 bits, each of at most 1/2.
    assert np.abs(transform(rgb, spec) - blocks.mean((1, 3))).max() <= 1.0


@given(SIDES, SIDES, st.integers(1, 12), st.integers(1, 12), st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_nearest_picks_pixels(
    height: int, width: int, out_height: int, out_width: int, seed: int
) -> None:
    rgb = noise(height, width, seed)
    spec = Preprocess(
        out_height, out_width, fit="squash", interpolation="nearest", layout="nhwc", **PIXELS
    )
    result = transform(rgb, spec)
    # Where a centre falls on the border of two pixels, either is the nearest.
    for y in range(out_height):
        for x in range(out_width):
            rows = {math.floor((y + 0.5) * height / out_height + e) for e in (-1e-6, 1e-6)}
            columns = {math.floor((x + 0.5) * width / out_width + e) for e in (-1e-6, 1e-6)}
            assert any((result[y, x] == rgb[r, c]).all() for r in rows for c in columns)


def test_same_size_changes_no_pixel() -> None:
    rgb = noise(31, 47)
    for fit in ("center_crop", "squash", "pad"):
        spec = Preprocess(31, 47, fit=fit, layout="nhwc", **PIXELS)  # type: ignore[arg-type]
        np.testing.assert_array_equal(transform(rgb, spec), rgb)


def test_shrinking_antialiases() -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    spec = Preprocess(8, 8, layout="nhwc", **PIXELS)
    # But for the outer columns, whose filter is cut off, every result averages whole stripes.
    assert np.abs(transform(stripes, spec)[:, 1:-1] - 127.5).max() <= 1


def test_box_rounded_past_the_edge_is_brought_back() -> None:
    assert 7 * (29 / 7) > 29  # in floating point
    result = transform(np.full((29, 29, 3), 9, np.uint8), Preprocess(7, 7, **PIXELS))
    assert (result == 9).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (500, 1), (3, 4001)])
@pytest.mark.parametrize("fit", ["center_crop", "squash", "pad"])
def test_extreme_shapes(shape: tuple[int, int], fit: str) -> None:
    rgb = np.full((*shape, 3), 200, np.uint8)
    spec = Preprocess(16, 24, fit=fit, crop_fraction=1e-3, layout="nhwc", **PIXELS)  # type: ignore[arg-type]
    result = transform(rgb, spec)
    assert set(np.unique(result)) <= {0.0, 200.0}
    assert (result == 200).any()


@given(
    st.integers(1, 9000),
    st.integers(1, 9000),
    st.integers(1, 500),
    st.integers(1, 500),
    st.floats(1e-3, 1.0),
)
@settings(max_examples=200, deadline=None)
def test_box_never_leaves_the_image(
    height: int, width: int, out_height: int, out_width: int, fraction: float
) -> None:
    from sn72engine.preprocessing import _cropped

    spec = Preprocess(out_height, out_width, crop_fraction=fraction)
    left, top, right, bottom = _cropped((0.0, 0.0, float(width), float(height)), spec)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    assert left + right == pytest.approx(width)
    assert top + bottom == pytest.approx(height)
    assert (right - left) * out_height == pytest.approx((bottom - top) * out_width)


# --- normalisation, layout, dtype ----------------------------------------------------------------

triples = st.tuples(*[st.floats(0, 255, width=32)] * 3)
deviations = st.tuples(*[st.floats(0.5, 300, width=32)] * 3)


@given(triples, deviations, st.sampled_from(["nchw", "nhwc"]), st.integers(0, 9))
@settings(max_examples=50, deadline=None)
def test_normalisation(
    mean: tuple[float, float, float], std: tuple[float, float, float], layout: str, seed: int
) -> None:
    rgb = noise(5, 7, seed)
    spec = Preprocess(5, 7, mean=mean, std=std, layout=layout)  # type: ignore[arg-type]
    exact = (rgb.astype(np.float64) - mean) / std
    if layout == "nchw":
        exact = exact.transpose(2, 0, 1)
    result = transform(rgb, spec)
    assert result.shape == spec.shape
    # Two rounded constants, one product and one sum, each of them at most max(pixel, mean)/std.
    bound = 4 * np.finfo(np.float32).eps * 255 / min(std)
    assert np.abs(result - exact).max() <= bound
    half = transform(rgb, Preprocess(5, 7, mean=mean, std=std, layout=layout, dtype="float16"))  # type: ignore[arg-type]
    assert half.dtype == np.float16
    np.testing.assert_array_equal(half, result.astype(np.float16))


def test_out_is_filled_whole_and_returned() -> None:
    for fit in ("center_crop", "pad"):
        for layout in ("nchw", "nhwc"):
            for dtype in ("float32", "float16"):
                spec = Preprocess(20, 30, fit=fit, layout=layout, dtype=dtype)  # type: ignore[arg-type]
                out = np.full(spec.shape, np.nan, dtype)
                rgb = noise(17, 45)
                assert transform(rgb, spec, out) is out
                np.testing.assert_array_equal(out, transform(rgb, spec))
                assert np.isfinite(out).all()


def test_out_must_fit() -> None:
    spec = Preprocess(20, 30)
    with pytest.raises(InputError, match=r"out is float64\[3, 20, 30\]"):
        transform(noise(9, 9), spec, np.empty((3, 20, 30)))
    with pytest.raises(InputError, match=r"float32\[20, 30, 3\]"):
        transform(noise(9, 9), spec, np.empty((20, 30, 3), np.float32))


@pytest.mark.parametrize(
    "rgb",
    [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3), np.float32),
     np.zeros((0, 4, 3), np.uint8)],
)  # fmt: skip
def test_transform_takes_only_rgb(rgb: np.ndarray) -> None:
    with pytest.raises(ImageError):
        transform(rgb, Preprocess())


# --- batches -------------------------------------------------------------------------------------


def test_every_kind_of_source_gives_the_same_sample(tmp_path: Path) -> None:
    rgb = noise(40, 50)
    spec = Preprocess(16, 16)
    expected = transform(rgb, spec)
    path = tmp_path / "a.png"
    image = Image.fromarray(rgb)
    image.save(path)
    sources = [path, str(path), path.read_bytes(), image, rgb]
    together = preprocess(sources, spec)
    assert together.shape == (5, 3, 16, 16)
    assert together.flags.c_contiguous
    for source, sample in zip(sources, together, strict=True):
        np.testing.assert_array_equal(sample, expected)
        alone = preprocess(source, spec)
        assert alone.shape == (1, 3, 16, 16)
        np.testing.assert_array_equal(alone[0], expected)
    stack = np.stack([rgb, rgb[::-1]])
    np.testing.assert_array_equal(
        preprocess(stack, spec), np.stack([expected, transform(rgb[::-1], spec)])
    )
    grey = preprocess(rgb[:, :, 0], spec)
    np.testing.assert_array_equal(grey, preprocess(stack[:1, :, :, :1], spec))


@given(st.lists(st.tuples(SIDES, SIDES), max_size=5), st.sampled_from(["nchw", "nhwc"]))
@settings(max_examples=25, deadline=None)
def test_a_batch_is_its_samples_in_order(sizes: list[tuple[int, int]], layout: str) -> None:
    spec = Preprocess(6, 9, layout=layout)  # type: ignore[arg-type]
    images = [noise(height, width, seed) for seed, (height, width) in enumerate(sizes)]
    result = preprocess(tuple(images), spec)
    assert result.shape == (len(images), *spec.shape)
    assert result.dtype == np.float32
    for image, sample in zip(images, result, strict=True):
        np.testing.assert_array_equal(sample, transform(image, spec))


def test_no_images() -> None:
    spec = Preprocess(6, 9, dtype="float16")
    for nothing in ([], (), np.zeros((0, 5, 5, 3), np.uint8)):
        result = preprocess(nothing, spec)
        assert result.shape == (0, 3, 6, 9)
        assert result.dtype == np.float16


def test_errors_name_the_image() -> None:
    good = noise(8, 8)
    with pytest.raises(ImageError, match=r"^image 2 of 3: image bytes: empty"):
        preprocess([good, good, b""], Preprocess())
    with pytest.raises(ImageError, match=r"^image bytes: empty"):
        preprocess(b"", Preprocess())
    with pytest.raises(ImageError, match=r"image 0 of 2: .*float32"):
        preprocess(np.zeros((2, 4, 4, 3), np.float32), Preprocess())
    with pytest.raises(ImageError, match="generator"):
        preprocess((image for image in [good]), Preprocess())  # type: ignore[arg-type]
    with pytest.raises(ImageError, match=r"image 0 of 1: .*max_pixels=63"):
        preprocess([good], Preprocess(), limits=DecodeLimits(max_pixels=63))


# --- decoding at a smaller scale -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (Preprocess(224, 160), (224, 160)),
        (Preprocess(224, 224, crop_fraction=0.875), (256, 256)),
        (Preprocess(224, 224, crop_fraction=0.5, fit="squash"), (224, 224)),
        (Preprocess(224, 224, crop_fraction=0.5, fit="pad"), (224, 224)),
        (Preprocess(draft=False), None),
        (Preprocess(interpolation="nearest"), None),
    ],
)
def test_required_size(spec: Preprocess, expected: tuple[int, int] | None) -> None:
    assert required_size(spec) == expected


def scene(height: int, width: int) -> np.ndarray:
    """Detail at every scale, as in a photograph: random patches of 2 to 128 pixels, summed."""
    generator = np.random.default_rng(3)
    total = np.zeros((height, width, 3))
    for size in (2, 8, 32, 128):
        patches = generator.normal(0, 1, (-(-height // size), -(-width // size), 3))
        patches *= 12 * math.log2(2 * size) / 2
        total += np.repeat(np.repeat(patches, size, 0), size, 1)[:height, :width]
    return np.clip(127 + total, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("fit", ["center_crop", "squash", "pad"])
@pytest.mark.parametrize("size", [(900, 1200), (1203, 901)])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_draft_differs_by_less_than_resampling_noise(
    fit: str, size: tuple[int, int], orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = jpeg(scene(*size), quality=92, exif=exif)
    kinds = {"height": 100, "width": 100, "fit": fit, "crop_fraction": 0.9, **PIXELS}
    quick = preprocess(data, Preprocess(**kinds))  # type: ignore[arg-type]
    whole = preprocess(data, Preprocess(draft=False, **kinds))  # type: ignore[arg-type]
    other = preprocess(data, Preprocess(draft=False, interpolation="lanczos", **kinds))  # type: ignore[arg-type]
    assert (quick != whole).any()  # the shorter way was taken
    # Yardstick: what choosing another good filter changes on the same pixels. 901 and 1203 are
    # no multiples of the scale, so this also shows that the partial last pixels are left out.
    assert np.abs(quick - whole).mean() < 0.75 * np.abs(other - whole).mean()


def test_draft_leaves_other_sources_alone() -> None:
    rgb = scene(300, 400)
    quick, whole = Preprocess(20, 20), Preprocess(20, 20, draft=False)
    np.testing.assert_array_equal(preprocess(rgb, quick), preprocess(rgb, whole))
    image = Image.open(io.BytesIO(jpeg(rgb)))
    np.testing.assert_array_equal(preprocess(image, quick), preprocess(jpeg(rgb), whole))


def test_threads_give_the_same_as_one() -> None:
    spec = Preprocess(32, 32)
    data = [jpeg(noise(60 + seed, 80, seed)) for seed in range(5)]
    expected = [preprocess(item, spec) for item in data]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda i: preprocess(data[i % 5], spec), range(60)))
    for index, result in enumerate(results):
        np.testing.assert_array_equal(result, expected[index % 5])
