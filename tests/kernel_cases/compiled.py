"""Compiles launches whose arguments are at an edge, and prints what the machine code says.

``python -m tests.kernel_cases.compiled [ARCH]``: in a process of its own, since the tests beside
it interpret. The interpreter sees neither that Triton makes a constant of an integer that is 1, nor
what it takes for aligned, nor the type of an offset.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from typing import Any

import torch

from sn72kernels import library, testing
from tests.kernel_cases import operators


def ones() -> dict[str, list[tuple[Any, ...]]]:
    """Every size 1 that can be, no options: integers that become constants."""

    def empty(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    x, row, scale, one = empty(1, 1), empty(1), empty(1, dtype=torch.float32), torch.ones(())
    q, table = empty(1, 1, 1, 2), empty(1, 1, 2)
    fp8, e8m0 = torch.float8_e4m3fn, torch.float8_e8m0fnu
    stats = empty(2, 1, dtype=torch.float32)
    long, wide = empty(1, 16385), empty(1, 8193)
    route = (scale, None, None, 0.1, 0.9)
    head = (x, None, None, empty(1, 1), None, row, None, None, None, 0.1, 0.9)
    images = empty(1, 1, 1, 3, dtype=torch.uint8)
    return {
        "attention": [(q, q, q, 1.0, "auto")],
        "cascade_route": [(*route, False, []), (*route, True, [1])],
        "classifier_head": [(*head, False, 1e-5, True), (*head, True, 1e-5, False)],
        "dequantize": [(x.to(torch.int8), one, "tensor", torch.bfloat16)],
        "dequantize_mxfp8": [(empty(1, 32).to(fp8), empty(1, 1).to(e8m0), torch.float32)],
        "dequantize_nvfp4": [(empty(1, 8).byte(), empty(1, 1).to(fp8), one, torch.float32)],
        "ensemble_vote": [([row], scale, True)],
        "layernorm_gelu_backward": [
            (x, None, x, stats, None, None, False),
            (wide, None, wide, stats, None, None, False),
            (wide, None, wide, stats, wide[0], None, True),
        ],
        "layernorm_gelu_forward": [
            (x, None, None, None, 1e-5, False, False, False),
            (long, None, None, None, 1e-5, False, False, True),
        ],
        "linear": [
            (x.to(dtype), one, x.to(dtype), one, None, "none", torch.float32)
            for dtype in (torch.int8, fp8)
        ],
        "preprocess": [
            (images, [1, 1], (0.0,) * 3, (1.0,) * 3, "squash", 1.0, "bilinear", torch.float32)
        ],
        "quantize_mxfp8": [(empty(1, 32),)],
        "quantize_nvfp4": [(empty(1, 16), one)],
        "quantize_static": [(x, one, "tensor", True), (x, scale, "token", False)],
        "quantize_token": [(x, True), (long, False)],
        "rope": [(q, q, table, table)],
        "rope_": [(q, q, table, table)],
    }


def far(x: torch.Tensor) -> torch.Tensor:
    """Leading dimensions more than 2^31 elements apart, of no memory: strides of 64 bits."""
    if x.dim() < 2:
        return x.to("meta")
    lead = [(1 << 31) + 16 * place for place in range(x.dim() - 1)]
    return torch.empty_strided(x.shape, (*lead, 1), dtype=x.dtype, device="meta")


def misaligned(x: torch.Tensor) -> torch.Tensor:
    """One element after a 16-byte border, of no memory."""
    memory = torch.empty(x.numel() + 1, dtype=x.dtype, device="meta")
    return memory[1:].view(x.shape)


KINDS: dict[str, tuple[Any, Any]] = {
    "plain": (operators.examples, lambda x: x.to("meta")),
    "ones": (ones, lambda x: x.to("meta")),
    "far": (operators.examples, far),
    "misaligned": (operators.examples, misaligned),
}


def launches(kind: str, arch: int) -> Iterator[tuple[str, library.Launch]]:
    """Launches of one kind, each with the name of its operator."""
    make, change = KINDS[kind]
    specs = operators.specs()
    for name, calls in make().items():
        for arguments in calls:
            given = operators.each_tensor(change, arguments)
            for launch in testing.record(specs[name].launch, *given, arch=arch):
                yield name, launch


def narrow_products(ttir: str) -> list[str]:
    """Products in 32 bits one of whose factors is an argument of the kernel: a size or a stride.

    Such a product is an offset that wraps beyond 2^31, unless something keeps the sizes small.
    """
    head = ttir[ttir.index("tt.func public") :].partition("\n")[0]
    sizes = set(re.findall(r"(%\w+): i32\b", head))
    found = []
    for line in ttir.splitlines():
        made = re.match(r"\s*(%\S+) = (\S+) (.*?) loc\(", line)
        if made is None:
            continue
        name, operation, rest = made.groups()
        uses = set(re.findall(r"%[\w#]+", rest.partition(" : ")[0]))
        if operation in ("tt.splat", "tt.broadcast", "tt.expand_dims") and uses & sizes:
            sizes.add(name)
        if operation == "arith.muli" and uses & sizes and re.search(r"(: |x)i32\b", rest):
            found.append(f"{operation} {rest}")
    return found


def inexact(ptx: str) -> list[str]:
    """Instructions that flush subnormal numbers or round otherwise than to nearest."""
    return sorted(set(re.findall(r"\b\w+\.(?:approx|full|ftz)[\w.]*", ptx)))


def main() -> None:
    """Print one JSON object per compiled launch."""
    arch = int(sys.argv[1]) if len(sys.argv) > 1 else 90
    for kind in KINDS:
        for name, launch in launches(kind, arch):
            row = testing.compile_launch(launch, arch, name)
            found = {"kind": kind, "op": name, "kernel": row.kernel, "faults": row.faults()}
            code = testing.compile_only(launch, arch).asm
            found["narrow"] = narrow_products(code["ttir"])
            found["inexact"] = inexact(str(code["ptx"]))
            found["fused"] = len(re.findall(r"\bfma\.rn\.f32", str(code["ptx"])))
            print(json.dumps(found | {"load": row.load_bits, "store": row.store_bits}))


if __name__ == "__main__":
    main()
