"""Which precision builds for which card, on a small vision transformer, with TensorRT-RTX.

The table in the documentation says the same. It is the library's own answer, not this project's:
a release that changes it fails here.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from sn72engine import _deps
from sn72engine.builder import build
from sn72engine.errors import BuildError
from sn72engine.half import to_half
from sn72engine.model import OnnxModel
from sn72engine.quantizer import quantize
from sn72engine.spec import BuildOptions, Precision, QuantizeOptions, ShapeRange
from sn72engine.store import Store
from tests import quantized_models

pytestmark = pytest.mark.skipif(
    not _deps.available("tensorrt_rtx"), reason="tensorrt_rtx is not installed"
)

CARDS = ("sm_75", "sm_86", "sm_89", "sm_120")
#: Precision -> the cards that it builds for; the others are refused for lack of a type.
TABLE: dict[Precision, tuple[str, ...]] = {
    "fp16": CARDS,
    "bf16": CARDS[1:],
    "int8": CARDS,
    "fp8": ("sm_89", "sm_120"),
    "nvfp4": ("sm_120",),
    "mxfp8": ("sm_89", "sm_120"),
}
BATCH = ShapeRange(1, 4, 8)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[Precision, OnnxModel]:
    folder = tmp_path_factory.mktemp("models")
    exported = quantized_models.exported("transformer")
    made: dict[Precision, OnnxModel] = {"fp16": exported}
    made["bf16"] = to_bfloat16(exported, folder / "bf16.onnx")
    for precision in ("int8", "fp8", "nvfp4", "mxfp8"):
        options = QuantizeOptions(precision=precision, method="max")  # type: ignore[arg-type]
        path = folder / f"{precision}.onnx"
        made[precision] = quantize(exported, quantized_models.data(8), options, path)  # type: ignore[index]
    return made


def to_bfloat16(model: OnnxModel, path: Path) -> OnnxModel:
    """The model with bfloat16 weights and arithmetic, and float32 inputs and outputs."""
    kind = onnx.TensorProto.BFLOAT16
    proto = onnx.load(model.path)
    graph = proto.graph
    del graph.value_info[:]

    def rounded(tensor: onnx.TensorProto) -> onnx.TensorProto:
        if tensor.data_type != onnx.TensorProto.FLOAT:
            return tensor
        values = onnx.numpy_helper.to_array(tensor).astype(
            onnx.helper.tensor_dtype_to_np_dtype(kind)
        )
        return onnx.numpy_helper.from_array(values, tensor.name)

    for tensor in graph.initializer:
        tensor.CopyFrom(rounded(tensor))
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                attribute.t.CopyFrom(rounded(attribute.t))
            if attribute.name == "to" and attribute.i == onnx.TensorProto.FLOAT:
                attribute.i = kind
        node.input[:] = [f"{n}.bf16" if n == graph.input[0].name else n for n in node.input]
        node.output[:] = [f"{n}.bf16" if n == graph.output[0].name else n for n in node.output]
    first, last = graph.input[0].name, graph.output[0].name
    graph.node.insert(0, onnx.helper.make_node("Cast", [first], [f"{first}.bf16"], to=kind))
    graph.node.append(onnx.helper.make_node("Cast", [f"{last}.bf16"], [last], to=1))
    onnx.save(proto, path)
    return OnnxModel.open(path)


def options(precision: Precision, card: str) -> BuildOptions:
    return BuildOptions(backend="tensorrt_rtx", target=card, precision=precision, batch=BATCH)


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("precision", TABLE)
def test_precision_builds_for_card(
    models: dict[Precision, OnnxModel], tmp_path: Path, precision: Precision, card: str
) -> None:
    model, store = models[precision], Store(tmp_path / "store")
    if card in TABLE[precision]:
        engine = build(model, options(precision, card), store=store)
        assert engine.manifest.precision == precision
        assert engine.path.stat().st_size > 10_000
        return
    with pytest.raises(BuildError, match=r"sm\d+ lacks .*(fp8|fp4|b16)"):
        build(model, options(precision, card), store=store)
    assert store.entries() == ()


def test_one_file_for_cards_that_all_have_the_type(
    models: dict[Precision, OnnxModel], tmp_path: Path
) -> None:
    store = Store(tmp_path / "store")
    both = build(models["fp8"], options("fp8", "sm_89,sm_120"), store=store)
    assert both.manifest.target == "sm_89,sm_120"
    with pytest.raises(BuildError, match="sm86 lacks fp8"):
        build(models["fp8"], options("fp8", "sm_86,sm_89"), store=store)


def test_bfloat16_is_not_for_onnx_runtime_on_a_cpu(
    models: dict[Precision, OnnxModel], tmp_path: Path
) -> None:
    with pytest.raises(BuildError, match=r"[Bb]float16 files are for GPUs: export .* float32"):
        build(
            models["bf16"],
            BuildOptions(precision="bf16", batch=BATCH),
            store=Store(tmp_path / "store"),
        )


def test_a_float16_file_with_float32_inputs_is_taken_for_what_it_is(
    models: dict[Precision, OnnxModel], tmp_path: Path
) -> None:
    exported = models["fp16"]
    to_half(exported.path, tmp_path / "half.onnx")
    half = OnnxModel.open(tmp_path / "half.onnx")
    assert half.inputs[0].dtype == "float32"
    assert (exported.precision, half.precision) == ("fp32", "fp16")
    engine = build(half, options("fp16", "sm_89"), store=Store(tmp_path / "store"))
    # Converting it once more would have left a remark, or failed.
    assert not any("converted" in note for note in engine.manifest.notes)
