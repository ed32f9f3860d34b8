"""A detector in the shape that StreetVision miners load: one picture in, one number out."""

from __future__ import annotations

import dataclasses
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING

from sn72engine.batching import BatchingOptions, MicroBatcher
from sn72engine.cascade.cascade import Cascade
from sn72engine.cascade.opening import Given
from sn72engine.cascade.report import CascadeReport
from sn72engine.cascade.result import Result
from sn72engine.cascade.spec import ALWAYS, CascadeSpec
from sn72engine.closing import Closing
from sn72engine.errors import OptionError
from sn72engine.events import Observe
from sn72engine.spec import RuntimeOptions, check_choice
from sn72engine.stages.engine import EngineStage

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger("sn72engine.miner")

#: Seconds for one picture, where the cascade says nothing: validators wait for 9.
DEFAULT_DEADLINE = 8.0

#: Answer where nothing is known; it rounds to "no roadwork".
UNKNOWN = 0.5


class RoadworkDetector(Closing):
    """Is there roadwork in a picture? Built once, then called per picture.

    Construction raises when anything is wrong, so that a miner does not start half broken. After
    that nothing raises: a call that fails is logged and answered with the best that is known,
    0.5 at worst, because a client takes an exception, None or NaN for a wrong answer or worse.
    A call ends within the deadline whatever a stage does.

    Args:
        config_name: path of a YAML cascade specification; without a suffix ``.yaml`` is added
            where that file exists.
        device: ``cpu`` or ``cuda``: what every engine in the cascade must have been built for.
        stages: objects for stages that the file only names, see
            :class:`~sn72engine.cascade.cascade.Cascade`.
        runtime: how engines are run.
        batching: gather the pictures of concurrent calls into batches. A picture that finds the
            queue full is answered 0.5. None runs each call by itself.
        observe: is told of calls and batches, see :mod:`sn72engine.events`.

    Raises:
        OptionError: the specification is wrong, its labels are class indices, or an engine was
            built for another device.
        Sn72Error: a stage cannot be loaded.
    """

    def __init__(
        self,
        config_name: str | Path,
        device: str = "cpu",
        *,
        stages: Given | None = None,
        runtime: RuntimeOptions | None = None,
        batching: BatchingOptions | None = None,
        observe: Observe | None = None,
    ) -> None:
        check_choice("device", device, ("cpu", "cuda"))
        spec = CascadeSpec.from_yaml(_find(config_name))
        if spec.top1:
            raise OptionError(
                f"{config_name}: stages score by 'top1', so labels are class indices; a roadwork "
                "detector needs probabilities of roadwork: use 'sigmoid' or 'softmax'"
            )
        if spec.deadline is None:
            spec = dataclasses.replace(spec, deadline=DEFAULT_DEADLINE)
        self._cascade = Cascade(spec, stages, runtime=runtime, observe=observe)
        try:
            _check_device(self._cascade, device)
        except OptionError:
            self._cascade.close()
            raise
        for stage in spec.stages:
            if stage.when != ALWAYS:
                log.warning(
                    "stage %s waits for %r, which a detector never flags: it will not run; drop "
                    "'when' from it, or the stage",
                    stage.name,
                    stage.when,
                )
        self._batcher = (
            None if batching is None else MicroBatcher(self._cascade, batching, observe=observe)
        )

    def __call__(self, image: Image.Image) -> float:
        """Probability of roadwork.

        Args:
            image: of any size and mode that :func:`sn72engine.decode.decode` takes.

        Returns:
            A finite number in [0, 1]. It is above 0.5 exactly where the cascade's label is 1,
            also with another decision threshold, because clients round it.
        """
        try:
            if self._batcher is not None:
                return self._answer(self._batcher(image))
            return self._answer(self._cascade([image])[0])
        except Exception:
            log.exception("the cascade failed; answering %s", UNKNOWN)
            return UNKNOWN

    async def predict(self, image: Image.Image) -> float:
        """As a call, for ``await``: the event loop stays free, so requests overlap."""
        try:
            if self._batcher is not None:
                return self._answer(await self._batcher.predict(image))
            return self._answer((await self._cascade.run_async([image]))[0])
        except Exception:
            log.exception("the cascade failed; answering %s", UNKNOWN)
            return UNKNOWN

    def report(self) -> CascadeReport:
        """What the stages have done since start."""
        return self._cascade.report()

    def close(self) -> None:
        """Release the engines. Later calls answer 0.5."""
        if self._batcher is not None:
            self._batcher.close(patience=self._cascade.spec.deadline)
        self._cascade.close()

    def _answer(self, result: Result) -> float:
        return rounding_to_label(
            result.probability, result.label, self._cascade.spec.decision_threshold
        )


def rounding_to_label(probability: float, label: int, threshold: float) -> float:
    """Move ``threshold`` to 0.5, so that rounding the number gives the label.

    Linear from [0, threshold] to [0, 0.5] and from [threshold, 1] to [0.5, 1]; the identity for a
    threshold of 0.5. A label on the other side of the threshold, which stage thresholds beyond
    it can give, moves the number to its own side of 0.5.

    Args:
        probability: in [0, 1].
        label: 0 or 1.
        threshold: in [0, 1].

    Returns:
        A number in [0, 0.5] for label 0, in (0.5, 1] for label 1.
    """
    if probability <= threshold:
        moved = 0.5 * probability / threshold if threshold > 0 else 0.5
    else:
        moved = 0.5 + 0.5 * (probability - threshold) / (1 - threshold)
    return max(moved, math.nextafter(0.5, 1.0)) if label == 1 else min(moved, 0.5)


def _find(config_name: str | Path) -> Path:
    path = Path(config_name).expanduser()
    with_suffix = path.with_name(f"{path.name}.yaml")
    if not path.exists() and with_suffix.exists():
        return with_suffix
    return path


def _check_device(cascade: Cascade, device: str) -> None:
    for spec, stage in zip(cascade.spec.stages, cascade.stages, strict=True):
        target = stage.target if isinstance(stage, EngineStage) else device
        if target.startswith("cpu") != (device == "cpu"):
            raise OptionError(
                f"stage {spec.name!r}: {spec.engine} was built for {target}, but "
                f"device={device!r} was asked for; build it for that device or change one of them"
            )
