"""Vision-language model -> checkpoint with INT4-AWQ or FP8 weights, for a server such as vLLM.

The language model's linear layers are calibrated and rounded by NVIDIA ModelOpt and written as
safetensors with the original names and a ``config.json`` that holds a ``quantization_config``. The
vision tower, the embeddings and the output layer stay in float, by ModelOpt's own rules. Everything
runs on a CPU.

Who loads it (sources of vLLM and SGLang as of 2026; neither was run): ``fp8`` is ModelOpt's own
layout, which vLLM takes. Of its 4-bit layouts both take NVFP4 only, so ``int4_awq`` is written as
``pack-quantized`` of compressed-tensors (:mod:`sn72engine.checkpoint_layout`), which both take.

AWQ: Lin et al. 2023, "AWQ: Activation-aware Weight Quantization for LLM Compression and
Acceleration": input channels that matter are scaled up before the weights are rounded, and the
inverse goes into the layer before (:mod:`sn72engine.checkpoint_scales`).
"""

from __future__ import annotations

import copy
import fnmatch
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sn72engine import _deps, checkpoint_layout, checkpoint_scales
from sn72engine.checkpoint_layout import BLOCK, FUSED
from sn72engine.errors import CalibrationError, InputError, QuantizationError
from sn72engine.progress import Progress
from sn72engine.quiet import quiet
from sn72engine.spec import Options, check_choice, check_int
from sn72kernels import atomic

if TYPE_CHECKING:
    import torch

CheckpointFormat = Literal["int4_awq", "fp8"]

#: File in the folder that says how the checkpoint was made.
RECORD = "sn72engine.json"

#: Format -> ModelOpt's configuration, and the ending and type of packed weights in the file.
_FORMATS: Mapping[str, tuple[str, str, str]] = {
    "int4_awq": ("INT4_AWQ_CFG", ".weight_packed", "I32"),
    "fp8": ("FP8_DEFAULT_CFG", ".weight", "F8_E4M3"),
}

#: Least cosine of the logits before and after AWQ's scales are moved, without rounding. Moving them
#: changes nothing but the last bits of weights in bfloat16.
_MOVED = 0.999

#: Batches whose logits are compared before and after.
_COMPARED = 4

Batch = Mapping[str, Any]
"""Keyword arguments of the model's ``forward``, as its processor makes them."""


@dataclass(frozen=True, slots=True)
class CheckpointOptions(Options):
    """How a model becomes a quantised checkpoint.

    Args:
        format: ``int4_awq``: weights of 4 bits in blocks of 128 inputs, activations in float.
            ``fp8``: weights and activations e4m3, one scale each per layer.
        exclude: patterns (``*`` and ``?``) of paths of linear layers to leave in float too.
        minimum: refuse to calibrate with fewer batches than this.
    """

    format: CheckpointFormat = "int4_awq"
    exclude: tuple[str, ...] = ()
    minimum: int = 8

    def __post_init__(self) -> None:
        check_choice("format", self.format, CheckpointFormat)
        check_int("minimum", self.minimum, 1)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint on disk.

    Attributes:
        folder: what the server is given.
        format: as asked for.
        quantised: paths of the quantised linear layers, as the model names them.
        skipped: path of each other linear layer, and why it stays in float.
        batches: how many calibrated it.
        bytes: of the weight files.
        float_bytes: of the model's parameters before.
        cosine: of the logits after quantisation with those before, over calibration batches.
    """

    folder: Path
    format: CheckpointFormat
    quantised: tuple[str, ...]
    skipped: Mapping[str, str]
    batches: int
    bytes: int
    float_bytes: int
    cosine: float


def export_checkpoint(
    model: torch.nn.Module,
    data: Iterable[Batch],
    options: CheckpointOptions,
    folder: str | Path,
    *,
    processor: Any = None,
    progress: bool | None = None,
) -> Checkpoint:
    """Quantise ``model`` and write it to ``folder``, whole or not at all.

    The model is used up: its weights are packed in place, for two copies of it may not fit. Load it
    again to go on with it.

    Args:
        model: a transformers model for generation whose ``forward`` gives ``logits``.
        data: calibration batches; read several times, so not a generator.
        options: format, excluded layers.
        folder: of the checkpoint. A checkpoint written here before is replaced.
        processor: its processor or tokenizer, saved with it (``save_pretrained``).
        progress: show a bar; None shows it on a terminal only.

    Raises:
        QuantizationError: no layer was quantised, an excluded pattern matches none or tears apart
            layers that servers load as one, AWQ's scales have no place to go, the quantised model
            gives NaN, or ModelOpt failed.
        CalibrationError: too little data, or data that holds NaN or does not fit the model.
        InputError: ``folder`` holds something else.
        MissingDependencyError: nvidia-modelopt or transformers is absent.
    """
    torch = _deps.require("torch", purpose="quantise a checkpoint")
    _deps.require("transformers", purpose="quantise a checkpoint")
    with quiet():
        purpose = "quantise a checkpoint"
        mtq = _deps.require("modelopt", purpose=purpose, submodule="torch.quantization")
        writer = _deps.require("modelopt", purpose=purpose, submodule="torch.export")
    folder = Path(folder)
    _refuse_other_content(folder)
    count = _count(torch, data, options)
    config, skipped = _configuration(torch, mtq, model, options)
    asked = set(_linears(torch, model)) - set(skipped)
    if not asked:
        raise QuantizationError(
            f"0 of {len(skipped)} linear layers would be quantised; "
            + "; ".join(f"{name}: {why}" for name, why in list(skipped.items())[:3])
        )
    float_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    model.eval()
    with (
        Progress(f"checkpoint {folder.name}", unit="batch", shown=progress) as bar,
        torch.no_grad(),
        _replacing(folder) as scratch,
        quiet("modelopt", "transformers") as said,
    ):
        before = _logits(torch, model, data)
        bar.note("calibrate")

        def calibrate(quantised: Any) -> None:
            for batch in data:
                quantised(**batch)
                bar.step()

        try:
            mtq.quantize(model, config, calibrate)
        except Exception as error:
            raise QuantizationError(_failure("quantise the model", error, said)) from error
        quantised = _enabled(torch, model)
        if set(quantised) != asked:
            raise QuantizationError(
                f"{len(asked)} layers were to be quantised, but ModelOpt quantised "
                f"{len(quantised)}; differing: {', '.join(sorted(asked ^ set(quantised))[:5])}"
            )
        if options.format == "int4_awq":
            _settle(torch, model, data, before, quantised)
        cosine = _cosine(torch, before, _logits(torch, model, data))
        bar.note("write")
        # ModelOpt looks the kind of model up there; one made from a configuration has none yet.
        configured: Any = model.config
        configured.architectures = configured.architectures or [_class_name(model)]
        dtype = model.dtype
        try:
            writer.export_hf_checkpoint(model, export_dir=scratch)
        except Exception as error:
            raise QuantizationError(_failure("write the checkpoint", error, said)) from error
        if options.format == "int4_awq":
            checkpoint_layout.rewrite(scratch, quantised, skipped, dtype)
        if processor is not None:
            processor.save_pretrained(scratch)
        weights = sorted(scratch.glob("*.safetensors"))
        _check_packed(weights, len(quantised), *_FORMATS[options.format][1:])
        made = Checkpoint(
            folder=folder,
            format=options.format,
            quantised=quantised,
            skipped=skipped,
            batches=count,
            bytes=sum(path.stat().st_size for path in weights),
            float_bytes=float_bytes,
            cosine=cosine,
        )
        _write_record(scratch, made, options)
    return made


def _refuse_other_content(folder: Path) -> None:
    if not folder.exists() or (folder / RECORD).is_file():
        return
    if not folder.is_dir() or any(folder.iterdir()):
        raise InputError(
            f"{folder} exists and is no checkpoint of ours (it has no {RECORD}); give another "
            "folder"
        )


def _count(torch: Any, data: Iterable[Batch], options: CheckpointOptions) -> int:
    """Number of batches, all of them checked."""
    if iter(data) is data:
        raise CalibrationError("data is an iterator, but is read several times; give a list")
    count = 0
    for count, batch in enumerate(data, 1):
        for name, value in batch.items():
            is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
            if is_float and not bool(torch.isfinite(value).all()):
                raise CalibrationError(
                    f"calibration batch {count - 1}: {name!r} holds NaN or infinite values"
                )
    if count < options.minimum:
        raise CalibrationError(
            f"{count} calibration batches, fewer than minimum={options.minimum}; give more data"
        )
    return count


def _linears(torch: Any, model: Any) -> dict[str, Any]:
    return {name: part for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)}


def _configuration(
    torch: Any, mtq: Any, model: Any, options: CheckpointOptions
) -> tuple[dict[str, Any], dict[str, str]]:
    """ModelOpt's configuration for these options, and why linear layers stay in float."""
    config: dict[str, Any] = copy.deepcopy(getattr(mtq, _FORMATS[options.format][0]))
    linears = _linears(torch, model)
    skipped: dict[str, str] = {}
    for pattern in options.exclude:
        found = fnmatch.filter(linears, pattern)
        if not found:
            raise QuantizationError(
                f"exclude={pattern!r} matches none of the {len(linears)} linear layers, such as "
                + ", ".join(list(linears)[:3])
            )
        skipped.update(dict.fromkeys(found, f"excluded by {pattern!r}"))
    if options.format == "int4_awq":
        for name, layer in linears.items():
            if layer.in_features % BLOCK:
                skipped.setdefault(
                    name, f"its {layer.in_features} inputs are no multiple of {BLOCK}"
                )
    rules = [
        entry["quantizer_name"]
        for entry in config["quant_cfg"]
        if entry.get("enable") is False and "parent_class" not in entry
    ]
    for name in linears:
        # The first rule switches everything off, before others switch weights on.
        matching = [r for r in rules[1:] if fnmatch.fnmatch(f"{name}.weight_quantizer", r)]
        if matching:
            skipped.setdefault(name, f"left in float by ModelOpt's rule {matching[0]!r}")
    _refuse_torn_groups(linears, skipped)
    config["quant_cfg"] += [
        {"quantizer_name": f"{name}.*_quantizer", "enable": False} for name in skipped
    ]
    return config, skipped


def _refuse_torn_groups(linears: Iterable[str], skipped: Mapping[str, str]) -> None:
    """Refuse to quantise some, but not all, of the layers that servers load as one."""
    for name in skipped:
        block, _, own = name.rpartition(".")
        for group in FUSED:
            others = [f"{block}.{other}" for other in group if own in group]
            rest = [other for other in others if other in linears and other not in skipped]
            if rest:
                raise QuantizationError(
                    f"{name} stays in float ({skipped[name]}), but {', '.join(rest)} would be "
                    "quantised; servers load them as one, so exclude all or none"
                )


def _settle(
    torch: Any, model: Any, data: Iterable[Batch], before: Any, quantised: tuple[str, ...]
) -> None:
    """Move AWQ's scales into the layers before, and check that this alone changes no answer."""
    checkpoint_scales.settle(model)
    with checkpoint_scales.unrounded(model.get_submodule(name) for name in quantised):
        cosine = _cosine(torch, before, _logits(torch, model, data))
    if cosine < _MOVED:
        raise QuantizationError(
            f"AWQ's scales cannot be moved into the layers before: the logits then have cosine "
            f"{cosine:.4f} with those of the model, below {_MOVED}; there is something between "
            "v_proj and o_proj or up_proj and down_proj that is not linear. Use fp8, or exclude "
            "the latter"
        )


def _enabled(torch: Any, model: Any) -> tuple[str, ...]:
    """Linear layers whose weights are quantised now."""
    return tuple(
        name
        for name, layer in _linears(torch, model).items()
        if getattr(getattr(layer, "weight_quantizer", None), "is_enabled", False)
    )


def _logits(torch: Any, model: Any, data: Iterable[Batch]) -> Any:
    """Logits of the first batches, in float32, end to end."""
    found = []
    for _, batch in zip(range(_COMPARED), data, strict=False):
        try:
            found.append(model(**batch).logits.float().flatten())
        except Exception as error:
            raise CalibrationError(
                f"the model fails on a calibration batch of {', '.join(batch)}: "
                f"{type(error).__name__}: {error}"
            ) from error
    return torch.cat(found)


def _cosine(torch: Any, one: Any, other: Any) -> float:
    value = float(torch.nn.functional.cosine_similarity(one, other, dim=0))
    if value != value:
        raise QuantizationError("the logits hold NaN before or after quantisation")
    return value


def _class_name(model: Any) -> str:
    """The class of the model as it was before ModelOpt made a subclass of it."""
    return next(c.__name__ for c in type(model).__mro__ if c.__module__.startswith("transformers"))


def _check_packed(weights: list[Path], count: int, ending: str, dtype: str) -> None:
    """Refuse files in which not every quantised layer's weight is packed."""
    packed = 0
    for path in weights:
        with path.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(size))
        packed += sum(
            name.endswith(ending) and fact["dtype"] == dtype for name, fact in header.items()
        )
    if packed != count:
        raise QuantizationError(
            f"{count} layers were quantised, but {packed} weights of type {dtype} were written"
        )


def _write_record(folder: Path, made: Checkpoint, options: CheckpointOptions) -> None:
    facts = asdict(made)
    del facts["folder"]
    versions = {name: _deps.version(name) for name in ("modelopt", "transformers", "torch")}
    record = {**facts, "options": options.to_dict(), "versions": versions}
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")


def _failure(what: str, error: Exception, said: Any) -> str:
    text = f"ModelOpt could not {what}: {type(error).__name__}: {error}"
    return f"{text}; it said:\n{said.getvalue()[-2000:]}".rstrip()


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """Give an empty folder beside ``folder``; on success flush it and put it in its place."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as place:
        scratch = Path(place) / "new"
        scratch.mkdir()
        yield scratch
        for path in (*scratch.rglob("*"), scratch):
            atomic.fsync_path(path)
        if folder.exists():
            # Goes away with the scratch folder.
            shutil.move(folder, Path(place) / "old")
        scratch.rename(folder)
        atomic.fsync_path(folder.parent)
