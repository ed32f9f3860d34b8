"""In what two inspected engines or ONNX files differ.

Facts (sizes, precision, options, fingerprint, inputs and outputs) are compared one by one; layers
by name, so that those that were added, taken away, or changed in type, precision, shape or weights
are told apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sn72engine.text import cut, wrapped

#: Facts of a report that say where it came from or how long it took, not what it is.
_INCIDENTAL = ("path", "created", "build_seconds", "key", "format", "layers", "layers_from")

#: Facts that are told elsewhere in the report, and by better names.
_REPEATED = {
    "fingerprint": ("backend", "backend_version", "target", "options", "preprocess_sha256"),
    "options": ("batch", "precision"),
    "quantization": ("modules", "nodes"),
}

#: Facts of a layer that are compared.
_LAYER_FACTS = ("op", "precision", "shape", "weight_bytes", "fused", "runs_on")


@dataclass(frozen=True, slots=True)
class Change:
    """A fact that differs: its dotted name, and its values; None where one has none.

    A group of facts that only one of them has is one change, with a mapping for its value.
    """

    name: str
    a: Any
    b: Any

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {"name": self.name, "a": self.a, "b": self.b}


@dataclass(frozen=True, slots=True)
class InspectionDiff:
    """What differs.

    Attributes:
        paths: of both.
        facts: everything but layers.
        added, removed: names of layers that only b, and only a, has; of layers of one name those
            after the first are numbered.
        changed: facts of layers that both have, named ``layer: fact``.
        layers: how many a and b have.
    """

    paths: tuple[str, str]
    facts: tuple[Change, ...]
    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[Change, ...]
    layers: tuple[int, int]

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        return not (self.facts or self.added or self.removed or self.changed)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "a": self.paths[0],
            "b": self.paths[1],
            "same": self.same,
            "facts": [change.to_dict() for change in self.facts],
            "layers": {
                "a": self.layers[0],
                "b": self.layers[1],
                "added": list(self.added),
                "removed": list(self.removed),
                "changed": [change.to_dict() for change in self.changed],
            },
        }

    def render(self, rows: int = 30) -> str:
        """The differences as text, at most ``rows`` lines of a kind."""
        lines = [f"a  {self.paths[0]}", f"b  {self.paths[1]}"]
        if self.same:
            return "\n".join([*lines, "no difference"])
        lines += _some([_line("", c) for c in self.facts], rows)
        lines.append(
            f"layers: {self.layers[0]} -> {self.layers[1]}; {len(self.removed)} removed, "
            f"{len(self.added)} added, {len({c.name.rpartition(': ')[0] for c in self.changed})} "
            "changed"
        )
        lines += _some([f"  - {name}" for name in self.removed], rows)
        lines += _some([f"  + {name}" for name in self.added], rows)
        lines += _some([_line("~ ", c) for c in self.changed], rows)
        return "\n".join(lines)


def diff(a: Mapping[str, Any], b: Mapping[str, Any]) -> InspectionDiff:
    """Compare two reports of :mod:`sn72engine.inspection`, of whatever kind each is."""
    facts = tuple(_changes(_identity(a), _identity(b)))
    old, new = _by_name(a.get("layers", ())), _by_name(b.get("layers", ()))
    changed = tuple(
        Change(f"{name}: {fact}", old[name][fact], new[name][fact])
        for name in old
        if name in new
        for fact in _LAYER_FACTS
        if old[name][fact] != new[name][fact]
    )
    return InspectionDiff(
        paths=(str(a["path"]), str(b["path"])),
        facts=facts,
        added=tuple(name for name in new if name not in old),
        removed=tuple(name for name in old if name not in new),
        changed=changed,
        layers=(len(old), len(new)),
    )


def _by_name(layers: Iterable[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    counts: Counter[str] = Counter()
    found = {}
    for layer in layers:
        name = layer["name"]
        counts[name] += 1
        found[name if counts[name] == 1 else f"{name} ({counts[name]})"] = layer
    return found


def _identity(report: Mapping[str, Any]) -> dict[str, Any]:
    """A report without what is incidental; tensors by name, so that their order does not count.

    An engine's report has its manifest and its graph one level down, where a file's has the same
    facts at the top.
    """
    levels = (report, report.get("manifest") or {}, report.get("graph") or {})
    return _kept({name: value for level in levels for name, value in level.items()})


def _kept(facts: Mapping[str, Any], without: Collection[str] = ()) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for name, value in facts.items():
        if name in (*_INCIDENTAL, "manifest", "graph", *without):
            continue
        if name in ("inputs", "outputs"):
            kept[name] = {t["name"]: f"{t['dtype']}{t['shape']}" for t in value}
        elif name == "verification":
            kept[name] = {"passed": value["passed"]} if value else None  # figures differ each run
        elif name == "files":
            kept[name] = sorted(file["name"] for file in value)
        elif isinstance(value, Mapping):
            kept[name] = _kept(value, _REPEATED.get(name, ()))
        else:
            kept[name] = value
    return kept


def _changes(a: Mapping[str, Any], b: Mapping[str, Any], above: str = "") -> Iterator[Change]:
    """Facts that differ, by name; those of a group that both have one by one."""
    for name in sorted(a.keys() | b.keys()):
        x, y = a.get(name), b.get(name)
        if isinstance(x, Mapping) and isinstance(y, Mapping):
            yield from _changes(x, y, f"{above}{name}.")
        elif x != y:
            yield Change(f"{above}{name}", x, y)


def _line(mark: str, change: Change) -> str:
    text = f"{change.name}: {_shown(change.a)} -> {_shown(change.b)}"
    return wrapped(f"  {mark}", text, 2 + len(mark))


def _shown(value: Any) -> str:
    if value is None or value in ("", [], ()):
        return "nothing"
    if isinstance(value, Mapping):
        simple = {k: v for k, v in value.items() if not isinstance(v, (Mapping, list))}
        return ", ".join(f"{k} {cut(str(v), 20)}" for k, v in simple.items())
    return cut(str(value), 60)


def _some(lines: list[str], most: int) -> list[str]:
    return lines if len(lines) <= most else [*lines[:most], f"  ({len(lines) - most} more)"]
