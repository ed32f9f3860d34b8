"""Skips this folder, with the reason, where its tests cannot run."""

from __future__ import annotations

import sys

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = _reason()
    for item in items:
        if "tests/gpu" in item.path.as_posix():
            item.add_marker(pytest.mark.gpu)
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


def _reason() -> str:
    if not torch.cuda.is_available():
        return f"no CUDA device is visible to torch {torch.__version__}"
    triton = sys.modules.get("triton")
    if triton is not None and triton.knobs.runtime.interpret:
        return "Triton interprets in this process; run tests/gpu on its own"
    return ""
