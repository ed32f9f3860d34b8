"""Reads the recorded surfaces, and finds what the source takes from the library.

An expression is typed by the name of the variable that it starts with: ``OWNERS`` says, for each
module, which class a name stands for there. ``trt`` is the library itself everywhere.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sn72engine

PACKAGE = Path(sn72engine.__file__).parent

_BUILDING = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "config": "IBuilderConfig",
    "parser": "OnnxParser",
    "error": "ParserError",
    "tensor": "ITensor",
}
#: Module -> name of a variable or attribute -> class of the library that it holds.
OWNERS: dict[str, dict[str, str]] = {
    "backends/tensorrt.py": _BUILDING,
    "backends/tensorrt_bound.py": {"context": "IExecutionContext", "_context": "IExecutionContext"},
    "backends/tensorrt_build.py": {**_BUILDING, "ours": "ITimingCache"},
    "backends/tensorrt_config.py": {**_BUILDING, "profile": "IOptimizationProfile"},
    "backends/tensorrt_engine.py": {
        "_engine": "ICudaEngine",
        "_runtime": "Runtime",
        "runtime": "Runtime",
        "config": "IRuntimeConfig",
        "context": "IExecutionContext",
        "_cached": "IRuntimeCache",
        "inspector": "EngineInspector",
    },
    "backends/tensorrt_log.py": {},
    "backends/tensorrt_plugin.py": {"trtp": "plugin"},
    "backends/tensorrt_refit.py": {
        "runtime": "Runtime",
        "loaded": "ICudaEngine",
        "refitter": "Refitter",
        "parser": "OnnxParserRefitter",
        "wanted": "ISerializationConfig",
    },
    "backends/tensorrt_runner.py": {"context": "IExecutionContext"},
    "introspection/tensorrt.py": {},
}

#: What exists in one library only, and is used for that one only.
ONE_LIBRARY = {
    "ComputeCapability": "tensorrt_rtx",
    "CudaGraphStrategy": "tensorrt_rtx",
    "DynamicShapesKernelSpecializationStrategy": "tensorrt_rtx",
    "IBuilderConfig.num_compute_capabilities": "tensorrt_rtx",
    "IBuilderConfig.set_compute_capability": "tensorrt_rtx",
    "IExecutionContext.is_stream_capturable": "tensorrt_rtx",
    "IRuntimeCache": "tensorrt_rtx",
    "IRuntimeConfig.create_runtime_cache": "tensorrt_rtx",
    "IRuntimeConfig.cuda_graph_strategy": "tensorrt_rtx",
    "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy": "tensorrt_rtx",
    "IRuntimeConfig.set_runtime_cache": "tensorrt_rtx",
    "NetworkDefinitionCreationFlag.PREFER_AOT_PYTHON_PLUGINS": "tensorrt",
    "plugin": "tensorrt",
}


@dataclass(frozen=True)
class Surface:
    """What one release of one library offers."""

    library: str
    version: str
    names: dict[str, Any]

    def find(self, path: str) -> Any:
        """The record of ``Class.member``; KeyError where there is none."""
        found: Any = self.names
        for part in path.split("."):
            if found is None or (isinstance(found, list) and part not in found):
                raise KeyError(path)
            found = None if isinstance(found, list) else found[part]
        return found

    def has(self, path: str) -> bool:
        """Whether there is such a name."""
        try:
            self.find(path)
        except KeyError:
            return False
        return True

    def concerns(self, path: str) -> bool:
        """Whether the code uses the name with this library."""
        only = (
            library
            for name, library in ONE_LIBRARY.items()
            if path == name or path.startswith(f"{name}.")
        )
        return next(only, self.library) == self.library


@dataclass(frozen=True)
class Use:
    """One place where the source takes a name from the library."""

    place: str
    path: str
    #: Positional count and keywords of a call; None for other uses, and where ``*`` hides them.
    call: tuple[int, tuple[str, ...]] | None = None


def surfaces() -> list[Surface]:
    """Every release on record."""
    found = []
    for path in sorted(Path(__file__).parent.glob("*.json")):
        record = json.loads(path.read_text())
        found.append(Surface(path.stem.split("-")[0], record["version"], record["names"]))
    return found


def modules() -> list[str]:
    """Every module of the package that calls something ``trt``."""
    found = (path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
    return sorted(m for m in found if re.search(r"\btrt\b", (PACKAGE / m).read_text()))


def uses() -> list[Use]:
    """Every use; what variables hold is known in the modules of ``OWNERS`` only."""
    return [
        use
        for module in sorted({*modules(), *OWNERS})
        for use in _uses(module, ast.parse((PACKAGE / module).read_text()), OWNERS.get(module, {}))
    ]


def subclasses() -> Iterator[tuple[str, ast.ClassDef]]:
    """Classes of the source that derive from one of the library, with its name."""
    for module in modules():
        for node in ast.walk(ast.parse((PACKAGE / module).read_text())):
            if isinstance(node, ast.ClassDef):
                for base in node.bases:
                    if path := _path(base, {}):
                        yield path, node


def _uses(module: str, tree: ast.AST, owners: dict[str, str]) -> Iterator[Use]:
    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or (id(node) in inner and id(node) not in calls):
            continue
        path = _path(node, owners)
        if path is None:
            continue
        call = calls.get(id(node))
        hidden = call is None or any(isinstance(a, ast.Starred) for a in call.args)
        shape = None
        if call is not None and not hidden and all(k.arg for k in call.keywords):
            shape = (len(call.args), tuple(str(k.arg) for k in call.keywords))
        yield Use(f"{module}:{node.lineno}", path, shape)


def _path(node: ast.AST, owners: dict[str, str]) -> str | None:
    """``Class.member`` of an attribute expression; None where it starts with something else."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        if node.attr in owners and parts:
            return ".".join([owners[node.attr], parts[-1]])
        if node.attr == "trt":
            break
        parts.append(node.attr)
        node = node.value
    if isinstance(node, ast.Attribute) or (isinstance(node, ast.Name) and node.id == "trt"):
        names = [part for part in reversed(parts) if not part.startswith("__")]
        return ".".join(names) or None
    if isinstance(node, ast.Name) and node.id in owners and parts:
        return ".".join([owners[node.id], parts[-1]])
    return None
