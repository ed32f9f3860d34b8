"""Registration of ops with PyTorch, the choice of implementation, and the launch of kernels.

An op is registered once, with a schema, a plain PyTorch reference, a Triton launcher and a fake
function. The CPU runs the reference. CUDA runs the launcher where Triton is installed and the
op takes the arguments, else the reference. Autograd is not registered here: an
``autograd.Function`` outside the op calls it, which costs less per call than
``torch.library.custom_op`` with its own autograd registration.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from sn72kernels import device as devices
from sn72kernels import env
from sn72kernels.errors import ArgumentError, NoTritonError

NAMESPACE = "sn72"
# The oldest that Triton supports, and the kernels are compiled for in the tests.
OLDEST_ARCH = 80

_library: Any = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]


_registered: dict[str, OpSpec] = {}


def _takes_everything(*_: Any) -> None:
    return None


def no_float64(first: torch.Tensor, *_: Any) -> str | None:
    """For :attr:`OpSpec.unsupported`: the kernel computes in float32."""
    return "float64 has no kernel" if first.dtype == torch.float64 else None


@dataclass(frozen=True)
class OpSpec:
    """One registered op.

    Attributes:
        name: registered as ``torch.ops.sn72.<name>``.
        schema: in PyTorch's schema language, without the name: ``(Tensor x) -> Tensor``.
        reference: plain PyTorch, same arguments; runs on any device.
        launch: allocates the outputs and launches Triton kernels; imports them when called.
        fake: shapes and dtypes of the outputs, for tracing.
        unsupported: given the op's arguments, the reason why the launcher does not take them, or
            None when it does.
    """

    name: str
    schema: str
    reference: Callable[..., Any]
    launch: Callable[..., Any]
    fake: Callable[..., Any]
    unsupported: Callable[..., str | None] = _takes_everything


@dataclass(frozen=True, slots=True)
class Choice:
    """Which implementation a call runs, and why.

    Attributes:
        op: registered name.
        implementation: ``"triton"`` or ``"reference"``.
        reason: one sentence.
        config: the launch configuration; empty for the reference.
    """

    op: str
    implementation: str
    reason: str
    config: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        text = f"{self.op}: {self.implementation}, because {self.reason}"
        return f"{text}; {self.config}" if self.config else text


def register(spec: OpSpec) -> Callable[..., Any]:
    """Define ``spec`` in PyTorch and return the callable overload."""
    _library.define(f"{spec.name}{spec.schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(spec.name, spec.reference, "CPU")
    _library.impl(spec.name, functools.partial(_run_on_cuda, spec), "CUDA")
    torch.library.register_fake(f"{NAMESPACE}::{spec.name}", spec.fake, lib=_library)
    overload: Callable[..., Any] = getattr(torch.ops.sn72, spec.name).default
    _registered[spec.name] = spec
    return overload


def registered() -> dict[str, OpSpec]:
    """The operators of the op modules imported so far, by registered name."""
    return dict(_registered)


def choose(spec: OpSpec, device: torch.device, *args: Any) -> Choice:
    """The implementation that ``spec`` runs for ``args`` on ``device``."""
    wanted = env.get("SN72_KERNELS")
    if wanted not in ("auto", "reference"):
        raise ArgumentError(f"SN72_KERNELS is {wanted!r}; set it to 'auto' or 'reference'.")
    if device.type != "cuda":
        return Choice(spec.name, "reference", f"the tensors are on {device}, not on a CUDA device")
    if wanted == "reference":
        return Choice(spec.name, "reference", "SN72_KERNELS=reference is set")
    if not triton_available():
        return Choice(spec.name, "reference", "Triton is not installed (pip install 'triton>=3.6')")
    arch = devices.arch(device)
    if arch < OLDEST_ARCH:
        why = f"Triton compiles for sm_{OLDEST_ARCH} and later, and this is sm_{arch}"
        return Choice(spec.name, "reference", why)
    reason = spec.unsupported(*args)
    if reason is not None:
        return Choice(spec.name, "reference", reason)
    return Choice(spec.name, "triton", "the tensors are on a CUDA device and Triton is installed")


@functools.cache
def triton_available() -> bool:
    """Whether Triton can be found; it is not imported."""
    return importlib.util.find_spec("triton") is not None


def require_triton(purpose: str) -> None:
    """Say how to get Triton where it is absent.

    Raises:
        NoTritonError: it is not installed.
    """
    if not triton_available():
        raise NoTritonError(f"Triton is needed to {purpose}; run: pip install 'triton>=3.6'")


def _run_on_cuda(spec: OpSpec, *args: Any) -> Any:
    device = _device_of(args)
    if choose(spec, device, *args).implementation == "reference":
        return spec.reference(*args)
    # Triton launches on the current device, whatever the device of its arguments.
    if device.index == torch.cuda.current_device():
        return spec.launch(*args)
    with torch.cuda.device(device):
        return spec.launch(*args)


def _device_of(args: tuple[Any, ...]) -> torch.device:
    for value in args:
        found = value[0] if isinstance(value, (list, tuple)) and value else value
        if isinstance(found, torch.Tensor):
            return found.device
    raise ArgumentError("the op was called without a tensor")


@dataclass(frozen=True)
class Launch:
    """One recorded kernel launch: everything that decides what is compiled."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]


_recording: list[Launch] | None = None


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch a Triton kernel. All launchers go through here, so that tools can record them.

    Args:
        kernel: a ``@triton.jit`` function.
        grid: number of programs per axis.
        args: positional kernel arguments, in the order of the kernel's parameters.
        options: constexpr arguments and compiler options (``num_warps``, ...).
    """
    if _recording is not None:
        _recording.append(Launch(kernel, grid, args, options))
        return
    kernel[grid](*args, **options)


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collect launches instead of running them, so that they can be compiled with no GPU.

    Process-wide and meant for tools and tests, not for concurrent use.
    """
    global _recording
    previous, _recording = _recording, []
    try:
        yield _recording
    finally:
        _recording = previous
