"""Any image a caller can have -> upright 8-bit RGB, or an ImageError that says why not.

Images come from strangers, so every answer below is defined and tested.

=============================================  ====================================================
Source                                         Answer
=============================================  ====================================================
encoded bytes, or a path to a file             JPEG, PNG, WebP, GIF, BMP and TIFF are read, known
                                               by their first bytes and never by their name
anything else (HTML, SVG, EPS, empty bytes)    refused
more than ``max_bytes`` encoded                refused before it is read
more than ``max_pixels`` in the header         refused before a pixel is decoded; Pillow's
                                               process-wide ``MAX_IMAGE_PIXELS`` is not relied on
a side of 0 pixels                             refused
truncated                                      refused, also where the host program has set
                                               Pillow's ``LOAD_TRUNCATED_IMAGES``
EXIF orientation 1 to 8                        applied, so that the image is upright
damaged EXIF                                   ignored: the image is taken as upright
grey, black-and-white, palette                 expanded to RGB
alpha channel or a transparent colour          composited on white, on which viewers and browsers
                                               show it; dropping the alpha instead would bring
                                               out colours that nobody has seen
16-bit grey (mode ``I;16``)                    rounded ``value / 257``: 0 to 65535 becomes 0 to 255
16-bit colour PNG                              the high byte of each sample, as Pillow reads it
mode ``I`` (32-bit integer), ``F`` (float)     refused: their range is unknown, and a guess would
                                               turn a good image black or white
CMYK, also as Adobe's inverted JPEG            converted without a colour profile
animated GIF or WebP, multi-page TIFF          the first frame
colour profiles                                ignored
``PIL.Image`` of any mode above                its current frame; neither changed nor closed (one
                                               opened lazily is loaded, as by any other use)
uint8 array (H, W), (H, W, 1), (H, W, 3 or 4)  grey, grey, RGB, RGBA
array of another dtype or shape                refused by name
=============================================  ====================================================

Nothing here keeps or changes process-wide state: calls may run in any number of threads.
"""

from __future__ import annotations

import io
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from sn72engine.errors import ImageError
from sn72engine.spec import Options, check_int

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels; may lie between pixels."""

Source = bytes | bytearray | memoryview | str | os.PathLike[str] | Image.Image | NDArray[np.uint8]

_BACKGROUND = (255, 255, 255, 255)
_ORIENTATION_TAG = 0x0112
#: Orientations from here to 8 exchange height and width.
_ON_ITS_SIDE = 5
#: EXIF orientation -> what makes it upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, slots=True)
class DecodeLimits(Options):
    """What is refused as too large.

    Args:
        max_pixels: width times height, from the header.
        max_bytes: of the encoded image.
    """

    max_pixels: int = 100_000_000
    max_bytes: int = 64 << 20

    def __post_init__(self) -> None:
        check_int("max_pixels", self.max_pixels, 1)
        check_int("max_bytes", self.max_bytes, 1)


DEFAULT = DecodeLimits()


class Decoded(NamedTuple):
    """A decoded image, and where in it the picture lies.

    ``image`` has mode ``RGB``, is upright and is only for reading: it can be the caller's own.
    ``area`` is the whole image, except that a JPEG decoded at 1/s of a size that s does not
    divide has a last row or column of pixels that reaches past the picture's edge.
    """

    image: Image.Image
    area: Box


def decode(
    source: Source, *, limits: DecodeLimits = DEFAULT, at_least: tuple[int, int] | None = None
) -> NDArray[np.uint8]:
    """Decode one image.

    Args:
        source: encoded bytes, a path, a ``PIL.Image`` or a uint8 array; see the module's table.
        limits: what to refuse as too large.
        at_least: (height, width) of the smallest result that is still of use, both measured
            upright. An encoded JPEG is then decoded at 1/2, 1/4 or 1/8 of its size, as far as
            both sides stay at least twice as long; where the scale does not divide a side, the
            last row or column reaches past the picture by less than a pixel, which only
            :func:`decode_image` tells. None decodes at full size.

    Returns:
        uint8 array (H, W, 3), RGB, upright, in C order and writeable. An RGB array comes back as
        it is, not copied.

    Raises:
        ImageError: the image is refused; the message says why.
        OptionError: ``at_least`` is not two positive integers.
    """
    if isinstance(source, np.ndarray) and source.ndim == 3 and source.shape[2] == 3:
        _check_array(source, limits)
        return source
    return np.array(decode_image(source, limits=limits, at_least=at_least).image)


def decode_image(
    source: Source, *, limits: DecodeLimits = DEFAULT, at_least: tuple[int, int] | None = None
) -> Decoded:
    """As :func:`decode`, but gives a Pillow image, which spares copies of large ones.

    Raises:
        ImageError: the image is refused; the message says why.
        OptionError: ``at_least`` is not two positive integers.
    """
    for side in at_least or ():
        check_int("at_least", side, 1)
    if isinstance(source, np.ndarray):
        _check_array(source, limits)
        rgb = _to_rgb(_from_array(source))
        return Decoded(rgb, _whole(rgb))
    if isinstance(source, Image.Image):
        return _load(source, "image", limits, None)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _decode_bytes(bytes(source), "image bytes", limits, at_least)
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        return _decode_bytes(_read(path, limits), str(path), limits, at_least)
    raise ImageError(
        f"cannot decode a {type(source).__module__}.{type(source).__qualname__}: pass encoded "
        "bytes, a path, a PIL.Image or a uint8 NumPy array"
    )


class _WholeFile(io.BytesIO):
    """Encoded bytes that may not be read past their end.

    A decoder that asks for more than there is has a truncated image before it. Saying so here
    holds whatever the host program has set ``PIL.ImageFile.LOAD_TRUNCATED_IMAGES`` to.
    """

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        if not data and size is not None and size > 0:
            raise OSError("image file is truncated")
        return data


class _JpegFile(JpegImagePlugin.JpegImageFile):
    """Pillow's JPEG reader without its look for a resolution in the EXIF data.

    Nothing here uses the resolution, and the look warns of damaged EXIF data, which is an error
    where a program runs with warnings as errors.
    """

    def _read_dpi_from_exif(self) -> None:
        pass


#: First bytes -> reader. Readers are called directly because ``Image.open`` compares sizes with
#: a process-wide limit, warns, and offers formats that start other programs (EPS).
_READERS: tuple[tuple[bytes, type[ImageFile.ImageFile]], ...] = (
    (b"\xff\xd8\xff", _JpegFile),
    (b"\x89PNG\r\n\x1a\n", PngImagePlugin.PngImageFile),
    (b"RIFF", WebPImagePlugin.WebPImageFile),
    (b"GIF8", GifImagePlugin.GifImageFile),
    (b"BM", BmpImagePlugin.BmpImageFile),
    (b"II*\x00", TiffImagePlugin.TiffImageFile),
    (b"MM\x00*", TiffImagePlugin.TiffImageFile),
)


def _read(path: Path, limits: DecodeLimits) -> bytes:
    try:
        if not path.is_file():
            raise ImageError(f"{path}: {'is not a file' if path.exists() else 'no such file'}")
        with path.open("rb") as file:
            # One byte more than allowed is enough to refuse, however long the file is. Python
            # takes memory for all that is asked for, so no more is asked for than there is.
            return file.read(min(path.stat().st_size, limits.max_bytes) + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"{path}: cannot be read ({error})") from error


def _decode_bytes(
    data: bytes, name: str, limits: DecodeLimits, at_least: tuple[int, int] | None
) -> Decoded:
    if not data:
        raise ImageError(f"{name}: empty, 0 bytes")
    if len(data) > limits.max_bytes:
        raise ImageError(
            f"{name}: more than max_bytes={limits.max_bytes} bytes; raise "
            "DecodeLimits.max_bytes if it can be trusted"
        )
    reader = next((reader for magic, reader in _READERS if data.startswith(magic)), None)
    if reader is None:
        raise ImageError(
            f"{name}: not an image that can be read (starts with {data[:8]!r}); expected JPEG, "
            "PNG, WebP, GIF, BMP or TIFF"
        )
    try:
        with reader(_WholeFile(data)) as image:
            return _load(image, name, limits, at_least)
    except ImageError:
        raise
    except Exception as error:  # Pillow's readers raise a dozen kinds on hostile bytes
        raise ImageError(f"{name}: cannot be decoded ({_reason(error)})") from error


def _load(
    image: Image.Image, name: str, limits: DecodeLimits, at_least: tuple[int, int] | None
) -> Decoded:
    """Decode an opened image whose header has been read; ``at_least`` may change ``image``."""
    _check_size(image.height, image.width, name, limits)
    scaled = None
    if at_least is not None:
        height, width = at_least
        if _orientation(image) >= _ON_ITS_SIDE:
            height, width = width, height
        # Pillow never goes below the size asked for; formats other than JPEG answer None.
        scaled = image.draft(None, (2 * width, 2 * height))
    try:
        image.load()
        rgb = _to_rgb(image, name)
    except ImageError:
        raise
    except Exception as error:  # Pillow's decoders raise a dozen kinds on hostile bytes
        raise ImageError(f"{name}: cannot be decoded ({_reason(error)})") from error
    # After loading: a PNG may hold its EXIF data behind the pixels, and Pillow turns a TIFF
    # upright itself and takes the tag away.
    orientation = _orientation(image)
    area = scaled[1] if scaled else _whole(rgb)
    if orientation not in _UPRIGHT:
        return Decoded(rgb, area)
    rgb = rgb.transpose(_UPRIGHT[orientation])
    return Decoded(rgb, _upright_area(rgb, area, orientation))


def _whole(image: Image.Image) -> Box:
    return 0.0, 0.0, float(image.width), float(image.height)


def _upright_area(upright: Image.Image, area: Box, orientation: int) -> Box:
    """``area``, which begins at the first stored pixel, where turning the image has put it."""
    _, _, width, height = area
    if orientation >= _ON_ITS_SIDE:
        width, height = height, width
    left = upright.width - width if orientation in (2, 3, 6, 7) else 0.0
    top = upright.height - height if orientation in (3, 4, 7, 8) else 0.0
    return left, top, left + width, top + height


def _to_rgb(image: Image.Image, name: str = "image") -> Image.Image:
    if image.mode in ("I", "F"):
        raise ImageError(
            f"{name}: mode {image.mode!r} has no defined range; scale it to 0..255 and pass mode "
            "'L' or a uint8 array"
        )
    if image.mode.startswith("I;16"):
        wide = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((wide + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        # Pillow converts premultiplied grey only by way of plain grey with alpha.
        straight = image.convert("LA") if image.mode == "La" else image
        background = Image.new("RGBA", image.size, _BACKGROUND)
        return Image.alpha_composite(background, straight.convert("RGBA")).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 where it is absent or damaged.

    Reads the one tag by itself because Pillow's reader parses everything else too and warns of
    what it dislikes. Layout: TIFF 6.0, section 2 (header, then 12-byte directory entries).
    """
    exif = image.info.get("exif")
    if not isinstance(exif, bytes):
        return 1
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, _, value = struct.unpack_from(order + "HHIH", tiff, entry)
            if tag == _ORIENTATION_TAG:
                short = 3
                return value if kind == short and 1 <= value <= 8 else 1
    except struct.error:  # an offset points outside the data
        pass
    return 1


def _from_array(array: NDArray[np.uint8]) -> Image.Image:
    grey = array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array
    return Image.fromarray(np.ascontiguousarray(grey))


def _check_array(array: NDArray[np.uint8], limits: DecodeLimits) -> None:
    if array.dtype != np.uint8:
        raise ImageError(
            f"image array has dtype {array.dtype}; only uint8 in 0..255 is taken, because the "
            "range of another type is a guess: scale, round and convert it first"
        )
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        hint = ""
        if array.ndim == 3 and array.shape[0] in (1, 3, 4):
            hint = "; channels go last: use array.transpose(1, 2, 0)"
        raise ImageError(
            f"image array has shape {array.shape}; expected (H, W), (H, W, 1), (H, W, 3) or "
            f"(H, W, 4){hint}"
        )
    _check_size(array.shape[0], array.shape[1], "image array", limits)


def _check_size(height: int, width: int, name: str, limits: DecodeLimits) -> None:
    if height < 1 or width < 1:
        raise ImageError(f"{name}: {width}x{height} pixels, there is nothing in it")
    if height * width > limits.max_pixels:
        raise ImageError(
            f"{name}: {width}x{height} pixels are more than max_pixels={limits.max_pixels}; raise "
            "DecodeLimits.max_pixels if it can be trusted"
        )


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
