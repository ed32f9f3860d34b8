"""The demonstration, from pretrained weights to its report, with few samples and no GPU engines."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from sn72engine.cascade.spec import CascadeSpec
from sn72engine.demo.options import DemoOptions
from sn72engine.errors import OptionError
from sn72engine.store import Store

NAMES = ("lite0", "lite2")


class Page(HTMLParser):
    """The pictures of a page, and what it fetches from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.pictures: list[str] = []
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if tag == "img" and name == "src":
                self.pictures.append(value or "")
            if name in ("src", "href") and not (value or "").startswith(("data:", "#")):
                self.fetched.append(f"{tag} {value}")


@pytest.mark.slow
def test_the_whole_demonstration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("efficientnet_lite_pytorch", "skimage", "sklearn", "modelopt"):
        pytest.importorskip(package, exc_type=ImportError)
    from sn72engine.demo.pipeline import run_demo

    monkeypatch.setenv("SN72_CACHE_DIR", str(tmp_path / "cache"))
    said: list[str] = []
    folder = tmp_path / "report"
    options = DemoOptions(folder=folder, calibration=16, evaluation=100, target="")
    result = run_demo(options, said.append)

    assert [line[:5] for line in said] == [f"[{step}/7]" for step in range(1, 8)]
    figures = json.loads((folder / "figures.json").read_text())
    assert figures == json.loads(json.dumps(result.figures))
    for name in NAMES:
        assert figures["export"][name] < 1e-3
        verified = figures["verification"][name]
        assert figures["shipped"][name] == ("int8" if verified["passed"] else "fp32")
        # ImageNet weights on photographs: both forms know what is on most of them.
        assert verified["reference_top1"] > 0.6
        assert verified["agreement"] > 0.6
    stored = [entry.manifest for entry in Store().entries() if entry.manifest]
    judged = {m.precision: m.verification is not None for m in stored}
    assert judged == {"int8": True, "fp32": False}
    assert figures["gpu_engines"] == []
    systems = figures["comparison"]["systems"]
    assert set(systems) - {"all stages"} == {"cascade", *NAMES}
    assert all(0.5 < system["accuracy"] <= 1 for system in systems.values())
    assert sum(figures["comparison"]["answered_by"].values()) == pytest.approx(1)

    spec = CascadeSpec.from_yaml(folder / "cascade.yaml")
    assert {stage.name for stage in spec.stages} <= set(NAMES)
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert len(lines) >= 5
    assert {line["status"] for line in lines} <= {"done", "undecided"}

    assert result.report == folder / "report.html"
    page = Page(result.report.read_text())
    assert page.fetched == []
    assert len(page.pictures) >= 2 + len(lines)
    assert str(result.report) in result.text


def test_options_that_would_show_nothing_are_refused() -> None:
    with pytest.raises(OptionError, match="evaluation=10"):
        DemoOptions(evaluation=10)
    with pytest.raises(OptionError, match="target='sm_90'"):
        DemoOptions(target="sm_90")
