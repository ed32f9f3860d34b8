"""Every environment variable that sn72kernels and sn72engine read, in one table."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Variable:
    """One environment variable: its name, what an unset one means, and what it does."""

    name: str
    default: str
    help: str


VARIABLES: dict[str, Variable] = {
    v.name: v
    for v in (
        Variable(
            "SN72_CACHE_DIR",
            "",
            "Folder for engines, timing caches, trained example weights and tuning results. "
            "Unset: $XDG_CACHE_HOME/sn72engine, or ~/.cache/sn72engine.",
        ),
        Variable(
            "SN72_STORE_LIMIT_GB",
            "20",
            "Size in GB above which the least recently used engines are evicted.",
        ),
        Variable(
            "SN72_VLM_API_KEY",
            "",
            "Bearer token sent to the server of a VLM stage. Unset: none is sent.",
        ),
        Variable(
            "SN72_KERNELS",
            "auto",
            "'auto' runs Triton kernels on CUDA tensors where Triton is installed; 'reference' "
            "runs the plain PyTorch reference everywhere (to tell a kernel bug from another one).",
        ),
        Variable(
            "SN72_TUNING",
            "1",
            "'0' ignores tuning results on disk and uses the built-in heuristics.",
        ),
        Variable(
            "SN72_NVTX",
            "0",
            "'1' marks stages, decoding and routing as ranges for NVIDIA's profilers.",
        ),
    )
}


def get(name: str) -> str:
    """Value of a variable of the table, or its default.

    Raises:
        KeyError: ``name`` is not in the table; add it there first.
    """
    return os.environ.get(name) or VARIABLES[name].default


def cache_dir() -> Path:
    """Root of everything that the two packages keep on disk; may not exist yet."""
    chosen = get("SN72_CACHE_DIR")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "sn72engine"
