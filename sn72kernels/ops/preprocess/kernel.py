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
    images, x_first, x_weights, y_first, y_weights, scale, bias, out,
    source_height, source_width, height, width, out_height, out_width, top, left,
    image_stride, row_stride, pixel_stride, channel_stride,
    X_TAPS: tl.constexpr, Y_TAPS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """ROWS x COLS output pixels of one channel of one image."""
    tiles = tl.cdiv(out_width, COLS)
    row = tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(0) % tiles * COLS + tl.arange(0, COLS)
    channel = tl.program_id(1)
    image = tl.program_id(2).to(tl.int64)
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
            source_x = tl.minimum(x_start + x_tap, source_width - 1)
            pixel = tl.load(line + source_x[None, :] * pixel_stride).to(tl.int32)
            weight = tl.load(x_weights + x * X_TAPS + x_tap, inside_x, other=0)
            across += pixel * weight[None, :]
        across = tl.minimum(tl.maximum(across >> 22, 0), 255)
        weight = tl.load(y_weights + y * Y_TAPS + y_tap, inside_y, other=0)
        total += across * weight[:, None]
    pixel = tl.minimum(tl.maximum(total >> 22, 0), 255).to(tl.float32)
    value = pixel * tl.load(scale + channel) + tl.load(bias + channel)
    value = tl.where(inside_y[:, None] & inside_x[None, :], value, 0.0)
    plane = out + (image * 3 + channel) * out_height * out_width
    inside = (row < out_height)[:, None] & (col < out_width)[None, :]
    tl.store(
        plane + row[:, None] * out_width + col[None, :], value.to(out.dtype.element_ty), inside
    )
