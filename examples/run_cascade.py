"""Run a cascade on pictures and print what it answered, where, and at what cost.

With a cascade of your own, on files and folders::

    python examples/run_cascade.py --spec road.yaml photos/ one.jpg

Without one, the cascade of ``calibrate_cascade.py`` is taken, and made first where it is missing
(minutes; ``--quick`` makes one in seconds that knows nothing). Without pictures, drawn road scenes
of rising difficulty are used::

    python examples/run_cascade.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import calibrate_cascade

from sn72engine import Cascade, CascadeSpec, RuntimeOptions
from sn72engine.image_files import images_in_folder
from sn72engine.roadscenes import scene


def files_in(arguments: list[Path]) -> list[tuple[str, Path]]:
    """Every picture that the arguments name, folders opened, with its name."""
    found = []
    for path in arguments:
        found += images_in_folder(path) if path.is_dir() else [path]
    return [(str(path), path) for path in found]


def drawn(count: int) -> list[tuple[str, object]]:
    """Scenes from easy to hard, every other one with roadwork, and what they are."""
    return [
        (
            f"scene {i:2} {'roadwork' if i % 2 else 'clear'}",
            scene(720_000_000 + i, i % 2, difficulty=0.9 * i / count),
        )
        for i in range(count)
    ]


def main() -> None:
    """Run the cascade and print a table and its report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", nargs="*", type=Path, help="files and folders")
    parser.add_argument("--spec", type=Path, help="cascade YAML")
    parser.add_argument("--deadline", type=float, help="seconds for all pictures together")
    parser.add_argument("--threads", type=int, help="CPU threads; default: all cores")
    parser.add_argument("--quick", action="store_true", help="where a cascade must be made")
    parser.add_argument("--output", type=Path, default=Path("example-output/cascade"))
    options = parser.parse_args()

    spec = options.spec or options.output / "road.yaml"
    if not options.spec and not spec.is_file():
        quick = ["--quick", "--scenes", "200"] if options.quick else []
        calibrate_cascade.main(["--output", str(options.output), *quick])
    named = files_in(options.images) if options.images else drawn(16)

    runtime = RuntimeOptions(threads=options.threads)
    with Cascade(CascadeSpec.from_yaml(spec), runtime=runtime) as cascade:
        results = cascade([image for _, image in named], deadline=options.deadline)
        report = cascade.report()

    width = max(len(name) for name, _ in named)
    print(f"{'picture':{width}}  roadwork  probability  stage      status")
    for (name, _), result in zip(named, results, strict=True):
        print(
            f"{name:{width}}  {'yes' if result.label else 'no':8}  {result.probability:11.4f}  "
            f"{result.stage or '-':9}  {result.status.value} {result.error}".rstrip()
        )
    print()
    print(report)


if __name__ == "__main__":
    main()
