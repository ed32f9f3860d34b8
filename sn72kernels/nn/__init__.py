"""Modules on the ops of this package, and :func:`patch`, which puts them into a model."""

from __future__ import annotations

from sn72kernels.nn.modules import Attention, ClassifierHead, LayerNormGelu, RotaryAttention
from sn72kernels.nn.patching import TOLERANCE, Change, Patched, patch

__all__ = [
    "TOLERANCE",
    "Attention",
    "Change",
    "ClassifierHead",
    "LayerNormGelu",
    "Patched",
    "RotaryAttention",
    "patch",
]
