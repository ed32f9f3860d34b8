"""What a cascade is made of: frozen, checked when made, read from YAML or built in Python.

A complete file::

    deadline: 8.0            # seconds; optional
    stages:
      - name: small
        engine: engines/small    # folder of a built engine, relative to this file
        score: sigmoid
        low: 0.15
        high: 0.85
      - name: large
        engine: engines/large
        score: softmax
        positive: 1
      - name: signs
        ocr: {keywords: [road work, men at work]}
        combine: positive_only
        when: text_visible

Stages that follow one another with the same ``group`` form a parallel group: they are asked at the
same time, their scores are combined, and the sample is routed once::

      - {name: left, engine: engines/left, score: sigmoid, group: second, low: 0.2, high: 0.8}
      - {name: right, engine: engines/right, score: sigmoid, group: second, combine: weighted}
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from sn72engine import _deps
from sn72engine.errors import OptionError
from sn72engine.spec import Options, check_choice, check_int, check_number
from sn72engine.stages.ocr import OcrOptions
from sn72engine.stages.scoring import Score
from sn72engine.stages.vlm import VlmOptions

Combine = Literal["replace", "weighted", "positive_only"]

ALWAYS = "always"
_LOW, _HIGH = 0.15, 0.85
VIDEO_TRIGGER = "is_video"


@dataclass(frozen=True, slots=True)
class StageSpec(Options):
    """One stage: what scores a sample, how the score counts, and when a sample may leave.

    Args:
        name: unique in its cascade; a stage with none of ``engine``, ``ocr`` and ``vlm`` is the
            Python object given to the cascade under this name.
        engine: folder of a built engine.
        ocr: read text and look for keywords.
        vlm: ask a vision-language model behind an OpenAI-compatible server.
        score: how outputs become a probability. ``sigmoid``: one logit. ``softmax``: logits of
            at least two classes, of which ``positive`` counts. ``probability``: it already is
            one. ``top1``: logits of many classes; the probability is the confidence in the best
            class and the label its index. Required with ``engine``; anything else gives
            probabilities itself, so only ``probability`` (the default there) and ``top1`` apply.
        positive: index of the positive class for ``softmax``.
        low: below it a sample leaves as negative. None means 0.15, and 0 for a stage with no
            negative exit (``top1``, ``positive_only``), where nothing else is accepted.
        high: above it a sample leaves as positive.
        combine: ``replace``: the score replaces what earlier stages said. ``weighted``: it joins
            them in a weighted mean. ``positive_only``: it counts only where it is higher than
            what earlier stages said; its absence proves nothing.
        weight: share in the weighted mean; only the ratio to the other weights matters.
        when: ``always``, or the name of a trigger: the stage then sees only samples that the
            caller flags with it.
        group: name of the parallel group that the stage belongs to; None for a stage by itself.
            The thresholds of the first stage of a group are the group's.
    """

    name: str
    engine: str | None = None
    ocr: OcrOptions | None = None
    vlm: VlmOptions | None = None
    score: Score | None = None
    positive: int = 1
    low: float | None = None
    high: float = _HIGH
    combine: Combine = "replace"
    weight: float = 1.0
    when: str = ALWAYS
    group: str | None = None

    def __post_init__(self) -> None:
        check_identifier("name", self.name)
        self._check_source()
        check_int("positive", self.positive, 0)
        check_choice("combine", self.combine, Combine)
        check_number("weight", self.weight)
        if self.weight <= 0:
            raise OptionError(f"weight={self.weight!r} must be greater than 0")
        check_identifier("when", self.when)
        if self.group is not None:
            check_identifier("group", self.group)
        self._check_thresholds()

    @property
    def top1(self) -> bool:
        """Whether the label is a class index."""
        return self.score == "top1"

    @property
    def negative_exit(self) -> bool:
        """Whether a sample can leave this stage as negative."""
        return not self.top1 and self.combine != "positive_only"

    @property
    def thresholds(self) -> tuple[float, float]:
        """``(low, high)`` with the default of ``low`` filled in."""
        if self.low is not None:
            return self.low, self.high
        return (_LOW if self.negative_exit else 0.0), self.high

    def _check_source(self) -> None:
        given = [key for key in ("engine", "ocr", "vlm") if getattr(self, key) is not None]
        if len(given) > 1:
            raise OptionError(f"{given[0]}= and {given[1]}= exclude each other; give one")
        if self.engine is not None and (not isinstance(self.engine, str) or not self.engine):
            raise OptionError(f"engine={self.engine!r} must be the path of an engine folder")
        for key, kind in (("ocr", OcrOptions), ("vlm", VlmOptions)):
            value = getattr(self, key)
            if value is not None and not isinstance(value, kind):
                raise OptionError(f"{key}={value!r} must be a mapping of its options")
        if self.score is not None:
            check_choice("score", self.score, Score)
        if self.engine is not None and self.score is None:
            raise OptionError(
                "score=None must say how the engine's outputs become a probability: "
                "sigmoid, softmax, probability or top1"
            )
        allowed = {"engine": None, "ocr": (None, "probability"), "vlm": (None, "probability")}
        accepted = allowed[given[0]] if given else (None, "probability", "top1")
        if accepted is not None and self.score not in accepted:
            raise OptionError(
                f"score={self.score!r} applies to an engine; this stage gives probabilities itself"
            )

    def _check_thresholds(self) -> None:
        low, high = self.thresholds
        check_number("low", low, 0.0, 1.0)
        check_number("high", high, 0.0, 1.0)
        if not self.negative_exit and low != 0:
            reason = "score='top1'" if self.top1 else "combine='positive_only'"
            raise OptionError(f"low={low!r} must be 0 with {reason}: it has no negative exit")
        if low > high:
            raise OptionError(f"low={low!r} must not exceed high={high!r}")

    @classmethod
    def _nested(cls) -> Mapping[str, type[Options]]:
        return {"ocr": OcrOptions, "vlm": VlmOptions}


def parallel_groups(stages: Sequence[StageSpec]) -> tuple[tuple[int, ...], ...]:
    """Numbers of the stages that run at the same time, in order; one number for most."""
    groups: list[tuple[int, ...]] = []
    for number, stage in enumerate(stages):
        if stage.group is not None and number and stages[number - 1].group == stage.group:
            groups[-1] += (number,)
        else:
            groups.append((number,))
    return tuple(groups)


@dataclass(frozen=True, slots=True)
class Preset:
    """A starting point for thresholds; thresholds that count come from labelled data."""

    low: float
    high: float
    first_stage_only: bool = False
    video: bool = False


PRESETS: dict[str, Preset] = {
    "speed": Preset(0.10, 0.90, first_stage_only=True),
    "accuracy": Preset(0.20, 0.80),
    "video": Preset(0.15, 0.85, video=True),
}


# No slots: from_dict needs super(), which a slotted dataclass breaks by replacing the class.
@dataclass(frozen=True)
class CascadeSpec(Options):
    """The stages of a cascade, in order, and what holds for all of them.

    Args:
        stages: at least one. Either all score by ``top1`` or none, because labels are class
            indices in one case and 0 or 1 in the other.
        decision_threshold: a sample that no stage is sure of is labelled 1 above it, else 0.
        deadline: seconds a call may take unless it says otherwise; None for no limit.
        max_batch: most samples handed to a stage at once; larger batches are cut up.
    """

    stages: tuple[StageSpec, ...]
    decision_threshold: float = 0.5
    deadline: float | None = None
    max_batch: int = 32

    def __post_init__(self) -> None:
        if not isinstance(self.stages, tuple) or not self.stages:
            raise OptionError(f"stages={self.stages!r} must hold at least one stage")
        for index, stage in enumerate(self.stages):
            if not isinstance(stage, StageSpec):
                raise OptionError(f"stages[{index}]={stage!r} must be a StageSpec")
        names = [stage.name for stage in self.stages]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise OptionError(f"stages[{index}].name={name!r} is used twice")
        if self.stages[0].combine == "positive_only":
            raise OptionError(
                "stages[0].combine='positive_only' has nothing to raise; put another stage first"
            )
        self._check_top1()
        self._check_groups()
        check_number("decision_threshold", self.decision_threshold, 0.0, 1.0)
        if self.deadline is not None:
            check_number("deadline", self.deadline)
            if self.deadline <= 0:
                raise OptionError(f"deadline={self.deadline!r} must be greater than 0 seconds")
        check_int("max_batch", self.max_batch, 1)

    @property
    def top1(self) -> bool:
        """Whether labels are class indices."""
        return self.stages[0].top1

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Numbers of the stages that run at the same time, see :func:`parallel_groups`."""
        return parallel_groups(self.stages)

    @property
    def triggers(self) -> tuple[str, ...]:
        """Names of the triggers that stages wait for, each once, in order."""
        return tuple(dict.fromkeys(s.when for s in self.stages if s.when != ALWAYS))

    def with_preset(self, name: str) -> Self:
        """This cascade with the thresholds and stages of a preset.

        ``speed`` keeps the first stage alone with 0.10/0.90; ``accuracy`` keeps all with
        0.20/0.80; ``video`` keeps all with 0.15/0.85 and takes every sample for a video frame:
        stages that wait for ``is_video`` always run.

        Raises:
            OptionError: no such preset.
        """
        check_choice("preset", name, tuple(PRESETS))
        preset = PRESETS[name]
        stages = self.stages[:1] if preset.first_stage_only else self.stages
        if preset.video:
            stages = tuple(
                dataclasses.replace(stage, when=ALWAYS) if stage.when == VIDEO_TRIGGER else stage
                for stage in stages
            )
        changed = list(stages)
        for first, *_ in parallel_groups(stages):
            low = preset.low if stages[first].negative_exit else 0.0
            changed[first] = dataclasses.replace(stages[first], low=low, high=preset.high)
        return dataclasses.replace(self, stages=tuple(changed))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, where: str = "cascade") -> Self:
        """Build from a mapping, as read from YAML or JSON.

        Args:
            values: the fields of this class, ``stages`` a list of mappings; optionally
                ``preset``, see :meth:`with_preset`, beside which no stage may set thresholds.
            where: what to call this mapping in messages.

        Raises:
            OptionError: unknown or missing key, or a value out of range. The message names the
                key in full, such as ``cascade.stages[1].low=1.5``.
        """
        if not isinstance(values, Mapping):
            raise OptionError(f"{where}: expected a mapping, got {type(values).__name__}")
        fields = dict(values)
        preset = fields.pop("preset", None)
        stages = fields.get("stages")
        if isinstance(stages, (list, tuple)):
            fields["stages"] = tuple(
                _stage_from_dict(stage, f"{where}.stages[{i}]", preset)
                for i, stage in enumerate(stages)
            )
        try:
            spec = super().from_dict(fields, where=where)
        except OptionError as error:
            raise _dotted(where, str(error)) from None
        if preset is None:
            return spec
        try:
            return spec.with_preset(preset)
        except OptionError as error:
            raise _dotted(where, f"{where}: {error}") from None

    @classmethod
    def from_yaml(cls, source: str | Path) -> Self:
        """Read a YAML file, or YAML text.

        Args:
            source: path of a file; a str with a line break is taken for the YAML itself.
                Engine folders are relative to the file's folder, or to the current one for text;
                what is returned holds them in full, wherever the process goes.

        Raises:
            OptionError: the file cannot be read, is not YAML, or does not describe a cascade.
        """
        yaml = _deps.require("yaml", purpose="read a cascade specification")
        text, folder, where = _read(source)
        try:
            values = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise OptionError(f"{where}: not valid YAML: {error}") from error
        spec = cls.from_dict(values, where=where)
        stages = tuple(
            stage
            if stage.engine is None
            else dataclasses.replace(stage, engine=str(folder / Path(stage.engine).expanduser()))
            for stage in spec.stages
        )
        return dataclasses.replace(spec, stages=stages)

    def to_yaml(self, folder: str | Path = ".") -> str:
        """This cascade as YAML text; keys that hold their default are left out.

        Args:
            folder: where the file will lie. Engine folders below its parent are written
                relative to it, so that file and engines can be moved together; others are
                written in full.
        """
        yaml = _deps.require("yaml", purpose="write a cascade specification")
        values = _changed(self)
        values["stages"] = [_changed(stage) for stage in self.stages]
        for stage in values["stages"]:
            if "engine" in stage:
                stage["engine"] = _relative(Path(stage["engine"]), Path(folder))
        text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        return text

    def _check_top1(self) -> None:
        for index, stage in enumerate(self.stages):
            if stage.top1 != self.top1:
                raise OptionError(
                    f"stages[{index}].score={stage.score!r} cannot follow "
                    f"stages[0].score={self.stages[0].score!r}: either every stage scores by "
                    "'top1' or none does"
                )
            if stage.top1 and stage.combine != "replace":
                raise OptionError(
                    f"stages[{index}].combine={stage.combine!r} must be 'replace' with "
                    "score='top1': confidences in different classes cannot be mixed"
                )

    def _check_groups(self) -> None:
        groups = self.groups
        names = [self.stages[group[0]].group for group in groups]
        for number, (name, (first, *others)) in enumerate(zip(names, groups, strict=True)):
            if name is not None and name in names[:number]:
                raise OptionError(
                    f"stages[{first}].group={name!r} is used before and not by the stage before "
                    "it; the stages of a parallel group must follow one another"
                )
            for other in others:
                self._check_beside(first, other)

    def _check_beside(self, first: int, other: int) -> None:
        stage = self.stages[other]
        if stage.combine == "replace":
            raise OptionError(
                f"stages[{other}].combine='replace' would discard what stages[{first}] says, which "
                f"runs beside it in group {stage.group!r}; use 'weighted' or 'positive_only'"
            )
        if stage.low is not None or stage.high != _HIGH:
            raise OptionError(
                f"stages[{other}].low={stage.low!r}, high={stage.high!r}: group {stage.group!r} "
                f"is routed once, by the thresholds of stages[{first}]; set them there"
            )
        if self.stages[first].combine == "positive_only" != stage.combine:
            raise OptionError(
                f"stages[{first}].combine='positive_only' has no negative exit, and its thresholds "
                f"are those of group {stage.group!r}; put stages[{other}] before it"
            )


def check_identifier(name: str, value: object) -> None:
    """Refuse anything but a short name of letters, digits, ``_``, ``-`` and ``.``."""
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", value):
        raise OptionError(f"{name}={value!r} must be 1 to 64 letters, digits, '_', '-' or '.'")


def _stage_from_dict(values: Any, where: str, preset: str | None) -> StageSpec:
    if preset is not None and isinstance(values, Mapping):
        for key in ("low", "high"):
            if key in values:
                raise OptionError(
                    f"{where}.{key}={values[key]!r} cannot stand beside preset={preset!r}, which "
                    "sets it; drop one of them"
                )
    try:
        return StageSpec.from_dict(values, where=where)
    except OptionError as error:
        raise _dotted(where, str(error)) from None


def _dotted(where: str, message: str) -> OptionError:
    """``where: key=value ...`` as ``where.key=value ...``; other messages as they are."""
    return OptionError(re.sub(rf"^{re.escape(where)}: (?=[\w.\[\]]+=)", f"{where}.", message))


def _read(source: str | Path) -> tuple[str, Path, str]:
    """Text, folder that paths are relative to, and what to call it in messages."""
    if isinstance(source, str) and "\n" in source:
        return source, Path.cwd(), "cascade"
    path = Path(source)
    try:
        return path.read_text(encoding="utf-8"), path.parent.absolute(), f"{path}: cascade"
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"{path}: cannot read the cascade specification ({error})") from error


def _changed(options: Options) -> dict[str, Any]:
    """Fields that differ from their default, and those without one, as plain values."""
    plain = options.to_dict()
    changed = {}
    for field in dataclasses.fields(options):  # type: ignore[arg-type]
        value = getattr(options, field.name)
        if value != field.default:
            nested = isinstance(value, Options)
            changed[field.name] = _changed(value) if nested else plain[field.name]
    return changed


def _relative(engine: Path, folder: Path) -> str:
    engine, folder = engine.resolve(), folder.resolve()
    if engine.is_relative_to(folder.parent):
        return os.path.relpath(engine, folder)
    return str(engine)
