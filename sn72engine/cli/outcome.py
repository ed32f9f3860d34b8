"""What a sub-command hands back, and the argument types that several of them share."""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sn72engine.errors import InputError, OptionError
from sn72engine.spec import Preprocess, ShapeRange
from sn72engine.text import wrapped

if TYPE_CHECKING:
    import torch


#: One letter could be a slip that names an engine by chance.
_SHORTEST_KEY = 4


@dataclass(frozen=True, slots=True)
class Outcome:
    """Result of a sub-command: ``data`` for ``--json``, ``text`` for a person."""

    data: Mapping[str, Any]
    text: str
    exit_code: int = field(default=0)


def batch_range(text: str) -> ShapeRange:
    """Argument type: ``8`` or ``1:8:32`` (min:opt:max)."""
    parts = text.split(":")
    if len(parts) not in (1, 3) or not all(part.isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a batch size or min:opt:max")
    numbers = [int(part) for part in parts]
    try:
        return ShapeRange(*numbers) if len(numbers) == 3 else ShapeRange(*numbers * 3)
    except OptionError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def preprocess_argument(text: str) -> Preprocess:
    """Argument type: a JSON/YAML file, or ``key=value,key=value``; triples as ``a/b/c``."""
    try:
        if Path(text).suffix in (".json", ".yaml", ".yml"):
            import yaml

            try:
                read = yaml.safe_load(Path(text).read_text(encoding="utf-8"))
            except (UnicodeDecodeError, yaml.YAMLError) as error:
                raise OptionError(f"{text}: neither YAML nor JSON ({error})") from error
            return Preprocess.from_dict(read, where=text)
        values: dict[str, Any] = {}
        for pair in filter(None, text.split(",")):
            key, _, value = pair.partition("=")
            triple = value.split("/")
            values[key] = [scalar(v) for v in triple] if len(triple) > 1 else scalar(value)
        return Preprocess.from_dict(values)
    except (OptionError, OSError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def scalar(text: str) -> Any:
    """A JSON scalar (number, true, null) where the text is one, else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def key_values(pairs: list[str]) -> dict[str, Any]:
    """Repeated ``name=value`` arguments as a mapping."""
    values = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise OptionError(f"{pair!r} is not of the form name=value")
        values[name] = scalar(value)
    return values


def load_object(reference: str) -> Any:
    """The object that ``package.module:name`` or ``path/to/file.py:name`` names."""
    module_name, colon, attribute = reference.rpartition(":")
    if not colon:
        raise OptionError(f"{reference!r} is not of the form package.module:name or file.py:name")
    if module_name.endswith(".py"):
        module = module_from_file(Path(module_name))
    else:
        try:
            module = importlib.import_module(module_name)
        except ImportError as error:
            raise OptionError(f"{reference}: cannot import {module_name!r} ({error})") from error
    try:
        return getattr(module, attribute)
    except AttributeError:
        raise OptionError(f"{reference}: {module_name} has no {attribute!r}") from None


def make_module(reference: str, arguments: Mapping[str, Any]) -> torch.nn.Module:
    """Call the factory that ``reference`` names.

    Raises:
        OptionError: there is none, it does not take these arguments, or it gives something else
            than a module.
        InputError: its file does not exist.
    """
    import torch

    factory = load_object(reference)
    try:
        inspect.signature(factory).bind(**arguments)
    except (TypeError, ValueError) as error:
        raise OptionError(f"{reference} cannot be called with these --arg: {error}") from None
    module = factory(**arguments)
    if not isinstance(module, torch.nn.Module):
        raise OptionError(f"{reference} returns a {type(module).__name__}, not a torch.nn.Module")
    return module


def module_from_file(path: Path) -> Any:
    """Import a Python file that is not on the module path."""
    import importlib.util

    name = f"sn72engine_{path.stem}"  # prefixed, so that a file cannot hide a package
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise InputError(f"{path}: no such Python file")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses, for one, look up the module of a class while it is made.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def engine_folder(text: str) -> Path:
    """Folder of an engine named by path, or by its key (or a unique start of it) in the store."""
    if not text:
        raise InputError("'' names no engine; give its folder or the start of its key")
    path = Path(text)
    if path.is_dir():
        return path
    if path.is_file():
        raise InputError(
            f"{text} is a file; give the folder of an engine, or the start of its key "
            "(`sn72engine build` makes an engine of an ONNX file)"
        )
    from sn72engine.store import Store

    if len(text) < _SHORTEST_KEY:
        raise InputError(
            f"{text!r} is too short for a key; give at least its first {_SHORTEST_KEY} characters"
        )
    matches = [entry for entry in Store().entries() if entry.key.startswith(text)]
    if len(matches) == 1:
        return matches[0].folder
    problem = "no engine folder or key" if not matches else f"{len(matches)} keys start with"
    raise InputError(f"{problem} {text!r}; `sn72engine cache list` shows what is stored")


def table(rows: list[tuple[str, object]]) -> str:
    """Two aligned columns; long values go on below themselves."""
    width = max((len(name) for name, _ in rows), default=0) + 2
    return "\n".join(wrapped(name, str(value), width) for name, value in rows)


def megabytes(count: int) -> str:
    """A byte count for a person."""
    return f"{count / 1e6:.1f} MB"
