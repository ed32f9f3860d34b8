"""What engines are judged on: images, with their labels where they are asked for, and bounds."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sn72engine.errors import OptionError
from sn72engine.spec import CalibrationOptions, Preprocess, VerifyOptions

if TYPE_CHECKING:
    import numpy as np

    from sn72engine.calibration import CalibrationData


def bound_arguments(parser: argparse.ArgumentParser, defaults: VerifyOptions) -> None:
    """Declare the bounds on accuracy."""
    parser.add_argument(
        "--min-cosine",
        type=float,
        default=defaults.min_cosine,
        help="mean cosine similarity of the outputs; default %(default)s",
    )
    parser.add_argument(
        "--min-agreement",
        type=float,
        default=defaults.min_agreement,
        help="share of samples with the same answer; default %(default)s",
    )
    parser.add_argument(
        "--max-top1-drop",
        type=float,
        default=defaults.max_top1_drop,
        help="with --labels, percentage points of accuracy; default %(default)s",
    )


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
