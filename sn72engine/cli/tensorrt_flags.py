"""Flags of ``sn72engine build`` for what only TensorRT's builders know."""

from __future__ import annotations

import argparse
from typing import Any, get_args

from sn72engine.spec import (
    HardwareCompatibility,
    Plugin,
    ProfilingVerbosity,
    Refit,
    TensorRTOptions,
    Tiling,
)

_MEGABYTE = 1 << 20


def add(parser: argparse.ArgumentParser) -> None:
    """Declare them; every flag has the name of its option."""
    group = parser.add_argument_group("with --backend tensorrt and tensorrt_rtx")
    group.add_argument("--tactic-mb", type=int, help="limit of memory for trying kernels")
    group.add_argument("--max-tactics", type=int, help="most kernels tried for one layer")
    group.add_argument(
        "--tactic-sources",
        metavar="NAME,NAME",
        help="where kernels come from, JIT_CONVOLUTIONS say; 'none' for none",
    )
    group.add_argument("--tiling", choices=get_args(Tiling), help="effort for the L2 cache")
    group.add_argument("--l2-tiling-mb", type=int, help="share of the L2 cache that it may use")
    group.add_argument("--aux-streams", type=int, help="most streams beside the main one")
    group.add_argument(
        "--hardware-compatibility",
        choices=get_args(HardwareCompatibility),
        help="other cards that shall run the engine (tensorrt)",
    )
    group.add_argument(
        "--version-compatible", action="store_true", help="later releases shall run the engine"
    )
    group.add_argument(
        "--exclude-lean-runtime", action="store_true", help="leave out the runtime for that"
    )
    group.add_argument(
        "--weight-streaming", action="store_true", help="weights may stay in host memory"
    )
    group.add_argument("--refit", choices=get_args(Refit), help="weights that can be replaced")
    group.add_argument(
        "--strip-weights", action="store_true", help="leave the weights out; refit puts them in"
    )
    group.add_argument(
        "--profiling", choices=get_args(ProfilingVerbosity), help="what layers tell of themselves"
    )
    group.add_argument(
        "--user-allocation", action="store_true", help="no allocation while running (tensorrt_rtx)"
    )
    group.add_argument(
        "--plugins",
        nargs="+",
        choices=get_args(Plugin),
        help="kernels of sn72kernels to compile into the engine (tensorrt)",
    )


def read(arguments: argparse.Namespace) -> TensorRTOptions:
    """The options that the flags say; what was not given keeps its default.

    Raises:
        OptionError: two do not go together, or a value is out of range.
    """
    values: dict[str, Any] = {
        "tactic_bytes": _bytes(arguments.tactic_mb),
        "l2_tiling_bytes": _bytes(arguments.l2_tiling_mb),
        "tactic_sources": _names(arguments.tactic_sources),
        "plugins": tuple(arguments.plugins or ()),
    }
    for name in (
        "max_tactics",
        "tiling",
        "aux_streams",
        "hardware_compatibility",
        "version_compatible",
        "exclude_lean_runtime",
        "weight_streaming",
        "refit",
        "strip_weights",
        "profiling",
        "user_allocation",
    ):
        values[name] = getattr(arguments, name)
    return TensorRTOptions(**{name: v for name, v in values.items() if v is not None})


def _bytes(megabytes: int | None) -> int | None:
    return None if megabytes is None else megabytes * _MEGABYTE


def _names(text: str | None) -> tuple[str, ...] | None:
    if text is None:
        return None
    return () if text == "none" else tuple(text.split(","))
