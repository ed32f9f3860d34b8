"""Every build option can be given on the command line, and arrives."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from sn72engine import _deps, cli
from sn72engine.cli import build, tensorrt_flags
from sn72engine.spec import BuildOptions, ShapeRange, TensorRTOptions
from tests import tiny_models

#: Flags, and the options that they stand for.
FLAGS: list[tuple[list[str], dict[str, Any]]] = [
    (["--tactic-mb", "3"], {"tactic_bytes": 3 << 20}),
    (["--max-tactics", "5"], {"max_tactics": 5}),
    (
        ["--tactic-sources", "CUDNN,JIT_CONVOLUTIONS"],
        {"tactic_sources": ("CUDNN", "JIT_CONVOLUTIONS")},
    ),
    (["--tactic-sources", "none"], {"tactic_sources": ()}),
    (["--tiling", "full"], {"tiling": "full"}),
    (["--l2-tiling-mb", "2"], {"l2_tiling_bytes": 2 << 20}),
    (["--aux-streams", "0"], {"aux_streams": 0}),
    (["--hardware-compatibility", "ampere_plus"], {"hardware_compatibility": "ampere_plus"}),
    (
        ["--version-compatible", "--exclude-lean-runtime"],
        {"version_compatible": True, "exclude_lean_runtime": True},
    ),
    (["--weight-streaming"], {"weight_streaming": True}),
    (["--refit", "identical", "--strip-weights"], {"refit": "identical", "strip_weights": True}),
    (["--profiling", "layer_names"], {"profiling": "layer_names"}),
    (["--user-allocation"], {"user_allocation": True}),
    (["--plugins", "layernorm_gelu"], {"plugins": ("layernorm_gelu",)}),
]


def parsed(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    build.arguments(parser)
    return parser.parse_args(["m.onnx", *flags])


@pytest.mark.parametrize(("flags", "options"), FLAGS)
def test_flags_become_options(flags: list[str], options: dict[str, Any]) -> None:
    assert tensorrt_flags.read(parsed(*flags)) == TensorRTOptions(**options)


def test_no_flags_are_the_defaults() -> None:
    assert tensorrt_flags.read(parsed()) == TensorRTOptions()


def test_every_option_has_a_flag() -> None:
    covered = {name for _, options in FLAGS for name in options}
    assert covered == {f.name for f in dataclasses.fields(TensorRTOptions)}
    given = set(vars(parsed()))
    others = {"workspace_bytes": "workspace_mb", "profiles": "profile", "tensorrt": "tactic_mb"}
    for field in dataclasses.fields(BuildOptions):
        assert others.get(field.name, field.name) in given


@pytest.mark.parametrize(
    ("flags", "batch"),
    [
        ([], ShapeRange()),
        (["--batch", "1:2:4"], ShapeRange(1, 2, 4)),
        (["--profile", "1:1:1", "--profile", "2:16:32"], ShapeRange(1, 16, 32)),
    ],
)
def test_the_batch_reaches_over_the_profiles(flags: list[str], batch: ShapeRange) -> None:
    assert build._batch(parsed(*flags)) == batch


@pytest.mark.skipif(not _deps.available("tensorrt_rtx"), reason="tensorrt_rtx is not installed")
def test_a_build_with_many_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SN72_CACHE_DIR", str(tmp_path / "cache"))
    model = tiny_models.linear(tmp_path / "m.onnx")
    code = cli.main(
        [
            *("build", str(model.path), "--backend", "tensorrt_rtx", "--precision", "fp16"),
            *("--target", "sm_89,sm_86", "--profile", "1:1:1", "--profile", "2:4:8"),
            *("--workspace-mb", "64", "--tiling", "fast", "--weight-streaming", "--json"),
        ]
    )
    assert code == 0
    manifest = json.loads(capsys.readouterr().out)["manifest"]
    assert manifest["target"] == "sm_86,sm_89"
    assert manifest["batch"] == {"min": 1, "opt": 4, "max": 8}
    options = json.loads(manifest["fingerprint"]["options"])
    assert options["workspace_bytes"] == 64 << 20
    assert [p["max"] for p in options["profiles"]] == [1, 8]
    assert options["tensorrt"]["tiling"] == "fast"
    assert options["tensorrt"]["weight_streaming"] is True


def test_refit_says_what_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SN72_CACHE_DIR", str(tmp_path / "cache"))
    model = tiny_models.linear(tmp_path / "m.onnx")
    assert cli.main(["build", str(model.path), "--json"]) == 0
    folder = json.loads(capsys.readouterr().out)["folder"]
    assert cli.main(["refit", folder, str(model.path)]) == 5
    assert "not built to be refitted" in capsys.readouterr().err
