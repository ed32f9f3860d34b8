"""A built engine as a stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from sn72engine.errors import CudaUnavailableError, OptionError
from sn72engine.preprocessing import required_size
from sn72engine.session import Session
from sn72engine.stages.base import Image, StageScores
from sn72engine.stages.scoring import Score, to_scores
from sn72engine.stages.tensor_offer import Bind, TensorOffer

if TYPE_CHECKING:
    import torch


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

    def offer_capture(self, device: int) -> TensorOffer:
        """The engine's work on that GPU, in a session of its own for each lane.

        Raises:
            CudaUnavailableError: the engine does not run there, or cannot be captured.
        """
        session = self._session
        preprocess, index = session.preprocess, session.options.device_index
        assert preprocess is not None  # checked when the stage was made
        if self.target == "cpu" or index != device:
            where = "the CPU" if self.target == "cpu" else f"cuda:{index}"
            raise CudaUnavailableError(f"its engine runs on {where}, not on cuda:{device}")
        if not session.bindable:
            raise CudaUnavailableError(f"engines of {session.manifest.backend} cannot be captured")
        return TensorOffer(
            _binder(session),
            preprocess,
            self._score,
            positive=self._positive,
            device=f"cuda:{device}",
            limits=(session.manifest.batch.min, session.manifest.batch.max),
        )

    def close(self) -> None:
        """Close the session."""
        self._session.close()


def _binder(session: Session) -> Bind:
    """Binds an engine in a clone of its session for each lane, which lives as what it has bound."""
    # Bindings of one session share scratch memory; those of two lanes must not.
    lanes: dict[int, Session] = {}

    def bind(rows: torch.Tensor, lane: int) -> Callable[[], torch.Tensor]:
        if lane not in lanes:
            lanes[lane] = session.clone()
        own = lanes[lane]
        bound = own.bind({own.inputs[0].name: rows})

        def call() -> torch.Tensor:
            bound()
            output: torch.Tensor = bound.outputs[own.outputs[0].name]
            return output

        return call

    return bind
