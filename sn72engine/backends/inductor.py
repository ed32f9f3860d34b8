"""AOTInductor: PyTorch's own compiler, ahead of time, for a CPU or the card that is present.

The engine file is a package of machine code and weights. On a CPU the code uses every instruction
of the machine that compiles it (``-march=native``), so the target names its instruction sets, and
an engine of another kind of CPU is not opened. On a card it holds kernels for one architecture.
Everything else in the file belongs to one release of PyTorch.

Threads: the CPU code uses as many as PyTorch is set to when it runs. ``RuntimeOptions.threads`` is
set for the length of a call and holds for the process, as ``torch.set_num_threads`` does.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sn72engine import _deps
from sn72engine.backends.advice import explain
from sn72engine.backends.base import Array, BuiltFiles
from sn72engine.cards import device_target
from sn72engine.engine import Engine
from sn72engine.errors import BuildError, SessionError
from sn72engine.model import TensorSpec
from sn72engine.program import TorchProgram
from sn72engine.progress import Progress
from sn72engine.quiet import quiet
from sn72engine.spec import BackendName, BuildOptions, RuntimeOptions

_FILE = "model.pt2"
_LOGGERS = ("torch._inductor", "torch._dynamo", "torch.export", "torch.fx")

#: Builder effort from which matrix products are tuned by measurement, on a card.
_TUNED = 3

#: What the compiler or the loader says -> what to do about it.
_ADVICE = (
    (
        r"[Oo]ut of memory|OutOfMemory|bad_alloc",
        "not enough memory: lower the batch size",
    ),
    (r"No space left", "the disk is full: free some, or set TORCHINDUCTOR_CACHE_DIR elsewhere"),
    (
        r"CUDA_HOME|cuda(_runtime_api|_runtime)?\.h: No such file",
        "compiling for a card needs the CUDA toolkit's headers: install the toolkit of the CUDA "
        "release that PyTorch was built for, and set CUDA_HOME to it",
    ),
    (
        # The compiler's command line, which has -fopenmp in it, stands in every such message.
        r"omp\.h: No such file|(unrecognized|unsupported)[^.]{0,40}-fopenmp|"
        r"cannot find -lg?omp|libgomp\.spec",
        "the compiler lacks OpenMP: install libgomp or libomp",
    ),
    (
        r"scaled_mm.*(only supported|compute capability)",
        "this card has no 8-bit floating point: export the program in bf16",
    ),
)


class InductorBackend:
    """Builds and opens AOTInductor packages."""

    name: BackendName = "inductor"

    def version(self) -> str:
        """Installed version of PyTorch, from its metadata."""
        return _deps.installed_version("torch")

    def target(self, options: BuildOptions) -> str:
        """``cpu_`` and the CPU's instruction sets, or the card's architecture, such as ``sm_90``.

        Raises:
            BuildError: there is no card, or not the one that is asked for.
        """
        if options.resolved_target == "cpu":
            return cpu_target()
        present = device_target()
        if present is None:
            raise BuildError(
                f"target={options.resolved_target!r}: PyTorch sees no CUDA device here, and "
                "inductor compiles for the card that is present; build there, or for 'cpu'"
            )
        return present

    def build(
        self,
        model: TorchProgram,
        options: BuildOptions,
        folder: Path,
        *,
        progress: bool | None = None,
    ) -> BuiltFiles:
        """Compile the program into ``model.pt2``.

        ``optimization_level`` 3 and more tunes matrix products by measurement on a card
        (``max_autotune``); ``workspace_bytes`` has no meaning here.

        Raises:
            BuildError: there is no C++ compiler, the program accepts no such batch, or PyTorch
                cannot compile it.
        """
        torch = _deps.require("torch", purpose="compile inductor engines")
        target = self.target(options)
        on_cpu = target.startswith("cpu")
        _check_compiler()
        if model.max_batch is not None and options.batch.max > model.max_batch:
            raise BuildError(
                f"batch={options.batch}: {model.path.name} was exported for at most "
                f"{model.max_batch}; export it with ProgramOptions(max_batch={options.batch.max})"
            )
        settings = {
            # Not as many threads as the machine that builds happens to have.
            "cpp.dynamic_threads": True,
            # Weights are brought into the layout of the kernels once, not at every call.
            "freezing": on_cpu,
            # On a CPU it gained nothing for a small ViT, and takes minutes.
            "max_autotune": not on_cpu and (options.optimization_level or 0) >= _TUNED,
        }
        with Progress("compile", 2, unit="step", shown=progress) as bar, quiet(*_LOGGERS):
            try:
                program = torch.export.load(model.path)
                if not on_cpu:
                    program = _on_card(torch, program)
                bar.step()
                with torch.no_grad():
                    torch._inductor.aoti_compile_and_package(
                        program, package_path=str(folder / _FILE), inductor_configs=settings
                    )
            except Exception as error:  # its exceptions share no base class
                raise BuildError(
                    f"inductor cannot compile {model.path.name}: {explain(str(error), _ADVICE)}"
                ) from error
            bar.step()
        return BuiltFiles((_FILE,), model.inputs, model.outputs)

    def open(self, engine: Engine, options: RuntimeOptions) -> InductorRunner:
        """Load an engine.

        Raises:
            SessionError: it is for another CPU or card, or PyTorch refuses the file.
        """
        torch = _deps.require("torch", purpose="run inductor engines")
        manifest = engine.manifest
        on_cpu = manifest.target.startswith("cpu")
        present = cpu_target() if on_cpu else device_target(options.device_index)
        if manifest.target != present:
            raise SessionError(
                f"the engine was compiled for {manifest.target}, and this machine is "
                f"{present or 'without a CUDA device'}; build it again here"
            )
        try:
            # A session runs one call at a time, and only this form can be captured in a CUDA graph.
            call = torch._inductor.aoti_load_package(
                str(engine.path),
                run_single_threaded=True,
                device_index=-1 if on_cpu else options.device_index,
            )
        except Exception as error:  # its exceptions share no base class
            raise SessionError(
                f"inductor cannot load {engine.path.name}: {explain(str(error), _ADVICE)}"
            ) from error
        if on_cpu:
            return InductorRunner(call, manifest.inputs, manifest.outputs, options.threads)
        device = torch.device("cuda", options.device_index)
        return InductorCudaRunner(call, manifest.inputs, manifest.outputs, device)


class InductorRunner:
    """One loaded package on the CPU. Inputs are read where they lie; outputs are new arrays."""

    def __init__(
        self,
        call: Any,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        threads: int | None = None,
    ) -> None:
        self.inputs = inputs
        self.outputs = outputs
        self._call = call
        self._threads = threads

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Execute on NumPy arrays; the arrays returned belong to the caller.

        Raises:
            SessionError: PyTorch reported failure.
        """
        with _set_threads(self._threads):
            results = self._execute({name: _tensor(array) for name, array in inputs.items()})
        return {name: tensor.numpy() for name, tensor in results.items()}

    def close(self) -> None:
        """Release the package."""
        self._call = None

    def _execute(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        import torch

        if self._call is None:
            raise SessionError("this engine was closed; load it again")
        try:
            with torch.no_grad():
                result = self._call(*(inputs[spec.name] for spec in self.inputs))
        except RuntimeError as error:
            raise SessionError(
                f"inductor failed while running: {explain(str(error), _ADVICE)}"
            ) from error
        tensors = torch.utils._pytree.tree_leaves(result)
        return {spec.name: tensor for spec, tensor in zip(self.outputs, tensors, strict=True)}


class InductorCudaRunner(InductorRunner):
    """One loaded package on a card, queued on PyTorch's current stream."""

    def __init__(
        self,
        call: Any,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        device: Any,
    ) -> None:
        super().__init__(call, inputs, outputs)
        self.device = device

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Execute on NumPy arrays; the arrays returned belong to the caller.

        Raises:
            SessionError: PyTorch reported failure.
        """
        tensors = {name: _tensor(array).to(self.device) for name, array in inputs.items()}
        return {name: y.cpu().numpy() for name, y in self.run_device(tensors).items()}

    def run_device(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Execute on tensors of the device; returns before the work is done.

        Raises:
            SessionError: PyTorch reported failure.
        """
        import torch

        with torch.cuda.device(self.device):
            return self._execute(inputs)

    def bind(self, inputs: Mapping[str, Any]) -> BoundCall:
        """A launch on tensors that stay where they are, for a CUDA graph.

        Raises:
            SessionError: PyTorch reported failure.
        """
        return BoundCall(self, inputs)


class BoundCall:
    """One launch on fixed inputs, with outputs that it overwrites."""

    def __init__(self, runner: InductorCudaRunner, inputs: Mapping[str, Any]) -> None:
        self._runner = runner
        self._inputs = dict(inputs)
        self.outputs: dict[str, Any] = {
            name: tensor.clone() for name, tensor in runner.run_device(inputs).items()
        }

    def __call__(self) -> None:
        """Queue it on PyTorch's current stream."""
        for name, tensor in self._runner.run_device(self._inputs).items():
            self.outputs[name].copy_(tensor)


def cpu_target() -> str:
    """``cpu_``, the vector instructions and a hash of all instruction sets: ``cpu_avx512_1a2b3c``.

    The compiler may use any of them, so the code runs only where all are present.
    """
    torch = _deps.require("torch", purpose="tell what this CPU can do")
    vectors = torch.backends.cpu.get_cpu_capability().lower().replace(" ", "")
    return (
        f"cpu_{vectors}_{hashlib.sha256(repr(_instruction_sets(torch)).encode()).hexdigest()[:6]}"
    )


def _instruction_sets(torch: Any) -> Sequence[str]:
    if hasattr(torch.cpu, "get_capabilities"):
        return sorted(name for name, held in torch.cpu.get_capabilities().items() if held is True)
    with contextlib.suppress(OSError):  # releases that do not tell, on Linux
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return sorted(line.partition(":")[2].split())
    return ()


def _on_card(torch: Any, program: Any) -> Any:
    """The exported program, moved to PyTorch's current CUDA device.

    By its number: what the program asserts of its tensors' devices is held against ``cuda:0`` when
    it is traced again, which ``cuda`` is not equal to.
    """
    # torch does not import it by itself.
    passes = _deps.require("torch", purpose="compile for a card", submodule="export.passes")
    return passes.move_to_device_pass(program, f"cuda:{torch.cuda.current_device()}")


def _check_compiler() -> None:
    name = os.environ.get("CXX") or "g++"
    if shutil.which(name) is None:
        raise BuildError(
            f"inductor needs a C++ compiler, and {name!r} is not to be found: install g++ "
            "(apt install g++), or name another in the variable CXX"
        )


def _tensor(array: Any) -> Any:
    """A tensor of a NumPy array, copied only where PyTorch could write into what it must not."""
    import torch

    return torch.from_numpy(array) if array.flags.writeable else torch.tensor(array)


@contextlib.contextmanager
def _set_threads(count: int | None) -> Iterator[None]:
    if count is None:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
