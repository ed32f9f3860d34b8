"""The command line, each sub-command on real models and images made for these tests."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sn72engine import cli
from sn72engine.cascade.spec import CascadeSpec
from sn72engine.cli.outcome import batch_range, key_values, load_object, preprocess_argument
from sn72engine.cli.run import cascade_spec
from sn72engine.cuda.driver import driver_available
from sn72engine.errors import InputError, OptionError
from sn72engine.image_files import labelled
from sn72engine.model import OnnxModel
from sn72engine.spec import Preprocess, ShapeRange
from sn72engine.store import Store, open_engine

no_driver = pytest.mark.skipif(driver_available().ok, reason="there is a GPU here")

#: Two models that answer "is the picture bright?"; ``corner`` sees one corner only, so it errs.
FACTORIES = """
from __future__ import annotations
from dataclasses import dataclass
import torch
from torch import nn

@dataclass
class Unused:  # needs its module to be registered while it is made
    name: str

class Brightness(nn.Module):
    def __init__(self, side: int, gain: float):
        super().__init__()
        self.side = side
        self.conv = nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False)
        self.head = nn.Linear(16, 1)
        with torch.no_grad():
            weight = torch.rand(self.conv.weight.shape, generator=torch.Generator().manual_seed(1))
            self.conv.weight.copy_(weight / weight.sum((1, 2, 3), keepdim=True))
            self.head.weight.fill_(gain / 16)
            self.head.bias.zero_()

    def forward(self, pixel_values):
        return self.head(self.conv(pixel_values[:, :, :self.side, :self.side]).mean((2, 3)))

class Random(nn.Module):
    def forward(self, pixel_values):
        return torch.rand_like(pixel_values).mean((2, 3))

def corner(): return Brightness(4, 8.0)
def whole(gain: float = 12.0): return Brightness(16, gain)
def random(): return Random()
def stopped(): raise KeyboardInterrupt
def text(): return "not a module"
"""

PREPROCESS = "height=16,width=16,mean=127.5/127.5/127.5,std=64/64/64"
IMAGES = 120


@dataclass(frozen=True)
class Workspace:
    """Files that the commands of :func:`workspace` made, and the keys of the engines."""

    folder: Path
    whole: str
    corner: str
    int8: str

    @property
    def photos(self) -> Path:
        return self.folder / "photos"

    @property
    def labels(self) -> Path:
        return self.folder / "photos" / "labels.csv"

    @property
    def model(self) -> Path:
        return self.folder / "whole.onnx"

    @property
    def int8_model(self) -> Path:
        return self.folder / "whole.int8.onnx"

    @property
    def cascade(self) -> Path:
        return self.folder / "road.yaml"


def answer(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    """What a command prints with ``--json``; it must succeed."""
    code = cli.main([*map(str, arguments), "--json"])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    return json.loads(printed.out)


def refusal(capsys: pytest.CaptureFixture[str], code: int, *arguments: object) -> str:
    """The one line that a refused command says on standard error, and in its JSON."""
    assert cli.main([*map(str, arguments), "--json"]) == code
    printed = capsys.readouterr()
    error = json.loads(printed.out)["error"]
    assert error["exit_code"] == code
    assert printed.err == f"sn72engine: {error['message']}\n"
    assert "\n" not in error["message"]
    return str(error["message"])


def write_photos(folder: Path) -> None:
    """Noisy pictures, bright (label 1) or dark (label 0), and their labels."""
    rng = np.random.default_rng(5)
    folder.mkdir()
    lines = ["file,label,split"]
    for index in range(IMAGES):
        level = rng.uniform(8, 40) * (1 if index % 2 else -1)
        pixels = 127.5 + level + rng.normal(0, 60, (16, 16, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{index}.png")
        lines.append(f"{index}.png,{index % 2},{'test' if index < 20 else 'train'}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """Two models exported, one quantised, and three engines in a store of their own."""
    folder = tmp_path_factory.mktemp("cli")
    write_photos(folder / "photos")
    (folder / "factories.py").write_text(FACTORIES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SN72_CACHE_DIR", str(folder / "cache"))
        keys = {}
        for name in ("whole", "corner"):
            run(
                *("export", f"{folder / 'factories.py'}:{name}", "--input", "3x16x16"),
                *("--preprocess", PREPROCESS, "-o", folder / f"{name}.onnx"),
            )
        run(
            *("quantize", folder / "whole.onnx", "--data", folder / "photos", "--method", "max"),
            *("--limit", 32, "-o", folder / "whole.int8.onnx"),
        )
        for name in ("whole", "corner", "whole.int8"):
            before = {entry.key for entry in Store().entries()}
            run("build", folder / f"{name}.onnx", "--batch", "1:8:16")
            (keys[name],) = {entry.key for entry in Store().entries()} - before
        stages = [
            {"name": name, "engine": f"cache/engines/{keys[name]}", "score": "sigmoid"}
            for name in ("corner", "whole")
        ]
        (folder / "road.yaml").write_text(json.dumps({"stages": stages}))
        yield Workspace(folder, keys["whole"], keys["corner"], keys["whole.int8"])


def run(*arguments: object) -> None:
    assert cli.main([*map(str, arguments)]) == 0


def test_export_says_what_it_wrote(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "m.onnx"
    factory = f"{workspace.folder / 'factories.py'}:whole"
    made = answer(
        capsys,
        *("export", factory, "--arg", "gain=3.5", "--input", "3x16x16", "-o", target),
        *("--input-name", "x", "--output-name", "y"),
    )
    assert made["path"] == str(target)
    assert made["bytes"] == target.stat().st_size
    assert made["inputs"] == [{"name": "x", "dtype": "float32", "shape": ["batch", 3, 16, 16]}]
    assert made["outputs"] == [{"name": "y", "dtype": "float32", "shape": ["batch", 1]}]
    assert made["export"]["parity"][0]["max_abs_error"] < 1e-4
    assert OnnxModel.open(target).preprocess is None


def test_export_in_float16(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    factory = f"{workspace.folder / 'factories.py'}:whole"
    made = answer(
        capsys, "export", factory, "--half", "--input", "3x16x16", "-o", tmp_path / "half.onnx"
    )
    assert made["inputs"][0]["dtype"] == "float16"


def test_quantize_keeps_its_record(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = answer(
        capsys,
        *("quantize", workspace.model, "--data", workspace.labels, "--method", "max"),
        *("--limit", 16, "--batch", 4, "-o", tmp_path / "q.onnx"),
    )
    record = made["quantization"]
    assert (record["method"], record["samples"], record["batch_size"]) == ("max", 16, 4)
    assert record["quantised"] >= 1
    assert "ranges" not in record
    assert OnnxModel.open(tmp_path / "q.onnx").precision == "int8"


def test_quantize_to_other_formats_with_exceptions(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("quantize", workspace.model, "--data", workspace.labels, "--limit", 8, "-o")
    made = answer(
        capsys,
        *(*asked, tmp_path / "q.onnx", "--precision", "fp8", "--op-type", "Conv"),
        *("--override", "*=int8", "--override", "*=fp8"),
    )
    assert made["quantization"]["precision"] == "fp8"
    assert OnnxModel.open(tmp_path / "q.onnx").formats == ("fp8",)


def test_building_again_finds_the_stored_engine(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    made = answer(capsys, "build", workspace.int8_model, "--batch", "1:8:16")
    assert made["manifest"]["key"] == workspace.int8
    assert made["manifest"]["precision"] == "int8"
    assert Path(made["folder"]) == Store().root / "engines" / workspace.int8


def test_verify_records_its_verdict(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    report = answer(
        capsys,
        *("verify", workspace.int8[:8], "--reference", workspace.whole, "--labels"),
        *("--data", workspace.labels, "--split", "train", "--no-speed"),
        *("--min-agreement", 0.8, "--max-top1-drop", 20),
    )
    assert report["passed"]
    assert report["reference_top1"] > 0.9
    (entry,) = (e for e in Store().entries() if e.key == workspace.int8)
    assert entry.manifest is not None
    assert entry.manifest.verification is not None
    assert entry.manifest.verification["passed"]


def test_verify_refuses_with_code_5_and_the_figures(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    code = cli.main(
        [
            *("verify", workspace.corner, "--reference", workspace.whole, "--no-speed"),
            *("--data", str(workspace.photos), "--limit", "60", "--min-agreement", "1"),
        ]
    )
    assert code == 5
    printed = capsys.readouterr().out
    assert "agreement" in printed
    assert "below the bound" in printed


def test_inspect_shows_a_file_and_an_engine(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    file = answer(capsys, "inspect", workspace.int8_model)
    assert file["kind"] == "onnx"
    assert file["precision"] == "int8"
    assert file["operators"]["DequantizeLinear"] >= 2
    engine = answer(capsys, "inspect", workspace.int8)
    assert engine["kind"] == "engine"
    assert engine["manifest"]["key"] == workspace.int8
    run("inspect", workspace.whole)
    printed = capsys.readouterr().out
    assert "float32[batch, 3, 16, 16]" in printed
    assert "height=16" in printed


def test_bench_measures_and_draws(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "latency.png"
    report = answer(
        capsys,
        *("bench", workspace.whole, "--batch", 4, "--repeats", 100, "--threads", 1),
        *("--histogram", picture),
    )
    assert report["batch"] == 4
    assert report["latency_ms"]["n"] == 100
    assert report["throughput"] == pytest.approx(4e3 / report["latency_ms"]["mean"])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_calibrate_writes_a_cascade_that_runs(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned, picture, results = tmp_path / "tuned.yaml", tmp_path / "p.png", tmp_path / "r.jsonl"
    chosen = answer(
        capsys,
        *("calibrate", workspace.cascade, "--data", workspace.labels, "--threads", 1),
        *("-o", tuned, "--pareto", picture),
    )
    assert chosen["choice"]["figures"]["accuracy"] > 0.8
    assert picture.read_bytes().startswith(b"\x89PNG")
    spec = CascadeSpec.from_yaml(tuned)
    assert [stage["name"] for stage in chosen["spec"]["stages"]] == [s.name for s in spec.stages]

    report = answer(capsys, "run", tuned, workspace.photos, "-o", results)
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert report["images"] == len(lines) == IMAGES
    assert [Path(line["file"]).name for line in lines] == [f"{i}.png" for i in range(IMAGES)]
    right = sum(line["label"] == index % 2 for index, line in enumerate(lines))
    assert right > 0.8 * IMAGES
    assert report["cascade"]["samples"] == IMAGES


def test_calibrate_prints_the_certificate(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    run("calibrate", workspace.cascade, "--data", workspace.labels, "--split", "train")
    printed = capsys.readouterr().out
    assert "corner alone" in printed
    assert "whole alone" in printed
    assert "guarantee" in printed


def test_run_takes_an_engine_and_patterns(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = workspace.photos
    # Each file once, in the order in which the arguments first name it.
    run("run", workspace.whole[:10], photos / "7.png", photos / "1?.png", photos / "7.png")
    printed = capsys.readouterr()
    lines = [json.loads(line) for line in printed.out.splitlines()]
    wanted = ["7.png", *(f"1{i}.png" for i in range(10))]
    assert [Path(line["file"]).name for line in lines] == wanted
    assert {line["stage"] for line in lines} == {"engine"}
    assert printed.err.startswith("11 images: ")


def test_run_as_json_and_with_a_deadline(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    made = answer(
        capsys, "run", workspace.cascade, workspace.photos / "3.png", "--deadline", "0.0000001"
    )
    assert [result["status"] for result in made["results"]] == ["deadline"]
    assert made["statuses"] == {"deadline": 1}


@no_driver
def test_run_says_what_ran_the_cascade_and_why(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = workspace.photos / "3.png"
    reasons = {"auto": driver_available().reason, "cpu": "mode='cpu' was asked for"}
    for mode, reason in reasons.items():
        run("run", workspace.cascade, photo, "--mode", mode)
        assert capsys.readouterr().err.endswith(f"; executor cpu ({reason})\n")
    run("run", workspace.cascade, photo, "-o", tmp_path / "r.jsonl")
    said = capsys.readouterr().out
    assert f"; executor cpu ({reasons['auto']}) -> {tmp_path / 'r.jsonl'}" in " ".join(said.split())
    data = answer(capsys, "run", workspace.cascade, photo)
    assert data["cascade"]["executor"]["reason"] == reasons["auto"]


@no_driver
@pytest.mark.parametrize("mode", ["host", "device"])
def test_run_refuses_a_gpu_mode_without_a_driver(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: str
) -> None:
    output = tmp_path / "r.jsonl"
    said = refusal(
        capsys, 7, "run", workspace.cascade, workspace.photos, "--mode", mode, "-o", output
    )
    assert said.startswith(
        f"mode='{mode}' needs a GPU: {driver_available().reason}; use mode='cpu'"
    )
    assert not output.exists()


def test_run_says_which_image_cannot_be_read_and_answers_the_others(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not a picture")
    made = answer(capsys, "run", workspace.cascade, broken, workspace.photos / "3.png")
    first, second = made["results"]
    assert (first["status"], first["stage"]) == ("stage_failed", None)
    assert "broken.png" in first["error"]
    assert second["error"] == ""
    assert second["stage"] is not None


def test_cache_lists_checks_and_removes(
    workspace: Workspace,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(workspace.folder / "cache", tmp_path / "cache")
    monkeypatch.setenv("SN72_CACHE_DIR", str(tmp_path / "cache"))
    listed = answer(capsys, "cache", "list")["entries"]
    assert {e["key"] for e in listed} == {workspace.whole, workspace.corner, workspace.int8}
    assert answer(capsys, "cache", "path")["path"] == str(Store().root)
    assert answer(capsys, "cache", "check")["problems"] == {}
    assert answer(capsys, "cache", "evict")["evicted"] == []
    assert answer(capsys, "cache", "remove", workspace.corner[:12])["removed"] == [workspace.corner]

    with (Store().root / "engines" / workspace.whole / "model.onnx").open("ab") as file:
        file.write(b"x")
    assert cli.main(["cache", "check"]) == 6
    printed = capsys.readouterr().out
    assert workspace.whole in printed
    assert "refused" in printed
    message = refusal(capsys, 6, "bench", workspace.whole)
    assert "model.onnx" in message

    monkeypatch.setenv("SN72_STORE_LIMIT_GB", "0.000000001")
    assert len(answer(capsys, "cache", "evict")["evicted"]) >= 1


def test_doctor_answers_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.main(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert code == (0 if report["healthy"] else 1)
    assert {"python", "cores", "modules", "problems"} <= set(report)


def test_a_refusal_prints_nothing_on_standard_output(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["build", str(workspace.model), "--precision", "int8"]) == 5
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("sn72engine: ")
    assert printed.err.count("\n") == 1


def test_code_2_for_wrong_options(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    factory, target = f"{workspace.folder / 'factories.py'}:whole", tmp_path / "m.onnx"
    said = refusal(capsys, 2, "export", factory, "--input", "3xbad", "-o", target)
    assert "3xbad" in said
    wrong = ("--input", "3x16x16", "-o", target)
    assert "gian" in refusal(capsys, 2, "export", factory, "--arg", "gian=3", *wrong)
    assert "name=value" in refusal(capsys, 2, "export", factory, "--arg", "gain", *wrong)
    absent = f"{workspace.folder / 'factories.py'}:absent"
    assert "absent" in refusal(capsys, 2, "export", absent, *wrong)
    text = f"{workspace.folder / 'factories.py'}:text"
    assert "str" in refusal(capsys, 2, "export", text, *wrong)
    assert "no_such_package" in refusal(capsys, 2, "export", "no_such_package:model", *wrong)
    assert "key" in refusal(capsys, 2, "cache", "remove")
    (tmp_path / "bad.yaml").write_text("stages: [{name: a, engine: b, score: sigmoid, low: 2}]")
    assert "low=2" in refusal(capsys, 2, "run", tmp_path / "bad.yaml", workspace.photos)
    assert not target.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["unknown"],
        ["build"],
        ["build", "m.onnx", "--batch", "8:1:2"],
        ["build", "m.onnx", "--batch", "two"],
        ["quantize", "m.onnx", "--data", "d", "-o", "o", "--preprocess", "height=0"],
        ["quantize", "m.onnx", "--data", "d", "-o", "o", "--preprocess", "colour=1"],
        ["quantize", "m.onnx", "--data", "d", "-o", "o", "--override", "head=half"],
    ],
    ids=" ".join,
)
def test_code_2_for_arguments_that_do_not_parse(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "usage: sn72engine" in capsys.readouterr().err


def test_code_3_names_the_pip_command(
    workspace: Workspace,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # Python's mark for "not there"
    picture = tmp_path / "latency.png"
    bench = ("bench", workspace.whole, "--repeats", 3, "--histogram", picture)
    assert "pip install 'sn72engine[demo]'" in refusal(capsys, 3, *bench)
    assert not picture.exists()


def test_code_4_for_bad_input(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal(capsys, 4, "inspect", "ffff")
    assert "ffff" in said
    assert "cache list" in said
    quantize = ("quantize", workspace.model, "-o", tmp_path / "q.onnx", "--data")
    assert "absent" in refusal(capsys, 4, *quantize, tmp_path / "absent")
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    assert "at least 8 must be" in refusal(capsys, 4, *quantize, tmp_path)
    assert "no such" in refusal(capsys, 4, "build", tmp_path / "absent.onnx")
    assert "names no image" in refusal(capsys, 4, "run", workspace.whole, tmp_path / "*.jpg")


def test_code_5_for_what_a_step_refuses(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal(capsys, 5, "build", workspace.model, "--precision", "int8")
    assert "quantize first" in said
    factory = f"{workspace.folder / 'factories.py'}:random"
    said = refusal(capsys, 5, "export", factory, "--input", "3x16x16", "-o", tmp_path / "r.onnx")
    assert "does not compute what the module does" in said
    said = refusal(
        capsys,
        *(5, "quantize", workspace.int8_model, "--data", workspace.photos),
        *("-o", tmp_path / "q.onnx"),
    )
    assert "already quantised" in said
    assert list(tmp_path.iterdir()) == []


def test_code_7_for_a_stage_that_fails(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Nothing listens on the discard port.
    stage = {"name": "ask", "vlm": {"url": "http://127.0.0.1:9", "model": "m", "timeout": 1.0}}
    (tmp_path / "ask.yaml").write_text(json.dumps({"stages": [stage]}))
    said = refusal(capsys, 7, "calibrate", tmp_path / "ask.yaml", "--data", workspace.labels)
    assert "stage 'ask', image 0" in said


def test_code_4_for_a_file_that_cannot_be_written(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    output = tmp_path / "file" / "results.jsonl"
    said = refusal(capsys, 4, "run", workspace.cascade, workspace.photos, "-o", output)
    assert str(output) in said
    said = refusal(capsys, 4, "quantize", workspace.model, "--data", workspace.photos, "-o", output)
    assert str(tmp_path / "file") in said


def test_run_finds_out_before_the_work_that_it_cannot_write(
    workspace: Workspace,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sn72engine.cascade import Cascade

    def called(*_: object, **__: object) -> None:
        raise AssertionError("images were run")

    monkeypatch.setattr(Cascade, "__call__", called)
    (tmp_path / "file").write_text("in the way")
    refusal(capsys, 4, "run", workspace.cascade, workspace.photos, "-o", tmp_path / "file" / "r")


def test_a_failing_run_leaves_the_old_results(
    workspace: Workspace,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sn72engine.cascade import Cascade

    run, calls = Cascade.__call__, []

    def second_call_stops(self: Cascade, images: Any, **options: Any) -> Any:
        calls.append(len(images))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run(self, images, **options)

    monkeypatch.setattr(Cascade, "__call__", second_call_stops)
    (tmp_path / "r.jsonl").write_text("old")
    arguments = ("run", workspace.cascade, workspace.photos, "-o", tmp_path / "r.jsonl")
    assert cli.main([str(a) for a in arguments]) == 130
    capsys.readouterr()
    assert len(calls) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["r.jsonl"]
    assert (tmp_path / "r.jsonl").read_text() == "old"


@pytest.mark.parametrize("score", ["sigmoid", "softmax", "probability", "top1"])
def test_the_answer_of_an_engine_by_itself_stands(workspace: Workspace, score: str) -> None:
    spec = cascade_spec(argparse.Namespace(subject=workspace.whole, score=score))
    low, high = spec.stages[0].thresholds
    # Nothing lies between them: no answer is left undecided but a tie.
    assert low == high


def test_a_flag_runs_the_stage_that_waits_for_it(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = CascadeSpec.from_yaml(workspace.cascade)
    first, second = (replace(stage, low=0.0, high=1.0) for stage in spec.stages)
    waiting = replace(spec, stages=(first, replace(second, when="night")))
    path = workspace.folder / "night.yaml"
    path.write_text(waiting.to_yaml(workspace.folder))
    photo = workspace.photos / "0.png"
    for flags, stage in (((), "corner"), (("--flag", "night"), "whole")):
        data = answer(capsys, "run", path, photo, *flags)
        assert data["results"][0]["stage"] == stage
    said = refusal(capsys, 2, "run", path, photo, "--flag", "day")
    assert "'day'; triggers: night" in said


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    command = f"{sys.executable} -m sn72engine cache list --json | true"
    done = subprocess.run(
        ["sh", "-c", command],
        capture_output=True,
        text=True,
        env={**os.environ, "SN72_CACHE_DIR": str(tmp_path)},
        check=False,
    )
    assert done.stderr == ""


def test_calibrate_checks_its_options_before_it_scores(
    workspace: Workspace,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sn72engine.cascade import tuning

    monkeypatch.setattr(tuning, "score_stages", lambda *_: pytest.fail("images were scored"))
    arguments = ("calibrate", workspace.cascade, "--data", workspace.labels, "--confidence", "2")
    assert "confidence=2.0" in refusal(capsys, 2, *arguments)


def test_verify_takes_labels_from_all_of_the_data(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Sorted by label, as a folder per class is: the first ten all have one label.
    paths, labels = labelled(workspace.labels)
    order = np.argsort(labels, kind="stable")
    table = tmp_path / "sorted.csv"
    rows = [
        f"{paths[i].resolve()},{labels[i]},{'all' if n else 'one'}" for n, i in enumerate(order)
    ]
    table.write_text("file,label,split\n" + "\n".join(rows) + "\n")
    common = ("verify", workspace.whole, "--reference", workspace.whole, "--no-speed")
    seen: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        import sn72engine.verifier

        real = sn72engine.verifier.verify
        patch.setattr(
            sn72engine.verifier,
            "verify",
            lambda *a, labels=None, **k: seen.append(labels) or real(*a, labels=labels, **k),
        )
        data = answer(capsys, *common, "--data", table, "--labels", "--limit", 10)
    assert data["samples"] == 10
    assert set(seen[0]) == {0, 1}
    # Without labels the split holds too.
    assert answer(capsys, *common, "--data", table, "--split", "one")["samples"] == 1


def test_verify_records_its_verdict_however_the_engine_is_named(
    workspace: Workspace,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = Store().root / "engines" / workspace.corner
    Store().update_manifest(open_engine(folder), verification=None)
    (tmp_path / "link").symlink_to(folder)
    arguments = ("--reference", workspace.corner, "--data", workspace.photos, "--no-speed")
    answer(capsys, "verify", tmp_path / "link", *arguments, "--limit", 4)
    verification = open_engine(folder).manifest.verification
    assert verification is not None
    assert verification["samples"] == 4


def test_what_is_no_engine_is_named(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "sn72engine build" in refusal(capsys, 4, "bench", workspace.model)
    assert "''" in refusal(capsys, 4, "bench", "")


def test_code_130_when_interrupted(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    factory = f"{workspace.folder / 'factories.py'}:stopped"
    code = cli.main(["export", factory, "--input", "3x16x16", "-o", str(tmp_path / "m.onnx")])
    assert code == 130
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_has_examples_and_exit_codes(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert f"  sn72engine {command}" in printed
    for code in (0, 1, 2, 3, 4, 5, 6, 7, 130):
        assert f"\n    {code} " in printed


def test_every_argument_has_a_help_text() -> None:
    [commands] = [action for action in cli.parser()._actions if action.dest == "command"]
    assert isinstance(commands.choices, dict)
    silent = [
        f"{name} {action.dest}"
        for name, command in commands.choices.items()
        for action in command._actions
        if not action.help
    ]
    assert silent == []


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_examples_in_the_help_parse(command: str) -> None:
    """Every example of a sub-command is a command line that its parser takes."""
    import importlib
    import shlex

    text = importlib.import_module(f"sn72engine.cli.{command}").EXAMPLES.replace("\\\n", " ")
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        if words[0] == "sn72engine":
            arguments = [word for word in words[1:] if word != ">"]
            if ">" in words:
                arguments = words[1 : words.index(">")]
            assert cli.parser().parse_args(arguments).command == command


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    import sn72engine

    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"sn72engine {sn72engine.__version__}\n"


def test_batch_ranges() -> None:
    assert batch_range("4") == ShapeRange(4, 4, 4)
    assert batch_range("1:8:32") == ShapeRange(1, 8, 32)


def test_key_values_are_json_where_they_can_be() -> None:
    pairs = ["a=1", "b=1.5", "c=true", "d=text", "e=x=y", "f="]
    wanted = {"a": 1, "b": 1.5, "c": True, "d": "text", "e": "x=y", "f": ""}
    assert key_values(pairs) == wanted


def test_preprocess_from_a_file_and_from_pairs(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text("height: 16\nwidth: 24\nfit: pad\nmean: [1, 2, 3]\n")
    wanted = Preprocess(height=16, width=24, fit="pad", mean=(1, 2, 3))
    assert preprocess_argument(str(file)) == wanted
    assert preprocess_argument("height=16,width=24,fit=pad,mean=1/2/3") == wanted
    for text in ("a: [", "\x00", "- 1"):
        file.write_text(text)
        with pytest.raises(argparse.ArgumentTypeError, match=r"p\.yaml"):
            preprocess_argument(str(file))


def test_objects_from_modules_and_files(tmp_path: Path) -> None:
    assert load_object("json:loads") is json.loads
    with pytest.raises(OptionError, match="form package"):
        load_object("json.loads")
    with pytest.raises(InputError, match="no such Python file"):
        load_object(f"{tmp_path / 'absent.py'}:x")
