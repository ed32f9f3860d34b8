"""Fixtures that more than one test file uses."""

from __future__ import annotations

import ctypes
import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

# A busy machine is slow, which says nothing of the code.
settings.register_profile("untimed", parent=settings.default, deadline=None)
settings.load_profile("untimed")

# As sn72engine does before it loads ONNX Runtime, which some tests load by themselves.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from torch import nn


@pytest.fixture(scope="session")
def trained_cnn() -> nn.Module:
    """The first-stage road-scene model; trained once per machine, then read from the cache."""
    from sn72engine.roadscenes import trained

    return trained("small_cnn")


@pytest.fixture(scope="session")
def trained_vit() -> nn.Module:
    """The second-stage road-scene model; trained once per machine, then read from the cache."""
    from sn72engine.roadscenes import trained

    return trained("small_vit")


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The CUDA kernels on the host emulator, for a ``SimulatedCuda``."""
    from tests.cpu.simulated_cuda import compile_kernels

    return compile_kernels(tmp_path_factory.mktemp("kernels") / "kernels.so")
