"""How kernels are held to account: error measures, poisoned outputs, graphs, compile-only checks.

The compile-only checks need no GPU: Triton brings ptxas and cuobjdump. A launcher is called on
meta tensors while its launches are recorded, each launch is compiled for an architecture just as
it would be specialised for a real call, and the machine code is read: registers, local memory
(spills), shared memory, and how wide global memory is accessed.

``python -m sn72kernels.testing`` prints the table; ``--json`` gives it to a program.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sn72kernels import device as devices
from sn72kernels.errors import KernelError, NoTritonError

if TYPE_CHECKING:
    import torch

    from sn72kernels.library import Launch

ARCHITECTURES = (80, 89, 90, 100, 120)


# --- numbers -------------------------------------------------------------------------------


def error_ratio(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of ``actual - expected`` over that of ``expected``, in float64.

    Zero for two empty tensors; infinite where ``actual`` holds a NaN that ``expected`` lacks.
    """
    got, want = actual.double(), expected.double()
    if want.numel() == 0:
        return 0.0
    gap = (got - want).square().mean().sqrt().item()
    if math.isnan(gap):
        return math.inf
    size = want.square().mean().sqrt().item()
    return gap / size if size > 0.0 else gap


def assert_close(
    name: str, actual: torch.Tensor, expected: torch.Tensor, *, relative: float, absolute: float
) -> None:
    """Assert ``|actual - expected| <= absolute + relative * |expected|`` everywhere.

    Args:
        name: named in the message.
        actual: what the kernel computed.
        expected: the oracle, usually float64 arithmetic on the same inputs.
        relative: relative bound; the caller says where it comes from.
        absolute: absolute bound, likewise.

    Raises:
        AssertionError: shapes differ, or an element is out of bounds or NaN; the message gives
            the worst element and its place.
    """
    if actual.shape != expected.shape:
        raise AssertionError(
            f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
        )
    if actual.numel() == 0:
        return
    got, want = actual.double().cpu(), expected.double().cpu()
    excess = (got - want).abs() - (absolute + relative * want.abs())
    excess = excess.nan_to_num(nan=math.inf)
    worst = int(excess.argmax())
    if float(excess.flatten()[worst]) > 0.0:
        raise AssertionError(
            f"{name}: flat element {worst} of {tuple(got.shape)} is {got.flatten()[worst].item()!r}"
            f", expected {want.flatten()[worst].item()!r} within {absolute:g} + {relative:g} of it;"
            f" {int((excess > 0).sum())} elements are out of bounds"
        )


def assert_same(actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    """Assert that tensors are equal in dtype, shape and value; a NaN equals a NaN.

    Raises:
        AssertionError: they are not.
    """
    import torch

    for have, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(have.cpu(), want.cpu(), rtol=0, atol=0, equal_nan=True)


def assert_capturable(
    call: Callable[..., Sequence[torch.Tensor]],
    first: Sequence[torch.Tensor],
    second: Sequence[torch.Tensor],
) -> None:
    """Capture ``call`` on ``first`` in a CUDA graph, replay it on ``second``, compare.

    Args:
        call: the op.
        first: CUDA tensors to capture with.
        second: CUDA tensors of the same shapes, copied into place before the replay.

    Raises:
        AssertionError: the replay gave something else than a plain call on ``second``.
    """
    import torch

    wanted = [t.clone() for t in call(*second)]
    buffers = [t.clone() for t in first]
    call(*buffers)  # compiles, which a capture may not
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call(*buffers)
    for buffer, value in zip(buffers, second, strict=True):
        buffer.copy_(value)
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert_same(outputs, wanted)


def assert_stream_safe(
    call: Callable[..., Sequence[torch.Tensor]],
    first: Sequence[torch.Tensor],
    second: Sequence[torch.Tensor],
) -> None:
    """Two streams at once give what one call after the other gives.

    Raises:
        AssertionError: they do not.
    """
    import torch

    wanted = [[t.clone() for t in call(*arguments)] for arguments in (first, second)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]  # type: ignore[no-untyped-call]
    results: list[list[Sequence[torch.Tensor]]] = [[], []]
    for _ in range(20):
        for place, arguments in enumerate((first, second)):
            with torch.cuda.stream(streams[place]):
                results[place].append(call(*arguments))
    torch.cuda.synchronize()
    for place in (0, 1):
        for outputs in results[place]:
            assert_same(outputs, wanted[place])


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill every ``torch.empty`` with NaN (the largest value for integers).

    What a kernel forgets to write then shows. Uses PyTorch's own switch, so that it covers every
    way of allocating.
    """
    import torch

    was = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    switch: Any = torch.utils.deterministic
    fill = switch.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    switch.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was, warn_only=warn_only)
        switch.fill_uninitialized_memory = fill


# --- compile-only checks -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Compiled:
    """What the machine code of one kernel for one architecture says.

    Attributes:
        case: label of the op's compile case.
        kernel: name of the ``@triton.jit`` function.
        arch: compute capability as one number.
        warps: warps per program.
        registers: per thread.
        local_bytes: local memory per thread (stack); spilled registers live there.
        shared_bytes: shared memory per block.
        load_bits: width of the widest load from global memory.
        store_bits: width of the widest store to global memory.
    """

    case: str
    kernel: str
    arch: int
    warps: int
    registers: int
    local_bytes: int
    shared_bytes: int
    load_bits: int
    store_bits: int

    def faults(self) -> tuple[str, ...]:
        """What is wrong with it, in words; empty when nothing is."""
        found = []
        if self.local_bytes:
            found.append(f"{self.local_bytes} bytes of local memory (spills)")
        if self.shared_bytes > devices.SHARED_LIMITS[self.arch]:
            found.append(f"{self.shared_bytes} bytes of shared memory")
        return tuple(found)


def record(call: Callable[..., object], *args: Any, arch: int) -> list[Launch]:
    """The launches that ``call(*args)`` would make on ``arch``; pass meta tensors."""
    from sn72kernels import library

    with devices.assume(arch), library.recording() as launches:
        call(*args)
    return launches


def compile_launch(launch: Launch, arch: int, case: str = "") -> Compiled:
    """Compile one recorded launch for ``arch`` and read the machine code.

    Raises:
        KernelError: the kernel was imported under Triton's interpreter, or Triton's own tools
            fail.
    """
    compiled = compile_only(launch, arch)
    registers, local, shared = _usage(compiled.asm["cubin"])
    ptx = str(compiled.asm["ptx"])
    return Compiled(
        case=case,
        kernel=launch.kernel.__name__,
        arch=arch,
        warps=compiled.metadata.num_warps,
        registers=registers,
        local_bytes=local,
        shared_bytes=max(shared, compiled.metadata.shared),
        load_bits=_widest(ptx, "ld"),
        store_bits=_widest(ptx, "st"),
    )


def compile_only(launch: Launch, arch: int) -> Any:
    """What Triton compiles of a recorded launch: ``asm`` has ``ttir``, ``ptx``, ``cubin``.

    Raises:
        KernelError: the kernel was imported under Triton's interpreter.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not isinstance(launch.kernel, triton.runtime.JITFunction):
        raise KernelError("kernels are interpreted here; compile in a process without the switch")
    signature, constants, attributes, options = _specialise(launch)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def compile_table(
    folders: Sequence[str], architectures: Sequence[int] = ARCHITECTURES
) -> list[Compiled]:
    """Compile every case of the ops in these folders for every architecture."""
    table: list[Compiled] = []
    for op in folders:
        module = importlib.import_module(f"sn72kernels.ops.{op}.op")
        for label, (call, args) in module.compile_cases().items():
            for arch in architectures:
                launches = record(call, *args, arch=arch)
                table.extend(compile_launch(each, arch, f"{op}: {label}") for each in launches)
    return table


def format_table(table: Sequence[Compiled]) -> str:
    """The table as text, one line per kernel and case, registers side by side per architecture."""
    architectures = sorted({row.arch for row in table})
    lines: dict[tuple[str, str], list[Compiled]] = {}
    for row in table:
        lines.setdefault((row.case, row.kernel), []).append(row)
    width = max((len(case) for case, _ in lines), default=4)
    head = " ".join(f"{f'sm_{arch}':>6}" for arch in architectures)
    text = [f"{'case':<{width}} {'kernel':<18} warps {head}  shared  load store  faults"]
    for (case, kernel), rows in lines.items():
        by_arch = {row.arch: row for row in rows}
        registers = " ".join(
            f"{by_arch[arch].registers if arch in by_arch else '-':>6}" for arch in architectures
        )
        faults = "; ".join(f"sm_{row.arch} {fault}" for row in rows for fault in row.faults())
        text.append(
            f"{case:<{width}} {kernel:<18} {rows[0].warps:>5} {registers}"
            f" {max(row.shared_bytes for row in rows):>7} {min(row.load_bits for row in rows):>5}"
            f" {min(row.store_bits for row in rows):>5}  {faults or 'none'}"
        )
    return "\n".join(text)


_TYPES = {
    "float16": "fp16",
    "bfloat16": "bf16",
    "float32": "fp32",
    "float64": "fp64",
    "uint8": "u8",
    "int8": "i8",
    "int32": "i32",
    "int64": "i64",
    "float8_e4m3fn": "fp8e4nv",
}


def _specialise(
    launch: Launch,
) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], Any], dict[str, Any]]:
    """Signature, constants and hints as Triton derives them from a real call.

    Pointers and integers that are multiples of 16 are marked so, and an integer 1 and None become
    constants.
    """
    import torch

    kernel = launch.kernel
    named = dict(zip(kernel.arg_names, launch.args, strict=False))
    options = {k: v for k, v in launch.options.items() if k not in kernel.arg_names}
    named.update({k: v for k, v in launch.options.items() if k in kernel.arg_names})
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], Any] = {}
    for place, parameter in enumerate(kernel.params):
        value = named[parameter.name]
        aligned = False
        if (
            parameter.is_constexpr
            or value is None
            or (isinstance(value, int) and (value == 1 or isinstance(value, bool)))
        ):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = f"*{_TYPES[str(value.dtype).removeprefix('torch.')]}"
            # Meta tensors stand for fresh allocations, which are aligned; an offset view is not.
            aligned = value.storage_offset() * value.element_size() % 16 == 0
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % 16 == 0
        else:
            signature[parameter.name] = "fp32"
        if aligned:
            attributes[(place,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes, options


def _usage(cubin: bytes) -> tuple[int, int, int]:
    """Registers, local bytes and static shared bytes of the kernel in ``cubin``."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [str(tool), "-res-usage", file.name], capture_output=True, text=True, check=False
        )
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", done.stdout)
    if found is None:
        raise KernelError(f"{tool} gave no resource usage: {done.stdout} {done.stderr}")
    registers, stack, shared, local = (int(group) for group in found.groups())
    return registers, stack + local, shared


def _widest(ptx: str, direction: str) -> int:
    """Bits of the widest ``ld.global`` or ``st.global``; 0 where there is none.

    A copy from global to shared memory (``cp.async``) counts as a load.
    """
    pattern = rf"\b{direction}\.global[.\w:]*?(?:\.v(\d))?\.[bufs](\d+)\b"
    widths = [int(n or 1) * int(bits) for n, bits in re.findall(pattern, ptx)]
    if direction == "ld":
        copies = re.findall(r"\bcp\.async\.c[ag]\.shared\.global[^;]*?\],\s*(0x[0-9a-f]+|\d+)", ptx)
        widths += [8 * int(size, 0) for size in copies]
    return max(widths, default=0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the compile table; exit code 1 where a kernel has a fault, 2 without Triton."""
    from sn72kernels import OPS
    from sn72kernels.library import require_triton

    folders = sorted(set(OPS.values()))
    parser = argparse.ArgumentParser(prog="python -m sn72kernels.testing", description=main.__doc__)
    parser.add_argument("--ops", nargs="+", default=folders, choices=folders)
    parser.add_argument("--arch", nargs="+", type=int, default=list(ARCHITECTURES))
    parser.add_argument("--json", action="store_true", help="one JSON list instead of the table")
    options = parser.parse_args(arguments)
    try:
        require_triton("compile kernels")
    except NoTritonError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    table = compile_table(options.ops, options.arch)
    if options.json:
        print(json.dumps([asdict(row) for row in table]))
    else:
        print(format_table(table))
    return 1 if any(row.faults() for row in table) else 0


if __name__ == "__main__":
    sys.exit(main())
