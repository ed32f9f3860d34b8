"""What a kernel launcher must know of a device: facts, read once per device and cached.

Nothing here touches CUDA until a function is called with a CUDA device.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sn72kernels.errors import NoGpuError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """Facts of one device.

    Attributes:
        name: as the driver reports it.
        arch: compute capability as one number (90 is sm_90); 0 where there is none.
        sms: streaming multiprocessors.
        l2_bytes: size of the L2 cache.
        shared_bytes: most shared memory that one block may ask for.
        memory_bytes: device memory.
        peak_gb_s: memory clock x bus width x 2 in 10^9 bytes/s; None where the driver does not
            tell.
    """

    name: str
    arch: int
    sms: int
    l2_bytes: int
    shared_bytes: int
    memory_bytes: int
    peak_gb_s: float | None


# Stands in where kernels are interpreted or only compiled: the smallest supported data centre
# part, so that a configuration chosen for it fits everywhere.
VIRTUAL = DeviceFacts(
    name="none",
    arch=80,
    sms=108,
    l2_bytes=40 << 20,
    shared_bytes=163 << 10,
    memory_bytes=0,
    peak_gb_s=None,
)

# Largest shared memory of one block, in bytes (CUDA C++ Programming Guide, table "Technical
# Specifications per Compute Capability").
SHARED_LIMITS: dict[int, int] = {
    80: 163 << 10,
    86: 99 << 10,
    89: 99 << 10,
    90: 227 << 10,
    100: 227 << 10,
    103: 227 << 10,
    120: 99 << 10,
    121: 99 << 10,
}

_assumed: DeviceFacts | None = None


def facts(device: torch.device) -> DeviceFacts:
    """Facts of ``device``; :data:`VIRTUAL` for one that is not a CUDA device."""
    if _assumed is not None:
        return _assumed
    if device.type != "cuda":
        return VIRTUAL
    return _read(_index(device))


def arch(device: torch.device) -> int:
    """Compute capability of ``device`` as one number, 80 for one that is not a CUDA device."""
    return facts(device).arch


@contextmanager
def assume(arch: int) -> Iterator[DeviceFacts]:
    """Let :func:`facts` answer for an architecture that is not here (compile-only checks).

    Process-wide and meant for tools and tests, not for concurrent use.
    """
    global _assumed
    previous = _assumed
    _assumed = replace(
        VIRTUAL, name=f"sm_{arch}", arch=arch, shared_bytes=SHARED_LIMITS.get(arch, 99 << 10)
    )
    try:
        yield _assumed
    finally:
        _assumed = previous


def require_cuda(purpose: str) -> torch.device:
    """The current CUDA device.

    Raises:
        NoGpuError: no CUDA device is visible; the message says what needed one.
    """
    import torch

    if not torch.cuda.is_available():
        raise NoGpuError(
            f"a CUDA device is needed to {purpose}, and torch {torch.__version__} sees none; run it"
            " on a machine with one, or check CUDA_VISIBLE_DEVICES and that torch is a CUDA build."
        )
    return torch.device("cuda", torch.cuda.current_device())


@functools.cache
def achieved_gb_s(index: int) -> float:
    """Copy bandwidth that CUDA device ``index`` reaches, in 10^9 bytes/s, read plus write.

    Measured once per process with a copy of a buffer far larger than the L2 cache: the ceiling
    that a memory-bound kernel is held against, closer to the truth than the data sheet's peak.

    Raises:
        NoGpuError: no CUDA device is visible.
    """
    import torch

    require_cuda("measure its memory bandwidth")
    device = torch.device("cuda", index)
    size = max(256 << 20, 8 * facts(device).l2_bytes)
    with torch.cuda.device(device):
        source = torch.empty(size, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        for _ in range(3):
            target.copy_(source)
        best = float("inf")
        for _ in range(10):
            start, stop = event(), event()
            start.record()
            target.copy_(source)
            stop.record()
            stop.synchronize()
            best = min(best, start.elapsed_time(stop))
    return 2 * size / best / 1e6


def event() -> torch.cuda.Event:
    """A CUDA event that keeps time."""
    import torch

    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _index(device: torch.device) -> int:
    import torch

    return torch.cuda.current_device() if device.index is None else device.index


@functools.cache
def _read(index: int) -> DeviceFacts:
    import torch

    properties = torch.cuda.get_device_properties(index)
    clock_khz = getattr(properties, "memory_clock_rate", 0)
    bus_bits = getattr(properties, "memory_bus_width", 0)
    number = properties.major * 10 + properties.minor
    return DeviceFacts(
        name=properties.name,
        arch=number,
        sms=properties.multi_processor_count,
        l2_bytes=getattr(properties, "L2_cache_size", 0) or VIRTUAL.l2_bytes,
        shared_bytes=getattr(
            properties, "shared_memory_per_block_optin", SHARED_LIMITS.get(number, 99 << 10)
        ),
        memory_bytes=properties.total_memory,
        peak_gb_s=2 * clock_khz * (bus_bits / 8) / 1e6 if clock_khz and bus_bits else None,
    )
