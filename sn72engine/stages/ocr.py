"""Keyword reading: does a sign in the image say that there is roadwork?

Made for ``combine: positive_only``. On road photographs keyword reading is precise and finds few:
a sign that can be read settles the matter, and no sign says nothing.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sn72engine import _deps
from sn72engine.errors import OptionError
from sn72engine.spec import Options, check_int, check_number
from sn72engine.stages.base import Image, StageScores


@dataclass(frozen=True, slots=True)
class OcrOptions(Options):
    """What to look for in an image.

    Args:
        keywords: any of these in the text makes the image positive. Case, accents, spaces and
            punctuation do not count, so ``road work`` also finds ``ROADWORK`` and ``Road-Work``;
            between words the text may go on in the next line, as it does on signs. A keyword also
            matches inside a longer word.
        min_confidence: lines that the reader is less sure of than this are ignored.
        min_size: smallest decoded height and width in pixels; small print needs more. None reads
            the full image, which makes every image of the cascade be decoded at full size.
    """

    keywords: tuple[str, ...]
    min_confidence: float = 0.6
    min_size: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.keywords, tuple) or not self.keywords:
            raise OptionError(f"keywords={self.keywords!r} must be a list of at least one keyword")
        for keyword in self.keywords:
            if not isinstance(keyword, str) or len(squeeze(keyword)) < 3:
                raise OptionError(
                    f"keywords: {keyword!r} must have at least 3 letters or digits; shorter ones "
                    "match inside ordinary words"
                )
        check_number("min_confidence", self.min_confidence, 0.0, 1.0)
        if self.min_size is not None:
            check_int("min_size", self.min_size, 32)


class OcrStage:
    """Reads text with RapidOCR (PP-OCR on ONNX Runtime, on the CPU).

    The probability of an image is the reader's confidence in the keyword it is surest of, and 0
    when there is none.
    """

    def __init__(self, options: OcrOptions) -> None:
        self.options = options
        self.needs = None if options.min_size is None else (options.min_size, options.min_size)
        self._patterns = tuple(keyword_pattern(keyword) for keyword in options.keywords)
        self._reader: Any = None

    def prepare(self) -> None:
        """Load the reader's models.

        Raises:
            MissingDependencyError: RapidOCR is absent or too old.
        """
        if self._reader is None:
            rapidocr = _deps.require("rapidocr", purpose="read signs in images")
            self._reader = rapidocr.RapidOCR(params={"Global.log_level": "critical"})

    def score(self, images: Sequence[Image]) -> StageScores:
        """Read each image by itself; the reader takes one at a time."""
        self.prepare()
        found = [self._score_one(image) for image in images]
        return StageScores(np.array(found, np.float32))

    def close(self) -> None:
        """Drop the reader's models."""
        self._reader = None

    def _score_one(self, image: Image) -> float:
        # The reader takes an array as OpenCV has it: blue first.
        answer = self._reader(np.ascontiguousarray(image[:, :, ::-1]))
        if answer.txts is None:
            return 0.0
        return keyword_confidence(
            zip(answer.txts, answer.scores, strict=True),
            self._patterns,
            self.options.min_confidence,
        )


def keyword_pattern(keyword: str) -> re.Pattern[str]:
    """What a keyword looks like in squeezed lines that are joined by line breaks."""
    words = [re.escape(word) for word in map(squeeze, keyword.split()) if word]
    return re.compile("\\n?".join(words))


def keyword_confidence(
    lines: Iterable[tuple[str, float]], patterns: Sequence[re.Pattern[str]], min_confidence: float
) -> float:
    """Confidence in the keyword that is read most surely; 0 when none is read.

    A keyword that goes over several lines is read as surely as the least sure of them.

    Args:
        lines: text and confidence in [0, 1] of each line, in reading order.
        patterns: see :func:`keyword_pattern`.
        min_confidence: lines below it are left out.
    """
    kept = [(squeeze(text), min(float(c), 1.0)) for text, c in lines if c >= min_confidence]
    text = "\n".join(line for line, _ in kept)
    best = 0.0
    for pattern in patterns:
        for match in pattern.finditer(text):
            first, last = (text.count("\n", 0, end) for end in match.span())
            best = max(best, min(c for _, c in kept[first : last + 1]))
    return best


def squeeze(text: str) -> str:
    """Letters and digits of ``text``, without case and accents."""
    folded = unicodedata.normalize("NFKD", text.casefold())
    return "".join(c for c in folded if c.isalnum())
