"""Options of the kernel benchmarks."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kernel benchmarks")
    group.addoption("--kernel-record", metavar="FILE", help="keep the races as JSON lines")
    group.addoption(
        "--kernel-minutes", type=float, metavar="N", help="start no race after N minutes"
    )
