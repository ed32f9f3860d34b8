"""The artefact that inductor engines are built from: a program that knows its origin."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sn72engine.errors import InputError, OptionError
from sn72engine.model import TensorSpec, file_sha256
from sn72engine.spec import Options, Preprocess, check_choice, check_int, check_number

#: Name under which the record lies in the program's own archive, so that it travels with it.
RECORD_NAME = "sn72engine.json"

ProgramPrecision = Literal["fp32", "bf16", "fp8"]


@dataclass(frozen=True, slots=True)
class ProgramOptions(Options):
    """How a module becomes a program file.

    Args:
        input_names, output_names: of its inputs and outputs, in order.
        precision: of its arithmetic. ``fp32`` is the module as it is. ``bf16`` converts weights
            and activations; inputs and outputs stay float32. ``fp8`` does that too, and computes
            linear layers with at least 16 inputs and outputs, but for the last one, in e4m3:
            weights scaled per output, activations per token as they come.
        dynamic_batch: leave axis 0 of every input and output free.
        max_batch: largest batch that the free axis must accept.
        parity_batches: batch sizes on which the program is compared with the module.
        parity_atol, parity_rtol: bounds of that comparison for ``fp32``:
            ``|program - module| <= atol + rtol * |module|`` for every element.
        parity_cosine: smallest cosine similarity for the other precisions, over all elements of
            an output.
        seed: of the random tensors used for parity.
    """

    input_names: tuple[str, ...] = ("pixel_values",)
    output_names: tuple[str, ...] = ("logits",)
    precision: ProgramPrecision = "fp32"
    dynamic_batch: bool = True
    max_batch: int = 1024
    parity_batches: tuple[int, ...] = (1, 2, 5)
    parity_atol: float = 1e-4
    parity_rtol: float = 1e-3
    parity_cosine: float = 0.99
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("input_names", "output_names"):
            names = getattr(self, name)
            if not names or len(set(names)) != len(names):
                raise OptionError(f"{name}={names!r} must hold at least one name, none twice")
        check_choice("precision", self.precision, ProgramPrecision)
        check_choice("dynamic_batch", self.dynamic_batch, (True, False))
        check_int("max_batch", self.max_batch, 2)
        if not self.parity_batches:
            raise OptionError("parity_batches=() would export without checking the result")
        for batch in self.parity_batches:
            check_int("parity_batches", batch, 1, self.max_batch)
        check_number("parity_atol", self.parity_atol, 0.0)
        check_number("parity_rtol", self.parity_rtol, 0.0)
        check_number("parity_cosine", self.parity_cosine, -1.0, 1.0)


@dataclass(frozen=True, slots=True)
class TorchProgram:
    """A ``.pt2`` file of torch.export, its signature, and the record of how it was made.

    It stands where :class:`~sn72engine.model.OnnxModel` does, for the backend ``inductor``.
    ``record`` holds ``export`` (options, parity) and, for ``fp8``, ``quantization``.
    """

    path: Path
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    precision: ProgramPrecision
    preprocess: Preprocess | None = None
    record: Mapping[str, Any] = field(default_factory=dict)

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        """Which layers are quantised and how; None for a float program."""
        return self.record.get("quantization")

    @property
    def quantised(self) -> bool:
        """Whether activations are quantised."""
        return self.precision == "fp8"

    @property
    def weights(self) -> str:
        """Type of the weights that are not quantised."""
        return "float32" if self.precision == "fp32" else "bfloat16"

    @property
    def max_batch(self) -> int | None:
        """Largest batch that it accepts; None where its batch is fixed."""
        options = ProgramOptions.from_dict(self.record["export"]["options"])
        return options.max_batch if options.dynamic_batch else None

    def sha256(self) -> str:
        """Hash of the file."""
        return file_sha256(self.path)

    @classmethod
    def open(cls, path: str | Path) -> TorchProgram:
        """Read the signature and record of a program; neither torch nor weights are loaded.

        Raises:
            InputError: the file is absent, or :func:`sn72engine.exporter.export_program` did not
                write it.
        """
        path = Path(path)
        if not path.is_file():
            raise InputError(f"{path}: no such program file")
        try:
            with zipfile.ZipFile(path) as archive:
                names = [n for n in archive.namelist() if n.split("/")[-1] == RECORD_NAME]
                record = json.loads(archive.read(names[0]))
            signature = record.pop("signature")
            preprocess = record.pop("preprocess", None)
            return cls(
                path=path,
                inputs=tuple(TensorSpec.from_dict(v) for v in signature["inputs"]),
                outputs=tuple(TensorSpec.from_dict(v) for v in signature["outputs"]),
                precision=ProgramOptions.from_dict(record["export"]["options"]).precision,
                preprocess=Preprocess.from_dict(preprocess) if preprocess else None,
                record=record,
            )
        except (zipfile.BadZipFile, LookupError, TypeError, ValueError, OptionError) as error:
            raise InputError(
                f"{path}: not a program that export_program wrote ({error!r}); export the module "
                "again with sn72engine.export_program"
            ) from error
