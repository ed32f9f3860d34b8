"""Early-exit cascades: a small model answers what it is sure of and escalates the rest.

(Not cascade attention over shared prefixes, which goes by the same name elsewhere.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sn72engine.cascade.cascade import Cascade as Cascade

__all__ = ["Cascade"]


# Lazy, because the stages import cascade.route while the cascade imports the stages.
def __getattr__(name: str) -> Any:
    if name == "Cascade":
        from sn72engine.cascade.cascade import Cascade

        return Cascade
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
