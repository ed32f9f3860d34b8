"""What the first bytes of a TensorRT engine file say, with no GPU and no library.

The release is where NVIDIA's open-source ``trtexec --getPlanVersionOnly`` reads it: four bytes
from byte 24 on. The file's size at byte 16, and the compute capabilities in the second header of a
TensorRT-RTX file, are not published; they are what files of TensorRT-RTX 1.7 hold, and are told
for those only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sn72engine.errors import InputError

_LENGTH = 64

#: First four bytes -> library.
_LIBRARIES = {b"ftrt": "tensorrt", b"ptrt": "tensorrt", b"vtrt": "tensorrt_rtx"}

#: Bits of the field of compute capabilities, from the lowest on.
_CAPABILITIES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_120", "sm_121")


def read(path: Path) -> dict[str, Any]:
    """Library, release, and where known the targets of an engine file, JSON-ready.

    Returns:
        ``library``; ``version`` as ``1.7.1.116``; for TensorRT-RTX 1.7 ``targets`` and
        ``complete``, whether the file has the size that it says.

    Raises:
        InputError: the file is too short, or starts like no engine that is known.
    """
    with path.open("rb") as stream:
        head = stream.read(_LENGTH)
    library = _LIBRARIES.get(head[:4])
    if len(head) < _LENGTH or library is None:
        raise InputError(f"{path} starts with {head[:4]!r}: not a TensorRT engine file")
    version = ".".join(str(number) for number in head[24:28])
    facts: dict[str, Any] = {"library": library, "version": version}
    if library == "tensorrt_rtx" and version.startswith("1.7."):
        bits = int.from_bytes(head[32:36], "little")
        facts["targets"] = [name for bit, name in enumerate(_CAPABILITIES) if bits >> bit & 1]
        facts["complete"] = int.from_bytes(head[16:24], "little") == path.stat().st_size
    return facts
