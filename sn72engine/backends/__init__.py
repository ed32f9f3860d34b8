"""Inference backends behind one protocol, chosen by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sn72engine.spec import BackendName, check_choice

if TYPE_CHECKING:
    from sn72engine.backends.base import Backend


def get_backend(name: BackendName) -> Backend:
    """The backend called ``name``; its library is imported when it is first used, not here.

    Raises:
        OptionError: there is no such backend.
    """
    check_choice("backend", name, BackendName)
    if name == "onnxruntime":
        from sn72engine.backends.onnxruntime import OnnxRuntimeBackend

        return OnnxRuntimeBackend()
    if name == "openvino":
        from sn72engine.backends.openvino import OpenVinoBackend

        return OpenVinoBackend()
    if name == "inductor":
        from sn72engine.backends.inductor import InductorBackend

        return InductorBackend()
    from sn72engine.backends.tensorrt import TensorRTBackend

    return TensorRTBackend(name)
