"""Skips this folder, with the reason, where its tests cannot run."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from tests.gpu import support
from tests.kernel_cases import interpreter

# Under the interpreter: as many parametrisations of a test as are run, spread over all of them.
INTERPRETED_PER_TEST = 2

# Filling new memory with NaN goes with PyTorch's deterministic mode, where cuBLAS wants this.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

if support.INTERPRETED and importlib.util.find_spec("triton") is not None:
    os.environ["TRITON_INTERPRET"] = "1"
    interpreter.repair()


def pytest_report_header() -> str:
    where = "Triton's interpreter" if support.INTERPRETED else "CUDA"
    return f"tests/gpu: on {where}, SN72_GPU_TESTS_SEED={support.SEED}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    mine = [item for item in items if "tests/gpu" in item.path.as_posix()]
    reason = _reason()
    for item in mine:
        item.add_marker(pytest.mark.gpu)
        # Filling new memory also brings warnings about ops that are not deterministic.
        item.add_marker(pytest.mark.filterwarnings("ignore:.*determinis:UserWarning"))
        for mark in interpreter.marks() if support.INTERPRETED else ():
            item.add_marker(mark)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))
    # The longest at the end, so that a run that is cut off has all the others.
    items.sort(key=lambda item: "test_100000_random_batches" in item.name)
    if support.INTERPRETED and not reason:
        _thin_out(config, items, mine)


def _thin_out(config: pytest.Config, items: list[pytest.Item], mine: list[pytest.Item]) -> None:
    """Leave a few parametrisations of every test that knows the interpreter."""
    families: dict[tuple[str, str], list[pytest.Item]] = defaultdict(list)
    for item in mine:
        if hasattr(item.module, "DEVICE"):  # type: ignore[attr-defined]
            families[str(item.path), getattr(item, "originalname", item.name)].append(item)
    kept: set[pytest.Item] = set()
    for family in families.values():
        last = len(family) - 1
        steps = max(1, INTERPRETED_PER_TEST - 1)
        kept.update(family[round(k * last / steps)] for k in range(steps + 1))
    dropped = [item for item in mine if item not in kept]
    config.hook.pytest_deselected(items=dropped)
    items[:] = [item for item in items if item not in dropped]


def _reason() -> str:
    if support.INTERPRETED:
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed, so there is no interpreter"
        return ""
    if not torch.cuda.is_available():
        return f"no CUDA device is visible to torch {torch.__version__}"
    triton = sys.modules.get("triton")
    if triton is not None and triton.knobs.runtime.interpret:
        return "Triton interprets in this process; run tests/gpu on its own"
    return ""


@pytest.fixture(autouse=True)
def quiet_numpy() -> Iterator[None]:
    """The interpreter's NumPy meets infinities and NaN without a warning, as a GPU does."""
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        yield
