"""Procedural road scenes with and without roadwork, and two small models trained on them.

They stand in for a real data set where none can be had: in tests, in the demonstration and in
examples. Nothing here claims to be a photograph; figures measured on these scenes say that the
machinery works, not how well it does on a road.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sn72engine.roadscenes.scenes import Scene, SceneOptions, render, scene
    from sn72engine.roadscenes.sets import dataset, write_dataset
    from sn72engine.roadscenes.train import TrainOptions, trained

_EXPORTS = {
    "Scene": "scenes",
    "SceneOptions": "scenes",
    "render": "scenes",
    "scene": "scenes",
    "dataset": "sets",
    "write_dataset": "sets",
    "TrainOptions": "train",
    "trained": "train",
}

__all__ = [
    "Scene",
    "SceneOptions",
    "TrainOptions",
    "dataset",
    "render",
    "scene",
    "trained",
    "write_dataset",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
