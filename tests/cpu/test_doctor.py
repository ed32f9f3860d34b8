"""The report works on a healthy and on a broken installation."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import venv
from pathlib import Path

import pytest

from sn72engine import _deps, doctor
from sn72kernels import env

SOURCE = Path(doctor.__file__)


def test_a_healthy_installation_has_no_problems() -> None:
    report = doctor.diagnose()
    assert report.healthy, report.problems
    by_name = {m.module: m for m in report.modules}
    assert by_name["numpy"].status == "ok"
    assert by_name["numpy"].version
    json.dumps(report.to_dict())
    text = doctor.render(report)
    assert "No problems found" in text
    assert report.cpu in text


def test_it_runs_as_a_plain_file_beside_a_broken_package(tmp_path: Path) -> None:
    # The package's own __init__ cannot even be parsed, and a dependency dies on import.
    package = tmp_path / "sn72engine"
    package.mkdir()
    (package / "__init__.py").write_text("this is not Python")
    shutil.copy(SOURCE, package / "doctor.py")
    broken = tmp_path / "onnx"
    broken.mkdir()
    (broken / "__init__.py").write_text("import os; os._exit(9)")
    # An interpreter with nothing installed: an editable installation would be found first.
    venv.create(tmp_path / "venv", symlinks=True)
    done = subprocess.run(
        [str(tmp_path / "venv" / "bin" / "python"), str(package / "doctor.py"), "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    statuses = {m["module"]: m["status"] for m in report["modules"]}
    assert statuses["sn72engine"] == "broken"
    assert statuses["onnx"] == "broken"
    assert any("sn72engine" in problem for problem in report["problems"])
    assert any("exit code 9" in problem for problem in report["problems"])
    assert any("numpy is missing" in problem for problem in report["problems"])


def test_an_absent_optional_package_is_no_problem() -> None:
    assert doctor.probe("surely_no_such_module", "gpu").status == "absent"


def test_a_hanging_import_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sleeper.py").write_text("import time; time.sleep(60)")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(doctor, "IMPORT_TIMEOUT", 1.0)
    report = doctor.probe("sleeper", "")
    assert report.status == "broken"
    assert "still importing" in report.detail


def test_a_module_without_a_version_has_that_of_its_distribution(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "quiet_one.py").write_text("")
    told = tmp_path / "quiet_one-1.2.3.dist-info"
    told.mkdir()
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: quiet-one\nVersion: 1.2.3\n")
    (tmp_path / "unknown_one.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert doctor.probe("quiet_one", "").version == "1.2.3"
    assert doctor.probe("unknown_one", "") == doctor.ModuleReport("unknown_one", "ok", "", "")


def test_an_unwritable_cache_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SN72_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "access", lambda *_: False)
    _, problem = doctor.cache_folder()
    assert "SN72_CACHE_DIR" in problem


def test_every_dependency_is_examined() -> None:
    ours = {"sn72engine": "", "sn72kernels": ""}
    declared = {name: dependency.extra for name, dependency in _deps.DEPENDENCIES.items()}
    assert dict(doctor.MODULES) == ours | declared


def test_a_package_that_is_too_old_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert doctor.outdated() == []
    described = tmp_path / "tqdm-1.0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: tqdm\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    (problem,) = doctor.outdated()
    assert problem.startswith("tqdm 1.0 ")
    assert _deps.DEPENDENCIES["tqdm"].floor in problem
    assert _deps.DEPENDENCIES["tqdm"].hint in problem


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"XDG_CACHE_HOME": "/tmp/xdg"},
        {"XDG_CACHE_HOME": ""},
        {"SN72_CACHE_DIR": "/tmp/mine", "XDG_CACHE_HOME": "/tmp/xdg"},
        {"SN72_CACHE_DIR": "~/mine"},
        {"SN72_CACHE_DIR": ""},
        {"SN72_CACHE_DIR": "relative/folder"},
    ],
)
def test_the_cache_is_the_one_that_is_used(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SN72_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    shown, _ = doctor.cache_folder()
    assert shown.partition(" (")[0] == str(env.cache_dir())


def test_a_file_where_the_cache_should_be_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("in the way")
    monkeypatch.setenv("SN72_CACHE_DIR", str(tmp_path / "cache"))
    _, problem = doctor.cache_folder()
    assert "SN72_CACHE_DIR" in problem
