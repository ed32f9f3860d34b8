from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

from sn72engine.errors import ExportError
from sn72engine.exporter import export
from sn72engine.model import OnnxModel
from sn72engine.spec import ExportOptions, Preprocess
from tests import tiny_modules

IMAGE = torch.zeros(1, 3, 16, 16)
ONE = ExportOptions(parity_batches=(3,))


def run(model: OnnxModel, *inputs: np.ndarray) -> list[np.ndarray]:
    session = ort.InferenceSession(str(model.path), providers=["CPUExecutionProvider"])
    return session.run(None, {s.name: x for s, x in zip(model.inputs, inputs, strict=True)})


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("make", [tiny_modules.residual_net, tiny_modules.transformer])
def test_computes_what_the_module_computes_at_any_batch(make, tmp_path):
    module = make()
    model = export(module, ExportOptions(), tmp_path / "m.onnx", example=IMAGE)
    assert model.inputs[0].shape == ("batch", 3, 16, 16)
    assert model.outputs[0].shape[0] == "batch"
    for batch in (1, 4, 7):
        x = torch.randn(batch, 3, 16, 16)
        with torch.no_grad():
            expected = module(x).numpy()
        np.testing.assert_allclose(run(model, x.numpy())[0], expected, atol=1e-5)


def test_record_says_how_it_was_made(tmp_path):
    preprocess = Preprocess(height=16, width=16)
    options = ExportOptions(parity_batches=(1, 6))
    model = export(
        tiny_modules.residual_net(),
        options,
        tmp_path / "m.onnx",
        example=IMAGE,
        preprocess=preprocess,
    )
    again = OnnxModel.open(model.path)
    assert again == model
    assert again.preprocess == preprocess
    record = again.record["export"]
    assert ExportOptions.from_dict(record["options"]) == options
    assert record["torch"] == torch.__version__
    assert [p["batch"] for p in record["parity"]] == [1, 6]
    assert all(0 <= p["max_abs_error"] < 1e-4 for p in record["parity"])
    assert record["cleanup"]["nodes_after"] == len(onnx.load(model.path).graph.node)


class TwoByTwo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, left, ids):
        x = self.layer(left)
        return {"sum": x + ids.unsqueeze(1), "ids": ids * 2}


def test_several_inputs_and_outputs_of_other_types(tmp_path):
    options = ExportOptions(input_names=("left", "ids"), output_names=("sum", "twice"))
    example = (torch.zeros(1, 4), torch.tensor([7]))
    module = TwoByTwo()
    model = export(module, options, tmp_path / "m.onnx", example=example)
    assert [s.dtype for s in model.inputs] == ["float32", "int64"]
    left, ids = torch.randn(3, 4), torch.tensor([1, 2, 3])
    total, twice = run(model, left.numpy(), ids.numpy())
    np.testing.assert_allclose(total, module(left, ids)["sum"].detach().numpy(), atol=1e-6)
    np.testing.assert_array_equal(twice, [2, 4, 6])


def test_variadic_forward(tmp_path):
    class Sum(nn.Module):
        def forward(self, *parts):
            return parts[0] + parts[1]

    options = ExportOptions(input_names=("a", "b"), output_names=("c",))
    model = export(
        Sum(), options, tmp_path / "m.onnx", example=(torch.zeros(1, 2), torch.zeros(1, 2))
    )
    assert [s.shape for s in model.inputs] == [("batch", 2)] * 2


def test_large_weights_go_to_a_second_file(tmp_path):
    module = tiny_modules.transformer()
    options = ExportOptions(external_data_bytes=1000, parity_batches=(2,))
    model = export(module, options, tmp_path / "m.onnx", example=IMAGE)
    assert leftovers(tmp_path) == ["m.onnx", "m.onnx.data"]
    assert model.external_files() == (tmp_path / "m.onnx.data",)
    x = torch.randn(2, 3, 16, 16)
    np.testing.assert_allclose(run(model, x.numpy())[0], module(x).detach().numpy(), atol=1e-5)
    # A smaller successor does not leave the old weights behind.
    export(module, ONE, tmp_path / "m.onnx", example=IMAGE)
    assert leftovers(tmp_path) == ["m.onnx"]


def test_module_is_left_as_it_was(tmp_path):
    module = tiny_modules.residual_net()
    module.train()
    module.stem.eval()
    flags = [part.training for part in module.modules()]
    statistics = module.stem[1].running_mean.clone()
    export(module, ONE, tmp_path / "m.onnx", example=IMAGE)
    assert [part.training for part in module.modules()] == flags
    assert torch.equal(module.stem[1].running_mean, statistics)
    assert torch.is_grad_enabled()


def test_says_nothing(tmp_path):
    code = (
        "import pathlib, sys, torch\n"
        "from sn72engine.exporter import export\n"
        "from sn72engine.spec import ExportOptions\n"
        "export(torch.nn.Linear(3, 2), ExportOptions(), pathlib.Path(sys.argv[1]),"
        " example=torch.zeros(1, 3))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "m.onnx")],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert (done.stdout, done.stderr) == ("", "")


def test_half_precision_is_held_to_its_own_rounding(tmp_path):
    module = tiny_modules.residual_net().half()
    model = export(module, ONE, tmp_path / "m.onnx", example=IMAGE.half())
    assert model.precision == "fp16"
    (parity,) = model.record["export"]["parity"]
    assert 0 < parity["rounding"] < 0.05
    assert parity["max_abs_error"] <= 1e-4 + 1e-3 * 10 + 4 * parity["rounding"]


class Wrong(nn.Module):
    """Gives something else to the exporter than to its user."""

    def forward(self, x):
        return x * (1.01 if torch.compiler.is_exporting() else 1.0)


def test_mismatch_is_refused_with_figures_and_the_old_file_stays(tmp_path):
    path = tmp_path / "m.onnx"
    export(nn.Linear(4, 4), ONE, path, example=torch.zeros(1, 4))
    before = path.read_bytes()
    with pytest.raises(ExportError, match=r"batch 3: max abs error 0\.0\d+, max rel") as caught:
        export(Wrong(), ONE, path, example=torch.zeros(1, 4))
    assert "parity_atol=0.0001" in str(caught.value)
    assert path.read_bytes() == before
    assert leftovers(tmp_path) == ["m.onnx"]


def test_mismatch_in_half_precision_is_refused(tmp_path):
    with pytest.raises(ExportError, match="does not compute what the module does"):
        export(Wrong(), ONE, tmp_path / "m.onnx", example=torch.zeros(1, 4).half())


def test_nan_on_one_side_only_is_a_mismatch(tmp_path):
    class Nan(nn.Module):
        def forward(self, x):
            return x * (float("nan") if torch.compiler.is_exporting() else 1.0)

    with pytest.raises(ExportError, match="max abs error inf"):
        export(Nan(), ONE, tmp_path / "m.onnx", example=torch.zeros(1, 4))
    assert not leftovers(tmp_path)


class FixedReshape(nn.Module):
    def forward(self, x):
        return x.reshape(2, 4) * 2


class PairsUp(nn.Module):
    def forward(self, x):
        return x.reshape(-1, 2, 4).sum(1)


class SumsUp(nn.Module):
    def forward(self, x):
        return x.sum(0)


@pytest.mark.parametrize("module", [FixedReshape(), PairsUp(), SumsUp()])
def test_fixed_batch_is_found_and_explained(module, tmp_path):
    with pytest.raises(ExportError, match=r"batch axis is not free.*reshape.*dynamic_batch=False"):
        export(module, ONE, tmp_path / "m.onnx", example=torch.zeros(1, 4))
    assert not leftovers(tmp_path)


def test_fixed_batch_may_be_asked_for(tmp_path):
    options = ExportOptions(dynamic_batch=False)
    model = export(FixedReshape(), options, tmp_path / "m.onnx", example=torch.zeros(2, 4))
    assert model.inputs[0].shape == (2, 4)
    assert [p["batch"] for p in model.record["export"]["parity"]] == [2]


@pytest.mark.parametrize(
    ("module", "options", "example", "message"),
    [
        (nn.Linear(4, 2), ExportOptions(input_names=("a", "b")), torch.zeros(1, 4), "1 tensors"),
        (nn.Linear(4, 2), ExportOptions(output_names=("a", "b")), torch.zeros(1, 4), "returns 1"),
        (
            nn.Linear(4, 2),
            ExportOptions(input_names=("a", "b")),
            (torch.zeros(1, 4), torch.zeros(1, 4)),
            r"forward\(input.*cannot be called with 2 inputs",
        ),
        (nn.Linear(4, 2), ExportOptions(), torch.zeros(1, 5), r"fails on the example \(\(2, 5\)"),
        (nn.Linear(4, 2), ExportOptions(), torch.tensor(1.0), "axis 0 must be the batch"),
        (nn.Linear(4, 2), ExportOptions(), torch.zeros(0, 4), "at least one sample"),
        (nn.Linear(4, 2), ExportOptions(), torch.zeros(1, 4).double(), "float64"),
        (nn.Linear(4, 2), ExportOptions(), ("x",), "is str, not a tensor"),
    ],
)
def test_wrong_arguments_are_named(module, options, example, message, tmp_path):
    with pytest.raises(ExportError, match=message):
        export(module, options, tmp_path / "m.onnx", example=example)
    assert not leftovers(tmp_path)


def test_what_cannot_be_exported_says_why(tmp_path):
    class Branches(nn.Module):
        def forward(self, x):
            return x if x.sum().item() > 0 else -x

    with pytest.raises(ExportError, match="Branches cannot be exported to opset 20"):
        export(Branches(), ONE, tmp_path / "m.onnx", example=torch.zeros(1, 4))


def test_parity_inputs_are_seeded(tmp_path):
    module = tiny_modules.transformer()
    errors = [
        json.dumps(
            export(module, ExportOptions(seed=seed), tmp_path / f"{n}.onnx", example=IMAGE).record[
                "export"
            ]["parity"]
        )
        for n, seed in enumerate((0, 0, 1))
    ]
    assert errors[0] == errors[1] != errors[2]
