# mypy: ignore-errors
"""Triton kernel of resize and normalise: every output pixel from its own taps, in one launch.

The intermediate image of a separable resize is never stored: a program computes the rows of it
that it needs in registers. Neighbouring output pixels read neighbouring source pixels, so most
reads hit the L1 cache.
"""

import triton
import triton.language as tl


@triton.jit
def preprocess(
    images, x_first, x_weights, y_first, y_weights, out,
    scale0, scale1, scale2, bias0, bias1, bias2,
    source_height, source_width, height, width, out_height, out_width, top, left,
    image_stride, row_stride, pixel_stride, channel_stride,
    X_TAPS: tl.constexpr, Y_TAPS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """ROWS x COLS output pixels of one channel of one image.

    All programs are on the grid's first axis, as the others end at 65535.
    """
    tiles_x = tl.cdiv(out_width, COLS)
    tiles = tiles_x * tl.cdiv(out_height, ROWS)
    tile = tl.program_id(0) % tiles
    row = tile // tiles_x * ROWS + tl.arange(0, ROWS)
    col = tile % tiles_x * COLS + tl.arange(0, COLS)
    plane = (tl.program_id(0) // tiles).to(tl.int64)
    image, channel = plane // 3, plane % 3
    y, x = row - top, col - left
    inside_y, inside_x = (y >= 0) & (y < height), (x >= 0) & (x < width)
    y_start = tl.load(y_first + y, inside_y, other=0)
    x_start = tl.load(x_first + x, inside_x, other=0)
    base = images + image * image_stride + channel * channel_stride
    # Sums start at a half, in fixed point, so that the shift below rounds to nearest.
    total = tl.full((ROWS, COLS), 2097152, tl.int32)
    for y_tap in range(Y_TAPS):
        source_y = tl.minimum(y_start + y_tap, source_height - 1).to(tl.int64)
        line = base + source_y[:, None] * row_stride
        across = tl.full((ROWS, COLS), 2097152, tl.int32)
        for x_tap in range(X_TAPS):
            # Past the image the weight is zero, whatever is read.
            source_x = tl.minimum(x_start + x_tap, source_width - 1).to(tl.int64)
            pixel = tl.load(line + source_x[None, :] * pixel_stride).to(tl.int32)
            weight = tl.load(x_weights + x * X_TAPS + x_tap, inside_x, other=0)
            across += pixel * weight[None, :]
        across = tl.minimum(tl.maximum(across >> 22, 0), 255)
        weight = tl.load(y_weights + y * Y_TAPS + y_tap, inside_y, other=0)
        total += across * weight[:, None]
    pixel = tl.minimum(tl.maximum(total >> 22, 0), 255).to(tl.float32)
    scale = tl.where(channel == 0, scale0, tl.where(channel == 1, scale1, scale2))
    bias = tl.where(channel == 0, bias0, tl.where(channel == 1, bias1, bias2))
    value = pixel * scale + bias
    value = tl.where(inside_y[:, None] & inside_x[None, :], value, 0.0)
    at = (plane * out_height + row[:, None]) * out_width + col[None, :]
    inside = (row < out_height)[:, None] & (col < out_width)[None, :]
    tl.store(out + at, value.to(out.dtype.element_ty), inside)
