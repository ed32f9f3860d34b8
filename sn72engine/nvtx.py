"""Named ranges for NVIDIA's profilers: one per stage, decoding and routing on the time line.

Switched on by the variable ``SN72_NVTX``, read when the first range is entered. Switched off, a
range is one shared object that does nothing.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator
from typing import Any

from sn72engine import _deps
from sn72engine.errors import MissingDependencyError
from sn72kernels import env

log = logging.getLogger("sn72engine.nvtx")

_OFF = contextlib.nullcontext()


def span(name: str) -> contextlib.AbstractContextManager[None]:
    """A range on the calling thread, for ``with``; ranges nest."""
    nvtx = _nvtx()
    return _OFF if nvtx is None else _range(nvtx, name)


@contextlib.contextmanager
def _range(nvtx: Any, name: str) -> Iterator[None]:
    nvtx.range_push(name)
    try:
        yield
    finally:
        nvtx.range_pop()


@functools.cache
def _nvtx() -> Any:
    """``torch.cuda.nvtx``, or None: measuring must not cost an answer."""
    if env.get("SN72_NVTX") != "1":
        return None
    try:
        nvtx = _deps.require("torch", purpose="mark ranges for a profiler").cuda.nvtx
        nvtx.range_push("sn72engine")
        nvtx.range_pop()
    except (MissingDependencyError, RuntimeError) as error:
        log.warning("SN72_NVTX=1 needs a CUDA build of torch; no ranges are marked (%s)", error)
        return None
    return nvtx
