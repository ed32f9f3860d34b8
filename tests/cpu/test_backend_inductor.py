from __future__ import annotations

import dataclasses
import importlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from sn72engine import (
    BuildOptions,
    Cascade,
    CascadeSpec,
    Engine,
    Preprocess,
    ProgramOptions,
    RuntimeOptions,
    Session,
    ShapeRange,
    StageSpec,
    Store,
    TorchProgram,
    build,
    export_program,
    load,
)
from sn72engine.backends import inductor
from sn72engine.backends.advice import explain
from sn72engine.cli import main
from sn72engine.engine_folder import open_engine
from sn72engine.errors import BuildError, ExportError, InputError, OptionError, SessionError
from sn72engine.model import TensorSpec
from tests import tiny_models, tiny_modules

IMAGES = Preprocess(height=16, width=16)
BATCH = ShapeRange(1, 2, 8)
OPTIONS = BuildOptions(backend="inductor", batch=BATCH)

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # torch.export, of its own internals
]


@pytest.fixture(scope="module", autouse=True)
def compiler_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


def program(folder: Path, precision: str = "fp32") -> TorchProgram:
    return export_program(
        tiny_modules.transformer(),
        ProgramOptions(precision=precision, max_batch=64),  # type: ignore[arg-type]
        folder / f"{precision}.pt2",
        example=torch.zeros(1, 3, 16, 16),
        preprocess=IMAGES,
    )


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> TorchProgram:
    return program(tmp_path_factory.mktemp("program"))


@pytest.fixture(scope="module")
def engine(exported: TorchProgram, store: Store) -> Engine:
    return build(exported, OPTIONS, store=store)


def pixels(batch: int) -> np.ndarray:
    return np.random.default_rng(batch).standard_normal((batch, 3, 16, 16), dtype=np.float32)


def wanted(x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        result: np.ndarray = tiny_modules.transformer()(torch.from_numpy(x)).numpy()
    return result


# ---------------------------------------------------------------- the program


def test_a_program_knows_its_signature_and_where_it_came_from(exported: TorchProgram) -> None:
    again = TorchProgram.open(exported.path)
    assert again == exported
    assert again.inputs == (TensorSpec("pixel_values", "float32", ("batch", 3, 16, 16)),)
    assert again.outputs == (TensorSpec("logits", "float32", ("batch", 1)),)
    assert (again.precision, again.quantised, again.max_batch) == ("fp32", False, 64)
    assert again.preprocess == IMAGES
    assert [p["batch"] for p in again.record["export"]["parity"]] == [1, 2, 5]
    assert again.sha256() == exported.sha256()


def test_lower_precisions_keep_float32_inputs_and_outputs(tmp_path: Path) -> None:
    module = tiny_modules.transformer()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    for precision in ("bf16", "fp8"):
        made = program(tmp_path, precision)
        assert (made.inputs[0].dtype, made.outputs[0].dtype) == ("float32", "float32")
        assert made.precision == precision
        assert all(0.99 < p["cosine"] <= 1.0 + 1e-9 for p in made.record["export"]["parity"])
    assert made.quantization is not None
    assert made.quantization["layers"] == ["qkv", "out", "up", "down"]  # and not the head
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_program_that_is_not_close_enough_is_refused(tmp_path: Path) -> None:
    options = ProgramOptions(precision="fp8", parity_cosine=1.0)
    with pytest.raises(ExportError, match=r"the fp8 program does not compute.*parity_cosine=1"):
        export_program(
            tiny_modules.transformer(),
            options,
            tmp_path / "m.pt2",
            example=torch.zeros(1, 3, 16, 16),
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("module", "options", "name", "message"),
    [
        (nn.Linear(4, 3), ProgramOptions(), "m.onnx", "must end in .pt2"),
        (nn.Linear(4, 3), ProgramOptions(precision="fp8"), "m.pt2", "nothing would be fp8"),
        (nn.Linear(4, 3), ProgramOptions(output_names=("a", "b")), "m.pt2", "returns 1 tensors"),
    ],
)
def test_a_module_that_does_not_fit_is_refused(
    tmp_path: Path, module: nn.Module, options: ProgramOptions, name: str, message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        export_program(module, options, tmp_path / name, example=torch.zeros(1, 4))


def test_a_module_that_fixes_its_batch_is_refused(tmp_path: Path) -> None:
    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(2, 4) + 1

    with pytest.raises(ExportError, match="cannot be exported"):
        export_program(Fixed(), ProgramOptions(), tmp_path / "m.pt2", example=torch.zeros(2, 4))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"precision": "fp16"}, "precision='fp16' is not one of fp32, bf16, fp8"),
        ({"parity_batches": ()}, "without checking"),
        ({"input_names": ()}, "at least one name"),
        ({"parity_cosine": 2.0}, "parity_cosine=2.0"),
    ],
)
def test_options_are_checked(changed: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        ProgramOptions.from_dict(changed)


def test_a_file_that_is_no_program_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such program"):
        TorchProgram.open(tmp_path / "absent.pt2")
    for name, data in (("text.pt2", b"hello"), ("empty.pt2", b"")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match="not a program that export_program wrote"):
            TorchProgram.open(tmp_path / name)
    other = torch.export.export(nn.Linear(4, 3), (torch.zeros(2, 4),))
    torch.export.save(other, tmp_path / "other.pt2")
    with pytest.raises(InputError, match="export the module again"):
        TorchProgram.open(tmp_path / "other.pt2")


# ---------------------------------------------------------------- the engine


def test_an_engine_computes_what_the_module_does(engine: Engine) -> None:
    with load(engine) as session:
        for batch in (1, 3, 8):
            x = pixels(batch)
            y = session(x)
            np.testing.assert_allclose(y, wanted(x), rtol=1e-4, atol=1e-5)
            kept = y.copy()
            session(pixels(batch) * 2)
            np.testing.assert_array_equal(y, kept)  # it belongs to the caller
        tensor = session(torch.from_numpy(pixels(2)))
        assert isinstance(tensor, torch.Tensor)
        frozen = pixels(2)
        frozen.flags.writeable = False
        np.testing.assert_array_equal(session(frozen), tensor.numpy())
        with pytest.raises(InputError, match="batch 9"):
            session(pixels(9))
        with session.clone() as other:
            np.testing.assert_array_equal(other(frozen), tensor.numpy())
    with pytest.raises(SessionError, match="closed"):
        session(pixels(1))


def test_the_manifest_says_what_it_is_and_the_store_has_it(
    engine: Engine, exported: TorchProgram, store: Store
) -> None:
    manifest = engine.manifest
    assert (manifest.backend, manifest.precision) == ("inductor", "fp32")
    assert manifest.backend_version == torch.__version__
    assert manifest.target == inductor.cpu_target()
    assert manifest.target.startswith("cpu_")
    assert manifest.preprocess == IMAGES
    assert build(exported, OPTIONS, store=store).folder == engine.folder
    assert open_engine(engine.folder).manifest == manifest


def test_threads_are_set_for_the_call_only(engine: Engine) -> None:
    before = torch.get_num_threads()
    with load(engine, RuntimeOptions(threads=1)) as session:
        np.testing.assert_allclose(session(pixels(4)), wanted(pixels(4)), rtol=1e-4, atol=1e-5)
    assert torch.get_num_threads() == before


def test_an_engine_of_another_cpu_or_release_is_refused(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(inductor, "_instruction_sets", lambda torch: ("avx2",))
        with pytest.raises(SessionError, match=r"compiled for cpu_.*build it again here"):
            Session(engine)
    old = dataclasses.replace(engine.manifest, target="sm_90")
    with pytest.raises(SessionError, match="sm_90, and this machine is without a CUDA device"):
        inductor.InductorBackend().open(dataclasses.replace(engine, manifest=old), RuntimeOptions())
    monkeypatch.setattr(inductor._deps, "installed_version", lambda name: "2.99.0")
    with pytest.raises(Exception, match=r"backend_version was .* and is 2\.99\.0 now"):
        Session(engine)


def test_a_file_that_is_damaged_is_refused(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "model.pt2").write_bytes(b"not a package")
    with pytest.raises(SessionError, match=r"inductor cannot load model\.pt2"):
        inductor.InductorBackend().open(
            dataclasses.replace(engine, folder=tmp_path), RuntimeOptions()
        )


def test_no_compiler_is_said_with_what_to_do(
    exported: TorchProgram, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(BuildError, match=r"needs a C\+\+ compiler.*apt install g\+\+"):
        build(exported, OPTIONS, store=Store(tmp_path / "store"))
    assert not list((tmp_path / "store").glob("*/manifest.json"))


def test_a_program_is_moved_to_a_card_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a program asserts of a device is compared with one that has a number."""
    passes = importlib.import_module("torch.export.passes")
    moved: list[tuple[object, str]] = []
    monkeypatch.setattr(passes, "move_to_device_pass", lambda *given: moved.append(given))
    monkeypatch.delattr(torch.export, "passes")  # as it is before anything has imported it
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    inductor._on_card(torch, "program")
    assert moved == [("program", "cuda:1")]


COMMAND = "C++ compile error\n\nCommand:\ng++ a.cpp -fopenmp -I/usr/local/cuda/include -lgomp\n\n"


@pytest.mark.parametrize(
    ("said", "advice"),
    [
        ("CUDA_HOME environment variable is not set. Please set it", "install the toolkit"),
        (f"{COMMAND}fatal error: cuda_runtime_api.h: No such file or directory", "the toolkit"),
        (f"{COMMAND}device_utils.h:9: fatal error: cuda.h: No such file", "install the toolkit"),
        (f"{COMMAND}a.cpp:3:10: fatal error: omp.h: No such file", "lacks OpenMP"),
        (f"{COMMAND}clang: error: unsupported option '-fopenmp'", "lacks OpenMP"),
        (f"{COMMAND}/usr/bin/ld: cannot find -lgomp: No such file", "lacks OpenMP"),
        (f"{COMMAND}No space left on device", "TORCHINDUCTOR_CACHE_DIR"),
        (f"{COMMAND}a.cpp:7:1: error: expected ';'", ""),
        ("CUDA out of memory. Tried to allocate 2 GiB", "lower the batch"),
    ],
)
def test_what_the_compiler_says_is_explained(said: str, advice: str) -> None:
    text = explain(said, inductor._ADVICE)
    if advice:
        assert advice in text
    else:
        assert text == " ".join(said.split())


def test_what_cannot_be_built_is_refused_before_it_is_compiled(
    exported: TorchProgram, tmp_path: Path
) -> None:
    store = Store(tmp_path / "store")
    onnx = tiny_models.linear(tmp_path / "m.onnx")
    for model, options, message in [
        (exported, BuildOptions(), "backend='onnxruntime' builds from an ONNX file"),
        (onnx, BuildOptions(backend="inductor"), "builds from a program: write one"),
        (
            exported,
            dataclasses.replace(OPTIONS, batch=ShapeRange(1, 8, 65)),
            r"exported for at most 64.*max_batch=65",
        ),
        (exported, dataclasses.replace(OPTIONS, precision="bf16"), "is a program in fp32"),
    ]:
        with pytest.raises(BuildError, match=message):
            build(model, options, store=store)
    if not torch.cuda.is_available():
        with pytest.raises(BuildError, match="PyTorch sees no CUDA device here"):
            build(exported, dataclasses.replace(OPTIONS, target="cuda"), store=store)


def test_an_engine_is_a_stage_of_a_cascade(engine: Engine) -> None:
    spec = CascadeSpec((StageSpec("only", engine=str(engine.folder), score="sigmoid"),))
    with Cascade(spec) as cascade:
        (result,) = cascade([np.zeros((20, 20, 3), np.uint8)])
    assert result.error == ""
    assert 0.0 < result.probability < 1.0


def test_an_fp8_engine_of_several_inputs_and_outputs_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(16, 32), nn.Linear(32, 2)

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
            x, y = self.head(self.layer(a)), self.head(self.layer(b))
            return {"total": x + y, "difference": x - y}

    torch.manual_seed(0)
    module = Twins()
    made = export_program(
        module,
        ProgramOptions(("a", "b"), ("total", "difference"), precision="fp8"),
        tmp_path / "twins.pt2",
        example=(torch.zeros(1, 16), torch.zeros(1, 16)),
    )
    monkeypatch.setenv("SN72_CACHE_DIR", str(tmp_path / "cache"))
    command = ["build", str(made.path), "--backend", "inductor", "--batch", "1:2:4", "--json"]
    assert main(command) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["manifest"]["precision"] == "fp8"
    assert answer["manifest"]["quantization"]["layers"] == ["layer"]
    a, b = (np.random.default_rng(k).standard_normal((3, 16), dtype=np.float32) for k in (0, 1))
    with load(answer["folder"]) as session, torch.no_grad():
        got = session({"b": b, "a": a})
        exact = module(torch.from_numpy(a), torch.from_numpy(b))
    for name in ("total", "difference"):
        one, other = got[name].ravel(), exact[name].numpy().ravel()
        assert one @ other / np.linalg.norm(one) / np.linalg.norm(other) > 0.99
