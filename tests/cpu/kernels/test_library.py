"""The parts that all ops share: import, choice of implementation, checks, devices, tuning."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

import sn72kernels
from sn72kernels import device, env, library, testing
from sn72kernels.errors import ArgumentError, DtypeError, NoGpuError, check_tensor

CUDA = torch.device("cuda", 0)


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_brings_neither_torch_nor_triton() -> None:
    code = "import sys, sn72kernels; print([m for m in ('torch', 'triton') if m in sys.modules])"
    assert run_python(code) == "[]"


def test_every_op_works_where_triton_is_absent() -> None:
    """A finder that refuses Triton stands for an environment without it."""
    code = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton'", name="triton")

sys.meta_path.insert(0, Refuse())
import torch
import sn72kernels

x = torch.randn(3, 8, requires_grad=True)
sn72kernels.layernorm_gelu(x).sum().backward()
vote = sn72kernels.ensemble_vote([torch.rand(5), torch.rand(5)], [0.5, 0.5])
sn72kernels.cascade_route(vote, 0.1, 0.9, buckets=(8,))
assert "triton" not in sys.modules
x = x.detach()
q = sn72kernels.quantize(x, granularity="token", dtype=torch.float8_e4m3fn)
sn72kernels.dequantize(*q, granularity="token")
sn72kernels.dequantize_blocks(*sn72kernels.quantize_blocks(torch.randn(2, 32)))
sn72kernels.classifier_head(x, x, None, torch.rand(3), None)
heads, tables = torch.randn(1, 2, 5, 16), torch.rand(4, 16)
images = torch.zeros(9, 8, 3, dtype=torch.uint8)
sn72kernels.rope(heads, heads, tables, tables)
sn72kernels.rope_(heads, heads.clone(), tables, tables)
sn72kernels.attention(heads, heads, heads)
sn72kernels.preprocess(images, (4, 4))
sn72kernels.linear(*q, *q)
blocks = torch.randn(2, 32)
calls = {
    "attention": [heads, heads, heads], "cascade_route": [vote, 0.1, 0.9],
    "classifier_head": [x, x, None, x[0], None], "dequantize": q,
    "dequantize_blocks": sn72kernels.quantize_blocks(blocks), "ensemble_vote": [[vote], [1.0]],
    "layernorm_gelu": [x], "linear": [*q, *q], "preprocess": [images, (4, 4)], "quantize": [x],
    "quantize_blocks": [blocks], "rope": [heads, heads, tables, tables],
    "rope_": [heads, heads, tables, tables],
}
assert calls.keys() == sn72kernels.OPS.keys()
for op, args in calls.items():
    wanted = "sdpa" if op == "attention" else "reference"
    assert sn72kernels.explain(op, *args).implementation == wanted, op
assert "triton" not in sys.modules
"""
    run_python(code)


def test_every_public_op_resolves_and_explains() -> None:
    for op in sn72kernels.OPS:
        assert callable(getattr(sn72kernels, op))
        assert op in dir(sn72kernels)
    choice = sn72kernels.explain("layernorm_gelu", torch.zeros(2, 4))
    assert choice.implementation == "reference"
    assert "not on a CUDA device" in str(choice)
    with pytest.raises(ArgumentError, match="there is no op 'nothing'; there are: "):
        sn72kernels.explain("nothing")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = sn72kernels.nothing


def spec(**changes: object) -> library.OpSpec:
    parts: dict[str, object] = {
        "name": "example",
        "schema": "(Tensor x) -> Tensor",
        "reference": torch.clone,
        "launch": torch.clone,
        "fake": torch.empty_like,
    }
    return library.OpSpec(**{**parts, **changes})  # type: ignore[arg-type]


@pytest.fixture
def hopper() -> Iterator[None]:
    with device.assume(90):
        yield


@pytest.mark.usefixtures("hopper")
def test_choice_and_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1)
    monkeypatch.setattr(library, "triton_available", lambda: True)
    assert library.choose(spec(), CUDA, x).implementation == "triton"
    refused = library.choose(spec(unsupported=lambda x: "it is odd"), CUDA, x)
    assert (refused.implementation, refused.reason) == ("reference", "it is odd")
    monkeypatch.setenv("SN72_KERNELS", "reference")
    assert "SN72_KERNELS=reference" in library.choose(spec(), CUDA, x).reason
    monkeypatch.setenv("SN72_KERNELS", "fast")
    with pytest.raises(ArgumentError, match="SN72_KERNELS is 'fast'; set it to"):
        library.choose(spec(), CUDA, x)
    monkeypatch.delenv("SN72_KERNELS")
    monkeypatch.setattr(library, "triton_available", lambda: False)
    assert "pip install" in library.choose(spec(), CUDA, x).reason


def test_the_reference_runs_where_triton_has_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "triton_available", lambda: True)
    with device.assume(75):
        old = library.choose(spec(), CUDA, torch.zeros(1))
    assert (old.implementation, old.reason) == (
        "reference", "Triton compiles for sm_80 and later, and this is sm_75",
    )  # fmt: skip
    with device.assume(80):
        assert library.choose(spec(), CUDA, torch.zeros(1)).implementation == "triton"


@pytest.mark.usefixtures("hopper")
def test_float64_runs_the_reference_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    from sn72kernels.ops.layernorm_gelu import op

    monkeypatch.setattr(library, "triton_available", lambda: True)
    x = torch.zeros(1, 4, dtype=torch.float64)
    assert library.choose(op.FORWARD, CUDA, x).reason == "float64 has no kernel"
    assert library.choose(op.FORWARD, CUDA, x.float()).implementation == "triton"


def test_every_variable_is_in_the_table() -> None:
    assert {"SN72_KERNELS", "SN72_TUNING"} <= set(env.VARIABLES)


def test_check_tensor_refuses_what_is_no_tensor() -> None:
    with pytest.raises(DtypeError, match=r"expected torch.Tensor, got list; convert it with"):
        check_tensor("scores", [1.0])  # type: ignore[arg-type]


def test_compile_table_where_triton_is_absent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(library, "triton_available", lambda: False)
    assert testing.main(["--ops", "rope"]) == 2
    assert "Triton is needed to compile kernels; run: pip install" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is visible")
def test_what_needs_a_gpu_says_so() -> None:
    with pytest.raises(NoGpuError, match="a CUDA device is needed to measure its memory bandwidth"):
        device.achieved_gb_s(0)


def test_virtual_device_is_within_every_limit() -> None:
    facts = device.facts(torch.device("cpu"))
    assert facts is device.VIRTUAL
    for arch in testing.ARCHITECTURES:
        with device.assume(arch) as assumed:
            assert assumed.shared_bytes == device.SHARED_LIMITS[arch]


def test_poison_fills_and_is_taken_back() -> None:
    torch.use_deterministic_algorithms(False)
    with testing.poisoned():
        assert torch.empty(3).isnan().all()
        assert torch.empty(3, dtype=torch.int32).tolist() == [2**31 - 1] * 3
        assert torch.empty_like(torch.zeros(2)).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_assert_close_names_the_worst_element() -> None:
    want = torch.tensor([1.0, 2.0, 3.0])
    testing.assert_close("y", want + 1e-3, want, relative=0.0, absolute=1.1e-3)
    with pytest.raises(AssertionError, match=r"y: flat element 1 of \(3,\) is 2.5, expected 2.0"):
        testing.assert_close("y", torch.tensor([1.0, 2.5, 3.1]), want, relative=0.0, absolute=0.0)
    with pytest.raises(AssertionError, match=r"element 2 .* is nan"):
        testing.assert_close(
            "y", torch.tensor([1.0, 2.0, float("nan")]), want, relative=1.0, absolute=1.0
        )
    with pytest.raises(AssertionError, match="shape"):
        testing.assert_close("y", want[:2], want, relative=1.0, absolute=1.0)


def test_error_ratio() -> None:
    want = torch.tensor([3.0, 4.0])
    assert testing.error_ratio(want, want) == 0.0
    assert testing.error_ratio(want * 1.5, want) == pytest.approx(0.5)
    assert testing.error_ratio(want * float("nan"), want) == float("inf")
    assert testing.error_ratio(want[:0], want[:0]) == 0.0
