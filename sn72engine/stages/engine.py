"""A built engine as a stage."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sn72engine.errors import OptionError
from sn72engine.preprocessing import required_size
from sn72engine.session import Session
from sn72engine.stages.base import Image, StageScores
from sn72engine.stages.scoring import Score, to_scores


class EngineStage:
    """Preprocesses images as the engine's manifest says, runs it, and reads its output.

    Args:
        session: an open engine that takes images and has one output.
        score: how the output becomes a probability, see
            :class:`~sn72engine.cascade.spec.StageSpec`.
        positive: index of the positive class for ``softmax``.

    Raises:
        OptionError: the engine does not take images, or has several outputs.
    """

    def __init__(self, session: Session, score: Score, *, positive: int = 1) -> None:
        manifest = session.manifest
        if session.preprocess is None or len(session.inputs) != 1:
            raise OptionError(
                f"engine {session.engine.folder} does not take images: a stage needs one input and "
                f"recorded preprocessing, it has {len(session.inputs)} inputs and "
                f"{'' if session.preprocess else 'no '}preprocessing; export the model with "
                "preprocess=..."
            )
        if len(session.outputs) != 1:
            names = ", ".join(output.name for output in manifest.outputs)
            raise OptionError(
                f"engine {session.engine.folder} has outputs {names}; a stage needs exactly one: "
                "export the model without the others"
            )
        self._session = session
        self._score: Score = score
        self._positive = positive
        self.needs = required_size(session.preprocess)

    @property
    def target(self) -> str:
        """What the engine was built for: ``cpu``, ``sm_89``."""
        return self._session.manifest.target

    def prepare(self) -> None:
        """Run one black image, so that the first real one does not pay for warming up.

        Raises:
            SessionError: the engine cannot run.
            InputError: its output does not fit ``score``.
        """
        self.score([np.zeros((8, 8, 3), np.uint8)])

    def score(self, images: Sequence[Image]) -> StageScores:
        """Run the images, in chunks of the engine's largest batch."""
        outputs = self._session.infer_images(images)
        return to_scores(outputs, self._score, positive=self._positive)

    def close(self) -> None:
        """Close the session."""
        self._session.close()
