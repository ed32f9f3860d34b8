"""Measure launch configurations on this machine's GPU and keep the fastest correct ones.

``python -m sn72kernels.tune`` goes over every op's own cases; ops then launch with what it found,
on GPUs of the same architecture and with the same version of Triton. It needs a GPU, and exits
with code 2 where there is none. Run it on a card that does nothing else.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sn72kernels import OPS, tuning
from sn72kernels import device as devices
from sn72kernels.errors import ArgumentError, NoGpuError, NoTritonError

if TYPE_CHECKING:
    import torch

# Root mean square of the gap to the reference over that of the reference: results are rounded to
# 16 bits, and a configuration that is wrong is wrong by far more.
TOLERANCE = 1e-2


def cases(folder: str, device: torch.device, **sizes: int) -> list[tuning.Case]:
    """The calls that the op in ``sn72kernels/ops/<folder>`` is measured with."""
    module: Any = importlib.import_module(f"sn72kernels.ops.{folder}.op")
    found: list[tuning.Case] = module.tuning_cases(device, **sizes)
    return found


def agrees(case: tuning.Case, wanted: Sequence[torch.Tensor] | torch.Tensor) -> bool:
    """Whether the launcher gives ``wanted``, the reference's result: codes and places exactly."""
    import torch

    from sn72kernels.testing import error_ratio

    have = _listed(case.launch(*case.args), case.outputs)
    for got, want in zip(have, _listed(wanted, case.outputs), strict=True):
        if got.dtype != want.dtype or got.shape != want.shape:
            return False
        if got.dtype in (torch.float16, torch.bfloat16, torch.float32):
            if not error_ratio(got, want) <= TOLERANCE:
                return False
        elif not torch.equal(got.view(torch.uint8), want.view(torch.uint8)):
            return False
    return True


def tune(case: tuning.Case, arch: int) -> tuning.Measured[Any]:
    """Measure one case on the current CUDA device and keep the result.

    Raises:
        NoGpuError: there is none.
        ArgumentError: no candidate is correct.
    """
    wanted = case.reference(*case.args)
    return tuning.autotune(
        case.tunable,
        case.key,
        case.launch,
        lambda: agrees(case, wanted),
        arch=arch,
        arguments=case.args,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure launch configurations on this machine's GPU and keep the fastest correct ones."""
    folders = sorted(set(OPS.values()))
    parser = argparse.ArgumentParser(prog="python -m sn72kernels.tune", description=main.__doc__)
    parser.add_argument("--op", nargs="+", default=folders, choices=folders, help="default: all")
    parser.add_argument("--list", action="store_true", help="say what would be measured, no more")
    options = parser.parse_args(arguments)
    if options.list:
        return _list(options.op)
    from sn72kernels.library import require_triton

    try:
        device = devices.require_cuda("measure launch configurations")
        require_triton("measure launch configurations")
    except (NoGpuError, NoTritonError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    facts = devices.facts(device)
    print(f"{facts.name} (sm_{facts.arch}); results go to {tuning.cache_file(facts.arch)}")
    failures = 0
    for folder in options.op:
        for case in cases(folder, device):
            label = " ".join(map(str, (case.tunable.name, *case.key)))
            try:
                found = tune(case, facts.arch)
            except ArgumentError as error:
                failures += 1
                print(f"{label}: {error}", file=sys.stderr)
                continue
            rule = "not correct" if found.rule_ms is None else f"{found.rule_ms * 1e3:.2f} us"
            print(
                f"{label}: {found.ms * 1e3:.2f} us (rule: {rule}) with {found.config};"
                f" {found.correct} of {found.tried} candidates are correct"
            )
    return 1 if failures else 0


def _list(folders: Sequence[str]) -> int:
    import torch

    for folder in folders:
        for case in cases(folder, torch.device("meta")):
            count = len(case.tunable.candidates(*case.key))
            print(" ".join(map(str, (case.tunable.name, *case.key))) + f": {count} candidates")
    return 0


def _listed(result: Any, count: int | None) -> list[torch.Tensor]:
    results = list(result) if isinstance(result, (tuple, list)) else [result]
    return results[:count]


if __name__ == "__main__":
    sys.exit(main())
