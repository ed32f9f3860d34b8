"""What TensorRT says, kept and turned into what to do about it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

#: Message of TensorRT -> what to do about it. The first that matches is given.
ADVICE = (
    (
        r"target\(s\) ([\w, ]+), because the model contains HW-specific datatypes: ([\w, ]+)",
        "{1} lacks {2}: FP8 needs sm_89 or later, FP4 sm_100 or sm_120, BF16 sm_80; build "
        "for such a target, or quantise to INT8, which runs on all",
    ),
    (
        r"FP32 GEMM is not supported",
        "sm_75 has no float32 matrix product here: build with precision='fp16'",
    ),
    (
        r"Attention operation was not supported",
        "the fused Attention operator needs float16: build with precision='fp16', or export "
        "with an opset below 23, which writes attention as matrix products",
    ),
    (
        r"cudaError 35|CUDA initialization failure|no CUDA-capable device|cudaErrorNoDevice",
        "no CUDA device or driver is present: with backend='tensorrt_rtx' name the card instead, "
        "target='sm_89' for example",
    ),
    (
        r"graph_jit\.cpp.*CUDA_SUCCESS",
        "refittable engines are compiled on the card, and no CUDA device is present: build where "
        "the card is, or with refit='none'",
    ),
    (
        r"libnvinfer_lean",
        "the lean runtime is not installed: build with exclude_lean_runtime=True",
    ),
    (
        r"Plugin not found|No importer registered|no checker registered|"
        r"not found in plugin registry|no runners that implement it",
        "TensorRT does not know this operator: export the model without it, or exclude it",
    ),
    (
        r"[Oo]ut of memory|cudaErrorMemoryAllocation|std::bad_alloc|insufficient memory",
        "not enough memory: lower batch.max or workspace_bytes",
    ),
    (
        r"Serialization assertion .*safeVersionRead|serialization version|"
        r"built with a different version|Version tag does not match",
        "the engine is from another TensorRT version: build it again with this one",
    ),
    (
        r"different compute capability|incompatible device|built for .*compute capability",
        "the engine is for another card: build it again here",
    ),
    (
        r"[Ww]orkspace|Could not find any implementation",
        "no kernel fits: raise workspace_bytes, or build with precision='fp16'",
    ),
)


@dataclass(frozen=True, slots=True)
class Message:
    """One line of TensorRT's log; ``severity`` is ILogger's name of it."""

    severity: str
    text: str


def make_logger(trt: Any) -> Any:
    """An ``ILogger`` that prints nothing and keeps warnings and errors in ``messages``.

    TensorRT calls it from its own threads; appending to a list is safe there.
    """

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.messages: list[Message] = []

        def log(self, severity: Any, text: str) -> None:
            if severity.name in ("WARNING", "ERROR", "INTERNAL_ERROR"):
                self.messages.append(Message(severity.name, text))

    return Logger()


def warnings(messages: list[Message]) -> tuple[str, ...]:
    """Every distinct warning, with the number of times it was given."""
    counts: dict[str, int] = {}
    for message in messages:
        if message.severity == "WARNING":
            text = " ".join(message.text.split())
            counts[text] = counts.get(text, 0) + 1
    return tuple(text if n == 1 else f"{text} ({n} times)" for text, n in counts.items())


def explain(messages: list[Message]) -> str:
    """The errors as one text, led by what to do about them where that is known."""
    texts = list(
        dict.fromkeys(
            " ".join(m.text.split()) for m in messages if m.severity in ("ERROR", "INTERNAL_ERROR")
        )
    )
    if not texts:
        return "TensorRT gave no reason"
    said = "; ".join(text[:400] for text in texts[-3:])
    advice = advise(" ".join(texts))
    return f"{advice} (TensorRT said: {said})" if advice else f"TensorRT said: {said}"


def advise(text: str) -> str:
    """What to do about a message; empty when it is not a known one."""
    for pattern, advice in ADVICE:
        match = re.search(pattern, text)
        if match:
            for place, found in enumerate(match.groups(), 1):
                advice = advice.replace(f"{{{place}}}", found.strip())
            return advice
    return ""
