"""A missing or old optional package is a one-line error that names the pip command."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from sn72engine import _deps
from sn72engine.errors import MissingDependencyError

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]


def test_a_package_that_is_there_is_returned() -> None:
    assert _deps.require("numpy", purpose="count").__name__ == "numpy"
    assert _deps.require("PIL", purpose="draw", submodule="Image").__name__ == "PIL.Image"


def test_a_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = _deps.Dependency("no_such_module", ("no-such-package",), "1.0", "quantize")
    monkeypatch.setitem(_deps.DEPENDENCIES, "no_such_module", absent)
    with pytest.raises(MissingDependencyError) as caught:
        _deps.require("no_such_module", purpose="calibrate")
    message = str(caught.value)
    assert "needed to calibrate" in message
    assert "pip install 'sn72engine[quantize]'" in message
    assert "\n" not in message
    assert not _deps.available("no_such_module")
    with pytest.raises(MissingDependencyError, match=r"not installed; run: pip install"):
        _deps.installed_version("no_such_module")


def test_an_old_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    old = _deps.Dependency("numpy", ("numpy",), "999.0", "")
    monkeypatch.setitem(_deps.DEPENDENCIES, "numpy", old)
    with pytest.raises(MissingDependencyError, match=r"older than 999\.0"):
        _deps.require("numpy", purpose="count")
    assert not _deps.available("numpy")


@pytest.mark.parametrize(
    ("text", "release"),
    [("2.13.0+cpu", (2, 13, 0)), ("1.30", (1, 30)), ("3.0rc1", (3, 0)), ("dev", ())],
)
def test_versions_are_compared_by_their_release(text: str, release: tuple[int, ...]) -> None:
    assert _deps._release(text) == release


@pytest.mark.parametrize("dependency", _deps.DEPENDENCIES.values(), ids=lambda d: d.module)
def test_the_hint_leads_to_a_declared_requirement(dependency: _deps.Dependency) -> None:
    extras = PROJECT["optional-dependencies"]

    def requirements(extra: str) -> list[str]:
        found = []
        for line in extras[extra] if extra else PROJECT["dependencies"]:
            if line.startswith("sn72engine["):
                for inner in line[len("sn72engine[") : -1].split(","):
                    found += requirements(inner)
            else:
                found.append(line)
        return found

    lines = requirements(dependency.extra)
    declared = {
        line.partition(">=")[0]: line.partition(">=")[2].partition(",")[0] for line in lines
    }
    assert any(declared.get(name) == dependency.floor for name in dependency.distributions)


@pytest.mark.parametrize(("given", "found"), [(None, "1"), ("0", "0")])
def test_onnxruntime_sends_no_usage_data_unless_asked_to(given: str | None, found: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    if given is not None:
        environment["ORT_DISABLE_TELEMETRY"] = given
    code = (
        "import os; from sn72engine import _deps; _deps.require('onnxruntime', purpose='test'); "
        "print(os.environ['ORT_DISABLE_TELEMETRY'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.strip() == found


def test_a_module_is_hidden_from_one_that_would_use_it_while_that_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sn72_reporter.py").write_text("")
    (tmp_path / "sn72_library.py").write_text(
        "try:\n    import sn72_reporter\n    found = True\nexcept ImportError:\n    found = False\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    library = _deps.Dependency("sn72_library", ("none-such",), "1", "", without="sn72_reporter")
    monkeypatch.setitem(_deps.DEPENDENCIES, "sn72_library", library)
    for loaded_before in (False, True):
        if loaded_before:
            importlib.import_module("sn72_reporter")
        assert _deps.require("sn72_library", purpose="test").found is False
        assert ("sn72_reporter" in sys.modules) == loaded_before
        del sys.modules["sn72_library"]
    del sys.modules["sn72_reporter"]
