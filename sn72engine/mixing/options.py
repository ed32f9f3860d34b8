"""What an automatic choice of formats is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from sn72engine.errors import OptionError
from sn72engine.mixing.cost import CARDS
from sn72engine.spec import (
    Options,
    QuantizedPrecision,
    VerifyOptions,
    check_choice,
    check_int,
)

Minimise = Literal["latency", "bytes"]


@dataclass(frozen=True, slots=True)
class MixOptions(Options):
    """How layers get their formats.

    Args:
        formats: that a layer may get, beside float. Empty takes all that ``card`` computes in.
        minimise: ``latency`` on ``card``, modelled or as given, or ``bytes`` of weights.
        card: whose arithmetic rates and memory bandwidth model the latency; a name of
            :data:`sn72engine.mixing.cost.CARDS`.
        batch: samples per call that the latency is modelled for.
        verify: the bound that the result keeps. ``min_speedup`` must be None: formats for a card
            are emulated where there is none, and emulation is slow.
        op_types, exclude: as in :class:`~sn72engine.spec.QuantizeOptions`.
    """

    formats: tuple[QuantizedPrecision, ...] = ()
    minimise: Minimise = "latency"
    card: str = "rtx4090"
    batch: int = 1
    verify: VerifyOptions = field(default_factory=lambda: VerifyOptions(min_speedup=None))
    op_types: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_choice("card", self.card, CARDS)
        check_choice("minimise", self.minimise, Minimise)
        check_int("batch", self.batch, 1)
        if len(set(self.formats)) != len(self.formats):
            raise OptionError(f"formats={self.formats!r} names one twice")
        for name in self.formats:
            check_choice("formats", name, QuantizedPrecision)
            if name not in CARDS[self.card].rates:
                raise OptionError(
                    f"formats={self.formats!r}: {self.card} does not compute in {name}; it does in "
                    f"{', '.join(CARDS[self.card].formats)}"
                )
        if self.verify.min_speedup is not None:
            raise OptionError(
                f"verify.min_speedup={self.verify.min_speedup!r} must be None: the latency is "
                "modelled, not measured"
            )

    @property
    def resolved_formats(self) -> tuple[QuantizedPrecision, ...]:
        """``formats`` with the empty default filled in."""
        return self.formats or CARDS[self.card].formats

    @classmethod
    def _nested(cls) -> Mapping[str, type[Options]]:
        return {"verify": VerifyOptions}
