"""Whom an op is compared with: PyTorch eager, ``torch.compile``, and packages that may be there.

A peer is imported when it is first called. One that is not installed, or needs a GPU where there
is none, is named with the reason instead.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.kernels.harness import COMPILED, EAGER, Call

# Name as people know it -> module that it installs.
PACKAGES = {"flash-attn": "flash_attn", "quack": "quack", "liger-kernel": "liger_kernel"}


def others(
    device: torch.device,
    eager: Call,
    peers: Mapping[str, Call] | None = None,
    *,
    compiles: bool = True,
) -> tuple[dict[str, Call], dict[str, str]]:
    """The candidates beside ours, and who is absent and why.

    Args:
        device: where the race is run.
        eager: the op in PyTorch's own ops.
        peers: name of a package of :data:`PACKAGES` -> a call that imports and uses it. A name
            with more after the package's (``"quack, then GELU"``) is taken by its first word.
        compiles: whether ``eager`` can be compiled without graph breaks.
    """
    found: dict[str, Call] = {EAGER: eager}
    absent: dict[str, str] = {}
    if device.type != "cuda":
        absent[COMPILED] = "it is timed on a GPU only"
    elif not compiles:
        absent[COMPILED] = "the eager form breaks the graph"
    else:
        found[COMPILED] = compiled(eager)
    for name, call in (peers or {}).items():
        package = name.partition(",")[0]
        if importlib.util.find_spec(PACKAGES[package]) is None:
            absent[name] = f"{package} is not installed"
        elif device.type != "cuda":
            absent[name] = f"{package} needs a GPU"
        else:
            found[name] = call
    return found, absent


def compiled(call: Call) -> Call:
    """``torch.compile(call)`` for one shape.

    What was compiled for earlier shapes is dropped: after eight shapes of one function PyTorch
    would run it eagerly and say nothing.
    """
    torch._dynamo.reset()
    return torch.compile(call, dynamic=False, fullgraph=True)


def lazily(load: Callable[[], Call]) -> Call:
    """A call that is looked up (and its package imported) when it is first used."""
    once = functools.cache(load)

    def call(*arguments: Any) -> Any:
        return once()(*arguments)

    return call
