"""What a stage offers, so that its work can be captured in a CUDA graph.

A graph replays fixed work on fixed addresses. So a stage is captured once for each number of rows
that it is to be run with, each time on an input buffer that stays where it is, and what it reads
and writes afterwards is what it read and wrote while it was captured.

A stage that can be captured has a method ``offer_capture``, see :class:`Offers`. The OCR and VLM
stages have none; they run on the host, after the captured stages.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from sn72engine.cuda.layout import Score
from sn72engine.stages.base import Image


@dataclass(frozen=True, slots=True)
class Rows:
    """One row of a stage's input, as it is uploaded.

    Attributes:
        shape, dtype: of the row, as a NumPy array.
        key: what the row is made of an image by. Stages with equal ``Rows`` share one upload.
    """

    shape: tuple[int, ...]
    dtype: str
    key: Hashable

    @property
    def bytes(self) -> int:
        """Size of one row."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True, slots=True)
class Output:
    """Where a captured stage leaves its scores.

    Attributes:
        address: of the score of row 0, on the device.
        kind: element type of the scores.
        stride: elements from one row's score to the next one's.
        from_logits: they are logits of the positive class; else probabilities.
        label: address of int64 class indices, one per row; None for a stage that has none.
    """

    address: int
    kind: Score
    stride: int = 1
    from_logits: bool = False
    label: int | None = None


class Bound(Protocol):
    """A stage bound to an input buffer and a number of rows."""

    def __call__(self) -> None:
        """Enqueue the work on the current stream; always the same work on the same addresses.

        It must not wait for the device, write to its input, or let one row's score depend on
        another row: padding rows hold anything.
        """
        ...

    @property
    def output(self) -> Output:
        """Where the last call leaves its scores; fixed once it has been captured."""
        ...


class Buffer(Protocol):
    """Device memory of a number of rows, contiguous, held as long as this object."""

    @property
    def address(self) -> int:
        """Of row 0; aligned to 16 bytes."""
        ...


class Capturable(Protocol):
    """A stage's work on one GPU."""

    @property
    def rows(self) -> Rows:
        """What one row of its input is."""
        ...

    @property
    def limits(self) -> tuple[int, int]:
        """Fewest and most rows that it can be bound with."""
        ...

    def load(self, image: Image, out: NDArray[Any]) -> None:
        """Make the row of an image, on the host; ``out`` has the shape and dtype of :attr:`rows`.

        Raises:
            ImageError: the image cannot be used.
        """
        ...

    def allocate(self, rows: int) -> Buffer:
        """An input buffer."""
        ...

    def bind(self, buffer: Buffer, rows: int, lane: int) -> Bound:
        """Bind to the first rows of a buffer that any stage with equal ``rows`` has allocated.

        Bindings of different lanes run at the same time, so they share nothing that is written.
        Those of one offer for one lane never do, and may share scratch memory.

        Raises:
            Sn72Error: this number of rows cannot be run.
        """
        ...


@runtime_checkable
class Offers(Protocol):
    """A stage that may be captured."""

    def offer_capture(self, device: int) -> Capturable:
        """Its work on the GPU of that number.

        Raises:
            CudaUnavailableError: it cannot be captured there; the message says why.
        """
        ...
