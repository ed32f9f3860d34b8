"""Random choices that stay the same on every platform and with every library version."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


class Dice:
    """Choices drawn from ``random.Random.random`` alone.

    Python promises that stream for a given seed; it does not promise the streams of ``choice``,
    ``shuffle`` and the like, nor does NumPy those of ``Generator``.

    Args:
        keys: what identifies the stream; equal keys give equal draws.
    """

    def __init__(self, *keys: object) -> None:
        self._random = random.Random("/".join(map(str, keys))).random

    def uniform(self, low: float, high: float) -> float:
        """A number in [low, high)."""
        return low + (high - low) * self._random()

    def chance(self, probability: float) -> bool:
        """True with the given probability."""
        return self._random() < probability

    def count(self, low: int, high: int) -> int:
        """An integer in [low, high], both included."""
        return low + int(self._random() * (high - low + 1))

    def pick(self, items: Sequence[T]) -> T:
        """One of ``items``."""
        return items[int(self._random() * len(items))]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """``items`` in random order (Fisher-Yates)."""
        result = list(items)
        for last in range(len(result) - 1, 0, -1):
            other = self.count(0, last)
            result[last], result[other] = result[other], result[last]
        return result

    def noise(self, shape: tuple[int, ...]) -> np.ndarray:
        """Zero-mean noise of unit standard deviation, triangular density, float32.

        From the raw 64-bit output of PCG64, whose stream NumPy promises, with only exactly
        rounded arithmetic after it.
        """
        count = int(np.prod(shape))
        generator = np.random.PCG64(int(self._random() * 2**53))
        words = generator.random_raw(-(-count // 4)).astype("<u8")
        pairs = words.view(np.uint8)[: 2 * count].reshape(2, count).astype(np.float32)
        # The sum of two bytes has mean 255 and variance 2 * (256**2 - 1) / 12.
        scaled: np.ndarray = ((pairs[0] + pairs[1]) - np.float32(255)) / np.float32(104.511)
        return scaled.reshape(shape)
