"""Loading the kernels without a GPU, compiling them with NVRTC, and the names that we call."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from sn72engine import _deps
from sn72engine.cuda import kernels, nvrtc
from sn72engine.cuda.driver import driver_available
from sn72engine.errors import CudaUnavailableError, MissingDependencyError

no_driver = pytest.mark.skipif(driver_available().ok, reason="there is a GPU here")


def dependency(module: str, submodule: str = "") -> ModuleType:
    try:
        found = _deps.require(module, purpose="check the names we call", submodule=submodule)
    except MissingDependencyError as error:
        pytest.skip(str(error))
    assert isinstance(found, ModuleType)
    return found


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache, where NVRTC works; the folder of its entries."""
    monkeypatch.setenv("SN72_CACHE_DIR", str(tmp_path / "cache"))
    try:
        nvrtc._version()
    except CudaUnavailableError as error:
        pytest.skip(str(error))
    return tmp_path / "cache" / "kernels"


def fresh_python(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter; a hang fails by the time limit."""
    command = [sys.executable, "-c", code]
    root = Path(__file__).parents[2]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=root)


def test_importing_touches_no_cuda() -> None:
    done = fresh_python(
        "import sys, sn72engine.cuda.kernels, sn72engine.cuda.nvrtc, sn72engine.cuda.layout\n"
        "print([m for m in sys.modules if m == 'torch' or m.split('.')[0] == 'cuda'])\n"
        "print('libcuda' in open('/proc/self/maps').read() if sys.platform == 'linux' else False)"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["[]", "False"]


@no_driver
def test_loading_without_a_driver_says_why_and_does_not_hang() -> None:
    done = fresh_python(
        "from sn72engine.cuda.driver import driver_available\n"
        "from sn72engine.cuda.kernels import load_kernels\n"
        "from sn72engine.errors import CudaUnavailableError\n"
        "for attempt in range(2):\n"
        "    try: load_kernels()\n"
        "    except CudaUnavailableError as error: assert str(error) == driver_available().reason\n"
        "    else: raise SystemExit('loaded')\n"
        "    print('refused')\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["refused", "refused"]


@no_driver
def test_the_reason_is_that_of_the_probe() -> None:
    with pytest.raises(CudaUnavailableError) as caught:
        kernels.load_kernels()
    assert str(caught.value) == driver_available().reason


def test_every_kernel_of_the_source_is_loaded() -> None:
    source = (nvrtc.source_folder() / "sn72_kernels.cu").read_text()
    for name in kernels.NAMES:
        stem, _, suffix = name.rpartition("_")
        routed = f"{stem.upper()}({suffix}," if suffix in ("f32", "f16", "bf16") else f"{name}("
        assert routed in source


def test_missing_sources_are_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(nvrtc, "_FOLDERS", (tmp_path,))
    with pytest.raises(CudaUnavailableError, match="sources are missing"):
        nvrtc.cubin((9, 0))


def test_nvrtc_compiles_once_and_keeps_the_result(compiler: Path) -> None:
    first = nvrtc.cubin((9, 0))
    assert first[:4] == b"\x7fELF"
    for name in kernels.NAMES:
        assert name.encode() in first
    (entry,) = compiler.iterdir()
    entry_time = entry.stat().st_mtime_ns
    assert nvrtc.cubin((9, 0)) == first
    assert entry.stat().st_mtime_ns == entry_time
    nvrtc.cubin((8, 0))
    assert len(list(compiler.iterdir())) == 2


def test_a_damaged_cache_entry_is_compiled_anew(compiler: Path) -> None:
    good = nvrtc.cubin((8, 9))
    (entry,) = compiler.iterdir()
    whole = entry.read_bytes()
    for damaged in (b"", whole[:-1], whole[:100] + b"?" + whole[101:]):
        entry.write_bytes(damaged)
        assert nvrtc.cubin((8, 9)) == good
        assert entry.read_bytes() == whole


def test_changed_sources_are_compiled_anew(
    compiler: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    copy = tmp_path / "src"
    copy.mkdir()
    for source in nvrtc.source_folder().iterdir():
        if source.suffix in (".cu", ".h"):
            (copy / source.name).write_bytes(source.read_bytes())
    monkeypatch.setattr(nvrtc, "_FOLDERS", (copy,))
    nvrtc.cubin((8, 0))
    with (copy / "number.h").open("a") as header:
        header.write("#error changed\n")
    with pytest.raises(CudaUnavailableError, match="changed"):
        nvrtc.cubin((8, 0))


def test_a_cache_that_cannot_be_written_is_done_without(
    compiler: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SN72_CACHE_DIR", str(tmp_path / "file"))
    assert nvrtc.cubin((8, 0))[:4] == b"\x7fELF"


def test_an_architecture_that_nvrtc_does_not_know_is_reported(compiler: Path) -> None:
    with pytest.raises(CudaUnavailableError, match="sm_999"):
        nvrtc.cubin((99, 9))
    assert not compiler.exists()


def test_cuda_core_has_the_names_that_we_call() -> None:
    core = dependency("cuda.core")
    options = inspect.signature(core.ProgramOptions).parameters
    assert set(options) >= {"name", "arch", "include_path", *nvrtc._OPTIONS}
    for owner, names in (
        (core.Program, ("compile", "close")),
        (core.ObjectCode, ("from_fatbin", "from_cubin", "get_kernel", "code")),
        (core.Kernel, ("handle",)),
        (core.Device, ("set_current",)),
    ):
        for name in names:
            assert hasattr(owner, name), f"{owner.__name__}.{name}"


def test_cuda_bindings_has_the_names_that_we_call() -> None:
    driver = dependency("cuda.bindings", "driver")
    assert int(driver.CUfunction(5)) == 5
    assert int(driver.CUstream(6)) == 6
    arguments = inspect.getdoc(driver.cuLaunchKernel)
    assert arguments is not None
    assert "sharedMemBytes, hStream, kernelParams" in arguments
