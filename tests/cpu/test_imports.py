"""Importing is quick, touches nothing, and works with the base dependencies alone."""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

BASE = ("filelock", "numpy", "onnxruntime", "PIL", "yaml", "torch", "tqdm")
OPTIONAL = (
    "cuda",
    "efficientnet_lite_pytorch",
    "flash_attn",
    "lief",
    "matplotlib",
    "modelopt",
    "onnx",
    "onnx_graphsurgeon",
    "onnxconverter_common",
    "onnxscript",
    "onnxslim",
    "openvino",
    "prometheus_client",
    "rapidocr",
    "skimage",
    "tensorrt",
    "tensorrt_rtx",
    "transformers",
    "triton",
)


def python(code: str) -> str:
    """Run code in a fresh interpreter; returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def modules() -> list[str]:
    names = []
    for package in ("sn72kernels", "sn72engine"):
        walked = pkgutil.walk_packages([str(ROOT / package)], prefix=f"{package}.")
        names += [package, *(module.name for module in walked if "__main__" not in module.name)]
    # Device code: only ever imported by the op beside it, once Triton is known to be there.
    return [name for name in names if not name.endswith("kernel")]


@pytest.mark.parametrize("package", ["sn72engine", "sn72kernels"])
def test_importing_a_package_loads_no_library(package: str) -> None:
    loaded = json.loads(
        python(f"import {package}, sys, json; print(json.dumps(list(sys.modules)))")
    )
    heavy = {"numpy", *BASE, *OPTIONAL} - {"cuda"}
    assert not heavy & {name.partition(".")[0] for name in loaded}


@pytest.mark.parametrize(
    "what",
    [
        "from sn72engine.cli import parser; parser()",
        "from sn72engine.backends import get_backend; get_backend('onnxruntime')",
    ],
)
def test_help_and_sessions_do_without_what_takes_seconds_to_import(what: str) -> None:
    slow = json.loads(python(f"{what}; import sys, json; print(json.dumps(list(sys.modules)))"))
    assert not {"torch", "onnx", "matplotlib", "transformers"} & set(slow)


def test_every_module_imports_with_the_base_dependencies_alone() -> None:
    code = f"""
import importlib, importlib.abc, sys
blocked = set({OPTIONAL!r})
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
for name in {modules()!r}:
    importlib.import_module(name)
if "torch" in sys.modules:
    assert not sys.modules["torch"].cuda.is_initialized()
"""
    python(code)


def test_public_names_are_what_they_say_after_every_module_was_imported() -> None:
    # A submodule named like a function would replace it in the package's namespace.
    code = f"""
import importlib, types, sn72engine
for name in {modules()!r}:
    importlib.import_module(name)
for name in sn72engine.__all__:
    value = getattr(sn72engine, name)
    assert not isinstance(value, types.ModuleType), f"{{name}} is a module"
    assert name == "__version__" or callable(value), name
"""
    python(code)


def test_an_unknown_name_is_an_attribute_error() -> None:
    import sn72engine

    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = sn72engine.nonsense  # type: ignore[attr-defined]
    assert set(sn72engine.__all__) <= set(dir(sn72engine))
