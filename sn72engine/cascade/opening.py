"""Making the stages that a specification describes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from sn72engine.cascade.spec import CascadeSpec, StageSpec
from sn72engine.errors import OptionError
from sn72engine.spec import RuntimeOptions
from sn72engine.stages.base import Stage
from sn72engine.stages.function import FunctionStage

Given = Mapping[str, Stage | Callable[..., Any]]


@contextlib.contextmanager
def open_stages(
    spec: CascadeSpec, runtime: RuntimeOptions | None = None, given: Given | None = None
) -> Iterator[dict[str, Stage]]:
    """The stages of a cascade by name, in order, to be used by themselves; closed at the end.

    Args:
        spec: what to open.
        runtime: how engines are run.
        given: objects for the stages that name no engine, OCR or VLM; these are not closed.

    Raises:
        OptionError: ``given`` does not fit ``spec``, or an engine cannot be a stage.
        Sn72Error: a stage cannot be loaded or warmed up.
    """
    with contextlib.ExitStack() as opened:
        yield enter_stages(spec, runtime, given or {}, opened)


def enter_stages(
    spec: CascadeSpec, runtime: RuntimeOptions | None, given: Given, opened: contextlib.ExitStack
) -> dict[str, Stage]:
    """As :func:`open_stages`; what is opened is closed when ``opened`` is."""
    _check_given(spec, given)
    stages: dict[str, Stage] = {}
    for stage_spec in spec.stages:
        stage = given.get(stage_spec.name)
        if stage is None:
            stage = _open(stage_spec, runtime)
            opened.callback(stage.close)
        elif not isinstance(stage, Stage):
            stage = FunctionStage(stage)
        stage.prepare()
        stages[stage_spec.name] = stage
    return stages


def _check_given(spec: CascadeSpec, given: Mapping[str, object]) -> None:
    open_names = [s.name for s in spec.stages if not (s.engine or s.ocr or s.vlm)]
    for name, stage in given.items():
        if name not in open_names:
            raise OptionError(
                f"stages: {name!r} is not a stage that takes a Python object; those are: "
                f"{', '.join(open_names) or 'none'}"
            )
        if not isinstance(stage, Stage) and not callable(stage):
            raise OptionError(
                f"stages[{name!r}] is a {type(stage).__name__}; it must be a Stage or a callable"
            )
    for name in open_names:
        if name not in given:
            raise OptionError(
                f"stage {name!r} has no engine, ocr or vlm; pass its object: "
                f"Cascade(spec, stages={{{name!r}: ...}})"
            )


def _open(spec: StageSpec, runtime: RuntimeOptions | None) -> Stage:
    """Make the stage that a specification describes."""
    if spec.engine is not None:
        from sn72engine.session import Session
        from sn72engine.stages.engine import EngineStage

        assert spec.score is not None  # the specification refuses an engine without it
        session = Session(spec.engine, runtime)
        try:
            return EngineStage(session, spec.score, positive=spec.positive)
        except OptionError:
            session.close()
            raise
    if spec.ocr is not None:
        from sn72engine.stages.ocr import OcrStage

        return OcrStage(spec.ocr)
    assert spec.vlm is not None
    from sn72engine.stages.vlm import VlmStage

    return VlmStage(spec.vlm)
