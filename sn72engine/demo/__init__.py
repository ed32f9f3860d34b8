"""The demonstration: a real two-stage cascade, from pretrained weights to a report."""

from __future__ import annotations

from sn72engine.demo.pipeline import DemoOptions, run_demo

__all__ = ["DemoOptions", "run_demo"]
