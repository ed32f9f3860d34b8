"""Takes the mean error of rounded weights out of a layer's bias.

A rounded weight ``W + E`` shifts a layer's output by ``E x``, on average by ``E mean(x)``. That
mean is not 0 where inputs have one, which they have behind every ReLU and most normalisations, and
it does not average out over pixels or tokens. Calibration knows ``mean(x)``, so the bias can hold
``-E mean(x)``, at no cost when the layer runs (Nagel, van Baalen, Blankevoort, Welling 2019,
"Data-Free Quantization through Weight Equalization and Bias Correction", section 4.2; with the
means measured instead of derived).
"""

from __future__ import annotations

import numpy as np


def shift(error: np.ndarray, mean: np.ndarray, axis: int) -> np.ndarray:
    """Mean shift of each output channel.

    Args:
        error: rounded minus exact weight; of a matrix product, (inputs, outputs) or the other way
            round; of a convolution, (outputs, inputs per group, *kernel).
        mean: float (inputs,), over all groups: the mean of each input channel over samples and
            positions. At the border of a padded image it is taken to go on.
        axis: of ``error`` that counts output channels.

    Returns:
        float64 (outputs,).
    """
    rows = np.moveaxis(error, axis, 0)
    rows = rows.reshape(*rows.shape[:2], -1).sum(2, dtype=np.float64)
    outputs, inputs = rows.shape
    groups = mean.size // inputs
    split = rows.reshape(groups, outputs // groups, inputs)
    found: np.ndarray = np.einsum("goi,gi->go", split, mean.reshape(groups, inputs))
    return found.reshape(outputs)
