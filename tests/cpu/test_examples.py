"""Every example runs as its reader would run it, on something small."""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from sn72engine.cascade.spec import CascadeSpec
from sn72engine.engine_folder import open_engine
from sn72engine.roadscenes import write_dataset

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))

pytestmark = pytest.mark.slow


def run(name: str, cache: Path, *arguments: object) -> str:
    """What an example prints, standard error included."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=cache,
        env={**os.environ, "PYTHONPATH": str(ROOT), "SN72_CACHE_DIR": str(cache)},
        check=False,
    )
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed[-4000:]
    return printed


def load(name: str) -> ModuleType:
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def cascade(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder of the cascade that run_cascade.py makes where there is none, and its output."""
    folder = tmp_path_factory.mktemp("cascade")
    return folder, run("run_cascade.py", folder, "--quick", "--output", folder, "--threads", 1)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_short_and_says_how_it_is_used(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 190
    assert f"python examples/{path.name}" in text.split('"""')[1]


def test_a_cascade_is_made_and_run(cascade: tuple[Path, str]) -> None:
    folder, printed = cascade
    assert "200 pictures, 50% with roadwork" in printed
    assert "certificate: " in printed
    assert printed.count("scene ") == 16
    assert "1 calls, 16 samples" in printed
    assert (folder / "pareto.png").read_bytes().startswith(b"\x89PNG")
    spec = CascadeSpec.from_yaml(folder / "road.yaml")
    for stage in spec.stages:
        assert stage.engine is not None
        # Inside the folder, so that it can be moved as a whole.
        assert Path(stage.engine).is_relative_to(folder)
        open_engine(stage.engine)


def test_a_given_cascade_is_calibrated_on_given_pictures(
    cascade: tuple[Path, str], tmp_path: Path
) -> None:
    folder, _ = cascade
    printed = run(
        *("calibrate_cascade.py", folder, "--spec", folder / "road.yaml"),
        *("--data", folder / "scenes" / "labels.csv", "--objective", "mcc", "--output", tmp_path),
    )
    assert "200 pictures" in printed
    assert CascadeSpec.from_yaml(tmp_path / "road.yaml").stages


def test_a_given_cascade_runs_on_files_and_folders(
    cascade: tuple[Path, str], tmp_path: Path
) -> None:
    folder, _ = cascade
    write_dataset(tmp_path, 3, 1, size=96, suffix=".png")
    single = folder / "scenes" / "images" / "00007.jpg"
    printed = run(
        "run_cascade.py", folder, "--spec", folder / "road.yaml", tmp_path / "images", single
    )
    assert [line.split()[0] for line in printed.splitlines()[1:5]] == [
        *(str(tmp_path / "images" / f"0000{i}.png") for i in range(3)),
        str(single),
    ]
    assert "1 calls, 4 samples" in printed


def test_a_given_model_is_mixed_on_given_pictures(
    cascade: tuple[Path, str], tmp_path: Path
) -> None:
    pytest.importorskip("modelopt")
    folder, _ = cascade
    write_dataset(tmp_path / "check", 8, 5, size=96)
    printed = run(
        *("mix_formats.py", folder, "--model", folder / "small_cnn.onnx", "--card", "rtx4090"),
        *("--data", folder / "scenes" / "images", "--check", tmp_path / "check" / "images"),
        *("--samples", 8, "--output", tmp_path),
    )
    assert "passed: 8 samples" in printed
    assert (tmp_path / "mixed.onnx").is_file()
    assert (tmp_path / "mix.png").read_bytes().startswith(b"\x89PNG")


def test_a_miner_loads_the_cascade(cascade: tuple[Path, str]) -> None:
    folder, _ = cascade
    printed = run("miner_detector.py", folder, "--config", folder / "road.yaml")
    assert printed.count(" ms  scene ") == 8
    assert "awaited together: " in printed


def test_dinov3_from_weights_on_disk(tmp_path: Path) -> None:
    import torch

    transformers = pytest.importorskip("transformers")
    pytest.importorskip("tensorrt_rtx")
    example = load("build_dinov3.py")
    config = transformers.DINOv3ViTConfig(
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=128,
        initializer_range=0.1,
    )
    backbone = transformers.DINOv3ViTModel(config)
    backbone.to(torch.bfloat16).save_pretrained(tmp_path / "weights")
    head = example.RoadworkClassifier(backbone, 64).head
    torch.save(head.state_dict(), tmp_path / "head.pt")
    write_dataset(tmp_path / "data", 8, 1, size=96)

    given = argparse.Namespace(weights=tmp_path / "weights", head=tmp_path / "head.pt")
    model = example.make_model(given)
    assert torch.equal(model.head[0].weight, head[0].weight)
    embedding = model.backbone.embeddings.patch_embeddings.weight
    assert embedding.dtype == torch.float32
    assert torch.equal(embedding, backbone.embeddings.patch_embeddings.weight.float())

    printed = run(
        *("build_dinov3.py", tmp_path, "--weights", tmp_path / "weights"),
        *("--head", tmp_path / "head.pt", "--data", tmp_path / "data", "--output", tmp_path),
    )
    engines = [open_engine(folder).manifest for folder in (tmp_path / "engines").iterdir()]
    assert {(m.precision, m.target) for m in engines} == {
        *(("fp16", "sm_89"), ("int8", "sm_89"), ("fp8", "sm_89"), ("nvfp4", "sm_120"))
    }
    assert {str(m.batch) for m in engines} == {"1..32 (tuned for 16)"}
    cosines = [float(words.split(",")[0]) for words in printed.split("cosine ")[1:]]
    assert len(cosines) == 4
    assert min(cosines[:3]) > 0.9
    assert cosines[3] > 0.5  # 4 bits, on a model that was never trained
    assert printed.count("[peak ") == 12


def test_dinov3_with_random_weights() -> None:
    import torch

    pytest.importorskip("transformers")
    example = load("build_dinov3.py")
    model = example.make_model(argparse.Namespace(weights=None, head=None, size="small"))
    images = np.random.default_rng(0).standard_normal((2, 3, 64, 64), dtype=np.float32)
    logits = model(torch.from_numpy(images))
    assert logits.shape == (2, 1)
    assert abs(logits[0] - logits[1]) > 1e-4
    assert example.SIZES["large"] == (24, 16, 1024)


@pytest.mark.parametrize(
    ("name", "size"), [("export_florence2.py", "base"), ("export_qwen3_vl.py", "2b")]
)
def test_language_models_have_a_real_size_by_default(name: str, size: str) -> None:
    pytest.importorskip("transformers")
    assert size in load(name).SIZES


def test_florence2_answers_as_pytorch_does(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    printed = run(
        *("export_florence2.py", tmp_path, "--random-weights", "--tiny", "--output", tmp_path)
    )
    cosines = [float(words.split()[0]) for words in printed.split("cosine to PyTorch ")[1:]]
    assert len(cosines) == 3
    assert min(cosines) > 0.9999
    here, there = printed.split("ms: ")[1].splitlines()[0].split("; PyTorch's: ")
    assert here == there
    assert len(set(here.strip("[]").split(", "))) > 2  # not one word again and again
    parts = ("vision", "encoder", "decoder")
    assert all((tmp_path / f"{name}.onnx").is_file() for name in parts)


def test_florence2_from_weights_on_disk(tmp_path: Path) -> None:
    import torch

    pytest.importorskip("transformers")
    example = load("export_florence2.py")
    made = example.make_model(argparse.Namespace(weights=None, size="tiny"))
    made.to(torch.bfloat16).save_pretrained(tmp_path)
    read = example.make_model(argparse.Namespace(weights=tmp_path))
    before, after = made.state_dict(), read.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name].float()) for name in before)


def test_qwen3_vl_checkpoints(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("modelopt")
    printed = run(
        *("export_qwen3_vl.py", tmp_path, "--random-weights", "--tiny", "--samples", 8),
        *("--formats", "fp8", "--output", tmp_path),  # test_checkpoint makes the other, too
    )
    assert (tmp_path / "fp8" / "config.json").is_file()
    assert printed.count("14 linear layers quantised, 17 not: left in float by") == 1
    assert "fp8: " in printed


def test_dinov3_wants_weights_or_a_word_that_there_are_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(sys, "argv", ["build_dinov3.py"])
    with pytest.raises(SystemExit) as stopped:
        load("build_dinov3.py").main()
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "one of the arguments --weights --random-weights is required" in said
