"""The ``sn72engine`` command: one sub-command per step, each in a module of its own.

Exit codes, the same for every sub-command:

    0    done
    1    unexpected error, or problems found by doctor
    2    wrong option, key or argument
    3    an optional package is missing; the message names the pip command
    4    bad input: image, tensor, calibration data; a file that cannot be read or written
    5    refused: export parity, quantisation, build or verification failed
    6    engine store: corrupt, mismatched or unusable entry
    7    an engine or cascade failed while running
    130  interrupted
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence

from sn72engine.cli.outcome import Outcome
from sn72engine.errors import InputError, Sn72Error

#: Sub-commands in the order of use. Each is ``sn72engine.cli.<name>`` with SUMMARY, EXAMPLES,
#: ``arguments(parser)`` and ``execute(namespace) -> Outcome``.
COMMANDS = (
    "doctor",
    "export",
    "quantize",
    "mix",
    "build",
    "refit",
    "verify",
    "inspect",
    "diff",
    "compare",
    "bench",
    "profile",
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
        text = json.dumps(outcome.data, indent=2) if options.json else outcome.text
        if text:
            print(text, flush=True)
    except Sn72Error as error:
        return report_error(error, str(error), error.exit_code, as_json=options.json)
    except KeyboardInterrupt:
        print("sn72engine: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read the output has gone. What is left of it must go somewhere at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 130
    except OSError as error:
        if error.filename is None:  # no file of the user's
            raise
        message = f"{error.filename}: cannot be read or written ({error.strerror})"
        return report_error(error, message, InputError.exit_code, as_json=options.json)
    return outcome.exit_code


def report_error(error: Exception, message: str, code: int, *, as_json: bool) -> int:
    """Print why a command was refused, without a traceback; returns its exit code."""
    if as_json:
        kind = type(error).__name__
        print(json.dumps({"error": {"type": kind, "message": message, "exit_code": code}}))
    print(f"sn72engine: {message}", file=sys.stderr)
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
