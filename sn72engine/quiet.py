"""Silences chatty libraries for the length of a step, and keeps what they said."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet(*loggers: str) -> Iterator[io.StringIO]:
    """Collect what the body prints or warns about, instead of showing it.

    A progress bar that was made before keeps its stream and stays visible.

    Args:
        loggers: names of loggers that may only report critical errors meanwhile.

    Yields:
        The buffer that holds everything printed, for use in an error message.
    """
    said = io.StringIO()
    levels = {name: logging.getLogger(name).level for name in loggers}
    with (
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        try:
            for name in loggers:
                logging.getLogger(name).setLevel(logging.CRITICAL)
            yield said
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
