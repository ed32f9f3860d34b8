"""Images that engines are judged on, with their labels where they are asked for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sn72engine.errors import OptionError
from sn72engine.spec import CalibrationOptions, Preprocess

if TYPE_CHECKING:
    import numpy as np

    from sn72engine.calibration import CalibrationData


def judging_data(
    path: Path,
    preprocess: Preprocess | None,
    options: CalibrationOptions,
    *,
    labels: bool,
    split: str | None,
    owner: object,
) -> tuple[CalibrationData, np.ndarray | None]:
    """Batches of the images at ``path`` and, with ``labels``, the class of each.

    Args:
        path: folder, CSV or .npz.
        preprocess: how images become tensors; None for .npz only.
        options: batch size and most images, spread evenly.
        labels: read the label column of the CSV, or the folder names.
        split: rows of the CSV to take.
        owner: what should have held the preprocessing, for the message.

    Raises:
        OptionError: there is no preprocessing for images.
        CalibrationError: there are no images, or no labels.
    """
    from sn72engine.calibration import batches, labelled
    from sn72engine.samples import spread

    if preprocess is None and path.suffix != ".npz":
        raise OptionError(f"{owner} holds no preprocessing; give the data as .npz")
    source: Any = path
    known = None
    if labels:
        paths, known = labelled(path, split)
        chosen = list(spread(len(paths), options.limit))
        source, known = [paths[i] for i in chosen], known[chosen]
    return batches(source, preprocess, options, split=split), known
