"""Ranges from a PyTorch module by ModelOpt, and the file that comes of them."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from sn72engine import torch_ranges
from sn72engine.builder import build
from sn72engine.errors import BuildError, CalibrationError, QuantizationError
from sn72engine.exporter import export
from sn72engine.qdq import lower_for_cpu
from sn72engine.quantizer import quantize
from sn72engine.quiet import quiet
from sn72engine.session import load
from sn72engine.spec import BuildOptions, ExportOptions, QuantizeOptions, ShapeRange
from sn72engine.store import Store
from sn72kernels.ops.quantize_blocks import reference
from tests import quantized_models, tiny_modules
from tests.quantized_models import data, exported, images

LAYERS = ("qkv", "out", "up", "down")


class Tower(nn.Module):
    """Layers whose paths ModelOpt's ready-made configurations leave out, and one they take."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.vision_tower = nn.Linear(32, 32)
        self.lm_head = nn.Linear(32, 32)
        self.unused = nn.Linear(32, 32)
        self.last = nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.lm_head(self.vision_tower(x).relu()).relu())


def batches(count: int = 4, scale: float = 1.0) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [scale * rng.standard_normal((8, 32), dtype=np.float32) for _ in range(count)]


def test_layers_with_any_name_get_their_range():
    module, given = Tower(), batches()
    wanted = {"vision_tower": "int8", "lm_head": "fp8"}
    found = torch_ranges.collect(module, wanted, given, "max")
    x = np.concatenate(given)
    assert found["vision_tower"].amax == pytest.approx(np.abs(x).max())
    inner = module.vision_tower(torch.from_numpy(x)).relu().detach().numpy()
    assert found["lm_head"].amax == pytest.approx(inner.max())
    np.testing.assert_allclose(found["lm_head"].mean, inner.mean(0), rtol=1e-5)


def test_means_are_those_of_each_channel_whatever_the_layer_and_batch():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.linear = nn.Conv2d(3, 32, 3), nn.Linear(6, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(self.conv(x))

    module, rng = Both(), np.random.default_rng(3)
    x = rng.random((5, 3, 8, 8), dtype=np.float32) + np.float32([1, 10, -5])[:, None, None]
    given = [x[:4], x[4:]]
    found = torch_ranges.collect(module, dict.fromkeys(("conv", "linear"), "fp8"), given, "max")
    np.testing.assert_allclose(found["conv"].mean, x.mean((0, 2, 3)), rtol=1e-5)
    with torch.no_grad():
        inner = module.conv(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(found["linear"].mean, inner.mean((0, 1, 2)), rtol=1e-5, atol=1e-6)


class One(nn.Module):
    """One layer, called with its input by name."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(input=x)


@pytest.mark.parametrize(
    ("layer", "shape", "axis"),
    [
        (nn.Linear(16, 16), (4, 3, 16), 2),
        (nn.Linear(16, 16), (16,), 0),
        (nn.Conv1d(16, 16, 3), (4, 16, 5), 1),
        (nn.Conv2d(16, 32, 3, groups=4, dilation=2), (4, 16, 6, 7), 1),
        (nn.Conv2d(16, 16, 3), (16, 6, 7), 0),
        (nn.Conv3d(16, 16, 2), (4, 16, 2, 3, 4), 1),
    ],
)
def test_means_are_those_of_the_channel_axis(layer, shape, axis):
    x = np.random.default_rng(4).random(shape, dtype=np.float32)
    found = torch_ranges.collect(One(layer), {"layer": "fp8"}, [x], "max")["layer"]
    others = tuple(i for i in range(x.ndim) if i != axis)
    np.testing.assert_allclose(found.mean, x.mean(others), rtol=1e-5)
    assert found.amax == pytest.approx(x.max())


def test_a_layer_that_is_called_twice_has_the_mean_of_both_calls():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x) + self.layer(x[:, :1] + 3)

    x = np.random.default_rng(5).random((4, 2, 16), dtype=np.float32)
    found = torch_ranges.collect(Twice(), {"layer": "fp8"}, [x], "max")["layer"]
    rows = np.concatenate([x.reshape(8, 16), x[:, 0] + 3])
    np.testing.assert_allclose(found.mean, rows.mean(0), rtol=1e-5)


def test_smoothing_leaves_convolutions_to_their_largest_magnitude():
    module = nn.Sequential(nn.Conv2d(16, 16, 1), nn.Flatten(), nn.Linear(64, 16))
    x = np.random.default_rng(6).random((4, 16, 2, 2), dtype=np.float32)
    found = torch_ranges.collect(module, {"0": "int8", "2": "int8"}, [x], "smoothquant")
    assert found["0"].smooth is None
    assert found["0"].amax == pytest.approx(x.max())
    assert found["2"].smooth.shape == (64,)


@pytest.mark.parametrize("method", ["max", "smoothquant"])
def test_smoothed_layers_have_their_means_unsmoothed(method):
    given = batches()
    given[0][0, 5] = 40.0
    found = torch_ranges.collect(Tower(), {"vision_tower": "int8"}, given, method)
    wanted = np.concatenate(given).mean(0)
    np.testing.assert_allclose(found["vision_tower"].mean, wanted, rtol=1e-5, atol=1e-6)


def test_the_usual_configuration_would_have_left_a_layer_out():
    """What the count of enabled quantizers protects from."""
    mtq = torch_ranges._modelopt()
    with quiet():
        twin = mtq.quantize(Tower(), {**mtq.INT8_DEFAULT_CFG, "algorithm": None})
    assert twin.last.input_quantizer.is_enabled
    assert not twin.vision_tower.input_quantizer.is_enabled
    assert not twin.lm_head.input_quantizer.is_enabled


def test_quantizers_that_were_not_switched_on_are_an_error(monkeypatch):
    usual = torch_ranges._config

    def without_heads(wanted, method):
        return [*usual(wanted, method), {"quantizer_name": "*lm_head*", "enable": False}]

    monkeypatch.setattr(torch_ranges, "_config", without_heads)
    with pytest.raises(QuantizationError, match=r"enabled 1 of the 2 .* missing lm_head"):
        torch_ranges.collect(Tower(), {"vision_tower": "int8", "lm_head": "int8"}, batches(), "max")


def test_a_layer_that_never_ran_is_an_error():
    with pytest.raises(QuantizationError, match="'unused' was not called"):
        torch_ranges.collect(Tower(), {"unused": "int8"}, batches(), "max")


def test_no_data_and_overflow_are_errors():
    with pytest.raises(CalibrationError, match="holds no batch"):
        torch_ranges.collect(Tower(), {"last": "int8"}, [], "max")
    module = Tower()
    module.vision_tower.weight.data.mul_(1e30)
    module.lm_head.weight.data.mul_(1e30)
    with pytest.raises((CalibrationError, QuantizationError), match=r"NaN|infinite|inf|nan"):
        torch_ranges.collect(module, {"last": "int8"}, batches(1), "max")


@pytest.mark.parametrize("method", ["max", "smoothquant"])
def test_a_module_that_fails_is_not_blamed_on_modelopt(method):
    module = Tower()
    given = [*batches(1), np.zeros((8, 31), np.float32)]
    with pytest.raises(CalibrationError, match=r"^the module fails on calibration batch 1, .*31"):
        torch_ranges.collect(module, {"last": "int8"}, given, method)
    assert not any(part._forward_pre_hooks for part in module.modules())


@pytest.mark.parametrize("method", ["max", "entropy", "smoothquant"])
def test_the_module_is_the_same_afterwards_and_nothing_holds_it(method):
    module = Tower().train()
    before = {name: (t.data_ptr(), t.clone()) for name, t in module.state_dict().items()}
    kinds = [type(part) for part in module.modules()]
    torch_ranges.collect(module, dict.fromkeys(("vision_tower", "last"), "int8"), batches(), method)
    for name, tensor in module.state_dict().items():
        assert tensor.data_ptr() == before[name][0]
        assert torch.equal(tensor, before[name][1])
    assert [type(part) for part in module.modules()] == kinds
    assert all(part.training for part in module.modules())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    weight = weakref.ref(module.last.weight)
    del module, tensor
    before.clear()
    gc.collect()
    assert weight() is None


def test_entropy_cuts_outliers_and_smoothing_scales_channels():
    given = batches()
    given[0][0, 5] = 40.0
    wanted = {"vision_tower": "int8"}
    found = {
        method: torch_ranges.collect(Tower(), wanted, given, method)["vision_tower"]
        for method in ("max", "entropy", "smoothquant")
    }
    assert found["max"].amax == pytest.approx(40)
    assert found["entropy"].amax < 30
    smooth = found["smoothquant"].smooth
    assert smooth.shape == (32,)
    assert smooth.argmin() == 5
    assert found["smoothquant"].amax < 20


def test_a_module_that_was_not_exported_is_refused(tmp_path):
    with pytest.raises(QuantizationError, match="'qkv', which Tower does not have"):
        quantize(
            exported("transformer"), data(8), QuantizeOptions(), tmp_path / "q", module=Tower()
        )


def test_layers_that_modelopt_does_not_know_are_left_with_the_reason(tmp_path):
    class Own(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight.T

    module = Tower()
    module.lm_head = Own(32, 32)
    options = ExportOptions(parity_batches=(2,))
    model = export(module, options, tmp_path / "m.onnx", example=torch.zeros(1, 32))
    given = quantized_models.batches(np.concatenate(batches()), None)
    found = quantize(
        model, given, QuantizeOptions(precision="fp8"), tmp_path / "q.onnx", module=module
    ).quantization
    assert list(found["modules"].values()) == ["vision_tower"]
    assert (found["asked"], found["quantised"]) == (2, 1)
    assert "ModelOpt has no quantised form of Own (lm_head)" in found["skipped"].values()
    with pytest.raises(QuantizationError, match=r"0 quantizers enabled: .*Own"):
        quantize(
            model,
            given,
            QuantizeOptions(precision="fp8", overrides={"vision_tower": "float"}),
            tmp_path / "q2.onnx",
            module=module,
        )


def fake_block_quantize(x, block, amax, bits, exponent, scale_bits, scale_exponent):
    """ModelOpt's one operation that has no CPU form, by the kernels' reference."""
    if block == reference.NVFP4_BLOCK:
        scale = (amax.float() / (6 * 448)).reshape(())
        codes = reference.quantize_nvfp4(x, scale)
        return reference.dequantize_nvfp4(*codes, scale, x.dtype)
    return reference.dequantize_mxfp8(*reference.quantize_mxfp8(x), x.dtype)


@pytest.mark.parametrize(
    ("precision", "tolerance"), [("int8", 5e-3), ("fp8", 2e-3), ("nvfp4", 2e-2), ("mxfp8", 2e-3)]
)
def test_the_file_computes_what_modelopt_simulates(precision, tolerance, monkeypatch, tmp_path):
    mtq = torch_ranges._modelopt()
    monkeypatch.setattr(mtq.tensor_quant, "dynamic_block_quantize_op", fake_block_quantize)
    module = tiny_modules.transformer()
    # ModelOpt leaves biases as they are.
    options = QuantizeOptions(precision=precision, method="max", bias_correction=False)
    model = quantize(exported("transformer"), data(), options, tmp_path / "q.onnx", module=module)
    lower = tmp_path / "cpu.onnx"
    lower_for_cpu(model.path, lower)
    numerics = dict(torch_ranges.NUMERICS[precision])
    weight = {**numerics, "axis": 0} if "axis" in numerics else numerics
    config = [{"quantizer_name": "*", "enable": False}]
    for layer in LAYERS:
        config += [
            {"quantizer_name": f"{layer}.input_quantizer", "cfg": numerics},
            {"quantizer_name": f"{layer}.weight_quantizer", "cfg": weight},
        ]

    def forward(twin):
        for batch in data():
            twin(torch.from_numpy(batch))

    with torch.no_grad(), quiet():
        twin = mtq.quantize(module, {"quant_cfg": config, "algorithm": "max"}, forward)
        x = images(16, seed=5)
        simulated = twin(torch.from_numpy(x)).numpy()
        plain = tiny_modules.transformer()(torch.from_numpy(x)).numpy()
    found = run(lower, x)
    spread = np.abs(plain).max()
    assert np.abs(found - simulated).max() / spread < tolerance
    assert np.abs(plain - simulated).max() > 0


def run(path, x: np.ndarray) -> np.ndarray:
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    session = ort.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    return session.run(None, {"pixel_values": x})[0]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The transformer in every format by the module, and a mixed one by the file."""
    folder = tmp_path_factory.mktemp("formats")
    found = {}
    for precision in ("int8", "fp8", "nvfp4", "mxfp8"):
        options = QuantizeOptions(precision=precision, method="max")
        found[precision] = quantize(
            exported("transformer"),
            data(),
            options,
            folder / f"{precision}.onnx",
            module=tiny_modules.transformer(),
        )
    options = QuantizeOptions(
        precision="fp8", method="max", overrides={"qkv": "int8", "up": "nvfp4", "down": "mxfp8"}
    )
    found["mixed"] = quantize(exported("transformer"), data(), options, folder / "mixed.onnx")
    return found


@pytest.mark.parametrize("precision", ["int8", "fp8", "nvfp4", "mxfp8", "mixed"])
def test_every_format_is_built_and_runs_on_a_cpu(files, precision, tmp_path):
    model = files[precision]
    assert model.precision == precision
    assert (model.inputs, model.outputs) == (
        exported("transformer").inputs,
        exported("transformer").outputs,
    )
    options = BuildOptions(batch=ShapeRange(1, 2, 16))
    engine = build(model, options, store=Store(tmp_path))
    assert engine.manifest.precision == precision
    assert any("emulated" in note for note in engine.manifest.notes) == (precision != "int8")
    x = images(16, seed=8)
    wanted = run(exported("transformer").path, x)
    with load(engine) as session:
        found = session(x)
    assert np.abs(found - wanted).max() < {"int8": 0.03, "fp8": 0.05}.get(precision, 0.2)


@pytest.mark.parametrize("precision", ["fp8", "mixed"])
def test_openvino_refuses_what_it_computes_wrongly(files, precision, tmp_path):
    pytest.importorskip("openvino")
    with pytest.raises(BuildError, match=f"is {precision}, .*backend='onnxruntime'"):
        build(files[precision], BuildOptions("openvino"), store=Store(tmp_path))


def test_records_tell_layers_formats_and_modules(files):
    record = files["mixed"].quantization
    assert record["precision"] == "mixed"
    by_module = {path: record["precisions"][node] for node, path in record["modules"].items()}
    assert by_module == {"qkv": "int8", "out": "fp8", "up": "nvfp4", "down": "mxfp8"}
    assert files["mixed"].formats == ("fp8", "int8", "mxfp8", "nvfp4")
    assert files["fp8"].quantization["source"] == "modelopt.torch"
    assert files["mixed"].quantization["source"] == "modelopt.onnx"


def test_ranges_from_the_module_are_those_of_the_file(files, tmp_path):
    for precision in ("fp8", "nvfp4"):
        options = QuantizeOptions(precision=precision)
        other = quantize(exported("transformer"), data(), options, tmp_path / precision)
        assert other.quantization["source"] == "onnxruntime"
        ours, theirs = (
            {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
            for path in (other.path, files[precision].path)
        )
        scales = [name for name in ours if name.endswith("_x_scale")]
        assert len(scales) == 4
        for name in scales:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "target", "works"),
    [
        ("int8", "sm_89", True),
        ("fp8", "sm_89", True),
        ("nvfp4", "sm_89", False),
        ("mxfp8", "sm_89", True),
        ("int8", "sm_120", True),
        ("fp8", "sm_120", True),
        ("nvfp4", "sm_120", True),
        ("mxfp8", "sm_120", True),
        ("mixed", "sm_120", True),
        ("fp8", "sm_86", False),
    ],
)
def test_tensorrt_rtx_builds_what_the_card_has(files, precision, target, works, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    options = BuildOptions("tensorrt_rtx", batch=ShapeRange(1, 2, 4), target=target)
    if not works:
        with pytest.raises(BuildError):
            build(files[precision], options, store=Store(tmp_path))
        return
    engine = build(files[precision], options, store=Store(tmp_path))
    assert (engine.manifest.precision, engine.manifest.target) == (precision, target)


def test_smoothing_needs_the_module(tmp_path):
    with pytest.raises(QuantizationError, match="needs the module that was exported"):
        quantize(
            exported("transformer"),
            data(8),
            QuantizeOptions(method="smoothquant"),
            tmp_path / "q.onnx",
        )
