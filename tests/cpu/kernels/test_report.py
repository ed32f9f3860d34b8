"""The report of the kernel benchmarks: from a record made here, and from one like a GPU's."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import markdown
from benchmarks.kernels import harness, report, work
from benchmarks.kernels.cases import every
from sn72kernels import bench

ROOT = Path(__file__).parents[3]
PAGE = "# Page\n\nbefore\n\n<!-- kernels: begin -->\n<!-- kernels: end -->\n\nafter\n"
PEAKS = bench.Peaks("Example GPU", 3000.0, {"bfloat16": 790.0, "int8": 1400.0})


def race(
    op: str, label: str, shape: tuple[int, ...], load: bench.Work, **factors: float | None
) -> dict[str, Any]:
    """A line of a record: ours takes as many times the least time as its factor says."""
    least = PEAKS.least_ms(load)
    names = {"ours": harness.OURS, "eager": harness.EAGER, "compiled": harness.COMPILED}
    timings = [
        bench.Timing(names.get(name, name), note="wrong result")
        if factor is None
        else bench.Timing.of(names.get(name, name), [least * factor] * 3, load, PEAKS)
        for name, factor in factors.items()
    ]
    return harness.Race(
        op=op,
        label=label,
        dtype="float16",
        shape=shape,
        gpu=True,
        cold=True,
        work=asdict(load),
        timings=[asdict(timing) for timing in timings],
        speedups=bench.speedups(timings),
        absent={"flash-attn": "flash-attn is not installed"},
    ).to_dict()


@pytest.fixture
def gpu_record() -> dict[str, Any]:
    """Invented figures in the form of a record; they stay in this test."""
    large = work.layernorm_gelu(16384, 8192, 2)
    small = work.layernorm_gelu(128, 256, 2)
    product = work.linear(581, 1024, 4096, unit="int8")
    return {
        "header": {**harness.header(PEAKS), "gpu": True},
        "races": [
            race(
                "layernorm_gelu", "16384 x 8192", (16384, 8192), large,
                ours=1.25, eager=5.0, compiled=1.5, quack=2.0, **{"liger-kernel, then GELU": 2.5},
            ),
            race(
                "layernorm_gelu", "128 x 256", (128, 256), small,
                ours=10.0, eager=20.0, compiled=None,
            ),
            race("linear", "581", (581,), product, ours=2.0, eager=4.0, compiled=3.0, peer=3.5),
            race("rope", "in place", (9,), small, ours=None, eager=4.0, compiled=3.0),
        ],
    }  # fmt: skip


def test_a_gpu_record(gpu_record: dict[str, Any]) -> None:
    text = report.body(gpu_record)
    assert "Example GPU" in text
    assert "copy 3000 GB/s" in text
    assert "int8 1400" in text
    assert "| 16384 | not run | 80%; 1.20×; 4.00×; 1.60× (quack) |" in text
    assert "| 128 | 10%; not timed; 2.00× | not run |" in text
    assert "at least 92% of the copy bandwidth at 128 MiB and more: 0 of 1 shapes; the" in text
    assert "at least as fast as `torch.compile`: 1 of 1 shapes, 1 not measured" in text
    assert "at least 3 times as fast as PyTorch eager: 1 of 2 shapes; the least is 2×" in text
    linear = next(line for line in text.splitlines() if line.startswith("| `linear`"))
    assert [cell.strip() for cell in linear.split("|")[-4:-1]] == ["1.50×", "2.00×", "1.75× (peer)"]


def test_no_speed_up_where_ours_is_wrong(gpu_record: dict[str, Any]) -> None:
    text = report.body(gpu_record)
    row = next(line for line in text.splitlines() if line.startswith("| `rope`"))
    assert "not timed: wrong result" in row
    assert "×" not in row


def test_pictures_of_a_gpu(gpu_record: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    drawn = report.draw(gpu_record, tmp_path)
    assert [path.name for path in drawn] == [
        "kernels-gpu-roofline.png",
        "kernels-gpu-layernorm-gelu-speedup.png",
        "kernels-gpu-speedup.png",
    ]
    for path in drawn:
        assert path.read_bytes().startswith(b"\x89PNG")


def test_part_of_a_page_is_replaced_and_only_once(
    gpu_record: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    path, page, saved = (tmp_path / name for name in ("r.json", "p.md", "saved.json"))
    path.write_text(json.dumps(gpu_record))
    page.write_text(PAGE)
    options = [str(path), "--page", str(page), "--save", str(saved)]
    assert report.main(options) == 0
    first = page.read_text()
    assert first.startswith("# Page\n\nbefore\n")
    assert first.endswith("after\n")
    assert "](images/kernels-gpu-roofline.png)" in first
    assert report.main([str(saved), *options[1:]]) == 0
    assert page.read_text() == first
    assert json.loads(saved.read_text()) == json.loads(path.read_text())


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "p.md"
    page.write_text("no part here")
    record = tmp_path / "r.json"
    record.write_text('{"kind": "header"}')
    assert report.main([str(record), "--page", str(page)]) == 2
    assert "has no part '<!-- kernels: begin" in capsys.readouterr().err
    assert report.main([str(tmp_path / "absent.json")]) == 2
    with pytest.raises(ValueError, match="has no part"):
        markdown.replaced("text", "kernels", "body")


def test_the_page_in_the_docs_is_what_its_record_says() -> None:
    source, found = markdown.part((ROOT / "docs/performance.md").read_text(), report.PART)
    record = harness.read(ROOT / source)
    pictures = [line for line in found.splitlines() if line.startswith("![")]
    links = [line.partition("](")[2].rstrip(")") for line in pictures]
    assert found == report.body(record, links)
    for link in links:
        assert (ROOT / "docs" / link).is_file()


def test_without_a_gpu_the_page_says_so(tmp_path: Path) -> None:
    """From a race run for real to the page and the picture."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    lines, page = tmp_path / "record.jsonl", tmp_path / "page.md"
    page.write_text(PAGE)
    record = harness.Record(lines)
    cpu = torch.device("cpu")
    peaks = bench.measure_peaks(cpu)
    record.add({**harness.header(peaks), "gpu": False})
    case = dict(every(cpu))["ensemble_vote: n=64"]()
    record.add(harness.run(case, peaks)[0].to_dict())
    assert report.main([str(lines), "--page", str(page)]) == 0
    text = page.read_text()
    assert "**No GPU was present: these are the reference paths on the CPU" in text
    assert "| `ensemble_vote` 5 x 64 |" in text
    assert "×" not in text, "a speed-up of one reference path over another means nothing"
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["kernels-cpu-roofline.png"]
