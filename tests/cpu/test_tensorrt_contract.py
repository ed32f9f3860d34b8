"""Every name and call of TensorRT in the source exists in the real bindings of every release.

The libraries are not installed where these tests run, nor is there a card; their surfaces are on
record (``tests/contract/record_surface.py``), read from the bindings themselves.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from typing import Any

import pytest

from sn72engine import _deps
from sn72engine.backends import tensorrt_config, tensorrt_engine, tensorrt_runner
from tests.contract import record_surface
from tests.contract.surface import (
    ONE_LIBRARY,
    OWNERS,
    PACKAGE,
    Surface,
    subclasses,
    surfaces,
    uses,
)

SURFACES = surfaces()
USES = uses()

every_release = pytest.mark.parametrize(
    "surface", SURFACES, ids=[f"{s.library}-{s.version}" for s in SURFACES]
)


def test_the_floor_the_newest_and_rtx_are_on_record() -> None:
    releases = [(s.library, s.version.rsplit(".", 2)[0]) for s in SURFACES]
    assert ("tensorrt", _deps.DEPENDENCIES["tensorrt"].floor) in releases
    assert ("tensorrt", "11.4") in releases
    assert ("tensorrt_rtx", _deps.DEPENDENCIES["tensorrt_rtx"].floor) in releases


@every_release
def test_every_name_exists(surface: Surface) -> None:
    absent = [
        f"{use.place}: {use.path}"
        for use in USES
        if surface.concerns(use.path) and not surface.has(use.path)
    ]
    assert not absent


@every_release
def test_every_call_fits_a_signature(surface: Surface) -> None:
    wrong = []
    for use in USES:
        if use.call is None or not surface.concerns(use.path) or not surface.has(use.path):
            continue
        known = surface.find(use.path)
        if isinstance(known, dict):
            known = known["__init__"]
        if known and not any(fits(parameters, *use.call) for parameters in known):
            wrong.append(f"{use.place}: {use.path}{use.call}, known {known}")
    assert not wrong


def fits(parameters: list[str], positional: int, keywords: tuple[str, ...]) -> bool:
    names = [name.rstrip("=") for name in parameters]
    given = [*names[:positional], *keywords]
    required = {name for name in parameters if not name.endswith("=")}
    return (
        positional <= len(names)
        and len(set(given)) == len(given)
        and set(keywords) <= set(names)
        and required <= set(given)
    )


@pytest.mark.parametrize(
    ("parameters", "call", "expected"),
    [
        (["a", "b="], (1, ()), True),
        (["a", "b="], (2, ()), True),
        (["a", "b="], (1, ("b",)), True),
        (["a", "b="], (0, ("b",)), False),
        (["a", "b="], (3, ()), False),
        (["a", "b="], (1, ("a",)), False),
        (["a"], (1, ("c",)), False),
    ],
)
def test_what_fits(
    parameters: list[str], call: tuple[int, tuple[str, ...]], expected: bool
) -> None:
    assert fits(parameters, *call) is expected


@every_release
def test_what_is_overridden_is_called_by_the_library(surface: Surface) -> None:
    found = 0
    for base, node in subclasses():
        callbacks = {
            name: kinds
            for name, kinds in surface.find(base).items()
            if kinds and isinstance(kinds[0], list)
        }
        own = {
            item.name: len(item.args.args) - 1
            for item in node.body
            if isinstance(item, ast.FunctionDef)
        }
        for name, kinds in callbacks.items():
            if name == "__init__":
                continue
            assert own.get(name) == len(kinds[0]), f"{base}.{name}{kinds[0]} in {node.name}"
            found += 1
    assert found >= 7


@every_release
@pytest.mark.parametrize(
    ("enumeration", "names"),
    [
        ("BuilderFlag", {*tensorrt_config.FLAGS.values(), *tensorrt_config.REFIT.values()}),
        ("TilingOptimizationLevel", set(tensorrt_config.TILING.values())),
        ("HardwareCompatibilityLevel", set(tensorrt_config.HARDWARE.values())),
        ("ProfilingVerbosity", set(tensorrt_config.PROFILING.values())),
        (
            "DynamicShapesKernelSpecializationStrategy",
            set(tensorrt_engine.SHAPE_KERNELS.values()),
        ),
        ("DataType", set(tensorrt_runner._NUMPY_NAMES)),
    ],
)
def test_every_name_in_a_table_is_a_member(
    surface: Surface, enumeration: str, names: set[str]
) -> None:
    if not surface.concerns(enumeration):
        return
    # Refused for the other library before the name is looked up.
    refused = {"REQUIRE_USER_ALLOCATION"} if surface.library == "tensorrt" else set()
    assert names - refused <= set(surface.find(enumeration))


def test_exceptions_for_one_library_are_needed() -> None:
    for name, library in ONE_LIBRARY.items():
        assert any(use.path.startswith(name) for use in USES), f"{name} is not used"
        for surface in SURFACES:
            assert surface.has(name) == (surface.library == library), (name, surface.version)


def test_the_walk_sees_the_calls_that_matter() -> None:
    seen = {use.path for use in USES}
    for path in (
        "Builder.build_serialized_network",
        "EngineInspector.get_engine_information",
        "IBuilderConfig.set_compute_capability",
        "IBuilderConfig.create_timing_cache",
        "ICudaEngine.create_execution_context",
        "ICudaEngine.get_tensor_profile_shape",
        "ICudaEngine.weight_streaming_budget_v2",
        "IExecutionContext.execute_async_v3",
        "IExecutionContext.infer_shapes",
        "IExecutionContext.set_device_memory",
        "IExecutionContext.set_output_allocator",
        "ITimingCache.combine",
        "MemoryPoolType.WORKSPACE",
        "NetworkDefinitionCreationFlag.STRONGLY_TYPED",
        "OnnxParserRefitter.refit_from_file",
        "Refitter.refit_cuda_engine",
        "Runtime.deserialize_cuda_engine",
    ):
        assert path in seen, path
    assert sum(use.call is not None for use in USES) > 40


def test_no_module_of_the_backend_is_left_out() -> None:
    modules = {f"backends/{path.name}" for path in (PACKAGE / "backends").glob("tensorrt*.py")}
    # The driver's side: it names nothing of the library.
    # Nor does the device code of the plugin.
    silent = {"backends/tensorrt_device.py", "backends/tensorrt_plugin_kernel.py"}
    assert modules - silent == {module for module in OWNERS if module.startswith("backends/")}


@pytest.mark.skipif(not _deps.available("tensorrt_rtx"), reason="tensorrt_rtx is not installed")
def test_the_record_is_what_the_installed_bindings_say() -> None:
    library = importlib.import_module("tensorrt_rtx")
    recorded = next(s for s in SURFACES if s.library == "tensorrt_rtx")
    if library.__version__ != recorded.version:
        pytest.skip(f"{recorded.version} is on record, {library.__version__} is installed")
    assert record_surface.record(library)["names"] == recorded.names


def test_a_python_function_is_recorded_with_its_parameters() -> None:
    def example(self: Any, first: int, second: int = 2) -> None:
        """Not read."""

    assert record_surface.overloads(example) == [["first", "second="]]
    assert inspect.isfunction(example)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("f(self: X, a: int, b: dict[int, str] = {1: 2}) -> int", [["a", "b="]]),
        ("f(self: X) -> int", [[]]),
        ("Overloaded.\n1. f(a: int) -> int\n2. f(b: K = <K.A: 1>) -> int", [["a"], ["b="]]),
        ("nothing to see", None),
    ],
)
def test_signatures_are_read_from_the_text(text: str, expected: Any) -> None:
    class F:
        __name__ = "f"
        __doc__ = text

        def __call__(self) -> None: ...

    made = F()
    made.__doc__ = text
    assert record_surface.overloads(made) == expected
