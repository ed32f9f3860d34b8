"""What each op has to move and compute at least, as formulas of its sizes.

Every input is read once and every output written once, whatever an implementation does; small
tables that every block reads again from the cache (filter weights, scales of a tensor) are left
out. Operations count one each, ``exp``, ``erf`` and ``sqrt`` too. An op with matrix products counts
those alone, ``2 m n k`` each, against the rate of a large product of dtype ``unit``.
"""

from __future__ import annotations

from sn72kernels.bench import Work


def layernorm_gelu(rows: int, cols: int, itemsize: int, *, residual: bool = False) -> Work:
    """``bytes = itemsize (2 rows cols + 2 cols)``; ``flops = 12 rows cols``.

    An element takes part in one sum for the mean (1), is centred (1), squared and summed (2),
    scaled (1), multiplied by the weight and added to the bias (2), and goes through
    ``0.5 v (1 + erf(v / sqrt 2))`` (5). A residual is read, its sum written, and is one more
    addition: ``bytes += 2 itemsize rows cols``, ``flops += rows cols``.
    """
    elements = rows * cols
    extra = 1 if residual else 0
    return Work(
        bytes=itemsize * ((2 + 2 * extra) * elements + 2 * cols), flops=(12 + extra) * elements
    )


def layernorm_gelu_training(rows: int, cols: int, itemsize: int) -> Work:
    """Forward and backward: ``bytes = itemsize (5 rows cols + 6 cols)``; ``flops = 36 rows cols``.

    Forward as :func:`layernorm_gelu`. Backward reads the input and the gradient and writes the
    input's gradient (3), and reads the parameters and writes their gradients; it recomputes the
    normalised value and the derivative of GELU (12), and forms two sums and the gradient (12).
    """
    elements = rows * cols
    return Work(bytes=itemsize * (5 * elements + 6 * cols), flops=36 * elements)


def cascade_route(n: int, itemsize: int, *, per_sample: bool = False) -> Work:
    """``bytes = n (itemsize + 9) + 16``, ``+ 8 n`` with thresholds per sample; ``flops = 25 n``.

    A score is read; a route (1), a position (4) and a probability (4) are written, and four
    numbers of 4 bytes for the batch. The sigmoid is 20 operations, the decision 5 comparisons.
    """
    return Work(bytes=n * (itemsize + 9 + (8 if per_sample else 0)) + 16, flops=25 * n)


def classifier_head(rows: int, depth: int, units: int, itemsize: int) -> Work:
    """``flops = 2 rows units depth``, of the first layer; bytes of all that it reads and writes.

    ``bytes = itemsize (rows depth + 2 depth + units depth + 2 units + 1) + 9 rows``: the norm's
    weight and bias, both layers, and per row a logit (4), a probability (4) and a route (1).
    """
    parameters = 2 * depth + units * depth + 2 * units + 1
    return Work(
        bytes=itemsize * (rows * depth + parameters) + 9 * rows,
        flops=2 * rows * units * depth,
        unit="bfloat16" if itemsize == 2 else "float32",
    )


def attention(batch: int, heads: int, tokens: int, depth: int, itemsize: int) -> Work:
    """``bytes = 4 itemsize batch heads tokens depth``; ``flops = 4 batch heads tokens^2 depth``.

    Queries, keys and values are read and the result written; two products of ``tokens x tokens``.
    """
    elements = batch * heads * tokens * depth
    return Work(
        bytes=4 * itemsize * elements,
        flops=4 * elements * tokens,
        unit="bfloat16" if itemsize == 2 else "float32",
    )


def rope(batch: int, heads: int, tokens: int, patches: int, depth: int, itemsize: int) -> Work:
    """``bytes = 4 itemsize batch heads tokens depth + 8 patches depth``, queries and keys alike.

    Both are read and written; the tables (float32) are the same for all samples. ``flops`` is 3
    per rotated element: two products and a sum.
    """
    return Work(
        bytes=4 * itemsize * batch * heads * tokens * depth + 8 * patches * depth,
        flops=6 * batch * heads * patches * depth,
    )


def preprocess(
    count: int, source: tuple[int, int], target: tuple[int, int], itemsize: int, *, taps: float
) -> Work:
    """``bytes = 3 count (h w + itemsize H W)`` for images of h x w bytes resized to H x W.

    Args:
        count: number of images.
        source: height and width before.
        target: height and width after.
        itemsize: bytes of an output element.
        taps: width of the filter in source pixels per unit of scale: 4 for bicubic.

    A pixel of the first pass (h x W) takes ``taps w / W`` products and sums, one of the second
    ``taps h / H``; the normalisation is one more product and sum.
    """
    (h, w), (height, width) = source, target
    first, second = 2 * h * width * taps * w / width, 2 * height * width * (taps * h / height + 1)
    return Work(
        bytes=3 * count * (h * w + itemsize * height * width),
        flops=round(3 * count * (first + second)),
    )


def quantize(rows: int, cols: int, itemsize: int) -> Work:
    """Per row: ``bytes = rows cols (itemsize + 1) + 4 rows``; ``flops = 5 rows cols``.

    Absolute value and maximum (2), division by the scale (1), clamping (1), rounding (1).
    """
    return Work(bytes=rows * cols * (itemsize + 1) + 4 * rows, flops=5 * rows * cols)


def dequantize(rows: int, cols: int, itemsize: int) -> Work:
    """Per row: ``bytes = rows cols (1 + itemsize) + 4 rows``; ``flops = rows cols``."""
    return Work(bytes=rows * cols * (1 + itemsize) + 4 * rows, flops=rows * cols)


def quantize_blocks(rows: int, cols: int, itemsize: int, *, block: int, bits: int) -> Work:
    """``bytes = rows cols (itemsize + bits / 8 + 1 / block)``; ``flops = 5 rows cols``.

    A code of ``bits`` per element and a scale of one byte per ``block``; operations as
    :func:`quantize`. The same bytes, the other way round, for dequantising.
    """
    elements = rows * cols
    return Work(
        bytes=elements * itemsize + elements * bits // 8 + elements // block, flops=5 * elements
    )


def linear(rows: int, depth: int, units: int, *, unit: str, itemsize: int = 2) -> Work:
    """``flops = 2 rows depth units``; bytes of codes (1 each), scales, bias and result.

    ``bytes = depth (rows + units) + 4 (rows + units) + 4 units + itemsize rows units``.
    """
    return Work(
        bytes=(depth + 4) * (rows + units) + 4 * units + itemsize * rows * units,
        flops=2 * rows * depth * units,
        unit=unit,
    )


def ensemble_vote(n: int, models: int, itemsize: int) -> Work:
    """``bytes = n (models itemsize + 4) + 4 models``; ``flops = n (7 models + 1)``.

    Per model: four comparisons, a product and two sums; a division at the end.
    """
    return Work(bytes=n * (models * itemsize + 4) + 4 * models, flops=n * (7 * models + 1))
