"""Make a virtual environment with the tested versions, then run the demo or the tests in it.

    python3 bootstrap.py demo    # the main job, end to end, on photographs
    python3 bootstrap.py test    # the test suite

Anything after the command is passed on: ``python3 bootstrap.py test -k cascade``. The environment
lies in ``.venv`` (``--venv`` chooses another place) and is made again only when pyproject.toml,
constraints.txt or CMakeLists.txt changes. Needs only a Python of version 3.11 or newer.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
TORCH = "torch==2.13.0"

#: Tests run in this many processes, a file in one of them; each may take 2 GB.
WORKERS = min(os.cpu_count() or 1, 4)

#: command -> (extras to install, module to run with its leading arguments). Benchmarks cannot be
#: timed beside other processes; their plugin would warn of it.
COMMANDS = {
    "demo": ("demo", ["sn72engine", "demo"]),
    "test": ("test", ["pytest", "-n", str(WORKERS), "--dist", "loadfile", "-p", "no:benchmark"]),
    "shell": ("test", []),
}


def main() -> int:
    """Parse the command line, install what is missing, run; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=COMMANDS, help="what to run; shell only installs")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="default: .venv")
    arguments, rest = parser.parse_known_args()
    if sys.version_info < (3, 11):
        return fail(f"Python {sys.version.split()[0]} is too old; run this with 3.11 or newer.")
    extras, module = COMMANDS[arguments.command]
    try:
        python = environment(arguments.venv.resolve(), extras)
    except subprocess.CalledProcessError as error:
        return fail(f"installing failed (exit code {error.returncode}); see the lines above.")
    if not module:
        print(f"Ready: {python}")
        return 0
    environ = dict(os.environ)
    if arguments.command == "test":
        # Processes beside each other would fight for the cores with their idle threads.
        environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // WORKERS)))
    return subprocess.call([str(python), "-m", *module, *rest], cwd=ROOT, env=environ)


def environment(venv: Path, extras: str) -> Path:
    """Create or refresh the virtual environment; returns its interpreter."""
    python = venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp = venv / f".installed-{extras}"
    wanted = recipe_hash()
    if python.exists() and stamp.exists() and stamp.read_text() == wanted:
        return python
    if not python.exists():
        print(f"Creating {venv}", flush=True)
        subprocess.check_call([sys.executable, "-m", "venv", str(venv)])
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # torch first and by itself, so that nothing else chooses another build of it.
    print(f"Installing {TORCH}", flush=True)
    subprocess.check_call([*pip, TORCH])
    print(f"Installing sn72engine[{extras}] with the versions of constraints.txt", flush=True)
    subprocess.check_call([*pip, "-c", str(ROOT / "constraints.txt"), "-e", f"{ROOT}[{extras}]"])
    stamp.write_text(wanted)
    return python


def recipe_hash() -> str:
    """Hash of everything that decides what is installed."""
    digest = hashlib.sha256(TORCH.encode())
    for name in ("pyproject.toml", "constraints.txt", "CMakeLists.txt"):
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def fail(message: str) -> int:
    """Print why nothing was run; returns the exit code."""
    print(f"bootstrap: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
