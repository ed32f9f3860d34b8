"""The CUDA sources on the host emulator: against their oracle, and against the CPU executor."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from sn72engine.cascade.route import ESCALATE, compact, route
from sn72engine.cascade.tally import Tally
from sn72engine.cuda import layout

CSRC = Path(__file__).parents[2] / "csrc"
COMPILER = shutil.which("g++")
UNTOUCHED = -12345

pytestmark = pytest.mark.skipif(COMPILER is None, reason="g++ is not installed")


UNDEFINED = ("-O1", "-fsanitize=undefined", "-fno-sanitize-recover=all")
ADDRESS = ("-O0", "-fsanitize=address")
HELPERS = ("tests/oracle.cpp", "tests/draw.cpp", "emulator/simt.cpp")


def gcc(*words: str | Path) -> subprocess.CompletedProcess[str]:
    flags = ["-std=c++17", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
    return subprocess.run([str(COMPILER), *flags, *map(str, words)], capture_output=True, text=True)


def built(program: Path, main: Path, helpers: list[Path], *flags: str) -> Path:
    done = gcc(*flags, main, *helpers, "-o", program)
    assert done.returncode == 0, done.stderr
    return program


@pytest.fixture(scope="module")
def helpers(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Object files of everything but the kernels and their tests."""
    folder = tmp_path_factory.mktemp("objects")
    objects = [folder / f"{Path(name).stem}.o" for name in HELPERS]
    for name, target in zip(HELPERS, objects, strict=True):
        done = gcc(*UNDEFINED, "-c", CSRC / name, "-o", target)
        assert done.returncode == 0, done.stderr
    return objects


@pytest.fixture(scope="module")
def program(helpers: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The emulator tests under UndefinedBehaviorSanitizer."""
    program = tmp_path_factory.mktemp("emulator") / "kernels"
    return built(program, CSRC / "tests" / "main.cpp", helpers, *UNDEFINED)


def run(program: Path, *words: object) -> subprocess.CompletedProcess[str]:
    command = [str(program), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


def barriers() -> list[tuple[str, int]]:
    return [
        (path.name, number)
        for path in sorted(CSRC.glob("*.h"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if "__syncthreads();" in line
    ]


def test_random_cases_match_the_oracle(program: Path) -> None:
    done = run(program, "random", 2400, 1)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2400 cases, 0 wrong" in done.stdout


def test_random_cases_stay_within_their_buffers(tmp_path: Path) -> None:
    (tmp_path / "empty.cpp").write_text("int main() { return 0; }\n")
    if gcc(*ADDRESS, tmp_path / "empty.cpp", "-o", tmp_path / "empty").returncode != 0:
        pytest.skip("g++ has no AddressSanitizer here")
    sources = [CSRC / name for name in HELPERS]
    program = built(tmp_path / "kernels", CSRC / "tests" / "main.cpp", sources, *ADDRESS)
    done = run(program, "random", 150, 90_001)
    assert done.returncode == 0, done.stdout + done.stderr


def test_there_are_barriers_to_drop() -> None:
    assert len(barriers()) == 2


@pytest.mark.parametrize(("file", "line"), barriers())
def test_a_missing_barrier_is_noticed(program: Path, file: str, line: int) -> None:
    assert run(program, "random", 100, 1, file, line).returncode != 0


@pytest.mark.parametrize(
    ("file", "right", "wrong"),
    [
        ("route_core.h", "if (p < low)", "if (p <= low)"),
        ("route_core.h", "!(low <= high)", "low > high"),
        ("route_core.h", "set ^= 1;", ""),  # lets a fast warp overwrite what a slow one reads
        ("sn72_kernels.cu", "if (blockIdx.x == 0) sn72", "sn72"),  # two setters of one condition
        ("route_core.h", "voted = voter > args.first", "voted = true"),  # negative by a raise
        ("route_core.h", "latest <= args.first", "latest <= args.stage"),
        ("route_core.h", "if (thread == 0 && !(args.flags & COMBINE_ONLY))", "if (thread == 0)"),
        ("move_core.h", "*args.count;", "*args.count + 1;"),  # scatters a padding row
        ("move_core.h", "alignment % 16", "args.row_bytes % 16"),
    ],
)
def test_a_wrong_kernel_is_noticed(
    helpers: list[Path], tmp_path: Path, file: str, right: str, wrong: str
) -> None:
    copy = tmp_path / "csrc"
    shutil.copytree(CSRC, copy)
    source = (copy / file).read_text()
    assert source.count(right) == 1
    (copy / file).write_text(source.replace(right, wrong))
    main = copy / "tests" / "main.cpp"
    program = built(tmp_path / "kernels", main, helpers, *UNDEFINED, "-O0")
    assert run(program, "random", 150, 1).returncode != 0


def test_the_records_are_laid_out_as_in_c(program: Path) -> None:
    done = run(program, "layout")
    here = {"Sample": layout.SAMPLE.itemsize, "Control": layout.CONTROL.itemsize}
    for name, dtype in (("Sample", layout.SAMPLE), ("Control", layout.CONTROL)):
        assert dtype.fields is not None
        here |= {f"{name}.{field}": where[1] for field, where in dtype.fields.items()}
    for record in (layout.BeginArgs, layout.RouteArgs, layout.ScatterArgs, layout.GatherArgs):
        here[record.__name__] = ctypes.sizeof(record)
        for field, *_ in record._fields_:
            here[f"{record.__name__}.{field}"] = getattr(record, field).offset
    here = {name: value for name, value in here.items() if not name.endswith(".reserved")}
    there = {line.split()[0]: int(line.split()[1]) for line in done.stdout.splitlines()}
    assert here == there


def test_the_codes_are_those_of_c() -> None:
    source = (CSRC / "layout.h").read_text()
    for enum in (layout.Code, layout.Combine, layout.Flag):
        for member in enum:
            assert re.search(rf"\b{member.name} = {member.value}u?\b", source), member
    assert f"NO_STAGE = {layout.NO_STAGE};" in source
    assert f"MAX_BUCKETS = {layout.MAX_BUCKETS};" in source


def fresh(count: int) -> np.ndarray:
    samples = np.zeros(count, layout.SAMPLE)
    samples["probability"], samples["route"], samples["open"] = 0.5, ESCALATE, 1
    for field in ("stage", "voter", "raiser"):
        samples[field] = layout.NO_STAGE
    return samples


def replay(
    program: Path,
    folder: Path,
    samples: np.ndarray,
    score: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    *,
    scored: np.ndarray | None = None,
    eligible: np.ndarray | None = None,
    budget: np.ndarray | None = None,
    elapsed: int = 0,
    **fields: int | float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One route launch on the emulator: samples, index and control after it."""
    count = len(samples)
    args = layout.RouteArgs(capacity=count, score_stride=1, threshold_stride=1, budget_stride=1)
    nobody_follows = layout.Flag.LAST_STAGE | layout.Flag.COMBINE_ONLY
    if not int(fields.get("flags", 0)) & nobody_follows:
        args.bucket_count, args.buckets[0] = 1, count
    args.weight = 1.0
    for name, value in fields.items():
        setattr(args, name, value)
    args.first = fields.get("first", args.stage)
    kinds = {np.dtype(np.float32): 0, np.dtype(np.float16): 1, np.dtype(np.uint16): 2}
    present = (scored is not None) | (eligible is not None) << 1 | (budget is not None) << 2
    threads = 32 * (1 + count % 7)
    numbers = np.array([elapsed, kinds[score.dtype], count, threads, present], np.uint64)
    zeros = np.zeros(count, np.uint8)
    arrays = [
        samples,
        score,
        low.astype(np.float32),
        high.astype(np.float32),
        zeros if scored is None else scored.astype(np.uint8),
        zeros if eligible is None else eligible.astype(np.uint8),
        np.zeros(count, np.uint64) if budget is None else budget.astype(np.uint64),
    ]
    given, answer = folder / "in.bin", folder / "out.bin"
    given.write_bytes(b"".join([bytes(args), numbers.tobytes(), *(a.tobytes() for a in arrays)]))
    done = run(program, "replay", given, answer)
    assert done.returncode == 0, done.stdout + done.stderr
    data = answer.read_bytes()
    after = np.frombuffer(data, layout.SAMPLE, count).copy()
    index = np.frombuffer(data, np.int32, count + 8, count * layout.SAMPLE.itemsize)
    control = np.frombuffer(data[-layout.CONTROL.itemsize :], layout.CONTROL)[0]
    return after, index, control


def awkward(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores and thresholds with ties, NaN, infinities and reversed pairs."""
    low, high = np.sort(rng.random((2, count), np.float32), axis=0)
    strange = np.array([np.nan, np.inf, -np.inf, 0, 1, -0.0, 2], np.float32)
    for values in (low, high):
        odd = rng.random(count) < 0.1
        values[odd] = rng.choice(strange, odd.sum())
    score = rng.random(count, np.float32)
    pick = rng.integers(0, 8, count)
    score = np.where(pick == 0, low, np.where(pick == 1, high, score))
    score = np.where(pick == 2, np.nextafter(low, np.float32(-1)), score)
    score = np.where(pick == 3, rng.choice(strange, count), score).astype(np.float32)
    return score, low, high


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("count", [1, 31, 32, 33, 700])
def test_routes_equal_the_numpy_definition(
    program: Path, tmp_path: Path, count: int, kind: str
) -> None:
    rng = np.random.default_rng(count)
    score, low, high = awkward(rng, count)
    score = np.clip(score, -60_000, 60_000, where=np.isfinite(score), out=score)
    given = score
    if kind == "f16":
        given = score.astype(np.float16)
        score = given.astype(np.float32)
    elif kind == "bf16":
        given = (score.view(np.uint32) >> 16).astype(np.uint16)
        score = (given.astype(np.uint32) << 16).view(np.float32)
    after, index, control = replay(program, tmp_path, fresh(count), given, low, high)
    wanted = route(score, low, high)
    np.testing.assert_array_equal(after["route"], wanted)
    escalated = compact(wanted)
    assert control["count"] == len(escalated)
    np.testing.assert_array_equal(index[: len(escalated)], escalated)
    padding = 0 if len(escalated) else UNTOUCHED
    assert (index[len(escalated) : count] == padding).all()
    assert (index[count:] == UNTOUCHED).all()


def test_routes_from_logits_equal_the_numpy_definition_off_the_thresholds(
    program: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(5)
    logits = rng.normal(0, 6, 800).astype(np.float32)
    logits[:6] = [np.nan, np.inf, -np.inf, 200, -200, 0]
    low, high = np.full(800, 0.15, np.float32), np.full(800, 0.85, np.float32)
    flags = int(layout.Flag.FROM_LOGITS)
    after, _, _ = replay(program, tmp_path, fresh(800), logits, low, high, flags=flags)
    truth = 1 / (1 + np.exp(-logits.astype(np.float64)))
    near = np.abs(truth[:, None] - [0.15, 0.85]).min(axis=1) < 4 * 2.0**-24
    assert not near[:6].any()
    assert near.sum() < 10
    wanted = route(logits, 0.15, 0.85, from_logits=True)
    np.testing.assert_array_equal(after["route"][~near], wanted[~near])


STATUS = {"pending": 0, "done": 1, "undecided": 2, "deadline": 3, "stage_failed": 4}


@pytest.mark.parametrize("seed", range(12))
def test_a_group_answers_as_the_cpu_executor(program: Path, tmp_path: Path, seed: int) -> None:
    """Stages side by side after one that has already spoken: combined in order, routed once."""
    rng = np.random.default_rng([seed, 7])
    count, members = int(rng.integers(1, 200)), int(rng.integers(2, 5))
    how = ["replace", "weighted", *rng.choice(["weighted", "positive_only"], members - 1)]
    tally = Tally(count)
    everyone = np.arange(count)
    before = rng.random(count, np.float32)
    tally.add(everyone, before, 0, "replace", 1.0)
    samples, _, _ = replay(
        program, tmp_path, fresh(count), before, np.zeros(count), np.ones(count),
        flags=int(layout.Flag.COMBINE_ONLY),
    )  # fmt: skip
    _, low, high = awkward(rng, count)
    last = np.zeros(count, int)  # stage that changed the answer last
    voted = np.zeros(count, bool)
    for stage in range(1, members + 1):
        score, _, _ = awkward(rng, count)
        final = stage == members
        samples, index, control = replay(
            program, tmp_path, samples, score, low, high,
            stage=stage,
            first=1,
            combine=int(layout.Combine[how[stage].upper()]),
            flags=0 if final else int(layout.Flag.COMBINE_ONLY),
        )  # fmt: skip
        good = (score >= 0) & (score <= 1)
        for position in everyone[~good].tolist():
            tally.fail(position, "no probability")
        changed, _ = tally.add(everyone[good], score[good], stage, how[stage], 1.0)
        last[changed] = stage
        voted[changed] |= how[stage] != "positive_only"
        if not final:
            assert (index == UNTOUCHED).all()
            assert samples["open"].all()
    changed = everyone[last > 0]
    routes = route(tally.probability(changed), low[changed], high[changed])
    routes[(routes == 0) & ~voted[changed]] = ESCALATE
    gone = tally.leave(changed, routes)
    np.testing.assert_array_equal(index[: control["count"]], tally.open())
    np.testing.assert_array_equal(samples["probability"], tally.probability(everyone))
    np.testing.assert_array_equal(np.flatnonzero(samples["open"] == 0), gone)
    np.testing.assert_array_equal(samples["closed"][gone], last[gone])
    np.testing.assert_array_equal(samples["route"][changed], routes)


@pytest.mark.parametrize("seed", range(12))
def test_a_whole_cascade_answers_as_the_cpu_executor(
    program: Path, tmp_path: Path, seed: int
) -> None:
    """Stages with all ways to combine, triggers, failures and a deadline, kept by ``Tally``."""
    rng = np.random.default_rng(seed)
    count, stages = int(rng.integers(1, 300)), int(rng.integers(1, 6))
    how = ["replace", *rng.choice(["replace", "weighted", "positive_only"], stages - 1)]
    weights = rng.choice([1.0, 0.4, 0.15, 0.1], stages)
    flagged = rng.random((stages, count)) < rng.choice([0.7, 1.0])
    late = rng.random(count) < 0.5  # whose time is up before the last stage begins
    # Calibrated budgets: boundary s happens at (s + 1) seconds.
    budget = np.where(late, stages - 1, 100) * 10**9
    tally = Tally(count)
    samples = fresh(count)
    asked = tally.open(flagged[0])
    for stage in range(stages):
        score, low, high = awkward(rng, count)
        scored = np.full(count, layout.NO_STAGE, np.uint8)
        scored[asked] = stage
        no_negative = how[stage] == "positive_only"
        last = stage == stages - 1
        flags = int(layout.Flag.LAST_STAGE * last | layout.Flag.NO_NEGATIVE_EXIT * no_negative)
        samples, index, control = replay(
            program, tmp_path, samples, score, low, high,
            scored=scored,
            eligible=None if last else flagged[stage + 1],
            budget=budget,
            elapsed=(stage + 1) * 10**9,
            stage=stage,
            combine=int(layout.Combine[how[stage].upper()]),
            weight=float(weights[stage]),
            flags=flags,
        )  # fmt: skip

        good = (score[asked] >= 0) & (score[asked] <= 1)
        for position in asked[~good].tolist():
            tally.fail(position, "no probability")
        changed, probability = tally.add(
            asked[good], score[asked[good]], stage, how[stage], float(weights[stage])
        )
        routes = route(probability, low[changed], high[changed])
        if no_negative:
            routes[routes == 0] = ESCALATE
        tally.leave(changed, routes)
        if last:
            break
        asked = tally.open(flagged[stage + 1])
        over = (stage + 1) * 10**9 >= budget[asked]
        tally.late(asked[over])
        asked = asked[~over]
        assert control["count"] == len(asked)
        np.testing.assert_array_equal(index[: len(asked)], asked)

    names = [f"stage{i}" for i in range(stages)]
    results = tally.results(names, 0.5, top1=False)
    status = np.array([STATUS[r.status.value] for r in results])
    author = [layout.NO_STAGE if r.stage is None else names.index(r.stage) for r in results]
    done = samples["route"] != ESCALATE
    label = np.where(done, samples["route"] == 1, samples["probability"] > 0.5)
    np.testing.assert_array_equal(samples["status"], status)
    np.testing.assert_array_equal(samples["probability"], [r.probability for r in results])
    np.testing.assert_array_equal(samples["stage"], author)
    np.testing.assert_array_equal(label, [r.label for r in results])
