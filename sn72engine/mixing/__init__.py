"""Automatic mixed precision: each layer in the cheapest format that the accuracy allows.

:func:`mix` measures what each format does to the answers when one layer alone is quantised to it,
orders the layers by what they save for what they spoil, and takes as many of them as a measured
accuracy bound allows.
"""

from __future__ import annotations

from sn72engine.mixing.mixer import mix
from sn72engine.mixing.mixture import LayerMix, Mixture
from sn72engine.mixing.options import MixOptions

__all__ = ["LayerMix", "MixOptions", "Mixture", "mix"]
