"""``sn72engine cache``."""

from __future__ import annotations

import argparse

from sn72engine.cli.outcome import Outcome, engine_folder, megabytes
from sn72engine.errors import OptionError

SUMMARY = "list, check, evict or remove stored engines"
EXAMPLES = """\
  sn72engine cache list
  sn72engine cache check              # hash every file of every engine; exit code 6 if one is bad
  sn72engine cache evict              # drop the least recently used above the size limit
  sn72engine cache remove KEY
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "action",
        choices=("list", "check", "evict", "remove", "path"),
        help="check hashes every file; evict keeps to the size limit; path is the folder",
    )
    parser.add_argument("key", nargs="?", help="for remove: the start of an engine's key")


def execute(options: argparse.Namespace) -> Outcome:
    """Run one action on the default store."""
    from sn72engine.store import Store

    store = Store()
    if options.action == "path":
        return Outcome({"path": str(store.root)}, str(store.root))
    if options.action == "remove":
        if not options.key:
            raise OptionError("cache remove needs a key; `sn72engine cache list` shows them")
        key = engine_folder(options.key).name
        store.remove(key)
        return Outcome({"removed": [key]}, f"removed {key}")
    if options.action == "evict":
        evicted = list(store.evict())
        return Outcome({"evicted": evicted}, "\n".join(evicted) or "nothing to evict")
    entries = store.entries()
    bad = {e.key: why for e in entries if options.action == "check" and (why := store.check(e.key))}
    data = {"entries": [e.to_dict() for e in entries], "problems": bad}
    lines = [f"{e.key}  {megabytes(e.bytes):>10}  {e.summary}" for e in entries]
    lines += [f"refused: {why}" for why in bad.values()]
    if options.action == "check" and not bad:
        lines.append(f"{len(entries)} engines checked, all intact")
    return Outcome(data, "\n".join(lines) or "no engines stored", 6 if bad else 0)
