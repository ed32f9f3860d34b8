"""``sn72engine profile``."""

from __future__ import annotations

import argparse
from pathlib import Path

from sn72engine.cli.outcome import Outcome, engine_folder
from sn72engine.errors import OptionError
from sn72engine.layer_profile import ProfileOptions
from sn72engine.spec import RuntimeOptions

SUMMARY = "time the layers of an engine, or the stages of a cascade"
EXAMPLES = """\
  sn72engine profile KEY --plot layers.png --trace run.json
  sn72engine profile KEY --batch 8 --threads 1 --top 40 --json
  sn72engine profile road.yaml --data photos/ --trace cascade.json   # opens in ui.perfetto.dev
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    defaults = ProfileOptions()
    parser.add_argument("subject", help="engine folder, the start of its key, or cascade YAML")
    parser.add_argument("--batch", type=int, default=defaults.batch, help="samples per call")
    parser.add_argument("--warmup", type=int, default=defaults.warmup, help="runs not counted")
    parser.add_argument("--repeats", type=int, default=defaults.repeats, help="runs counted")
    parser.add_argument("--threads", type=int, help="CPU threads; default: all cores")
    parser.add_argument("--top", type=int, default=20, help="layers to list; default 20")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the slowest layers")
    parser.add_argument("--trace", type=Path, metavar="JSON", help="write a Chrome/Perfetto trace")
    parser.add_argument(
        "--data", nargs="+", help="for a cascade: files, folders or patterns of images to run on"
    )


def execute(options: argparse.Namespace) -> Outcome:
    """Profile."""
    runtime = RuntimeOptions(threads=options.threads)
    if Path(options.subject).suffix in (".yaml", ".yml"):
        return _cascade(options, runtime)
    if options.data:
        raise OptionError("--data belongs to a cascade; an engine is timed on random numbers")
    from sn72engine.layer_profile import profile

    found = profile(
        engine_folder(options.subject),
        ProfileOptions(batch=options.batch, warmup=options.warmup, repeats=options.repeats),
        runtime=runtime,
    )
    if options.plot:
        found.save_plot(options.plot)
    if options.trace:
        found.save_trace(options.trace)
    return Outcome(found.to_dict(), found.render(options.top))


def _cascade(options: argparse.Namespace, runtime: RuntimeOptions) -> Outcome:
    from sn72engine.cascade import Cascade
    from sn72engine.cascade.spec import CascadeSpec
    from sn72engine.cli.run import find_images
    from sn72engine.trace import TraceRecorder

    if not options.data:
        raise OptionError("a cascade is profiled on images: name some with --data")
    if options.plot:
        raise OptionError("--plot draws the layers of an engine; a cascade has --trace")
    paths = find_images(options.data)
    recorder = TraceRecorder()
    spec = CascadeSpec.from_yaml(Path(options.subject))
    with Cascade(spec, runtime=runtime, observe=recorder) as cascade:
        for start in range(0, len(paths), options.batch):
            cascade(paths[start : start + options.batch])
        report = cascade.report()
    if options.trace:
        recorder.save(options.trace)
    return Outcome({"cascade": report.to_dict(), "spans": len(recorder.spans)}, str(report))
