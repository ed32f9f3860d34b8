"""What quantising one layer alone does to the answers.

The damage is the mean squared change of the first output over its mean square, over all samples:
``sum |q - y|^2 / sum |y|^2``. Rounding errors of different layers are nearly independent, so that
the damage of several layers is nearly the sum of theirs, which no figure of accuracy is; and it
tells layers apart long before any answer flips.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sn72engine.builder import build
from sn72engine.errors import InputError
from sn72engine.model import OnnxModel
from sn72engine.session import Session
from sn72engine.spec import BuildOptions
from sn72engine.store import Store

if TYPE_CHECKING:
    from collections.abc import Iterator

Outputs = list[np.ndarray]


@contextmanager
def opened(model: OnnxModel) -> Iterator[Session]:
    """A session of an engine that is built for this purpose, kept nowhere, and closed again.

    ONNX Runtime runs it on the CPU; formats that a CPU lacks are emulated.
    """
    with tempfile.TemporaryDirectory(prefix=".sn72.", dir=model.path.parent) as scratch:
        engine = build(model, BuildOptions(), store=Store(Path(scratch)), progress=False)
        with Session(engine) as session:
            yield session


def answers(model: OnnxModel, batches: Iterable[np.ndarray]) -> Outputs:
    """First output of a model for every batch, float64.

    Raises:
        InputError: there is no batch.
    """
    with opened(model) as session:
        dtype = session.inputs[0].dtype
        found = []
        for batch in batches:
            outputs: Any = session.infer_rows(batch.astype(dtype, copy=False))
            first = outputs[0] if isinstance(outputs, tuple) else outputs
            found.append(np.asarray(first, np.float64))
    if not found:
        raise InputError("no data to check the formats on: batches is empty")
    return found


def damage(found: Outputs, wanted: Outputs) -> float:
    """The measure above; NaN where an answer is not finite, and infinite for a change of nothing.

    Args:
        found, wanted: first outputs by batch, of the quantised and of the float model.
    """
    change = sum(float(np.square(a - b).sum()) for a, b in zip(found, wanted, strict=True))
    size = sum(float(np.square(b).sum()) for b in wanted)
    if size == 0:
        return 0.0 if change == 0 else float("inf")
    return change / size
