"""Launch configurations: rules, what is read from disk, and the command that measures."""

from __future__ import annotations

import importlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import sn72kernels
from sn72kernels import OPS, device, library, tune, tuning
from sn72kernels.errors import ArgumentError, NoGpuError
from tests.kernel_cases import operators

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def example_rule(cols: int, itemsize: int) -> tuning.Block:
    return tuning.Block(cols, itemsize)


EXAMPLE = tuning.Tunable("example.part", example_rule, {"warps": (1, 4)})
KEY = (64, 2)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SN72_CACHE_DIR", str(tmp_path))
    return tmp_path


def write(arch: int, **configs: dict[str, int]) -> None:
    path = tuning.cache_file(arch)
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = {name.replace("__", "/"): {"config": c, "ms": 1.0} for name, c in configs.items()}
    path.write_text(json.dumps(entries))
    tuning._load.cache_clear()
    tuning._find.cache_clear()


def measure_by_warps(times: dict[int, float]) -> Any:
    def measure(call: Any, *arguments: Any) -> float:
        config: tuning.Block = call(*arguments)
        return times[config.warps]

    return measure


def test_candidates_begin_with_the_rule_and_repeat_nothing() -> None:
    assert EXAMPLE.candidates(*KEY) == (
        tuning.Block(64, 2), tuning.Block(64, 1), tuning.Block(64, 4),
    )  # fmt: skip
    assert EXAMPLE.candidates(64, 4) == (tuning.Block(64, 4), tuning.Block(64, 1))


def test_no_candidate_for_rows_asks_for_more_elements_than_a_thread_has_registers_for() -> None:
    """Such a kernel spills, and takes the compiler minutes."""
    from sn72kernels.ops.layernorm_gelu import op as layernorm_gelu
    from sn72kernels.ops.quantize import op as quantize

    tunables = (
        layernorm_gelu.FORWARD_TILE, layernorm_gelu.BACKWARD_TILE, quantize.TILE,
        quantize.TOKEN_TILE,
    )  # fmt: skip
    for tunable in tunables:
        for cols in (8, *tuning.WIDTHS, 1 << 20):
            key = (cols, 2) if tunable is layernorm_gelu.FORWARD_TILE else (cols,)
            found = tunable.candidates(*key)
            assert len(found) > 5
            assert found[0] == tunable.rule(*key)
            assert max(c.rows * c.cols // (32 * c.warps) for c in found) <= 64


def test_autotune_keeps_the_fastest_correct_one(cache: Path) -> None:
    def run() -> tuning.Block:
        return EXAMPLE.config(CUDA, *KEY)

    def correct() -> bool:
        if run().warps == 1:
            raise RuntimeError("out of resources")  # as Triton has it
        return True

    measure = measure_by_warps({1: 1.0, 2: 3.0, 4: 2.0})
    with device.assume(90):
        assert run() == tuning.Block(64, 2)
        found = tuning.autotune(EXAMPLE, KEY, run, correct, arch=90, measure=measure)
        assert found == tuning.Measured(tuning.Block(64, 4), 2.0, 3.0, 2, 3)
        assert run() == tuning.Block(64, 4)
    assert tuning.tuned(EXAMPLE, (65, 2), 90) is None
    assert tuning.tuned(EXAMPLE, KEY, 80) is None
    path = tuning.cache_file(90)
    assert cache in path.parents
    written = {"example.part/64/2": {"config": {"size": 64, "warps": 4}, "ms": 2.0}}
    assert json.loads(path.read_text()) == written
    assert list(path.parent.iterdir()) == [path]


def test_results_of_another_key_stay() -> None:
    for key in (KEY, (128, 2)):
        tuning.autotune(EXAMPLE, key, print, lambda: True, arch=90, measure=lambda _: 1.0)
    assert set(json.loads(tuning.cache_file(90).read_text())) == {
        "example.part/64/2", "example.part/128/2",
    }  # fmt: skip


def test_no_correct_candidate_is_an_error() -> None:
    with pytest.raises(ArgumentError, match=r"none of the 3 candidates for example.part computes"):
        tuning.autotune(EXAMPLE, KEY, print, lambda: False, arch=90, measure=lambda _: 0.0)
    assert not tuning.cache_file(90).exists()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1]",
        '{"example.part/64/2": {}}',
        '{"example.part/64/2": 3}',
        '{"example.part/64/2": {"config": {"other": 1}}}',
        # Well-formed, but the kernel was never declared to work with it.
        '{"example.part/64/2": {"config": {"size": 32, "warps": 4}}}',
    ],
)
def test_unusable_entry_is_as_none(text: str) -> None:
    path = tuning.cache_file(90)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert tuning.tuned(EXAMPLE, KEY, 90) is None
    with device.assume(90):
        assert EXAMPLE.config(CUDA, *KEY) == tuning.Block(64, 2)


def test_lookup_tells_where_a_configuration_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    write(90, **{"example.part__64__2": {"size": 64, "warps": 4}})
    with device.assume(90):
        assert EXAMPLE.explain(CUDA, *KEY) == {"size": 64, "warps": 4, "chosen_by": "tuning"}
        assert EXAMPLE.explain(CUDA, 32, 2)["chosen_by"] == "rule example_rule"
        monkeypatch.setenv("SN72_TUNING", "0")
        assert EXAMPLE.explain(CUDA, *KEY)["chosen_by"] == "rule example_rule"
        monkeypatch.delenv("SN72_TUNING")
        assert EXAMPLE.config(CUDA, *KEY).warps == 4
        # Interpreted kernels and compile checks do not depend on what was measured.
        assert EXAMPLE.config(CPU, *KEY).warps == 2
        assert EXAMPLE.config(torch.device("meta"), *KEY).warps == 2


# --- ops -----------------------------------------------------------------------------------


def test_every_op_declares_its_configurations() -> None:
    names: dict[str, str] = {}
    for folder in sorted(set(OPS.values())):
        found = {case.tunable.name for case in tune.cases(folder, torch.device("meta"))}
        declared = {
            value.name
            for value in vars(importlib.import_module(f"sn72kernels.ops.{folder}.op")).values()
            if isinstance(value, tuning.Tunable)
        }
        assert found == declared
        assert found, folder
        for name in found:
            assert names.setdefault(name, folder) == folder
            assert name.startswith(folder)


def test_launcher_follows_the_measured_configuration() -> None:
    """The number of warps that a file asks for arrives at the launch, and only with its key."""
    from sn72kernels.ops.quantize import op

    pytest.importorskip("triton", reason="Triton is not installed")
    wanted = next(c for c in op.TOKEN_TILE.candidates(1024) if c.warps == 16)
    write(90, **{"quantize.token__1024": asdict(wanted)})
    found = op.TOKEN_TILE.explain
    with device.assume(90):
        assert found(CUDA, 1024)["chosen_by"] == "tuning"
        assert found(CUDA, 768)["chosen_by"] == "rule token_config"
    x = torch.empty(4, 1024, device="meta").half()
    with tuning.forced(op.TOKEN_TILE, wanted), library.recording() as launches:
        op.launch_token(x, True)
    assert [launch.options["num_warps"] for launch in launches] == [16]


def test_explain_shows_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    from sn72kernels.ops.layernorm_gelu import op

    monkeypatch.setattr(
        op.library, "choose", lambda *_: library.Choice("op", "triton", "it is asked for")
    )
    text = str(sn72kernels.explain("layernorm_gelu", torch.zeros(2, 64)))
    assert "rule tile_config" in text


SPECS = operators.specs()


def examples() -> list[tuple[str, int]]:
    """One example for each kernel that is cut by a configuration; the in-place rope is rope."""
    return [
        (name, place)
        for name, calls in operators.examples().items()
        for place in range(len(calls))
        # The others launch the same kernels, in another dtype or with other options.
        if (name, place) not in {("attention", 1), ("cascade_route", 1), ("quantize_static", 2)}
        if name != "rope_"
    ]


@pytest.mark.parametrize(("name", "place"), examples())
def test_every_candidate_is_right(name: str, place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever measuring may choose computes what the reference does."""
    used: dict[str, tuple[tuning.Tunable[Any], tuple[object, ...]]] = {}
    config = tuning.Tunable.config

    def spy(tunable: tuning.Tunable[Any], device: torch.device, *key: object) -> Any:
        used[tunable.name] = (tunable, key)
        return config(tunable, device, *key)

    arguments = operators.examples()[name][place]
    spec = SPECS[name]
    with monkeypatch.context() as patch:
        patch.setattr(tuning.Tunable, "config", spy)
        spec.launch(*arguments)
    ((tunable, key),) = used.values()
    # Sums over rows are not ordered by the reference, whose rounding tune.agrees() allows for.
    case = tuning.Case(tunable, key, spec.launch, spec.reference, arguments, outputs(name))
    wanted = spec.reference(*arguments)
    # Interpreted, a launch does not depend on the numbers of warps and of stages.
    candidates = {
        tuple(n for field, n in asdict(c).items() if field not in ("warps", "stages")): c
        for c in tunable.candidates(*key)
    }
    for candidate in candidates.values():
        with tuning.forced(tunable, candidate):
            assert tune.agrees(case, wanted), candidate


def outputs(name: str) -> int | None:
    """Routes follow from the logits, whose last bits depend on the configuration."""
    return 2 if name == "classifier_head" else None


def test_layers_of_another_size_do_not_share_a_configuration() -> None:
    from sn72kernels.ops.linear import op

    def layer(units: int, depth: int, dtype: torch.dtype = torch.int8) -> torch.Tensor:
        return torch.empty(units, depth, dtype=dtype)

    fp8 = torch.float8_e4m3fn
    with device.assume(90):
        keys = {
            op._key(rows, w)
            for rows in (1, 16)
            for w in (layer(64, 32), layer(32, 64), layer(64, 64), layer(64, 32, fp8))
        }
        assert op._key(9, layer(64, 32)) == op._key(16, layer(64, 32))  # batches vary
        wanted = op.PRODUCT.candidates(16, 64, 32, "int8")[-1]
        write(90, **{"linear.product__16__64__32__int8": asdict(wanted)})
        assert op.PRODUCT.config(CUDA, 16, 64, 32, "int8") == wanted
        for other in ((16, 32, 64, "int8"), (16, 64, 32, "fp8"), (32, 64, 32, "int8")):
            assert op.PRODUCT.config(CUDA, *other) == op.linear_config(*other)
    with device.assume(80):
        keys.add(op._key(1, layer(64, 32, fp8)))
    assert len(keys) == 9


def test_wrong_results_do_not_agree() -> None:
    x = torch.rand(8)
    case = tuning.Case(EXAMPLE, KEY, lambda t: (t, t.int()), lambda t: (t, t.int()), (x,))
    assert tune.agrees(case, (x, x.int()))
    assert not tune.agrees(case, (x * 1.1, x.int()))
    assert not tune.agrees(case, (x, x.int() + 1))
    assert not tune.agrees(case, (x, x.long()))
    assert not tune.agrees(case, (x * float("nan"), x.int()))


@pytest.mark.parametrize("folder", sorted(set(OPS.values())))
@pytest.mark.parametrize("rows", [1, 48])
def test_every_op_has_cases_at_small_sizes(folder: str, rows: int) -> None:
    assert tune.cases(folder, torch.device("meta"), rows=rows)


# --- the command ---------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is visible")
def test_command_needs_a_gpu(capsys: pytest.CaptureFixture[str], cache: Path) -> None:
    assert tune.main(["--op", "quantize"]) == 2
    assert "a CUDA device is needed to measure launch configurations" in capsys.readouterr().err
    assert not list(cache.iterdir())
    with pytest.raises(NoGpuError):
        tuning.autotune(EXAMPLE, KEY, print, lambda: True, arch=90)


def test_command_lists_what_it_would_measure(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main(["--op", "quantize", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "quantize.token 1024 16: 19 candidates" in lines


@pytest.mark.parametrize("rows", [1, 128, 200, 512, 1024, 2048, 4096, 16384])
@pytest.mark.parametrize("cols", [256, 512, 1024, 2048, 4096, 8192])
def test_no_multiprocessor_is_idle_while_another_has_two_rows(rows: int, cols: int) -> None:
    """Of the 132 of an H100; and a large batch is cut as its row length asks for."""
    from sn72kernels.ops.layernorm_gelu import op

    h100 = replace(device.VIRTUAL, sms=132)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "facts", lambda _: h100)
        tile = op.tile_config(cols, 2, tuning.most_rows(rows, CUDA))
    assert -(-rows // tile.rows) >= min(rows, 2 * 132)
    assert tile.cols == cols
    assert 8 <= tile.rows * tile.cols // (32 * tile.warps) <= 16
    if rows >= 16384:
        assert tile == op.tile_config(cols, 2)


def test_power_of_two() -> None:
    assert [tuning.power_of_two(n) for n in (0, 1, 2, 3, 4, 5, 1023, 1025)] == [
        1, 1, 2, 4, 4, 8, 1024, 2048,
    ]  # fmt: skip
