"""``sn72engine run``."""

from __future__ import annotations

import argparse
import glob
import json
import sys
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sn72engine.cli.outcome import Outcome, engine_folder
from sn72engine.errors import InputError
from sn72engine.spec import RuntimeOptions
from sn72kernels import atomic

SUMMARY = "run a cascade or an engine on images; one JSON line per image"
EXAMPLES = """\
  sn72engine run road.yaml photos/ -o results.jsonl
  sn72engine run road.yaml 'cam1/*.jpg' cam2/0001.jpg --deadline 5
  sn72engine run KEY --score sigmoid photo.jpg
  sn72engine run road.yaml photos/ --mode host
"""

#: Images handed to the cascade at once, so that the progress bar moves and memory stays flat.
_CHUNK = 64


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("subject", help="cascade YAML, engine folder, or the start of a key")
    parser.add_argument("images", nargs="+", help="files, folders or glob patterns")
    parser.add_argument("-o", "--output", type=Path, help="JSONL file; default: standard output")
    parser.add_argument("--deadline", type=float, help="seconds for all images together")
    parser.add_argument(
        "--flag",
        action="append",
        default=[],
        metavar="TRIGGER",
        help="mark every image with this trigger of the cascade (a stage's 'when'); repeatable",
    )
    parser.add_argument("--threads", type=int, help="CPU threads; default: all cores")
    parser.add_argument(
        "--mode",
        choices=("auto", "cpu", "host", "device"),
        default="auto",
        help="what runs the cascade: its stages one by one (cpu), CUDA graphs of them launched by "
        "the host (host), or one graph (device); default: auto, which says what it chose",
    )
    parser.add_argument(
        "--score",
        choices=("sigmoid", "softmax", "probability", "top1"),
        default="sigmoid",
        help="for an engine: how its output becomes a probability; default: sigmoid",
    )


def execute(options: argparse.Namespace) -> Outcome:
    """Run and write one line per image, in the order of the arguments."""
    import time

    from sn72engine.cascade import Cascade
    from sn72engine.progress import Progress

    paths = find_images(options.images)
    ends = None if options.deadline is None else time.monotonic() + options.deadline
    lines: list[str] = []
    statuses: Counter[str] = Counter()
    with ExitStack() as opened:
        scratch = None
        if options.output is not None:
            # Before the work, so that a place that cannot be written to is found at once.
            scratch = opened.enter_context(atomic.replacing(options.output))
        runtime = RuntimeOptions(threads=options.threads)
        spec = cascade_spec(options)
        cascade = opened.enter_context(Cascade(spec, runtime=runtime, mode=options.mode))
        bar = opened.enter_context(Progress("run", len(paths), unit="image"))
        for start in range(0, len(paths), _CHUNK):
            chunk = paths[start : start + _CHUNK]
            left = None if ends is None else ends - time.monotonic()
            results = cascade(chunk, deadline=left, flags=dict.fromkeys(options.flag, True))
            for path, result in zip(chunk, results, strict=True):
                lines.append(json.dumps({"file": str(path), **result.to_dict()}))
                statuses[result.status.value] += 1
                if options.output is None and not options.json:
                    print(lines[-1], flush=True)  # as it comes: an interrupted run keeps it
            bar.step(len(chunk))
        report = cascade.report()
        if scratch is not None:
            scratch.write_text("".join(f"{line}\n" for line in lines))
    data: dict[str, Any] = {"images": len(paths), "statuses": dict(statuses)}
    data["cascade"] = report.to_dict()
    summary = f"{len(paths)} images: " + ", ".join(f"{n} {s}" for s, n in statuses.most_common())
    summary += f"; {report.executor}"
    if options.output is not None:
        return Outcome({**data, "output": str(options.output)}, f"{summary} -> {options.output}")
    if options.json:
        return Outcome({**data, "results": [json.loads(line) for line in lines]}, "")
    print(summary, file=sys.stderr)
    return Outcome(data, "")


def cascade_spec(options: argparse.Namespace) -> Any:
    """The specification that the subject names; an engine is a cascade of one stage."""
    from sn72engine.cascade.spec import CascadeSpec, StageSpec

    if Path(options.subject).suffix in (".yaml", ".yml"):
        return CascadeSpec.from_yaml(Path(options.subject))
    folder = engine_folder(options.subject)
    # No room between the thresholds: the answer of the only stage stands, whatever it is.
    threshold = 0.0 if options.score == "top1" else 0.5
    stage = StageSpec(
        "engine", engine=str(folder), score=options.score, low=threshold, high=threshold
    )
    return CascadeSpec((stage,))


def find_images(patterns: list[str]) -> list[Path]:
    """Files that the arguments name, each once, in order.

    Raises:
        InputError: an argument names no file.
    """
    from sn72engine.image_files import images_in_folder

    found: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            matches = images_in_folder(path)
        elif path.is_file():
            matches = [path]
        else:
            # Path.glob takes no absolute patterns.
            matches = sorted(map(Path, glob.glob(pattern, recursive=True)))  # noqa: PTH207
        if not matches:
            raise InputError(f"{pattern!r} names no image; give files, folders or glob patterns")
        found.update(dict.fromkeys(matches))
    return list(found)
