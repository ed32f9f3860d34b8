"""Every error that sn72engine raises on purpose.

Each message says what was wrong, with the value, and what to do about it. Each class carries
the exit code with which the command line reports it, so that scripts can tell causes apart.
"""

from __future__ import annotations


class Sn72Error(Exception):
    """Base of all deliberate errors. ``exit_code`` is what the command line exits with."""

    exit_code = 1


class MissingDependencyError(Sn72Error, ImportError):
    """An optional package is absent or too old; the message names the pip command."""

    exit_code = 3


class OptionError(Sn72Error, ValueError):
    """An option, specification key or argument has a value that cannot be used."""

    exit_code = 2


class InputError(Sn72Error, ValueError):
    """Run-time input (tensor, batch, file) does not fit what the engine takes."""

    exit_code = 4


class ImageError(InputError):
    """An image cannot be decoded, or is refused (empty, truncated, too large)."""


class ExportError(Sn72Error):
    """A module cannot be exported, or its ONNX file does not compute what the module does."""

    exit_code = 5


class CalibrationError(Sn72Error):
    """Calibration data is absent, unusable or inconsistent. Random data is never substituted."""

    exit_code = 4


class QuantizationError(Sn72Error):
    """Quantisation failed or did not do what was asked (for example 0 layers quantised)."""

    exit_code = 5


class BuildError(Sn72Error):
    """A backend could not build the engine; the message translates the builder's own."""

    exit_code = 5


class VerificationError(Sn72Error):
    """An engine broke its accuracy or speed bounds; the message gives each figure and bound."""

    exit_code = 5


class StoreError(Sn72Error):
    """The engine store cannot be used as asked."""

    exit_code = 6


class EngineCorruptError(StoreError):
    """A stored engine or manifest does not match its recorded hash, or is incomplete."""


class EngineMismatchError(StoreError):
    """A stored engine is intact but was built for something else (model, options, device)."""


class SessionError(Sn72Error):
    """An engine could not be loaded or an execution call reported failure."""

    exit_code = 7


class CascadeError(Sn72Error):
    """The cascade cannot run as specified, or broke one of its own invariants."""

    exit_code = 7


class OverloadedError(CascadeError):
    """Too many requests are waiting already; this one was not taken. Try again later."""


class CudaUnavailableError(Sn72Error):
    """The GPU or its kernels cannot be used here; the message says why. Callers fall back."""

    exit_code = 7


def described(error: BaseException) -> str:
    """What went wrong, as text: our errors say it themselves, others need their kind before it."""
    return str(error) if isinstance(error, Sn72Error) else f"{type(error).__name__}: {error}"
