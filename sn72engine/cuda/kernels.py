"""Load the kernels onto a GPU and launch them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from sn72engine import _deps
from sn72engine.cuda import nvrtc
from sn72engine.cuda.driver import compute_capability
from sn72engine.cuda.layout import Launch
from sn72engine.errors import CudaUnavailableError

NAMES: Final = (
    "sn72_begin",
    "sn72_gather",
    "sn72_route_f32",
    "sn72_route_f16",
    "sn72_route_bf16",
    "sn72_scatter_f32",
    "sn72_scatter_f16",
    "sn72_scatter_bf16",
)

_FATBIN = Path(__file__).with_name("sn72_kernels.fatbin")
_PURPOSE = "run the cascade on the GPU"


@dataclass(frozen=True, slots=True)
class Kernels:
    """The loaded kernels.

    Attributes:
        origin: ``fatbin``: compiled when the package was built; ``nvrtc``: compiled here.
        handles: kernel name to its ``CUkernel`` handle, for graph nodes made by hand.
        code: the ``cuda.core.ObjectCode`` that owns them; they are valid as long as it lives.
    """

    origin: Literal["fatbin", "nvrtc"]
    handles: Mapping[str, int]
    code: Any

    def launch(self, launch: Launch, stream: int) -> None:
        """Launch on a stream, or record into the graph that the stream is capturing.

        Args:
            launch: from :mod:`sn72engine.cuda.layout`.
            stream: a ``CUstream`` handle, such as ``torch.cuda.Stream().cuda_stream``.

        Raises:
            CudaUnavailableError: the driver refuses the launch.
        """
        driver = _deps.require("cuda.bindings", purpose=_PURPOSE, submodule="driver")
        # The driver copies the record before it returns.
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(launch.args))
        (status,) = driver.cuLaunchKernel(
            driver.CUfunction(self.handles[launch.kernel]),
            *launch.grid,
            *launch.block,
            0,
            driver.CUstream(stream),
            ctypes.addressof(pointers),
            0,
        )
        if int(status) != 0:
            raise CudaUnavailableError(f"launching {launch.kernel} failed with {status!r}")


def load_kernels(device: int = 0) -> Kernels:
    """Load the kernels on a GPU and make its primary context current.

    Takes the fatbin that came with the package, else compiles the sources with NVRTC.

    Raises:
        CudaUnavailableError: there is no usable driver or GPU, ``cuda-core`` is absent, or
            neither way gave kernels. The message says which and why.
    """
    capability = compute_capability(device)  # before cuda.core, which may hang without a driver
    try:
        core = _deps.require("cuda.core", purpose=_PURPOSE)
        _deps.require("cuda.bindings", purpose=_PURPOSE, submodule="driver")
        core.Device(device).set_current()
    except Exception as error:
        raise CudaUnavailableError(f"GPU {device} cannot be used: {error}") from error
    reasons = []
    if _FATBIN.is_file():
        try:
            return _loaded("fatbin", lambda: core.ObjectCode.from_fatbin(_FATBIN.read_bytes()))
        except CudaUnavailableError as error:
            reasons.append(str(error))
    else:
        reasons.append(f"{_FATBIN.name}: the package was built without nvcc")
    try:
        compiled = nvrtc.cubin(capability)
        return _loaded("nvrtc", lambda: core.ObjectCode.from_cubin(compiled))
    except CudaUnavailableError as error:
        reasons.append(str(error))
    raise CudaUnavailableError("no CUDA kernels: " + "; ".join(reasons))


def _loaded(origin: Literal["fatbin", "nvrtc"], load: Callable[[], Any]) -> Kernels:
    try:
        code = load()
        handles = {name: int(code.get_kernel(name).handle) for name in NAMES}
    except Exception as error:  # cuda.core's errors have no common base
        raise CudaUnavailableError(
            f"{origin}: the driver cannot load the kernels ({type(error).__name__}: {error})"
        ) from error
    return Kernels(origin, handles, code)
