"""Our LayerNorm+GELU as a TensorRT plugin: Triton's machine code (PTX) inside the engine.

``aot_impl`` of TensorRT's plugin interface takes the text of a kernel and how to launch it when the
engine is built; nothing of Triton or Python is needed when it runs. The ONNX parser looks up an
operator that it does not know among the plugins by domain and name, so the pattern is replaced by
one node of our domain first.

A plugin is registered for each width, epsilon, form of GELU and card, instead of one with
attributes: the parser then has none to convert. Triton gives every kernel two more parameters, for
scratch memory, which TensorRT would not pass. They are taken out of the text; a kernel that uses
them is refused.
"""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sn72engine import _deps, onnx_file
from sn72engine.errors import BuildError
from sn72engine.graph_order import reads

#: Domain of our nodes in ONNX, and namespace of our plugins in TensorRT.
NAMESPACE = "sn72"

#: Longest row that the kernel holds in registers.
_WIDEST = 16384

#: TensorRT's DataType by name -> Triton's.
_TRITON_TYPES = {"FLOAT": "fp32", "HALF": "fp16", "BF16": "bf16"}

_registered: set[str] = set()
_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class LayerNormGelu:
    """One plugin.

    Args:
        cols: elements of a row.
        eps: added to the variance.
        tanh: GELU in its tanh form instead of the exact one.
        arch: compute capability that its kernel is for, as a number: 89.
    """

    cols: int
    eps: float
    tanh: bool
    arch: int

    @property
    def name(self) -> str:
        """Name of the plugin and of the ONNX operator; letters, digits and underscores only."""
        eps = re.sub(r"\W", lambda m: {"-": "m", ".": "p"}.get(m[0], "_"), f"{self.eps:.9g}")
        form = "tanh" if self.tanh else "erf"
        return f"layernorm_gelu_{form}_{self.cols}_{eps}_sm{self.arch}"


@dataclass(frozen=True, slots=True)
class Kernel:
    """A compiled kernel: entry point, PTX, threads and shared memory of a block, rows it takes."""

    name: str
    ptx: str
    threads: int
    shared_bytes: int
    rows: int


def fuse(source: Path, target: Path, arch: int) -> tuple[LayerNormGelu, ...]:
    """Write ``source`` to ``target`` with every LayerNorm+GELU as one node of our domain.

    A pair is taken where the normalisation is over the last axis, has scale and bias, and feeds
    nothing but a ``Gelu`` (operator set 20 and later).

    Args:
        source: ONNX file whose types are those of the engine.
        target: file to write.
        arch: compute capability of the card that the engine is for, as a number.

    Returns:
        The plugins that the file needs; empty when there is no such pair, and nothing is written.
    """
    onnx = _deps.require("onnx", purpose="put plugins into a model")
    proto = onnx_file.load(source)
    graph = proto.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in reads(node):
            readers.setdefault(name, []).append(node)
    results = {value.name for value in graph.output}
    found: dict[str, LayerNormGelu] = {}
    replaced: dict[str, Any] = {}
    for norm in graph.node:
        plugin = _plugin(onnx, norm, weights, arch)
        following = readers.get(norm.output[0], []) if norm.output else []
        if plugin is None or len(following) != 1 or norm.output[0] in results:
            continue
        gelu = following[0]
        if gelu.op_type != "Gelu" or gelu.domain:
            continue
        plugin = replace(plugin, tanh=_attribute(gelu, "approximate") == b"tanh")
        found[plugin.name] = plugin
        replaced[gelu.output[0]] = onnx.helper.make_node(
            plugin.name,
            list(norm.input),
            [gelu.output[0]],
            name=gelu.name,
            domain=NAMESPACE,
            plugin_namespace=NAMESPACE,
            plugin_version="1",
        )
        replaced[norm.output[0]] = None
    if not found:
        return ()
    nodes = [replaced.get(node.output[0], node) for node in graph.node]
    del graph.node[:]
    graph.node.extend(node for node in nodes if node is not None)
    proto.opset_import.append(onnx.helper.make_opsetid(NAMESPACE, 1))
    onnx_file.write(proto, target)
    return tuple(found.values())


def compile_kernel(plugin: LayerNormGelu, types: tuple[str, str, str]) -> Kernel:
    """Compile the kernel for the plugin's architecture; needs no card.

    Args:
        plugin: which one.
        types: Triton's names of the types of input (and output), weight and bias: ``fp16``.

    Raises:
        BuildError: Triton interprets here, or its kernel needs memory that TensorRT does not give.
        MissingDependencyError: Triton is not installed.
    """
    purpose = "compile a plugin"
    triton = _deps.require("triton", purpose=purpose)
    compiler = _deps.require("triton", purpose=purpose, submodule="compiler")
    backends = _deps.require("triton", purpose=purpose, submodule="backends.compiler")
    from sn72engine.backends.tensorrt_plugin_kernel import layernorm_gelu
    from sn72kernels.ops.layernorm_gelu.op import tile_config

    if not isinstance(layernorm_gelu, triton.runtime.JITFunction):
        raise BuildError(
            "Triton interprets kernels in this process (TRITON_INTERPRET is set), so none can be "
            "compiled into an engine; build in a process without it"
        )
    tile = tile_config(plugin.cols, 4 if types[0] == "fp32" else 2)
    constants = {
        "cols": plugin.cols,
        "eps": plugin.eps,
        "tanh": plugin.tanh,
        "block_rows": tile.rows,
        "block_cols": tile.cols,
    }
    x, weight, bias = (f"*{kind}" for kind in types)
    signature = {"x": x, "weight": weight, "bias": bias, "rows": "i32", "out": x}
    signature |= dict.fromkeys(constants, "constexpr")
    # TensorRT's tensors begin at multiples of 256 bytes, which lets Triton load 16 at once.
    aligned = {(index,): [["tt.divisibility", 16]] for index in (0, 1, 2, 4)}
    source = compiler.ASTSource(layernorm_gelu, signature, constants, aligned)
    target = backends.GPUTarget("cuda", plugin.arch, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": tile.warps})
    name = str(compiled.metadata.name)
    return Kernel(
        name=name,
        ptx=without_hidden_parameters(str(compiled.asm["ptx"]), name, len(types) + 2),
        threads=compiled.metadata.num_warps * 32,
        shared_bytes=compiled.metadata.shared,
        rows=tile.rows,
    )


def without_hidden_parameters(ptx: str, name: str, count: int) -> str:
    """The PTX with only the first ``count`` parameters of its entry point.

    Raises:
        BuildError: one of the others is read.
    """
    head = re.search(rf"\.entry {name}\(\s*(.*?)\s*\)", ptx, re.DOTALL)
    if head is None:
        raise BuildError(f"Triton's PTX has no entry point {name!r}; use another release of Triton")
    parameters = [line.strip() for line in head[1].split(",\n")]
    rest = ptx[head.end() :]
    for parameter in parameters[count:]:
        if re.search(rf"\b{re.escape(parameter.split()[-1])}\b", rest):
            raise BuildError(
                f"Triton's kernel {name!r} needs scratch memory that TensorRT does not give it; "
                "build without plugins"
            )
    kept = ",\n\t".join(parameters[:count])
    return f"{ptx[: head.start(1)]}{kept}{ptx[head.end(1) :]}"


def register(trtp: Any, plugin: LayerNormGelu, *, lazily: bool = False) -> str:
    """Make a plugin known to TensorRT, once per process.

    Args:
        trtp: the library's part for plugins, ``tensorrt.plugin``.
        plugin: which one.
        lazily: let TensorRT register it when it is first used by name; the ONNX parser needs it
            registered before.

    Returns:
        Its identifier.
    """
    identifier = f"{NAMESPACE}::{plugin.name}"
    with _lock:
        if identifier in _registered:
            return identifier

        def describe(x, weight, bias):  # type: ignore[no-untyped-def]
            return x.like()

        def launch(x, weight, bias, outputs, tactic):  # type: ignore[no-untyped-def]
            first, second, third = (_TRITON_TYPES[t.dtype.name] for t in (x, weight, bias))
            kernel = compile_kernel(plugin, (first, second, third))
            rows = trtp.cdiv(x.shape_expr.numel(), plugin.cols)
            how = trtp.KernelLaunchParams(
                grid_x=trtp.cdiv(rows, kernel.rows),
                block_x=kernel.threads,
                shared_mem=kernel.shared_bytes,
            )
            numbers = trtp.SymIntExprs(1)
            numbers[0] = trtp.SymInt32(rows)
            return kernel.name, kernel.ptx, how, numbers

        # TensorRT reads the types from the annotations, and takes no text for them.
        tensor = trtp.TensorDesc
        describe.__annotations__ = {
            **dict.fromkeys(("x", "weight", "bias"), tensor),
            "return": tensor,
        }
        launch.__annotations__ = {
            "return": tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymIntExprs]
        }
        trtp.register(identifier, lazy_register=lazily)(describe)
        trtp.aot_impl(identifier)(launch)
        _registered.add(identifier)
    return identifier


def _plugin(onnx: Any, norm: Any, weights: dict[str, Any], arch: int) -> LayerNormGelu | None:
    """The plugin for a normalisation; None where the kernel does not do what the node does."""
    if norm.op_type != "LayerNormalization" or norm.domain or len(norm.input) != 3:
        return None
    if _attribute(norm, "axis", -1) != -1 or any(norm.output[1:]):
        return None
    if not all(name in weights and len(weights[name].dims) == 1 for name in norm.input[1:]):
        return None
    allowed = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
    if any(weights[name].data_type not in allowed for name in norm.input[1:]):
        return None
    cols = weights[norm.input[1]].dims[0]
    if cols > _WIDEST:
        return None
    return LayerNormGelu(cols, float(_attribute(norm, "epsilon", 1e-5)), False, arch)


def _attribute(node: Any, name: str, default: Any = None) -> Any:
    for attribute in node.attribute:
        if attribute.name == name:
            return {1: attribute.f, 2: attribute.i, 3: attribute.s}[attribute.type]
    return default
