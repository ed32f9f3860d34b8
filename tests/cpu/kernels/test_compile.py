"""Every kernel compiles for every architecture, spills nothing and accesses memory widely.

Compiled in a child process, because this one interprets. No GPU is needed or used.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sn72kernels import OPS, device, library, testing

pytest.importorskip("triton", reason="Triton is not installed")

# Kernel -> bits of its widest load and store, where one is below 128.
NARROWER = {
    # Reads eight routes of a byte each, writes one integer per escalated sample where it belongs.
    "compact_blocks": (64, 32),
    # Reads tiles, writes two rows of sums.
    "backward_columns": (128, 32),
    # A thread's 16 elements are 8 bytes of half-byte codes.
    "quantize_nvfp4": (128, 64),
    "dequantize_nvfp4": (64, 128),
    # One number per row and block of hidden units; and one per row from a few dozen of these.
    "hidden": (128, 32),
    "finish": (64, 32),
    # A program of few rows has four 16-bit results to a thread.
    "linear": (128, 64),
    # Gathers single bytes; a thread writes two neighbouring values of 16 bits.
    "preprocess": (8, 32),
}


@pytest.mark.slow
def test_every_op_compiles_for_every_architecture(compiled: list[testing.Compiled]) -> None:
    seen = {(row.case.partition(":")[0], row.arch) for row in compiled}
    assert seen == {(op, arch) for op in OPS.values() for arch in testing.ARCHITECTURES}


@pytest.mark.slow
def test_every_kernel_has_a_case(compiled: list[testing.Compiled]) -> None:
    import importlib

    for op in set(OPS.values()):
        module = importlib.import_module(f"sn72kernels.ops.{op}.kernel")
        public = {
            name
            for name, value in vars(module).items()
            if not name.startswith("_")
            and hasattr(value, "fn")
            and value.fn.__module__ == module.__name__
        }
        assert public, op
        assert {row.kernel for row in compiled if row.case.startswith(f"{op}:")} == public


@pytest.mark.slow
def test_nothing_spills_and_shared_memory_fits(compiled: list[testing.Compiled]) -> None:
    faults = {(row.case, row.kernel, row.arch): row.faults() for row in compiled if row.faults()}
    assert not faults


@pytest.mark.slow
def test_global_memory_is_accessed_128_bits_wide(compiled: list[testing.Compiled]) -> None:
    """Loads and stores of every kernel, but for those that say why not."""
    for row in compiled:
        load, store = NARROWER.get(row.kernel, (128, 128))
        assert row.load_bits >= load, row
        assert row.store_bits >= store, row


def test_fault_is_found() -> None:
    row = testing.Compiled("case", "kernel", 120, 4, 255, 8, (99 << 10) + 1, 128, 128)
    assert [fault.split()[0] for fault in row.faults()] == ["8", str((99 << 10) + 1)]


def test_width_is_read_from_ptx() -> None:
    ptx = """
    ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
    @%p1 ld.global.L1::evict_last.v2.b32 { %r5, %r6 }, [ %rd2 + 0 ];
    st.global.b16 [ %rd3 + 0 ], { %rs1 };
    ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%r9];
    """
    assert testing._widest(ptx, "ld") == 128
    assert testing._widest(ptx, "st") == 16
    assert testing._widest("ret;", "ld") == 0
    copy = "cp.async.cg.shared.global [ %r5 + 0 ], [ %rd4 + 0 ], 0x10, %r6;"
    assert testing._widest(copy, "ld") == 128
    assert testing._widest(copy, "st") == 0


def test_record_sees_the_launch_of_the_assumed_device() -> None:
    from sn72kernels.ops.layernorm_gelu import op

    x = torch.empty(4, 64, device="meta")
    with device.assume(120) as facts:
        assert facts.arch == device.arch(torch.device("cpu")) == 120
    assert device.arch(torch.device("cpu")) == device.VIRTUAL.arch
    launches = testing.record(
        op.launch_forward, x, None, None, None, 1e-5, False, False, False, arch=90
    )
    assert [launch.kernel.__name__ for launch in launches] == ["forward_tile"]
    assert library._recording is None


# --- arguments at an edge ------------------------------------------------------------------

# Kernel -> why a product of sizes in 32 bits cannot wrap.
BOUNDED = {
    "route_blocks": "twice the number of blocks, of at most 2^24 samples",
    "compact_blocks": "likewise",
    "finish": "at most 256 rows of at most 1024 parts",
}


@pytest.fixture(scope="module")
def edges() -> list[dict[str, Any]]:
    """Launches with sizes of 1, with strides of 64 bits, and misaligned: for one architecture."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernel_cases.compiled"],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        cwd=Path(__file__).parents[3],
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_every_kernel_compiles_at_every_edge(edges: list[dict[str, Any]]) -> None:
    """Triton makes a constant of an integer that is 1, which the interpreter does not."""
    by_kind: dict[str, set[str]] = {}
    for row in edges:
        assert not row["faults"], row
        by_kind.setdefault(row["kind"], set()).add(row["kernel"])
    assert set(by_kind) == {"plain", "ones", "far", "misaligned"}
    # With one sample there is one launch only.
    assert by_kind["plain"] - by_kind["ones"] == {"route_blocks", "compact_blocks"}
    assert by_kind["plain"] == by_kind["far"] == by_kind["misaligned"]


@pytest.mark.slow
def test_no_alignment_is_claimed_that_is_not_there(edges: list[dict[str, Any]]) -> None:
    """A misaligned input is read by elements, of 32 bits at most; a fresh one by 128 bits."""
    misaligned = [row for row in edges if row["kind"] == "misaligned"]
    assert all(row["load"] <= 32 for row in misaligned)
    assert any(row["load"] == 128 for row in edges if row["kind"] == "plain")


@pytest.mark.slow
def test_offsets_of_rows_are_of_64_bits(edges: list[dict[str, Any]]) -> None:
    """No kernel multiplies a size or a stride in 32 bits, for inputs or outputs."""
    narrow = {row["kernel"] for row in edges if row["narrow"]}
    assert narrow == set(BOUNDED)


# Kernels that promise the bits of their reference -> why a multiplication and an addition may be
# one instruction that rounds once. The others do both steps apart, as their reference does.
EXACT = {
    "route_loop": "",
    "route_blocks": "",
    "compact_blocks": "",
    "finish": "",
    "vote": "",
    "preprocess": "",
    "dequantize": "",
    "dequantize_nvfp4": "",
    "dequantize_mxfp8": "",
    "quantize_static": "a power of two times a code, exact, then the rounding constant",
    "quantize_token": "likewise",
    "quantize_token_wide": "likewise",
    "quantize_mxfp8": "likewise",
    "quantize_nvfp4": "likewise; and a zero is added to a product",
}


@pytest.mark.slow
def test_exact_kernels_round_as_their_reference_does(edges: list[dict[str, Any]]) -> None:
    """No flushing of subnormal numbers, no approximate division, no fused steps."""
    rows = [row for row in edges if row["kernel"] in EXACT]
    assert {row["kernel"] for row in rows} == set(EXACT)
    for row in rows:
        assert row["inexact"] == [], row
        assert row["fused"] == 0 or EXACT[row["kernel"]], row
    assert any(row["inexact"] for row in edges)  # GELU's exponential, where no bits are promised
