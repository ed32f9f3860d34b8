"""Which CUDA device is there, and which engines it can run. PyTorch is asked, nothing else."""

from __future__ import annotations


def device_target(index: int | None = None) -> str | None:
    """Architecture of a CUDA device, such as ``sm_90``; None where there is none.

    Args:
        index: of the device; None for PyTorch's current one.
    """
    import torch

    if not torch.cuda.is_available() or (index or 0) >= torch.cuda.device_count():
        return None
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def card_name() -> str:
    """Name of PyTorch's current CUDA device; empty where there is none."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def runs_on(target: str, present: str | None) -> bool:
    """Whether an engine for ``target`` runs on a card of architecture ``present``.

    Args:
        target: as in a manifest: ``sm_89``, several as ``sm_86,sm_89``, or ``sm_80+`` for all
            from that one on.
        present: architecture of a device; None where there is none.
    """
    if present is None:
        return False
    if target.endswith("+"):
        return int(present[3:]) >= int(target[3:-1])
    return present in target.split(",")
