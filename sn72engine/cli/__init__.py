"""The ``sn72engine`` command: one sub-command per step, each in a module of its own.

Exit codes, the same for every sub-command:

    0    done
    1    unexpected error, or problems found by doctor
    2    wrong option, key or argument
    3    an optional package is missing; the message names the pip command
    4    bad input: image, tensor, calibration data
    5    refused: export parity, quantisation, build or verification failed
    6    engine store: corrupt, mismatched or unusable entry
    7    an engine or cascade failed while running
    130  interrupted
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence

from sn72engine.cli.outcome import Outcome
from sn72engine.errors import Sn72Error

#: Sub-commands in the order of use. Each is ``sn72engine.cli.<name>`` with SUMMARY, EXAMPLES,
#: ``arguments(parser)`` and ``execute(namespace) -> Outcome``.
COMMANDS = (
    "doctor",
    "export",
    "quantize",
    "build",
    "verify",
    "inspect",
    "bench",
    "calibrate",
    "run",
    "cache",
    "demo",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one sub-command; returns the exit code."""
    options = parser().parse_args(arguments)
    try:
        outcome: Outcome = options.execute(options)
    except Sn72Error as error:
        return report_error(error, error.exit_code, as_json=options.json)
    except (KeyboardInterrupt, BrokenPipeError):
        print("sn72engine: interrupted", file=sys.stderr)
        return 130
    print(json.dumps(outcome.data, indent=2) if options.json else outcome.text)
    return outcome.exit_code


def report_error(error: Sn72Error, code: int, *, as_json: bool) -> int:
    """Print a deliberate error without a traceback; returns its exit code."""
    if as_json:
        kind = type(error).__name__
        print(json.dumps({"error": {"type": kind, "message": str(error), "exit_code": code}}))
    print(f"sn72engine: {error}", file=sys.stderr)
    return code


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    from sn72engine import __version__

    root = argparse.ArgumentParser(
        prog="sn72engine",
        description="Export, calibrate, build, verify and run early-exit image cascades.",
        epilog=exit_codes(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    root.add_argument("--version", action="version", version=f"sn72engine {__version__}")
    commands = root.add_subparsers(dest="command", required=True, metavar="command")
    for name in COMMANDS:
        module = importlib.import_module(f"sn72engine.cli.{name}")
        sub = commands.add_parser(
            name,
            help=module.SUMMARY,
            description=module.SUMMARY,
            epilog=f"examples:\n{module.EXAMPLES}\n{exit_codes()}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.arguments(sub)
        sub.add_argument("--json", action="store_true", help="print the result as JSON")
        sub.set_defaults(execute=module.execute)
    return root


def exit_codes() -> str:
    """The table of exit codes, as it stands in this module's docstring."""
    text = __doc__ or ""
    return text[text.index("Exit codes") :].rstrip()
