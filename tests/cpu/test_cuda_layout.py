"""Launch shapes and the checks that the kernels leave to the host."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sn72engine.cuda import layout
from sn72engine.errors import OptionError


def route_args(buckets: list[int], **fields: Any) -> layout.RouteArgs:
    args = layout.RouteArgs(capacity=64, weight=1.0, bucket_count=len(buckets))
    args.buckets[: len(buckets)] = buckets[: layout.MAX_BUCKETS]
    for name, value in fields.items():
        setattr(args, name, value)
    return args


@given(st.integers(1, 5000))
def test_route_is_one_block_of_whole_warps(capacity: int) -> None:
    launch = layout.route(route_args([capacity], capacity=capacity), "f16")
    assert launch.kernel == "sn72_route_f16"
    assert launch.grid == (1, 1, 1)
    threads = launch.block[0]
    assert threads % 32 == 0
    assert threads <= 1024
    assert threads >= min(capacity, 1024)
    assert launch.block[1:] == (1, 1)


@given(st.integers(1, 10_000))
def test_begin_and_scatter_cover_every_item(items: int) -> None:
    begin = layout.begin(layout.BeginArgs(capacity=items))
    scatter = layout.scatter(layout.ScatterArgs(stage=2), "bf16", items)
    assert (begin.kernel, scatter.kernel) == ("sn72_begin", "sn72_scatter_bf16")
    for launch in (begin, scatter):
        assert launch.grid[0] * launch.block[0] >= items


@given(st.integers(1, 2**40), st.integers(1, 100_000))
def test_gather_fits_the_grid_limits(row_bytes: int, rows: int) -> None:
    args = layout.GatherArgs(row_bytes=row_bytes, target_stride=row_bytes, rows=rows)
    launch = layout.gather(args)
    assert launch.kernel == "sn72_gather"
    assert 1 <= launch.grid[0] <= 256
    assert 1 <= launch.grid[1] <= min(rows, 65535)


@pytest.mark.parametrize(
    ("buckets", "fields", "message"),
    [
        ([], {}, "bucket_count=0 must be 1 to 32"),
        (list(range(1, 34)), {"capacity": 33}, "bucket_count=33 must be 1 to 32"),
        ([8, 8, 64], {}, r"\[8, 8, 64\] must be positive and ascending"),
        ([0, 64], {}, "must be positive and ascending"),
        ([8, 63], {}, "must end with capacity=64"),
        ([64], {"flags": 2}, "bucket_count=1 must be 0 where no stage follows"),
        ([64], {"flags": 32}, "bucket_count=1 must be 0 where no stage follows"),
        ([64], {"stage": 2, "first": 3}, "first=3 must be 0 to stage=2"),
        ([64], {"stage": 2, "first": -1}, "first=-1"),
        ([64], {"capacity": 0}, "capacity=0 must be at least 1"),
        ([64], {"stage": 255}, "stage=255 must be 0 to 254"),
        ([64], {"stage": -1}, "stage=-1"),
        ([64], {"weight": 0.0}, "weight=0.0 must be greater than 0"),
        ([64], {"weight": float("nan")}, "weight=nan"),
        ([64], {"threshold_stride": 2}, "threshold_stride=2"),
        ([64], {"budget_stride": -1}, "budget_stride=-1"),
        ([64], {"budget_ns": 4096}, "start_ns must be given"),
    ],
)
def test_route_refuses_what_the_kernel_cannot_use(
    buckets: list[int], fields: dict[str, Any], message: str
) -> None:
    args = route_args(buckets[: layout.MAX_BUCKETS], **fields)
    args.bucket_count = len(buckets)
    with pytest.raises(OptionError, match=message):
        layout.route(args, "f32")


def test_route_accepts_the_last_stage_and_full_tables() -> None:
    layout.route(route_args([], flags=int(layout.Flag.LAST_STAGE)), "f32")
    layout.route(route_args([], flags=int(layout.Flag.COMBINE_ONLY), stage=3, first=2), "f32")
    layout.route(route_args([*range(1, 32), 64]), "f32")


def test_scatter_and_gather_refuse_what_the_kernels_cannot_use() -> None:
    with pytest.raises(OptionError, match="rows=0"):
        layout.scatter(layout.ScatterArgs(), "f32", 0)
    with pytest.raises(OptionError, match="label_out"):
        layout.scatter(layout.ScatterArgs(label=64), "f32", 1)
    with pytest.raises(OptionError, match="row_bytes=0"):
        layout.gather(layout.GatherArgs(rows=1))
    with pytest.raises(OptionError, match="target_stride=3 must be at least row_bytes=4"):
        layout.gather(layout.GatherArgs(rows=1, row_bytes=4, target_stride=3))
    with pytest.raises(OptionError, match="capacity=0"):
        layout.begin(layout.BeginArgs())
