"""A pytest plugin that keeps every outcome as a line of JSON, written through at once.

A benchmark's line has its extra columns too: pytest-benchmark writes its own file at the very end.

``pytest -p benchmarks.pytest_outcomes --outcomes=FILE``. JUnit files and the like are written when
the last test has ended; a run that is cut off leaves nothing of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """The path of the file."""
    parser.addoption("--outcomes", metavar="FILE", help="keep outcomes as JSON lines")


def pytest_configure(config: pytest.Config) -> None:
    """Empty the file."""
    path = config.getoption("--outcomes")
    if path:
        config.pluginmanager.register(_Writer(Path(path)), "outcomes-writer")


class _Writer:
    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._add({"collected": len(session.items)})

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Iterator[None]:
        outcome: Any = yield
        figures = getattr(getattr(item, "funcargs", {}).get("benchmark"), "extra_info", None)
        if call.when == "call" and figures:
            outcome.get_result().user_properties.append(("figures", dict(figures)))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One line a test: its call, or what kept it from being called."""
        if report.when != "call" and report.outcome == "passed":
            return
        line: dict[str, object] = {
            "test": report.nodeid,
            "outcome": report.outcome if report.when == "call" or report.skipped else "error",
            "seconds": round(report.duration, 3),
            **{name: value for name, value in report.user_properties if name == "figures"},
        }
        if report.skipped and isinstance(report.longrepr, tuple):
            line["reason"] = report.longrepr[2].removeprefix("Skipped: ")
        elif report.failed:
            line["reason"] = report.longreprtext[-2000:]
        self._add(line)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be imported counts as an error."""
        if report.failed:
            self._add(
                {"test": report.nodeid, "outcome": "error", "reason": report.longreprtext[-2000:]}
            )

    def _add(self, line: dict[str, object]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
