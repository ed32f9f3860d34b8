"""A PyTorch module, or anything that maps a tensor to a tensor, as a stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from sn72engine.errors import CudaUnavailableError, OptionError
from sn72engine.preprocessing import preprocess, required_size
from sn72engine.spec import Preprocess
from sn72engine.stages.base import Image, StageScores
from sn72engine.stages.scoring import Score, to_scores
from sn72engine.stages.tensor_offer import TensorOffer

if TYPE_CHECKING:
    import torch


class TorchStage:
    """Scores images with a module in eval mode; on a GPU it can be captured in CUDA graphs.

    To be captured the module must do the same work on every call: no branch on values, nothing
    that waits for the device, no randomness. Operators of ``sn72kernels`` and packages of
    AOTInductor (loaded with ``run_single_threaded=True``) keep to that.

    Args:
        module: from a batch, shape (n, \\*transform.shape), to outputs as ``score`` wants them. It
            must be on ``device`` already.
        transform: how images become the batch.
        score: how outputs become a probability, see :class:`~sn72engine.cascade.spec.StageSpec`.
        positive: index of the positive class for ``softmax``.
        device: where the module is, ``cpu`` or such as ``cuda:0``.

    Raises:
        OptionError: the module is in training mode.
    """

    def __init__(
        self,
        module: Callable[[torch.Tensor], torch.Tensor],
        transform: Preprocess,
        *,
        score: Score = "sigmoid",
        positive: int = 1,
        device: str = "cpu",
    ) -> None:
        self._module = module
        self._transform = transform
        self._score: Score = score
        self._positive = positive
        self._device = device
        self.needs = required_size(transform)
        self._check_eval()

    def prepare(self) -> None:
        """Run one row of zeros, so that the first image does not pay for warming up."""
        import torch

        self._run(torch.zeros((1, *self._transform.shape), dtype=self._dtype()))

    def score(self, images: Sequence[Image]) -> StageScores:
        """Run the images as one batch."""
        import torch

        outputs = self._run(torch.from_numpy(preprocess(images, self._transform)))
        return to_scores(outputs.float().cpu().numpy(), self._score, positive=self._positive)

    def offer_capture(self, device: int) -> TensorOffer:
        """The module's work on that GPU.

        Raises:
            CudaUnavailableError: the module is not there.
            OptionError: it is in training mode.
        """
        import torch

        where = torch.device(self._device)
        if where.type != "cuda" or (where.index or 0) != device:
            raise CudaUnavailableError(f"its module is on {self._device}, not on cuda:{device}")
        self._check_eval()
        return TensorOffer(
            lambda rows, lane: lambda: self._module(rows),
            self._transform,
            self._score,
            positive=self._positive,
            device=f"cuda:{device}",
            limits=(1, 1 << 30),
        )

    def close(self) -> None:
        """Nothing to release."""

    def _run(self, batch: torch.Tensor) -> torch.Tensor:
        import torch

        with torch.inference_mode():
            return self._module(batch.to(self._device))

    def _dtype(self) -> Any:
        import torch

        return getattr(torch, self._transform.dtype)

    def _check_eval(self) -> None:
        modules = getattr(self._module, "modules", None)
        if modules is not None and any(module.training for module in modules()):
            raise OptionError("module is in training mode; call module.eval() first")
