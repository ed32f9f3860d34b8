"""Write down what a release of the TensorRT bindings offers: names and signatures, nothing else.

The bindings are a small wheel that links against libraries of more than a gigabyte. Stand-ins
for those libraries, with the few symbols that the bindings look up and no code behind them, are
enough to import the wheel and to read its classes:

    pip download --no-deps --dest wheels tensorrt_cu13_bindings==11.4.0.106
    python tests/contract/record_surface.py wheels/tensorrt_cu13_bindings-11.4.0.106-*.whl

An installed package is recorded by its name:

    python tests/contract/record_surface.py tensorrt_rtx

Either writes ``tests/contract/<library>-<version>.json``. The wheel must be for the Python that
runs this; ``cc`` is needed. Functions are written as lists of overloads, an overload as a list of
parameters, ``=`` behind those that may be left out; enumerations as the list of their members;
other attributes as null. Methods that an application overrides are read from the class's own text.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

#: Library that the bindings link against -> symbols that they need from it.
STUBS = {
    "nvinfer": (
        "createInferBuilder_INTERNAL",
        "createInferRefitter_INTERNAL",
        "createInferRuntime_INTERNAL",
        "getBuilderPluginRegistry",
        "getPluginRegistry",
        "getInferLibVersion",
    ),
    "nvonnxparser": (
        "createNvOnnxParserRefitter_INTERNAL",
        "createNvOnnxParser_INTERNAL",
        "getNvOnnxParserVersion",
    ),
    "nvinfer_plugin": ("initLibNvInferPlugins",),
}

#: Layers, which the ONNX parser makes and nothing here touches, and layouts of plugins in C++.
LEFT_OUT = re.compile(r"I\w+Layer|IPlugin\w*|IAlgorithm\w*|PluginField\w*")


def record(library: Any) -> dict[str, Any]:
    """The surface of an imported bindings module, with that of its plugins where it has them."""
    names = members(library)
    if library.__name__ == "tensorrt_bindings":
        sys.modules["tensorrt"] = library  # the name by which its plugins import it
        names["plugin"] = members(importlib.import_module("tensorrt_bindings.plugin"))
    return {"version": library.__version__, "names": names}


def members(module: Any) -> dict[str, Any]:
    """Every public name of a module."""
    return {
        name: describe(value)
        for name, value in sorted(vars(module).items())
        if not name.startswith("_") and not inspect.ismodule(value) and not LEFT_OUT.fullmatch(name)
    }


def describe(value: Any) -> Any:
    """A class as a mapping, an enumeration as a list, a function as its overloads, else None."""
    if inspect.isclass(value) and hasattr(value, "__members__"):
        return sorted(value.__members__)
    if inspect.isclass(value):
        own = {
            name: describe(member)
            for name in sorted(dir(value))
            if not name.startswith("_") or name == "__init__"
            for member in [inspect.getattr_static(value, name)]
        }
        return {**overridden(value), **own}
    if callable(value):
        return overloads(value)
    return None


def overridden(kind: Any) -> dict[str, list[list[str]]]:
    """Methods that subclasses define, which exist in the text of the class only."""
    shown = re.findall(r"def (\w+)\(self,? *([^)]*)\):", kind.__doc__ or "")
    return {name: [re.findall(r"\w+", names)] for name, names in shown if name != "__init__"}


def overloads(function: Any) -> list[list[str]] | None:
    """Parameters of every overload, without ``self``; None where the function does not tell."""
    if inspect.isfunction(function):
        return [
            [
                p.name + ("" if p.default is p.empty else "=")
                for p in inspect.signature(function).parameters.values()
                if p.name not in ("self", "this")
            ]
        ]
    name = re.escape(getattr(function, "__name__", ""))
    lines = (function.__doc__ or "").splitlines()
    found = [m[1] for line in lines if (m := re.match(rf"(?:\d+\. )?{name}(\(.*\)) ->", line))]
    different = dict.fromkeys(tuple(_parameters(text)) for text in found if "*args" not in text)
    return [list(parameters) for parameters in different] or None


def _parameters(signature: str) -> list[str]:
    """Split "(self: X, a: dict[int, str], b: int = 1)" at its outermost commas."""
    parts, depth, start = [], 0, 1
    for index, letter in enumerate(signature):
        depth += (letter in "([{<") - (letter in ")]}>")
        if (letter == "," and depth == 1) or depth == 0:
            parts.append(signature[start:index].strip())
            start = index + 1
            if depth == 0:
                break
    return [
        part.split(":")[0].strip() + ("=" if re.search(r"[^=]=[^=]", part) else "")
        for part in parts
        if part and part.split(":")[0] not in ("self", "/", "*")
    ]


def build_stubs(bindings: Path, folder: Path) -> None:
    """Compile a stand-in for each library that ``bindings`` asks the loader for."""
    wanted = re.findall(
        rb"\0lib((?:nvinfer_plugin|nvonnxparser|nvinfer)\.so\.\d+)(?=\0)", bindings.read_bytes()
    )
    for soname in {name.decode() for name in wanted}:
        symbols = STUBS[soname.split(".")[0]]
        source = "".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in symbols)
        target = folder / f"lib{soname}"
        subprocess.run(
            ["cc", "-shared", "-fPIC", "-xc", "-", f"-Wl,-soname,{target.name}", "-o", target],
            input=source.encode(),
            check=True,
        )


def record_wheel(wheel: Path) -> dict[str, Any]:
    """The surface of a bindings wheel, read in a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(scratch)
        package = next(Path(scratch).glob("*_bindings"))
        build_stubs(next(package.glob("*.so")), Path(scratch))
        done = subprocess.run(
            [sys.executable, __file__, "--print", package.name],
            env={"LD_LIBRARY_PATH": scratch, "PYTHONPATH": scratch},
            check=True,
            stdout=subprocess.PIPE,
        )
    # The bindings print a line of their own when their plugins find no registry.
    surface: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return surface


def write(surface: dict[str, Any], library: str) -> Path:
    """Write one line per name, so that a change can be read in a diff."""
    version = ".".join(surface["version"].split(".")[:2])
    path = Path(__file__).with_name(f"{library}-{version}.json")
    lines = [
        f"  {json.dumps(name)}: {json.dumps(value, separators=(',', ':'))}"
        for name, value in surface["names"].items()
    ]
    text = f'{{"version": "{surface["version"]}",\n "names": {{\n' + ",\n".join(lines) + "\n}}\n"
    path.write_text(text)
    return path


def main() -> None:
    """Record what the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", nargs="+", help="bindings wheels, or installed modules")
    parser.add_argument("--print", action="store_true", help="print the surface of a module")
    options = parser.parse_args()
    for source in options.source:
        if options.print:
            print(json.dumps(record(importlib.import_module(source))))
        elif source.endswith(".whl"):
            print(write(record_wheel(Path(source)), "tensorrt"))
        else:
            print(write(record(importlib.import_module(source)), source))


if __name__ == "__main__":
    main()
