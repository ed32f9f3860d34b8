"""Every answer that the table of sn72engine.decode promises."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps, TiffImagePlugin

from sn72engine.decode import DecodeLimits, decode, decode_image
from sn72engine.errors import ImageError, OptionError

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def photo(width: int, height: int) -> Image.Image:
    """A smooth picture in which every corner has a colour of its own."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    x, y = x / width, y / height
    planes = [255 * x, 255 * y, 127 + 120 * np.sin(6 * x) * np.cos(5 * y)]
    return Image.fromarray(np.stack(planes, axis=2).astype(np.uint8))


def exif_with(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


def png_claiming(width: int, height: int) -> bytes:
    """A well-formed PNG header of any size, with next to no pixels behind it."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG"])
def test_reads_each_format(kind: str, tmp_path: Path) -> None:
    image = photo(40, 30)
    options: dict[str, dict[str, object]] = {
        "WEBP": {"lossless": True},
        "JPEG": {"quality": 95, "subsampling": 0},
    }
    data = encoded(image, kind, **options.get(kind, {}))
    array = decode(data)
    assert array.shape == (30, 40, 3)
    assert array.dtype == np.uint8
    assert array.flags.writeable
    tolerance = {"JPEG": 12, "GIF": 40}.get(kind, 0)
    assert np.abs(array.astype(int) - np.asarray(image).astype(int)).max() <= tolerance
    # The name says nothing: content decides.
    path = tmp_path / "picture.txt"
    path.write_bytes(data)
    for source in (path, str(path), bytearray(data), memoryview(data)):
        np.testing.assert_array_equal(decode(source), array)


@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 3, 4, None]), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_arrays(height: int, width: int, channels: int | None, seed: int) -> None:
    shape = (height, width) if channels is None else (height, width, channels)
    array = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    before = array.copy()
    result = decode(array)
    assert result.shape == (height, width, 3)
    if channels == 3:
        np.testing.assert_array_equal(result, array)
    elif channels == 4:
        alpha = array[:, :, 3:].astype(float) / 255
        over_white = array[:, :, :3] * alpha + 255 * (1 - alpha)
        # One rounding to 8 bits, in Pillow's integer arithmetic.
        assert np.abs(result - over_white).max() <= 1.0
    else:
        np.testing.assert_array_equal(result, np.repeat(array.reshape(height, width, 1), 3, 2))
    np.testing.assert_array_equal(array, before)


def test_array_views_are_read_as_they_look() -> None:
    array = noise(6, 8)
    np.testing.assert_array_equal(
        np.asarray(decode_image(array[::-2, ::3]).image), np.ascontiguousarray(array[::-2, ::3])
    )
    grey = array[:, :, 1]
    np.testing.assert_array_equal(decode(grey)[:, :, 2], grey)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((4, 4, 3), np.float32), "float32"),
        (np.zeros((4, 4, 3), np.float64), "float64"),
        (np.zeros((4, 4), np.uint16), "uint16"),
        (np.zeros((4, 4), bool), "bool"),
        (np.zeros(4, np.uint8), "shape (4,)"),
        (np.zeros((2, 4, 4, 3), np.uint8), "shape (2, 4, 4, 3)"),
        (np.zeros((4, 4, 2), np.uint8), "shape (4, 4, 2)"),
        (np.zeros((3, 40, 50), np.uint8), "transpose(1, 2, 0)"),
        (np.zeros((0, 4, 3), np.uint8), "nothing in it"),
        (np.zeros((4, 0), np.uint8), "nothing in it"),
    ],
)
def test_refused_arrays_are_named(array: np.ndarray, words: str) -> None:
    with pytest.raises(ImageError) as caught:
        decode(array)
    assert words in str(caught.value)


@pytest.mark.parametrize("source", [None, 3, ["a.jpg"], io.BytesIO(b"x")])
def test_refused_types_are_named(source: object) -> None:
    with pytest.raises(ImageError, match=type(source).__name__):
        decode(source)  # type: ignore[arg-type]


# --- modes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"])
def test_opaque_modes_keep_their_colours(mode: str) -> None:
    image = Image.new("RGB", (4, 2), (255, 255, 255))
    image.paste((0, 0, 0), (0, 0, 2, 2))
    converted = image.convert(mode)
    result = decode(converted)
    np.testing.assert_array_equal(result, np.asarray(image))


@pytest.mark.parametrize("mode", ["CMYK", "RGB", "YCbCr", "HSV", "P", "RGBA"])
def test_colour_modes_keep_red(mode: str) -> None:
    result = decode(Image.new("RGB", (3, 3), RED).convert(mode))
    assert np.abs(result.astype(int) - np.array(RED)).max() <= 1  # YCbCr rounds


def test_lab_is_converted() -> None:
    assert (decode(Image.new("LAB", (3, 3), (255, 128, 128))) > 240).all()


@pytest.mark.parametrize("mode", ["I", "F"])
def test_modes_without_a_range_are_refused(mode: str) -> None:
    with pytest.raises(ImageError, match=f"mode '{mode}' has no defined range"):
        decode(Image.new(mode, (3, 3)))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_not_clipped(kind: str) -> None:
    values = np.array([[0, 128, 129, 257, 300], [25700, 32768, 40000, 65406, 65535]], np.uint16)
    result = decode(encoded(Image.fromarray(values), kind))
    expected = np.round(values / 257).astype(np.uint8)
    np.testing.assert_array_equal(result, np.repeat(expected[:, :, None], 3, 2))
    assert expected.max() == 255
    assert len(np.unique(expected)) > 5


def test_every_sixteen_bit_value_rounds_to_the_nearest() -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    result = decode(Image.fromarray(values))[:, :, 0]
    np.testing.assert_array_equal(result, np.round(values / 257.0).astype(np.uint8))


@pytest.mark.parametrize("order", ["I;16L", "I;16B", "I;16N"])
def test_sixteen_bit_byte_orders(order: str) -> None:
    image = Image.new(order, (2, 1))
    image.putpixel((1, 0), 65535)
    np.testing.assert_array_equal(decode(image)[0, :, 0], [0, 255])


def transparent(mode: str) -> Image.Image:
    """A red pixel that is opaque, beside a green one that is fully transparent."""
    image = Image.new("RGBA", (2, 1), (*RED, 255))
    image.putpixel((1, 0), (*GREEN, 0))
    if mode == "P":
        palette = Image.new("P", (2, 1))
        palette.putpalette([*RED, *GREEN])
        palette.putpixel((1, 0), 1)
        palette.info["transparency"] = 1
        return palette
    if mode == "P bytes":
        palette = transparent("P")
        palette.info["transparency"] = bytes([255, 0])
        return palette
    if mode == "RGB key":
        keyed = image.convert("RGB")
        keyed.info["transparency"] = GREEN
        return keyed
    if mode == "PA":
        # Not by convert(), which in Pillow 11 loses the alpha.
        indexed = Image.new("PA", (2, 1))
        indexed.putpalette([*RED, *GREEN])
        indexed.putpixel((0, 0), (0, 255))
        indexed.putpixel((1, 0), (1, 0))
        return indexed
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "P", "P bytes", "RGB key", "PA"])
def test_transparency_shows_white(mode: str) -> None:
    result = decode(transparent(mode))
    np.testing.assert_array_equal(result[0], [RED, (255, 255, 255)])


@pytest.mark.parametrize("mode", ["RGBA", "P", "P bytes", "RGB key"])
def test_transparency_shows_white_from_png(mode: str) -> None:
    image = transparent(mode)
    data = encoded(image, transparency=image.info.get("transparency"))
    np.testing.assert_array_equal(decode(data)[0], [RED, (255, 255, 255)])


@pytest.mark.parametrize("mode", ["LA", "La", "L key", "1 key"])
def test_grey_transparency_shows_white(mode: str) -> None:
    if mode.endswith("key"):
        image = Image.new(mode[:-4], (2, 1), 0)
        image.putpixel((1, 0), 255)
        image.info["transparency"] = 0
        np.testing.assert_array_equal(decode(image)[0, :, 0], [255, 255])
        return
    image = Image.new("LA", (2, 1), (40, 255))
    image.putpixel((1, 0), (40, 0))
    np.testing.assert_array_equal(decode(image.convert(mode))[0, :, 0], [40, 255])


def test_half_transparent_is_mixed_with_white() -> None:
    result = decode(Image.new("RGBA", (1, 1), (0, 0, 0, 128)))
    np.testing.assert_array_equal(result[0, 0], [127, 127, 127])


@pytest.mark.parametrize("colour", [RED, GREEN, BLUE, (255, 255, 255), (0, 0, 0), (90, 60, 30)])
@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_is_not_inverted(kind: str, colour: tuple[int, int, int]) -> None:
    cmyk = Image.new("RGB", (16, 16), colour).convert("CMYK")
    data = encoded(cmyk, kind, **({"quality": 100} if kind == "JPEG" else {}))
    if kind == "JPEG":
        with Image.open(io.BytesIO(data)) as opened:
            assert opened.mode == "CMYK"
            assert "adobe" in opened.info
    assert np.abs(decode(data).astype(int) - np.array(colour)).max() <= 3


# --- orientation -------------------------------------------------------------------------------


def corner_colours(array: np.ndarray) -> list[tuple[bool, ...]]:
    """Which of R, G, B are high in the corners: top left, top right, bottom left, bottom right."""
    corners = (array[3, 3], array[3, -4], array[-4, 3], array[-4, -4])
    return [tuple(bool(v > 128) for v in corner) for corner in corners]


def marked() -> Image.Image:
    image = Image.new("RGB", (48, 32), (0, 0, 0))
    image.paste(RED, (0, 0, 24, 16))
    image.paste(GREEN, (24, 0, 48, 16))
    image.paste(BLUE, (0, 16, 24, 32))
    return image


#: How the stored image is made from the upright one, from the EXIF 2.32 table of what row 0 and
#: column 0 of the stored image are. Written with NumPy, apart from the code under test.
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[::-1],
    7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
    8: lambda a: a.swapaxes(0, 1)[:, ::-1],
}


@pytest.mark.parametrize("at_least", [None, (4, 6)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(orientation: int, kind: str, at_least: tuple[int, int] | None) -> None:
    upright = np.asarray(marked())
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    options: dict[str, object] = {"exif": exif_with(orientation)}
    if kind == "JPEG":
        options["quality"] = 95
    if kind == "TIFF":
        tags = TiffImagePlugin.ImageFileDirectory_v2()
        tags[0x0112] = orientation
        options = {"tiffinfo": tags}
    data = encoded(stored, kind, **options)
    result = decode(data, at_least=at_least)
    if kind == "JPEG" and at_least:
        assert result.shape == (8, 12, 3)
        result = np.repeat(np.repeat(result, 4, 0), 4, 1)
    assert result.shape == upright.shape
    assert corner_colours(result) == corner_colours(upright)
    with Image.open(io.BytesIO(data)) as opened:
        np.testing.assert_array_equal(
            decode(opened), np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
        )


def test_orientation_big_endian() -> None:
    entry = struct.pack(">HHIHH", 0x0112, 3, 1, 3, 0)
    exif = b"Exif\0\0MM\0*" + struct.pack(">I", 8) + struct.pack(">H", 1) + entry + bytes(4)
    stored = Image.fromarray(np.asarray(marked())[::-1, ::-1])
    result = decode(encoded(stored, "JPEG", exif=exif))
    assert corner_colours(result) == corner_colours(np.asarray(marked()))


@given(
    st.binary(max_size=80), st.sampled_from([b"", b"II*\0", b"MM\0*", b"II*\0\x08\0\0\0\xff\xff"])
)
@settings(max_examples=60, deadline=None)
def test_damaged_exif_is_ignored(tail: bytes, head: bytes) -> None:
    # Warnings are errors in this suite, so this also shows that none leaks out of Pillow.
    image = photo(24, 16)
    data = encoded(image, "JPEG", exif=b"Exif\0\0" + head + tail)
    result = decode(data)
    assert sorted(result.shape) == [3, 16, 24]


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_impossible_orientation_is_ignored(orientation: int) -> None:
    data = encoded(marked(), "JPEG", exif=exif_with(orientation))
    assert corner_colours(decode(data)) == corner_colours(np.asarray(marked()))


# --- hostile and damaged -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [b"", b"\xff", b"<html></html>", b"%!PS-Adobe-3.0 EPSF-3.0", b"GIF8", b"\xff\xd8\xff", b"RIFF"],
)
def test_not_an_image(data: bytes) -> None:
    with pytest.raises(ImageError, match="image bytes: "):
        decode(data)


@given(
    st.sampled_from([b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"II*\0", b"MM\0*"]),
    st.binary(max_size=200),
)
@settings(max_examples=100, deadline=None)
def test_garbage_never_raises_anything_else(head: bytes, tail: bytes) -> None:
    with contextlib.suppress(ImageError):
        decode(head + tail, limits=DecodeLimits(max_pixels=10_000))


@pytest.mark.parametrize("host_accepts_truncated", [False, True])
@pytest.mark.parametrize("kind", ["JPEG", "progressive JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF"])
def test_truncated_is_refused(
    kind: str, host_accepts_truncated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"progressive": True} if kind.startswith("progressive") else {}
    whole = encoded(Image.fromarray(noise(40, 50)), kind.removeprefix("progressive "), **options)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", host_accepts_truncated)
    decode(whole)
    for share in (0.2, 0.5, 0.8, 0.97):
        with pytest.raises(ImageError):
            decode(whole[: int(len(whole) * share)])
    assert host_accepts_truncated == ImageFile.LOAD_TRUNCATED_IMAGES


@given(st.integers(2, 2000), st.booleans(), st.sampled_from([None, (5, 5)]))
@settings(max_examples=40, deadline=None)
def test_jpeg_missing_its_end_is_refused(
    missing: int, progressive: bool, at_least: tuple[int, int] | None
) -> None:
    whole = encoded(Image.fromarray(noise(40, 50)), "JPEG", progressive=progressive)
    with pytest.raises(ImageError):
        decode(whole[: max(len(whole) - missing, 1)], at_least=at_least)


def test_truncated_file_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "half.jpg"
    data = encoded(Image.fromarray(noise(64, 64)), "JPEG")
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ImageError, match=r"half\.jpg.*truncated"):
        decode(path)


def test_bomb_is_refused_from_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        ImageFile.ImageFile, "load", lambda self: pytest.fail("pixels were decoded")
    )
    for width, height in ((100_000, 100_000), (10_001, 10_000), (2**31 - 1, 1)):
        with pytest.raises(ImageError, match="max_pixels=100000000"):
            decode(png_claiming(width, height))


def test_size_limit_is_ours_not_pillows(monkeypatch: pytest.MonkeyPatch) -> None:
    # Below Pillow's limit of an error, above its limit of a warning: neither may show.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert decode(encoded(photo(20, 20))).shape == (20, 20, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(ImageError, match="20x20 pixels are more than max_pixels=399"):
        decode(encoded(photo(20, 20)), limits=DecodeLimits(max_pixels=399))
    assert Image.MAX_IMAGE_PIXELS is None
    for source in (photo(20, 20), noise(20, 20)):
        with pytest.raises(ImageError, match="max_pixels=399"):
            decode(source, limits=DecodeLimits(max_pixels=399))


def test_too_many_bytes(tmp_path: Path) -> None:
    data = encoded(photo(20, 20))
    path = tmp_path / "a.png"
    path.write_bytes(data)
    exactly = DecodeLimits(max_bytes=len(data))
    less = DecodeLimits(max_bytes=len(data) - 1)
    for source in (data, path):
        assert decode(source, limits=exactly).shape == (20, 20, 3)
        with pytest.raises(ImageError, match="max_bytes"):
            decode(source, limits=less)


@pytest.mark.parametrize("name", ["max_pixels", "max_bytes"])
def test_limits_are_checked_and_frozen(name: str) -> None:
    with pytest.raises(OptionError, match=name):
        DecodeLimits(**{name: 0})
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(DecodeLimits(), name, 1)


def test_paths_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="no such file"):
        decode(tmp_path / "absent.jpg")
    with pytest.raises(ImageError, match="not a file"):
        decode(tmp_path)
    with pytest.raises(ImageError):
        decode("a\0b")
    with pytest.raises(ImageError):
        decode("x" * 5000)
    empty = tmp_path / "empty.jpg"
    empty.touch()
    with pytest.raises(ImageError, match=r"empty\.jpg: empty, 0 bytes"):
        decode(empty)


# --- frames and Pillow images ------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "PNG"])
def test_first_frame_of_several(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert (decode(data) == np.array(RED)).all()


def test_pillow_image_is_neither_changed_nor_closed() -> None:
    for mode in ("RGB", "RGBA", "P", "L", "CMYK"):
        image = photo(30, 20).convert(mode)
        image.info["exif"] = exif_with(6)
        before = (image.mode, image.size, image.tobytes(), dict(image.info))
        assert decode(image, at_least=(2, 2)).shape == (30, 20, 3)
        assert (image.mode, image.size, image.tobytes(), dict(image.info)) == before


def test_result_does_not_share_memory_with_a_pillow_image() -> None:
    image = photo(8, 8)
    before = image.tobytes()
    decode(image)[:] = 0
    assert image.tobytes() == before


def test_lazily_opened_pillow_image_stays_usable(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    photo(64, 48).save(path)
    with Image.open(path) as image:
        full = decode(image, at_least=(1, 1))
        assert image.size == (64, 48)
        np.testing.assert_array_equal(np.asarray(image), full)


def test_current_frame_of_a_pillow_image() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    with Image.open(io.BytesIO(data)) as image:
        image.seek(2)
        assert (decode(image) == np.array(BLUE)).all()
        assert image.tell() == 2
        image.seek(1)


def test_bad_pillow_images() -> None:
    with pytest.raises(ImageError, match="nothing in it"):
        decode(Image.new("RGB", (0, 5)))
    closed = Image.open(io.BytesIO(encoded(photo(8, 8))))
    closed.close()
    with pytest.raises(ImageError):
        decode(closed)
    data = encoded(Image.fromarray(noise(40, 50)), "JPEG")
    with Image.open(io.BytesIO(data[: len(data) // 2])) as half:
        with pytest.raises(ImageError, match="truncated"):
            decode(half)


# --- decoding at a smaller scale -----------------------------------------------------------------


@given(
    st.integers(8, 300),
    st.integers(8, 300),
    st.integers(1, 80),
    st.integers(1, 80),
    st.sampled_from([1, 3, 6, 8]),
)
@settings(max_examples=60, deadline=None)
def test_scaled_decode_stays_twice_as_large(
    width: int, height: int, need_height: int, need_width: int, orientation: int
) -> None:
    data = encoded(photo(width, height), "JPEG", exif=exif_with(orientation))
    full = decode(data)
    result = decode(data, at_least=(need_height, need_width))
    (factor,) = (
        scale
        for scale in (1, 2, 4, 8)
        if result.shape[:2] == tuple(-(-side // scale) for side in full.shape[:2])
    )
    if factor > 1:
        assert result.shape[0] >= 2 * need_height
        assert result.shape[1] >= 2 * need_width
    if factor < 8:  # the next step would have been too small
        too_small = [full.shape[0] // (2 * factor), full.shape[1] // (2 * factor)]
        assert too_small[0] < 2 * need_height or too_small[1] < 2 * need_width


def test_scaled_decode_shows_the_same_picture() -> None:
    data = encoded(photo(800, 600), "JPEG", quality=95)
    small = decode(data, at_least=(75, 100))
    assert small.shape == (150, 200, 3)
    averaged = decode(data).astype(np.float64).reshape(150, 4, 200, 4, 3).mean((1, 3))
    # Both are the mean of the same 4 x 4 pixels; the rest is rounding and chroma filtering.
    assert np.abs(small - averaged).mean() < 1.5


def test_at_least_is_checked() -> None:
    with pytest.raises(OptionError, match="at_least=0"):
        decode(encoded(photo(8, 8), "JPEG"), at_least=(0, 4))


# --- threads -----------------------------------------------------------------------------------


def test_threads_do_not_disturb_each_other() -> None:
    whole = [encoded(Image.fromarray(noise(60, 80, seed)), "JPEG") for seed in range(6)]
    expected = [decode(data) for data in whole]
    work = [(i % 6, whole[i % 6] if i % 4 else whole[i % 6][:900]) for i in range(96)]

    def one(item: tuple[int, bytes]) -> bool:
        index, data = item
        try:
            return np.array_equal(decode(data), expected[index]) and len(data) > 900
        except ImageError:
            return len(data) == 900

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(one, work))
