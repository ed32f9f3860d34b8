"""What identifies a built engine, and what it means when a stored one differs.

A fingerprint holds every input that can change the engine file or its answers. Two builds with
equal fingerprints are interchangeable; its key names the engine's folder in the store.

What a difference means (``hard``: build again; ``soft``: may be used):

========================  ====================  ====  ==========================================
field                     difference            kind  why
========================  ====================  ====  ==========================================
model_sha256              any                   hard  other weights or graph (external weight
                                                      files are hashed too)
preprocess_sha256         any                   hard  the same image gives another input tensor
options                   any                   hard  the builder was told something else
backend                   any                   hard  the files of one cannot be opened by another
target                    any                   hard  machine code, kernels and measured speed
                                                      belong to one architecture and platform
format                    any                   hard  the manifest's fields have other meanings
backend_version,          major or minor        hard  kernels and their rounding change between
  onnxruntime, openvino                               minor releases, so the recorded accuracy and
                                                      speed no longer hold
backend_version,          patch or suffix       soft  the engine file is plain ONNX, which every
  onnxruntime, openvino                               later release reads; patches fix bugs only
backend_version,          any number            hard  the runtime refuses an engine of any other
  tensorrt, tensorrt_rtx                              release, patch releases included
the same, built with      later, same major     soft  such an engine carries, or names, the runtime
  ``version_compatible``                              of the release that built it
backend_version,          suffix (``.post1``,   soft  the same library, packaged again
  tensorrt, tensorrt_rtx  ``+cu13``)
backend_version, others   any                   hard  nothing is known about their files
========================  ====================  ====  ==========================================

Sources: the version compatibility pages of the TensorRT and TensorRT-RTX documentation ("engines
are compatible only with the version used to build them"; engines are not portable across
platforms) and the compatibility page of ONNX Runtime.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from sn72engine.engine import MANIFEST_FORMAT
from sn72engine.errors import EngineMismatchError, OptionError
from sn72engine.spec import Options, check_int

if TYPE_CHECKING:
    from sn72engine.backends.base import Backend
    from sn72engine.model import OnnxModel
    from sn72engine.program import TorchProgram
    from sn72engine.spec import BuildOptions

Kind = Literal["hard", "soft"]

_SHA256 = re.compile(r"[0-9a-f]{64}")
_NUMBERS = re.compile(r"\d+(?:\.\d+)*")

#: How many leading numbers of the version must agree; a backend not listed needs the exact text.
_VERSION_NUMBERS = {"onnxruntime": 2, "openvino": 2, "tensorrt": None, "tensorrt_rtx": None}

_ADVICE = {
    "model_sha256": "the ONNX file or its weights changed; build again",
    "preprocess_sha256": "images would become other tensors; build again",
    "backend": "engine files of one backend cannot be opened by another; build again",
    "target": "engines do not move between architectures or platforms; build again there",
    "format": "the manifest's layout changed; build again",
}


@dataclass(frozen=True, slots=True)
class Fingerprint(Options):
    """The inputs of a build that decide its result.

    Args:
        model_sha256: hash of the ONNX file and its external weights.
        preprocess_sha256: hash of the preprocessing, a fixed value when there is none.
        options: build options as canonical JSON, without ``backend`` and ``target``, which are
            recorded as they were resolved.
        backend: name of the backend.
        backend_version: version of its library, as the library writes it.
        target: device, operating system and machine, such as ``cpu-linux-x86_64``.
        format: layout version of the manifest.
    """

    model_sha256: str
    preprocess_sha256: str
    options: str
    backend: str
    backend_version: str
    target: str
    format: int = MANIFEST_FORMAT

    def __post_init__(self) -> None:
        for name in ("model_sha256", "preprocess_sha256"):
            value = getattr(self, name)
            if not isinstance(value, str) or not _SHA256.fullmatch(value):
                raise OptionError(f"{name}={value!r} must be 64 lower-case hexadecimal digits")
        for name in ("backend", "backend_version", "target"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value:
                raise OptionError(f"{name}={value!r} must be a text that is not empty")
        check_int("format", self.format, 0)
        try:
            canonical = canonical_json(json.loads(self.options)) == self.options
        except (TypeError, ValueError):
            canonical = False
        if not canonical:
            raise OptionError(f"options={self.options!r} must be canonical JSON")

    @property
    def key(self) -> str:
        """128 bits of the SHA-256 of the canonical fields, as 32 hexadecimal digits."""
        return sha256_json(self.to_dict())[:32]


@dataclass(frozen=True, slots=True)
class Mismatch:
    """One difference between a stored and a wanted engine.

    ``field`` is the fingerprint field, or ``options.<name>`` for one build option; ``stored``
    and ``wanted`` are the two values as text; ``message`` is one sentence with both and the
    way out.
    """

    field: str
    kind: Kind
    stored: str
    wanted: str
    message: str

    def __str__(self) -> str:
        return self.message


def of(model: OnnxModel | TorchProgram, options: BuildOptions, backend: Backend) -> Fingerprint:
    """Fingerprint of building ``model`` with ``options`` on ``backend`` on this machine.

    Reads the ONNX file and its external weights once, to hash them.

    Raises:
        BuildError: the backend cannot resolve the target (``cuda`` with no card, say).
    """
    build = options.to_dict()
    del build["backend"], build["target"]
    device = backend.target(options)
    return Fingerprint(
        model_sha256=model.sha256(),
        preprocess_sha256=of_preprocess(model),
        options=canonical_json(build),
        backend=backend.name,
        backend_version=backend.version(),
        target=_on_this_platform(device),
    )


def of_preprocess(model: OnnxModel | TorchProgram) -> str:
    """Hash of a model's preprocessing, a fixed value when there is none."""
    return sha256_json(model.preprocess.to_dict() if model.preprocess else None)


def here(stored: Fingerprint, backend: Backend) -> Fingerprint:
    """The fingerprint that building ``stored`` anew on this machine would have.

    The device is taken to be the same; whether it is here is for the backend to say.
    """
    device = stored.target.partition("-")[0]
    return replace(stored, backend_version=backend.version(), target=_on_this_platform(device))


def compare(stored: Fingerprint, wanted: Fingerprint) -> tuple[Mismatch, ...]:
    """Every difference between a stored engine and the one wanted; empty when they are equal.

    See the module's table for which differences are hard.
    """
    found: list[Mismatch] = []
    for name in (f.name for f in fields(Fingerprint)):
        old, new = getattr(stored, name), getattr(wanted, name)
        if old == new:
            continue
        if name == "options":
            found += _compare_options(json.loads(old), json.loads(new))
        elif name == "backend_version" and stored.backend == wanted.backend:
            found.append(_compare_versions(stored, old, new))
        elif name == "backend_version":
            found.append(_differs(name, old, new, "each backend has its own; build again"))
        else:
            found.append(_differs(name, old, new, _ADVICE[name]))
    return tuple(found)


def check(
    stored: Fingerprint, wanted: Fingerprint, *, name: str = "the engine"
) -> tuple[Mismatch, ...]:
    """Refuse a stored engine that differs in a way that matters; return the soft differences.

    To ask whether an engine can run here: ``check(stored, here(stored, backend))``.

    Args:
        stored: of the engine.
        wanted: what it is to be used for.
        name: what to call the engine in the message.

    Raises:
        EngineMismatchError: any difference is hard; the message lists all of those.
    """
    found = compare(stored, wanted)
    hard = [str(mismatch) for mismatch in found if mismatch.kind == "hard"]
    if hard:
        raise EngineMismatchError(f"{name} was built for something else: " + "; ".join(hard))
    return found


def _on_this_platform(device: str) -> str:
    return f"{device}-{platform.system()}-{platform.machine()}".lower()


def canonical_json(value: Any) -> str:
    """One text for equal values: sorted keys, no spaces, whole floats written as integers.

    Python holds 127 and 127.0 to be equal, and so do options objects that carry them; their
    text, and with it their hash, must be equal too.

    Raises:
        ValueError: a number is NaN or infinite.
        TypeError: a value that JSON does not know.
    """
    return json.dumps(
        _whole(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )


def sha256_json(value: Any) -> str:
    """SHA-256, in hexadecimal, of :func:`canonical_json`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def _whole(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {key: _whole(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_whole(item) for item in value]
    return value


def _differs(field: str, old: object, new: object, advice: str, kind: Kind = "hard") -> Mismatch:
    message = f"{field} was {old} when the engine was built and is {new} now: {advice}"
    return Mismatch(field, kind, str(old), str(new), message)


def _compare_options(stored: Any, wanted: Any) -> list[Mismatch]:
    if not isinstance(stored, dict) or not isinstance(wanted, dict):
        return [_differs("options", canonical_json(stored), canonical_json(wanted), "build again")]
    before = {name: canonical_json(value) for name, value in stored.items()}
    after = {name: canonical_json(value) for name, value in wanted.items()}
    return [
        _differs(
            f"options.{name}",
            before.get(name, "absent"),
            after.get(name, "absent"),
            "the builder was told something else; build again",
        )
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]


def _compare_versions(stored: Fingerprint, old: str, new: str) -> Mismatch:
    field, backend = "backend_version", stored.backend
    before, after = _NUMBERS.match(old), _NUMBERS.match(new)
    if backend not in _VERSION_NUMBERS or before is None or after is None:
        return _differs(
            field, old, new, f"nothing is known about other {backend} releases; build again"
        )
    if _version_compatible(stored) and _later_of_same_major(before.group(), after.group()):
        advice = "the engine was built to be used by later releases"
        return _differs(field, old, new, advice, "soft")
    count = _VERSION_NUMBERS[backend]
    if before.group().split(".")[:count] != after.group().split(".")[:count]:
        advice = (
            "the runtime refuses engines of another release"
            if count is None
            else "kernels and rounding change between minor releases"
        )
        return _differs(field, old, new, f"{advice}; build again with {backend} {new}")
    advice = (
        "only the packaging differs; the engine may be used"
        if count is None
        else "the file is plain ONNX, which this release reads; the engine may be used"
    )
    return _differs(field, old, new, advice, "soft")


def _version_compatible(stored: Fingerprint) -> bool:
    options = json.loads(stored.options)
    tensorrt = options.get("tensorrt") if isinstance(options, dict) else None
    return isinstance(tensorrt, dict) and tensorrt.get("version_compatible") is True


def _later_of_same_major(before: str, after: str) -> bool:
    old, new = ([int(part) for part in text.split(".")] for text in (before, after))
    return old[0] == new[0] and old < new
