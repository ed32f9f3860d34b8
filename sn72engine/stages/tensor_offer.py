"""The offer of a stage that works on PyTorch tensors: a module, a package, an engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from sn72engine.cuda.layout import Score as ElementType
from sn72engine.errors import InputError
from sn72engine.preprocessing import preprocess_one, scale_and_bias
from sn72engine.spec import Preprocess
from sn72engine.stages.base import Image
from sn72engine.stages.capture import Output, Rows
from sn72engine.stages.scoring import Score

if TYPE_CHECKING:
    import torch

Bind = Callable[["torch.Tensor", int], Callable[[], "torch.Tensor"]]
"""From an input tensor and the number of a lane to what computes the model's output from it."""


class TensorOffer:
    """A model on one GPU, see :class:`~sn72engine.stages.capture.Capturable`.

    Images are cropped and resized on the host, uploaded as 8-bit pixels, and normalised on the
    GPU as the first thing that is captured, with the same arithmetic as
    :func:`~sn72engine.preprocessing.preprocess`, so to the same bits. With ``fit="pad"`` they are
    normalised on the host: the border has no 8-bit value.

    Args:
        bind: makes the call that is captured; it works on PyTorch's current stream.
        transform: how an image becomes a row.
        score, positive: how outputs become probabilities, as in
            :class:`~sn72engine.cascade.spec.StageSpec`.
        device: where the tensors are, such as ``cuda:0``.
        limits: fewest and most rows that the model takes.
    """

    def __init__(
        self,
        bind: Bind,
        transform: Preprocess,
        score: Score,
        *,
        positive: int,
        device: str,
        limits: tuple[int, int],
    ) -> None:
        self._as_pixels = transform.fit != "pad"
        #: What is done to an image on the host.
        self._on_host = _geometry(transform) if self._as_pixels else transform
        dtype = "uint8" if self._as_pixels else transform.dtype
        self.rows = Rows(self._on_host.shape, dtype, self._on_host)
        self.limits = limits
        self._bind = bind
        self._transform = transform
        self._score: Score = score
        self._positive = positive
        self._device = device
        #: By lane: normalised rows, as many as the largest binding has.
        self._inputs: dict[int, torch.Tensor] = {}

    def load(self, image: Image, out: NDArray[Any]) -> None:
        """Crop and resize an image; normalise it where the GPU does not."""
        if self._as_pixels:
            out[...] = preprocess_one(image, self._on_host)
        else:
            preprocess_one(image, self._on_host, out)

    def allocate(self, rows: int) -> TensorBuffer:
        """Zeroed, so that a model never starts on what was in memory."""
        import torch

        shape, dtype = (rows, *self.rows.shape), getattr(torch, self.rows.dtype)
        return TensorBuffer(torch.zeros(shape, dtype=dtype, device=self._device))

    def bind(self, buffer: TensorBuffer, rows: int, lane: int) -> TensorBound:
        """The model on the first rows of a buffer."""
        given = buffer.tensor[:rows]
        if not self._as_pixels:
            return TensorBound(self._bind(given, lane), rows, self._score, self._positive)
        inputs = self._inputs.get(lane)
        if inputs is None or len(inputs) < rows:
            shape, dtype = (rows, *self._transform.shape), _torch_dtype(self._transform)
            inputs = self._inputs[lane] = given.new_zeros(shape, dtype=dtype)
        normalise = _normaliser(given, inputs[:rows], self._transform)
        model = self._bind(inputs[:rows], lane)

        def call() -> torch.Tensor:
            normalise()
            return model()

        return TensorBound(call, rows, self._score, self._positive)


class TensorBuffer:
    """Rows as a tensor."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    @property
    def address(self) -> int:
        """Of row 0."""
        return self.tensor.data_ptr()


class TensorBound:
    """A model bound to a tensor; holds the tensors that it wrote last."""

    def __init__(
        self, call: Callable[[], torch.Tensor], rows: int, score: Score, positive: int
    ) -> None:
        self._call = call
        self._rows = rows
        self._score: Score = score
        self._positive = positive
        self._scores: torch.Tensor | None = None
        self._labels: torch.Tensor | None = None

    def __call__(self) -> None:
        """Run the model and turn its output into scores, on the current stream."""
        self._scores, self._labels = device_scores(
            self._call(), self._score, positive=self._positive, rows=self._rows
        )

    @property
    def output(self) -> Output:
        """Where the scores are."""
        assert self._scores is not None, "the work has not been run"
        return Output(
            self._scores.data_ptr(),
            _element_type(self._scores),
            self._scores.stride(0),
            self._score == "sigmoid",
            None if self._labels is None else self._labels.data_ptr(),
        )


def device_scores(
    outputs: torch.Tensor, score: Score, *, positive: int, rows: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """:func:`~sn72engine.stages.scoring.to_scores` for a tensor, without waiting for the device.

    Returns:
        One score per row, and labels for ``top1``. For ``sigmoid`` the scores are the logits,
        which the routing kernel takes as they are.

    Raises:
        InputError: the shape does not fit ``score``.
    """
    import torch

    if len(outputs) != rows:
        raise InputError(f"a model gave {len(outputs)} outputs for {rows} rows")
    if score in ("sigmoid", "probability"):
        if outputs.numel() != rows:
            raise InputError(
                f"score={score!r} needs one output per row, got shape {tuple(outputs.shape)}"
            )
        return outputs.reshape(rows), None
    if outputs.ndim != 2 or not positive < outputs.shape[1] or outputs.shape[1] < 2:
        raise InputError(
            f"score={score!r} needs outputs of shape (n, classes), of which positive={positive} is "
            f"one, got {tuple(outputs.shape)}"
        )
    logits = outputs.float()
    finite = torch.isfinite(logits).all(dim=1, keepdim=True)
    safe = torch.where(finite, logits, 0.0)
    shares = torch.where(finite, torch.softmax(safe, dim=1).clamp(max=1.0), torch.nan)
    if score == "softmax":
        return shares[:, positive], None
    labels = logits.argmax(dim=1)
    return shares.gather(1, labels[:, None])[:, 0], labels


def _geometry(transform: Preprocess) -> Preprocess:
    """The same crop and size, with the pixels left as they are."""
    return dataclasses.replace(
        transform, mean=(0.0,) * 3, std=(1.0,) * 3, layout="nhwc", dtype="float32"
    )


def _normaliser(
    pixels: torch.Tensor, target: torch.Tensor, transform: Preprocess
) -> Callable[[], None]:
    """What writes ``pixels``, uint8 (n, H, W, 3), normalised into ``target``."""
    import torch

    scale, bias = (torch.from_numpy(one).to(pixels.device) for one in scale_and_bias(transform))

    def normalise() -> None:
        # Two operations, each rounded to float32, and one last rounding: as on the host.
        values = pixels.to(torch.float32) * scale + bias
        target.copy_(values.permute(0, 3, 1, 2) if transform.layout == "nchw" else values)

    return normalise


def _torch_dtype(transform: Preprocess) -> torch.dtype:
    import torch

    dtype: torch.dtype = getattr(torch, transform.dtype)
    return dtype


def _element_type(scores: torch.Tensor) -> ElementType:
    names: dict[str, ElementType] = {
        "torch.float32": "f32",
        "torch.float16": "f16",
        "torch.bfloat16": "bf16",
    }
    name = names.get(str(scores.dtype))
    if name is None:
        raise InputError(
            f"scores are {scores.dtype}; a captured stage gives float32, float16 or bfloat16"
        )
    return name
