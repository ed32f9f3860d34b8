"""Compile the kernels with NVRTC, where the package came without compiled ones, and keep them.

The cache entry's name is a hash of the sources, the options, the architecture and the NVRTC
version; its content begins with the SHA-256 of the rest, so that a damaged file is compiled anew.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from sn72engine import _deps
from sn72engine.errors import CudaUnavailableError
from sn72kernels import atomic, env

_PURPOSE = "compile the CUDA kernels"
_MAIN = "sn72_kernels.cu"
_HERE = Path(__file__).parent
#: In an installed package, and in a source tree.
_FOLDERS = (_HERE / "src", _HERE.parents[1] / "csrc")
#: Spelled out, because routes must not depend on defaults: no fast-math of any kind.
_OPTIONS: dict[str, str | bool] = {
    "std": "c++17",
    "use_fast_math": False,
    "ftz": False,
    "prec_div": True,
    "prec_sqrt": True,
}
_DIGEST_BYTES = hashlib.sha256().digest_size


def source_folder() -> Path:
    """Folder of the kernels' sources.

    Raises:
        CudaUnavailableError: the installation lacks them.
    """
    for folder in _FOLDERS:
        if (folder / _MAIN).is_file():
            return folder
    raise CudaUnavailableError(f"the CUDA sources are missing from {_FOLDERS[0]}; reinstall")


def cubin(capability: tuple[int, int]) -> bytes:
    """The kernels compiled for one compute capability, from the cache or by NVRTC.

    Needs no GPU.

    Raises:
        CudaUnavailableError: NVRTC is absent, too old for the GPU, or refuses the sources.
    """
    folder = source_folder()
    version = _version()
    architecture = f"sm_{capability[0]}{capability[1]}"
    path = _entry(folder, architecture, version)
    kept = _read(path)
    if kept is not None:
        return kept
    compiled = _compile(folder, architecture)
    try:
        atomic.write_bytes(path, hashlib.sha256(compiled).digest() + compiled)
    except OSError:
        return compiled  # a cache that cannot be written costs time, nothing else
    return compiled


def _entry(folder: Path, architecture: str, version: tuple[int, int]) -> Path:
    digest = hashlib.sha256(json.dumps([architecture, version, _OPTIONS]).encode())
    for source in sorted((*folder.glob("*.cu"), *folder.glob("*.h"))):
        content = source.read_bytes()
        digest.update(f"\n{source.name} {len(content)}\n".encode())
        digest.update(content)
    return env.cache_dir() / "kernels" / f"{digest.hexdigest()[:32]}.{architecture}.cubin"


def _read(path: Path) -> bytes | None:
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, compiled = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    return compiled if hashlib.sha256(compiled).digest() == digest else None


def _version() -> tuple[int, int]:
    try:
        nvrtc = _deps.require("cuda.bindings", purpose=_PURPOSE, submodule="nvrtc")
        status, major, minor = nvrtc.nvrtcVersion()
    except Exception as error:  # the library's loader has its own errors
        raise CudaUnavailableError(f"NVRTC is not available: {_brief(error)}") from error
    if int(status) != 0:
        raise CudaUnavailableError(f"nvrtcVersion failed with {status!r}")
    return major, minor


def _compile(folder: Path, architecture: str) -> bytes:
    try:
        core = _deps.require("cuda.core", purpose=_PURPOSE)
        options = core.ProgramOptions(
            name=_MAIN, arch=architecture, include_path=str(folder), **_OPTIONS
        )
        source = (folder / _MAIN).read_text(encoding="utf-8")
        program = core.Program(source, "c++", options)
        try:
            return bytes(program.compile("cubin").code)
        finally:
            program.close()
    except Exception as error:  # cuda.core's errors have no common base
        raise CudaUnavailableError(
            f"NVRTC cannot compile the kernels for {architecture}: {_brief(error)}"
        ) from error


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()}"[:800]
