"""The plugin's pattern, its PTX and its registration, as far as they go without a card.

What the real bindings say of the registration is checked where a wheel of them is given:
``TENSORRT_BINDINGS=tensorrt_cu13_bindings-11.4...whl pytest tests/cpu/test_tensorrt_plugin.py``.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from sn72engine import _deps
from sn72engine.backends import tensorrt, tensorrt_plugin
from sn72engine.backends.tensorrt import TensorRTBackend
from sn72engine.backends.tensorrt_plugin import Kernel, LayerNormGelu, fuse
from sn72engine.errors import BuildError
from tests import tiny_models
from tests.contract import record_surface

ROOT = Path(__file__).resolve().parents[2]
WHEEL = os.environ.get("TENSORRT_BINDINGS", "")

needs_triton = pytest.mark.skipif(not _deps.available("triton"), reason="triton is not installed")

GRAPH = """pair (float[N, 7, 16] x) => (float[N, 7, 16] y) {
    n = LayerNormalization <axis = -1, epsilon = 0.001> (x, w, b)
    y = Gelu <approximate = "tanh"> (n)
}"""


def weights(cols: int = 16) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(cols).astype(np.float32) for name in ("w", "b")}


def reference(x: np.ndarray, w: np.ndarray, b: np.ndarray, eps: float, tanh: bool) -> np.ndarray:
    import torch
    from torch.nn import functional

    given = [torch.tensor(a) for a in (x, w, b)]
    normal = functional.layer_norm(given[0], (x.shape[-1],), given[1], given[2], eps)
    result: np.ndarray = functional.gelu(normal, approximate="tanh" if tanh else "none").numpy()
    return result


# The pattern


def test_the_pair_becomes_one_node_that_computes_the_same(tmp_path: Path) -> None:
    model = tiny_models.save(tmp_path / "m.onnx", GRAPH, weights())
    (plugin,) = fuse(model.path, tmp_path / "fused.onnx", 89)
    assert plugin == LayerNormGelu(16, pytest.approx(1e-3), tanh=True, arch=89)  # type: ignore[arg-type]
    fused = onnx.load(tmp_path / "fused.onnx")
    (node,) = fused.graph.node
    assert (node.op_type, node.domain) == (plugin.name, "sn72")

    class Pair(OpRun):
        op_domain = "sn72"

        def _run(self, x: Any, w: Any, b: Any, **_: Any) -> Any:
            return (reference(x, w, b, plugin.eps, plugin.tanh),)

    Pair.__name__ = plugin.name
    x = np.random.default_rng(1).standard_normal((2, 7, 16)).astype(np.float32)
    (got,) = ReferenceEvaluator(fused, new_ops=[Pair]).run(None, {"x": x})
    (want,) = ReferenceEvaluator(onnx.load(model.path)).run(None, {"x": x})
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "graph",
    [
        "no (float[N, 7, 16] x) => (float[N, 7, 16] y) { y = Gelu(x) }",
        """twice (float[N, 7, 16] x) => (float[N, 7, 16] y) {
            n = LayerNormalization(x, w, b)
            g = Gelu(n)
            y = Add(g, n)
        }""",
        """shown (float[N, 7, 16] x) => (float[N, 7, 16] y, float[N, 7, 16] n) {
            n = LayerNormalization(x, w, b)
            y = Gelu(n)
        }""",
        """other_axis (float[N, 7, 16] x) => (float[N, 7, 16] y) {
            n = LayerNormalization <axis = 1> (x, w2, b2)
            y = Gelu(n)
        }""",
        """no_bias (float[N, 7, 16] x) => (float[N, 7, 16] y) {
            n = LayerNormalization(x, w)
            y = Gelu(n)
        }""",
        """other (float[N, 7, 16] x) => (float[N, 7, 16] y) {
            n = LayerNormalization(x, w, b)
            y = Relu(n)
        }""",
        """branch (float[N, 7, 16] x, bool c) => (float[N, 7, 16] y, float[N, 7, 16] z) {
            n = LayerNormalization(x, w, b)
            y = Gelu(n)
            z = If (c) <then_branch = p () => (float[N, 7, 16] t) { t = Neg(n) },
                        else_branch = q () => (float[N, 7, 16] u) { u = Neg(x) }>
        }""",
    ],
)
def test_what_is_not_the_pair_stays(tmp_path: Path, graph: str) -> None:
    held = {**weights(), "w2": np.ones((7, 16), np.float32), "b2": np.ones((7, 16), np.float32)}
    model = tiny_models.save(tmp_path / "m.onnx", graph, held)
    assert fuse(model.path, tmp_path / "fused.onnx", 89) == ()
    assert not (tmp_path / "fused.onnx").exists()


def test_names_tell_plugins_apart_and_are_identifiers() -> None:
    plugins = [
        LayerNormGelu(cols, eps, tanh, arch)
        for cols in (768, 1024)
        for eps in (1e-5, 1e-6, 0.001, 9.999999974752427e-07)
        for tanh in (False, True)
        for arch in (89, 120)
    ]
    names = {plugin.name for plugin in plugins}
    assert len(names) == len(plugins)
    assert all(name.isidentifier() for name in names)


# The kernel


ARCHITECTURES = (80, 89, 90, 120)

COMPILED = """
import dataclasses, json, sys
from sn72engine.backends.tensorrt_plugin import LayerNormGelu, compile_kernel
print(json.dumps({
    arch: dataclasses.asdict(
        compile_kernel(LayerNormGelu(1024, 1e-6, tanh=False, arch=int(arch)), ("fp16",) * 3)
    )
    for arch in sys.argv[1:]
}))
"""


def python(code: str, *arguments: object, **env: str) -> str:
    """Run code in a process of its own: other tests may have told Triton to interpret in this."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**inherited, **env},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def kernels() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(python(COMPILED, *ARCHITECTURES))
    return found


@needs_triton
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_ptx_takes_what_tensorrt_passes_and_assembles(
    kernels: dict[str, Any], arch: int, tmp_path: Path
) -> None:
    kernel = Kernel(**kernels[str(arch)])
    head = re.search(rf"\.entry {kernel.name}\((.*?)\)", kernel.ptx, re.DOTALL)
    assert head is not None
    kinds = re.findall(r"\.param \.(\w+)", head[1])
    assert kinds == ["u64", "u64", "u64", "u32", "u64"]
    assert kernel.threads % 32 == 0
    assert kernel.rows >= 1
    target = re.search(r"\.target (sm_\d+\w*)", kernel.ptx)
    assert target is not None
    assert target[1].startswith(f"sm_{arch}")
    # What is left of the text is still a program: Triton's own assembler takes it.
    (tmp_path / "k.ptx").write_text(kernel.ptx)
    from triton import knobs

    blackwell = getattr(knobs.nvidia, "ptxas_blackwell", knobs.nvidia.ptxas)
    ptxas = blackwell if arch >= 100 else knobs.nvidia.ptxas
    done = subprocess.run(
        [ptxas.path, f"-arch={target[1]}", str(tmp_path / "k.ptx"), "-o", str(tmp_path / "k.bin")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


INTERPRETING = """
from sn72engine.backends.tensorrt_plugin import LayerNormGelu, compile_kernel
from sn72engine.errors import BuildError
try:
    compile_kernel(LayerNormGelu(16, 1e-6, tanh=False, arch=89), ("fp16",) * 3)
except BuildError as error:
    print(error)
"""


@needs_triton
def test_an_interpreted_kernel_cannot_be_compiled() -> None:
    assert "TRITON_INTERPRET is set" in python(INTERPRETING, TRITON_INTERPRET="1")


PTX = """.visible .entry k(
\t.param .u64 .ptr .global .align 1 k_param_0,
\t.param .u32 k_param_1,
\t.param .u64 .ptr .global .align 1 k_param_10
)
.reqntid 128
{{
\tld.param.b64 %rd1, [k_param_0];
\tld.param.b32 %r1, [{read}];
}}
"""


def test_hidden_parameters_are_taken_out() -> None:
    short = tensorrt_plugin.without_hidden_parameters(PTX.format(read="k_param_1"), "k", 2)
    assert "k_param_10" not in short
    assert short.count(".param .u") == 2
    assert short.endswith("[k_param_1];\n}\n")


def test_hidden_parameters_that_are_used_are_refused() -> None:
    with pytest.raises(BuildError, match="scratch memory that TensorRT does not give"):
        tensorrt_plugin.without_hidden_parameters(PTX.format(read="k_param_10"), "k", 2)
    with pytest.raises(BuildError, match="no entry point 'other'"):
        tensorrt_plugin.without_hidden_parameters(PTX.format(read="k_param_1"), "other", 2)


INTERPRETED = """
import torch
from sn72engine.backends.tensorrt_plugin_kernel import layernorm_gelu
from sn72kernels.ops.layernorm_gelu.op import tile_config
for rows, cols, tanh in ((5, 16, True), (3, 200, False)):
    torch.manual_seed(0)
    x, w, b = torch.randn(rows, cols), torch.randn(cols), torch.randn(cols)
    out, tile = torch.empty_like(x), tile_config(cols, 4)
    grid = (-(-rows // tile.rows),)
    layernorm_gelu[grid](x, w, b, rows, out, cols, 1e-6, tanh, tile.rows, tile.cols)
    want = torch.nn.functional.layer_norm(x, (cols,), w, b, 1e-6)
    want = torch.nn.functional.gelu(want, approximate="tanh" if tanh else "none")
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
print("ok")
"""


@needs_triton
def test_the_entry_point_computes_the_pair() -> None:
    assert python(INTERPRETED, TRITON_INTERPRET="1") == "ok\n"


# Registration


REGISTERED = """
import json, sys
import tensorrt_bindings
sys.modules["tensorrt"] = tensorrt_bindings
import tensorrt_bindings.plugin as trtp
from sn72engine.backends.tensorrt_plugin import LayerNormGelu, register
plugin = LayerNormGelu(16, 1e-6, False, 89)
name = register(trtp, plugin, lazily=True)
assert register(trtp, plugin, lazily=True) == name
definition = trtp._lib.QDP_REGISTRY[name]
# With the library's own description of a tensor, as it passes them when it builds.
def tensor(*sizes):
    shape = trtp.ShapeExprs(len(sizes))
    for i, size in enumerate(sizes):
        shape[i] = trtp.ShapeExpr(size)
    return trtp.TensorDesc(shape, tensorrt_bindings.float16)
x, w, b = tensor(4, 16), tensor(16), tensor(16)
out = definition.register_func(x, w, b)
assert isinstance(out, trtp.TensorDesc)
kernel, ptx, launch, numbers = definition.aot_impl_func(x, w, b, (out,), 0)
assert isinstance(launch, trtp.KernelLaunchParams) and isinstance(numbers, trtp.SymExprs)
assert len(numbers) == 1 and f".entry {kernel}(" in ptx
assert definition.num_outputs == 1 and definition.input_tensor_names == ["x", "weight", "bias"]
print(tensorrt_bindings.__version__)
"""


@needs_triton
@pytest.mark.skipif(not WHEEL, reason="TENSORRT_BINDINGS names no wheel of the bindings")
def test_the_real_bindings_take_the_registration(tmp_path: Path) -> None:
    with zipfile.ZipFile(WHEEL) as archive:
        archive.extractall(tmp_path)
    record_surface.build_stubs(next((tmp_path / "tensorrt_bindings").glob("*.so")), tmp_path)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    said = python(REGISTERED, LD_LIBRARY_PATH=str(tmp_path), PYTHONPATH=path)
    assert said.splitlines()[-1] in Path(WHEEL).name


def test_the_model_that_is_built_holds_its_plugins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known: list[LayerNormGelu] = []

    def register(trtp: Any, plugin: LayerNormGelu) -> str:
        known.append(plugin)
        return f"sn72::{plugin.name}"

    real = _deps.require

    def require(module: str, **named: Any) -> Any:
        return SimpleNamespace() if module == "tensorrt" else real(module, **named)

    monkeypatch.setattr(_deps, "require", require)
    monkeypatch.setattr(tensorrt, "register", register)
    backend = TensorRTBackend("tensorrt")
    model = tiny_models.save(tmp_path / "m.onnx", GRAPH, weights())
    source, notes = backend._with_plugins(model.path, tmp_path, "sm_90")
    assert [plugin.arch for plugin in known] == [90]
    assert notes == (f"plugins: sn72::{known[0].name}",)
    assert [node.op_type for node in onnx.load(source).graph.node] == [known[0].name]
    plain = tiny_models.linear(tmp_path / "plain.onnx")
    source, notes = backend._with_plugins(plain.path, tmp_path, "sm_90")
    assert source == plain.path
    assert "no plugin fits" in notes[0]
    assert len(known) == 1
    with pytest.raises(BuildError, match="no CUDA device is present"):
        backend._with_plugins(model.path, tmp_path, None)
