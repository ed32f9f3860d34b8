"""Whether a usable NVIDIA driver and GPU are here, asked with ctypes alone.

This comes before any call of ``cuda.core`` or ``cuda.bindings``: without a driver some of their
calls fail late, and a few wait for ever.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from dataclasses import dataclass

from sn72engine.errors import CudaUnavailableError

#: Conditional graph nodes, which the kernels steer, came with CUDA 12.4.
LOWEST_VERSION = (12, 4)

_LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_COMPUTE_CAPABILITY_MAJOR = 75  # CUdevice_attribute
_COMPUTE_CAPABILITY_MINOR = 76


@dataclass(frozen=True, slots=True)
class Availability:
    """What the probe found.

    Attributes:
        ok: a driver that is new enough and at least one GPU.
        reason: why not; empty when ``ok``.
        version: newest CUDA version that the driver serves, such as (13, 0); None without one.
        devices: number of GPUs visible to this process.
    """

    ok: bool
    reason: str
    version: tuple[int, int] | None = None
    devices: int = 0


@functools.cache
def driver_available() -> Availability:
    """Probe once per process. Initialises the driver but creates no context."""
    return probe(_LIBRARY)


def probe(library: str) -> Availability:
    """As :func:`driver_available`, for the driver library of that name; not cached."""
    try:
        cuda = ctypes.CDLL(library)
    except OSError as error:
        absent = "No such file" in str(error) or "not found" in str(error)
        return Availability(
            False, f"no NVIDIA driver: {f'{library} is not installed' if absent else error}"
        )
    try:
        version = _version(cuda)
        if version < LOWEST_VERSION:
            return Availability(
                False,
                f"the NVIDIA driver serves CUDA {_dotted(version)}, and {_dotted(LOWEST_VERSION)} "
                "or newer is needed; update the driver",
                version,
            )
        _check(cuda, "cuInit", 0)
        count = ctypes.c_int()
        _check(cuda, "cuDeviceGetCount", ctypes.byref(count))
    except CudaUnavailableError as error:
        return Availability(False, str(error))
    if count.value == 0:
        return Availability(False, "the NVIDIA driver sees no GPU", version)
    return Availability(True, "", version, count.value)


def compute_capability(device: int = 0) -> tuple[int, int]:
    """Compute capability of a GPU, such as (9, 0).

    Raises:
        CudaUnavailableError: there is no driver, or no GPU of that number.
    """
    found = driver_available()
    if not found.ok:
        raise CudaUnavailableError(found.reason)
    if not 0 <= device < found.devices:
        raise CudaUnavailableError(f"device={device} is not one of the {found.devices} GPUs here")
    cuda = ctypes.CDLL(_LIBRARY)
    handle = ctypes.c_int()
    _check(cuda, "cuDeviceGet", ctypes.byref(handle), device)
    return (
        _attribute(cuda, _COMPUTE_CAPABILITY_MAJOR, handle),
        _attribute(cuda, _COMPUTE_CAPABILITY_MINOR, handle),
    )


def _attribute(cuda: ctypes.CDLL, attribute: int, device: ctypes.c_int) -> int:
    value = ctypes.c_int()
    _check(cuda, "cuDeviceGetAttribute", ctypes.byref(value), attribute, device)
    return value.value


def _version(cuda: ctypes.CDLL) -> tuple[int, int]:
    value = ctypes.c_int()
    _check(cuda, "cuDriverGetVersion", ctypes.byref(value))
    return value.value // 1000, value.value % 1000 // 10


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def _check(cuda: ctypes.CDLL, name: str, *arguments: object) -> None:
    """Call a driver function.

    Raises:
        CudaUnavailableError: the library does not have it, or it reports an error.
    """
    try:
        function = getattr(cuda, name)
    except AttributeError:
        raise CudaUnavailableError(f"the NVIDIA driver library has no {name}") from None
    status = function(*arguments)
    if status != 0:
        raise CudaUnavailableError(f"{name} failed with CUDA error {status}{_name(cuda, status)}")


def _name(cuda: ctypes.CDLL, status: int) -> str:
    text = ctypes.c_char_p()
    function = getattr(cuda, "cuGetErrorName", None)
    if function is None or function(status, ctypes.byref(text)) != 0 or text.value is None:
        return ""
    return f" ({text.value.decode()})"
