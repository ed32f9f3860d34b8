"""The kernel benchmarks' cases: their models of work against real tensors, their gates, a record.

Every case that is run on a CPU is built and its op called, so the formulas are held against what
was really read and written, and against PyTorch's own count of the operations of matrix products.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.kernels import gates, harness, work
from benchmarks.kernels.cases import OPS, every, layernorm_gelu
from sn72kernels import OPS as PUBLIC
from sn72kernels import bench

CPU = torch.device("cpu")
CASES = dict(every(CPU))
PEAKS = bench.Peaks("example", 1000.0, {"float32": 1.0})


def distinct_bytes(tensor: torch.Tensor) -> int:
    """Of the elements that are in memory: a broadcast dimension holds one."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else 1
    return count * tensor.element_size()


def outputs(out: Any) -> list[torch.Tensor]:
    return list(out) if isinstance(out, (tuple, list)) else [out]


def taken(case: harness.Case) -> tuple[Any, ...]:
    """Arguments without copies in another dtype, which only others take."""
    if case.op == "linear":
        return case.arguments[:5]
    return case.arguments[:3] if case.ours is layernorm_gelu.fused else case.arguments


def test_every_op_has_cases_and_the_grid_is_the_stated_one() -> None:
    assert set(OPS) == set(PUBLIC.values())
    rows, cols = zip(*layernorm_gelu.GRID, strict=True)
    assert (min(rows), max(rows), min(cols), max(cols)) == (128, 16384, 256, 8192)
    assert len(set(layernorm_gelu.GRID)) == 48
    names = [name for name, _ in every(torch.device("cuda"))]
    assert len(names) == len(set(names))
    assert sum("layernorm_gelu" in name and "float16" in name for name in names) == 96


@pytest.mark.parametrize("name", CASES)
def test_model_of_work(name: str) -> None:
    case = CASES[name]()
    # PyTorch counts attention only where it is made of matrix products.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        out = case.others[harness.EAGER](*(a.clone() for a in case.arguments))
    assert case.correct(case.ours(*(a.clone() for a in case.arguments)))
    moved = sum(map(distinct_bytes, taken(case))) + sum(map(bench.bytes_of, outputs(out)))
    if case.op == "linear":  # its eager form is another layer, whose result is of twice the width
        moved -= bench.bytes_of(out) // 2
    if "training" in name:  # backward reads the input and the parameters again
        moved += sum(map(distinct_bytes, case.arguments[:3]))
    assert case.work.bytes == moved
    if case.work.unit:
        assert case.work.flops == counter.get_total_flops()
    assert case.work.flops > 0


class Counted(float):
    """A number that counts the operations done with it."""

    count = 0


def _counting(name: str) -> Callable[..., Counted]:
    def operation(self: Counted, *others: Any) -> Counted:
        Counted.count += 1
        return Counted(getattr(float, name)(float(self), *map(float, others)))

    return operation


for _name in ("__add__", "__radd__", "__sub__", "__mul__", "__rmul__", "__truediv__"):
    setattr(Counted, _name, _counting(_name))


def test_operations_of_layernorm_gelu_are_counted() -> None:
    """One row, done by hand; what is done once per row (the scale) is not in the formula."""
    cols = 64
    x = [Counted(value) for value in torch.randn(cols).tolist()]
    Counted.count = 0
    mean = sum(x, start=Counted(0.0)) * (1.0 / cols)
    centred = [v - mean for v in x]
    variance = sum((c * c for c in centred), start=Counted(0.0)) * (1.0 / cols)
    scale = Counted(float(variance + 1e-5) ** -0.5)
    half = Counted(0.5)
    for c in centred:
        v = c * scale * 1.5 + 0.25
        inner = v * 0.7071067811865476
        error_function = Counted(torch.erf(torch.tensor(float(inner))).item())
        Counted.count += 1
        half * v * (Counted(1.0) + error_function)
    once = 3
    assert Counted.count - once == work.layernorm_gelu(1, cols, 2).flops


def test_operations_of_a_resize() -> None:
    """An image of 8 x 6 to 4 x 3 with a filter of width 4: 8 taps across and 8 down."""
    found = work.preprocess(1, (8, 6), (4, 3), 2, taps=4.0)
    across = 8 * 3 * 8 * 2
    down = 4 * 3 * (8 + 1) * 2
    assert found.flops == 3 * (across + down)
    assert found.bytes == 3 * (8 * 6 + 2 * 4 * 3)


def test_gates() -> None:
    want = torch.linspace(-3, 3, 1000, dtype=torch.float64)
    assert gates.close(want, dtype=torch.float16)(want.half())
    for spoilt in (float("nan"), 1e9, 3.5):
        out = want.half()
        out[17] = spoilt
        assert not gates.close(want, dtype=torch.float16)(out), spoilt
    assert not gates.close(want, dtype=torch.float16)(want.half()[:-1])
    codes = torch.arange(100, dtype=torch.int8)
    off = codes.clone()
    off[3] += 1
    assert gates.same_bits(codes)(codes.clone())
    assert not gates.same_bits(codes)(off)
    assert gates.share_equal(codes, share=0.99)(off)
    assert not gates.share_equal(codes, share=0.995)(off)
    hole = torch.tensor([float("nan"), 1.0])
    assert gates.same_bits(hole)(hole.clone())


def test_a_wrong_kernel_gets_no_time_and_no_speed_up_in_the_record() -> None:
    case = CASES["ensemble_vote: n=64"]()
    wrong = replace(case, ours=lambda *arguments: case.ours(*arguments) + 1e-3)
    race, table = harness.run(wrong, PEAKS)
    line = race.to_dict()
    assert race.wrong == "wrong result"
    assert line["timings"][0]["ms"] is None
    assert line["speedups"] == {}
    assert f"{harness.OURS} " in table
    assert "not timed: wrong result" in table
    right, table = harness.run(case, PEAKS)
    assert set(right.speedups) == {harness.EAGER}
    assert "no GPU is present; sn72kernels is the reference path on the CPU" in table


def test_peers_that_are_not_there_are_named() -> None:
    case = CASES["layernorm_gelu: 128x256 float16"]()
    for name in ("liger-kernel, then GELU", "quack, then GELU"):
        assert name in case.absent
        assert name not in case.others
    assert case.absent[harness.COMPILED] == "it is timed on a GPU only"


def test_a_record_that_was_cut_off_keeps_what_was_done(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "record.jsonl"
    record = harness.Record(path)
    record.add(harness.header(PEAKS))
    race, _ = harness.run(CASES["ensemble_vote: n=64"](), PEAKS)
    record.add(race.to_dict())
    whole = harness.read(path)
    with path.open("a") as file:
        file.write(json.dumps(race.to_dict())[:100])
    assert harness.read(path) == whole
    assert [each["op"] for each in whole["races"]] == ["ensemble_vote"]
    path.write_text(json.dumps(whole))
    assert harness.read(path) == whole
    path.write_text("{}\n")
    with pytest.raises(ValueError, match="no record of kernel benchmarks"):
        harness.read(path)
