from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats

from sn72engine.errors import InputError, OptionError
from sn72engine.thresholds import ThresholdChoice, ThresholdOptions, choose
from sn72engine.thresholds.certify import lower_bound, upper_bound, value_bound
from sn72engine.thresholds.objective import Objective, mcc
from sn72engine.thresholds.samples import Config, Outcome, Samples, run
from sn72engine.thresholds.search import cuts, frontier, pareto

COSTS = (1e-3, 8e-3, 3e-2)


def drawn(count: int, strengths: Sequence[float], seed: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Calibrated scores of independent stages; a stage of strength s is right with Phi(s)."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 2, count)
    scores = []
    for strength in strengths:
        evidence = strength * (2 * labels - 1) + generator.normal(size=count)
        scores.append(1 / (1 + np.exp(-2 * strength * evidence)))
    return scores, labels


def oracle(
    scores: Sequence[np.ndarray],
    labels: np.ndarray,
    costs: Sequence[float],
    pairs: Sequence[tuple[float, float]],
    decision: float,
) -> tuple[int, float]:
    """Right answers and cost of a cascade, one sample and one comparison at a time."""
    right, cost = 0, 0.0
    for sample, label in enumerate(labels):
        best, answer = 0.5, None
        for stage, stage_scores in enumerate(scores):
            cost += costs[stage]
            p = float(stage_scores[sample])
            if math.isnan(p) or not 0 <= p <= 1:
                continue
            best = p
            low, high = map(np.float32, pairs[stage])
            p = np.float32(p)
            if p < low or p > high:
                answer = int(p > high)
                break
        if answer is None:
            answer = int(np.float32(best) > np.float32(decision))
        right += answer == label
    return right, cost / len(labels)


SCORES = st.sampled_from([0.0, 0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9, 1.0, math.nan, -0.5, 2.0])


def samples_of(scores: Sequence[np.ndarray], labels: np.ndarray) -> Samples:
    stacked = np.stack(scores).astype(np.float32)
    return Samples(stacked, np.array(COSTS[: len(scores)]), labels.astype(bool), None)


@st.composite
def cascades(draw: st.DrawFn, stages: int) -> tuple[list[np.ndarray], np.ndarray]:
    count = draw(st.integers(4, 14))
    scores = [
        np.array(draw(st.lists(SCORES, min_size=count, max_size=count)), np.float32)
        for _ in range(stages)
    ]
    labels = np.array(draw(st.lists(st.integers(0, 1), min_size=count, max_size=count)))
    return scores, labels


def objective_of(samples: Samples, name: str = "accuracy") -> Objective:
    positives = int(samples.positive.sum())
    return Objective(
        name,  # type: ignore[arg-type]
        "binary",
        positives,
        samples.count - positives,
        windows=400,
        seed=0,
    )


@given(cascades(3), st.lists(st.sampled_from([0.0, 0.2, 0.5, 0.6, 1.0]), min_size=4, max_size=4))
@settings(max_examples=60, deadline=None)
def test_run_follows_the_routing_rules(
    cascade: tuple[list[np.ndarray], np.ndarray], cut: list[float]
) -> None:
    scores, labels = cascade
    samples = samples_of(scores, labels)
    pairs = [(min(cut[:2]), max(cut[:2])), (min(cut[2:]), max(cut[2:])), (0.5, 0.5)]
    config = Config((0, 1, 2), *zip(*pairs, strict=True), 0.5)
    outcome = run(samples, config)
    right, cost = oracle(scores, labels, COSTS, pairs, 0.5)
    assert outcome.correct.sum() == right
    assert outcome.fp + outcome.fn == len(labels) - right
    assert outcome.cost == pytest.approx(cost)


@given(cascades(2))
@settings(max_examples=25, deadline=None)
def test_two_stages_are_searched_exhaustively(
    cascade: tuple[list[np.ndarray], np.ndarray],
) -> None:
    scores, labels = cascade
    samples = samples_of(scores, labels)
    found = frontier(samples, objective_of(samples), ThresholdOptions(grid=64))[0, 1]
    # Between and at all values that occur there is no other behaviour than these.
    values = [0.0, 0.05, 0.2, 0.3, 0.45, 0.55, 0.7, 0.8, 0.95, 1.0]
    for low, high in itertools.combinations_with_replacement(values, 2):
        right, cost = oracle(scores, labels, COSTS, [(low, high), (0.5, 0.5)], 0.5)
        if cost == pytest.approx(COSTS[0]):
            continue  # nobody escalates: not a cascade of two
        good = [c for c in found if c.cost <= cost + 1e-12]
        assert max(c.value for c in good) >= right / len(labels) - 1e-12


@given(cascades(3), st.integers(0, 2))
@settings(max_examples=25, deadline=None)
def test_what_the_search_claims_is_what_its_cascades_do(
    cascade: tuple[list[np.ndarray], np.ndarray], seed: int
) -> None:
    scores, labels = cascade
    samples = samples_of(scores, labels)
    found = frontier(samples, objective_of(samples), ThresholdOptions(grid=4, seed=seed))
    for kept, candidates in found.items():
        for candidate in candidates:
            config = candidate.config
            right, cost = oracle(
                [scores[k] for k in kept],
                labels,
                [COSTS[k] for k in kept],
                list(zip(config.low, config.high, strict=True)),
                config.decision,
            )
            assert candidate.value == pytest.approx(right / len(labels))
            assert candidate.cost == pytest.approx(cost)
    merged = pareto([c for candidates in found.values() for c in candidates])
    assert [c.cost for c in merged] == sorted(c.cost for c in merged)
    assert all(a.value < b.value for a, b in itertools.pairwise(merged))


def test_three_stages_come_close_to_trying_everything() -> None:
    scores, labels = drawn(120, (0.8, 1.3, 2.0), seed=3)
    samples = samples_of(scores, labels)
    found = pareto(frontier(samples, objective_of(samples), ThresholdOptions(grid=8))[0, 1, 2])
    grids = [cuts(samples.scores[k], 8) for k in (0, 1)]
    pairs = [
        [(low, high) for low in lows for high in highs if low <= high] for lows, highs in grids
    ]
    price = 3.0
    best = -math.inf
    for first, second in itertools.product(*pairs):
        config = Config((0, 1, 2), (first[0], second[0], 0.5), (first[1], second[1], 0.5), 0.5)
        outcome = run(samples, config)
        best = max(best, outcome.correct.mean() - price * outcome.cost)
    assert max(c.value - price * c.cost for c in found) >= best - 0.01


@given(
    st.lists(st.floats(0, 1, width=32), min_size=2, max_size=60),
    st.integers(2, 70),
)
@settings(max_examples=60, deadline=None)
def test_cuts_separate_neighbouring_scores(values: list[float], most: int) -> None:
    scores = np.array(values, np.float32)
    lows, highs = cuts(scores, most)
    assert lows[0] == highs[0] == 0
    assert lows[-1] == highs[-1] == 1
    assert lows.dtype == highs.dtype == np.float32
    assert max(len(lows), len(highs)) <= most + 2
    distinct = len(np.unique(scores))
    if distinct - 1 <= most:
        every = np.unique(np.concatenate([scores, [0, 1]]))
        assert {(scores < low).sum() for low in lows} == {(scores < v).sum() for v in every}
        assert {(scores > high).sum() for high in highs} == {(scores > v).sum() for v in every}


def test_symmetric_thresholds_mirror_each_other() -> None:
    scores, labels = drawn(600, (1.2, 2.2), seed=5)
    choice = choose(scores, labels, COSTS[:2], ThresholdOptions(symmetric=True, tolerance=0.05))
    assert choice.kept == (0, 1)
    for point in choice.pareto:
        if len(point.kept) == 2:
            assert point.low[0] == pytest.approx(1 - point.high[0], abs=1e-7)


# Objectives.


@given(st.integers(1, 40), st.integers(1, 40), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_mcc_is_the_correlation_of_labels_and_answers(
    positives: int, negatives: int, misses: float, alarms: float
) -> None:
    fn, fp = round(misses * positives), round(alarms * negatives)
    labels = np.repeat([1, 0], [positives, negatives])
    answers = labels.copy()
    answers[:fn] = 0
    answers[positives : positives + fp] = 1
    got = float(mcc(np.array([float(fp)]), np.array([float(fn)]), positives, negatives)[0])
    if answers.min() == answers.max():
        assert got == 0
    else:
        assert got == pytest.approx(np.corrcoef(labels, answers)[0, 1])


def test_reward_agrees_with_resampling_answers_one_by_one() -> None:
    generator = np.random.default_rng(2)
    labels = np.repeat([1, 0], [60, 140])
    answers = labels.copy()
    answers[:9] = 0
    answers[60:70] = 1
    rewards = []
    for _ in range(4000):
        window = generator.integers(0, 200, 100)
        truth, said = labels[window], answers[window]
        correlation = np.corrcoef(truth, said)[0, 1]
        recent = (truth == said)[-10:].mean()
        rewards.append((0.5 * correlation + 0.5 * recent) ** 3)
    ours = Objective("reward", "binary", 60, 140, windows=4000, seed=1).value(10, 9)
    assert ours == pytest.approx(np.mean(rewards), abs=0.01)


def test_reward_of_the_faultless_and_the_inverted() -> None:
    goal = Objective("reward", "binary", 50, 50, windows=64, seed=0)
    assert goal.value(0, 0) == 1
    assert goal.value(50, 50) == 0


def test_the_interpolated_reward_is_near_the_exact_one() -> None:
    goal = Objective("reward", "binary", 300, 500, windows=512, seed=0)
    generator = np.random.default_rng(0)
    fp, fn = generator.uniform(0, 120, 50), generator.uniform(0, 120, 50)
    exact = [goal.value(a, b) for a, b in zip(fp, fn, strict=True)]
    np.testing.assert_allclose(goal.values(fp, fn), exact, atol=0.01)


# Certificates.


@given(st.integers(1, 400), st.floats(0, 1), st.sampled_from([0.01, 0.05, 0.1]))
@settings(max_examples=60, deadline=None)
def test_bounds_are_those_of_clopper_and_pearson(trials: int, share: float, alpha: float) -> None:
    successes = round(share * trials)
    low = stats.beta.ppf(alpha, successes, trials - successes + 1) if successes else 0.0
    high = (
        stats.beta.ppf(1 - alpha, successes + 1, trials - successes) if successes < trials else 1.0
    )
    assert lower_bound(successes, trials, alpha) == pytest.approx(low, abs=1e-7)
    assert upper_bound(successes, trials, alpha) == pytest.approx(high, abs=1e-7)


def test_the_mcc_bound_is_the_least_over_the_box_of_rates() -> None:
    goal = Objective("mcc", "binary", 80, 120, windows=16, seed=0)
    correct = np.ones(200, bool)
    correct[:20] = False
    bound = value_bound(Outcome(correct, 8, 12, 0.0, ()), goal, 0.05)
    misses, alarms = upper_bound(12, 80, 0.025), upper_bound(8, 120, 0.025)
    box = [
        goal.value(a * 120, m * 80)
        for a in np.linspace(0, alarms, 9)
        for m in np.linspace(0, misses, 9)
    ]
    assert bound == pytest.approx(min(box))
    hopeless = Outcome(correct, 100, 60, 0.0, ())
    assert value_bound(hopeless, goal, 0.05) == -1


def true_accuracy(choice: ThresholdChoice, strengths: Sequence[float]) -> float:
    """Accuracy of the chosen cascade on far more samples than it was chosen on."""
    scores, labels = drawn(200_000, strengths, seed=10_000)
    samples = samples_of(scores, labels)
    config = Config(choice.kept, choice.low, choice.high, choice.decision_threshold)
    return float(run(samples, config).correct.mean())


def test_a_certified_target_is_missed_no_more_often_than_promised() -> None:
    # The target lies where cascades of either kind exist, so both outcomes occur.
    strengths, target, confidence = (1.0, 1.6), 0.92, 0.8
    options = ThresholdOptions(target=target, confidence=confidence, grid=12, minimum=40)
    certified = wrong = 0
    runs = 50
    for seed in range(runs):
        scores, labels = drawn(600, strengths, seed)
        choice = choose(scores, labels, COSTS[:2], options)
        certified += choice.certified
        wrong += choice.certified and true_accuracy(choice, strengths) < target
    assert certified > 0.3 * runs
    # 99.9% quantile of the number of errors if each occurred with probability 1 - confidence.
    assert wrong <= stats.binom.ppf(0.999, runs, 1 - confidence)


def test_an_impossible_target_is_hardly_ever_certified() -> None:
    # Every stage and cascade is below the target in truth.
    options = ThresholdOptions(target=0.9, confidence=0.9, grid=12)
    runs = 40
    certified = 0
    for seed in range(runs):
        scores, labels = drawn(120, (0.9, 1.0), seed)
        certified += choose(scores, labels, COSTS[:2], options).certified
    assert certified <= stats.binom.ppf(0.999, runs, 0.1)


def test_a_certificate_against_a_stage_holds_in_truth() -> None:
    strengths = (1.2, 2.0)
    best = float(stats.norm.cdf(2.0))
    options = ThresholdOptions(tolerance=0.03, confidence=0.9, grid=24)
    certified = wrong = 0
    for seed in range(16):
        scores, labels = drawn(1500, strengths, seed)
        choice = choose(scores, labels, COSTS[:2], options)
        certified += choice.certified
        assert choice.expected_cost < COSTS[1]
        wrong += choice.certified and true_accuracy(choice, strengths) < best - 0.03 - 1e-3
        if choice.certified:
            assert choice.lower_bound == pytest.approx(-0.03)
            assert "Certified" in choice.statement
    assert certified >= 9
    assert wrong <= stats.binom.ppf(0.999, 16, 0.1)


def test_a_certified_choice_meets_its_target_on_the_held_out_half() -> None:
    scores, labels = drawn(1200, (1.2, 2.0), seed=1)
    choice = choose(scores, labels, COSTS[:2], ThresholdOptions(target=0.93))
    assert choice.certified
    assert choice.target_met
    assert choice.accuracy > choice.target == 0.93
    assert choice.lower_bound == 0.93
    assert choice.fitted_on + choice.certified_on == 1200
    assert choice.singles[0].cost < choice.expected_cost < choice.singles[1].cost


def test_without_enough_labels_nothing_is_certified_and_it_says_so() -> None:
    scores, labels = drawn(100, (1.2, 2.0), seed=1)
    choice = choose(scores, labels, COSTS[:2], ThresholdOptions(target=0.95))
    assert not choice.certified
    assert choice.statement.startswith("Not certified: 50 held-out samples")
    assert 0 < choice.lower_bound < choice.accuracy
    assert f"at least {choice.lower_bound:.4f}" in choice.statement


def test_the_reference_itself_needs_no_certificate() -> None:
    scores, labels = drawn(200, (1.6, 0.7), seed=2)
    choice = choose(scores, labels, COSTS[:2])
    assert choice.kept == (0,)
    assert choice.certified
    assert choice.lower_bound == 0
    assert "nothing to certify" in choice.statement


@pytest.mark.parametrize("objective", ["mcc", "reward"])
def test_a_relative_target_of_another_objective_still_saves_time(objective: str) -> None:
    scores, labels = drawn(2000, (1.2, 2.0), seed=12)
    options = ThresholdOptions(objective=objective, tolerance=0.05)  # type: ignore[arg-type]
    choice = choose(scores, labels, COSTS[:2], options)
    assert choice.kept == (0, 1)
    assert choice.target == pytest.approx(choice.singles[1].value - 0.05)
    assert choice.target_met
    assert choice.expected_cost < 0.8 * COSTS[1]


# Stages that do not help.


@pytest.mark.parametrize("objective", ["accuracy", "mcc", "reward"])
def test_a_larger_stage_that_lowers_accuracy_is_dropped(objective: str) -> None:
    scores, labels = drawn(600, (1.6, 0.7), seed=2)
    options = ThresholdOptions(objective=objective)  # type: ignore[arg-type]
    choice = choose(scores, labels, COSTS[:2], options)
    assert choice.kept == (0,)
    assert choice.singles[1].value < choice.singles[0].value
    (dropped,) = choice.dropped
    assert dropped.stage == 1
    assert "no more than stage 0" in dropped.reason
    assert choice.expected_cost == COSTS[0]
    assert choice.low == choice.high == (0.5,)


def test_a_harmful_stage_is_dropped_under_a_target_out_of_reach_too() -> None:
    scores, labels = drawn(600, (1.6, 0.2), seed=4)
    choice = choose(scores, labels, COSTS[:2], ThresholdOptions(target=0.999))
    assert choice.kept == (0,)
    assert not choice.target_met
    assert not choice.certified


def test_a_stage_between_two_that_makes_no_difference_is_dropped() -> None:
    scores, labels = drawn(800, (1.2, 1.2, 2.4), seed=3)
    scores[1] = scores[0].copy()
    choice = choose(scores, labels, (1e-3, 2e-2, 3e-2), ThresholdOptions(tolerance=0.02))
    assert choice.kept == (0, 2)
    assert [d.stage for d in choice.dropped] == [1]


def test_a_dear_stage_no_better_than_the_cheap_one_is_dropped() -> None:
    scores, labels = drawn(500, (2.0,), seed=3)
    with pytest.raises(OptionError, match="must name all 2 stages"):
        choose([scores[0], scores[0]], labels, COSTS[:2], names=["cheap"])
    named = choose([scores[0], scores[0]], labels, COSTS[:2], names=["cheap", "dear"])
    assert named.statement.startswith("The choice is cheap alone")
    assert "no more than cheap with" in named.dropped[0].reason
    choice = choose([scores[0], scores[0]], labels, COSTS[:2])
    assert choice.kept == (0,)


# Decision threshold, top1, bad scores, errors.


def test_the_decision_threshold_is_fitted_when_asked() -> None:
    scores, labels = drawn(800, (1.5,), seed=6)
    shifted = [np.sqrt(s) for s in scores]  # best cut at sqrt(0.5), about 0.71
    fixed = choose(shifted, labels, COSTS[:1])
    fitted = choose(shifted, labels, COSTS[:1], ThresholdOptions(decision_threshold=None))
    assert fixed.decision_threshold == 0.5
    assert 0.6 < fitted.decision_threshold < 0.8
    assert fitted.accuracy > fixed.accuracy
    assert fitted.low == fitted.high == (fitted.decision_threshold,)


def test_top1_has_no_low_threshold() -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 10, 800)
    predicted, confidence = [], []
    for skill in (0.75, 0.95):
        right = generator.random(800) < skill
        predicted.append(np.where(right, labels, (labels + 1) % 10))
        confidence.append(np.clip(0.3 + 0.5 * right + 0.2 * generator.random(800), 0, 1))
    options = ThresholdOptions(task="top1", tolerance=0.03)
    choice = choose(confidence, labels, COSTS[:2], options, stage_labels=predicted)
    assert choice.kept == (0, 1)
    assert choice.low == (0.0, 0.0)
    assert choice.mcc is None
    assert choice.reward is None
    assert choice.expected_cost < COSTS[1]
    assert choice.certified
    # Stage 0 is sure to 0.3..0.5 where it is wrong and to 0.8..1 where it is right.
    assert 0.4 < choice.high[0] < 0.8


def test_samples_without_a_usable_score_escalate_and_keep_what_they_had() -> None:
    scores, labels = drawn(300, (1.2, 2.0), seed=8)
    scores[0][::7] = np.nan
    scores[1][::5] = np.nan
    choice = choose(scores, labels, COSTS[:2], ThresholdOptions(tolerance=0.02))
    for point in choice.pareto:
        if len(point.kept) == 2:
            assert point.cost >= COSTS[0] + COSTS[1] * 0.1


def test_the_choice_is_deterministic_and_serialises() -> None:
    scores, labels = drawn(300, (1.0, 1.6, 2.2), seed=9)
    options = ThresholdOptions(objective="reward", decision_threshold=None, grid=12, windows=64)
    first, second = (choose(scores, labels, COSTS, options) for _ in range(2))
    assert first == second
    values = json.loads(json.dumps(first.to_dict()))
    assert values["figures"]["cost"] == first.expected_cost
    assert ThresholdOptions.from_dict(values["options"]) == options
    assert len(values["stages"]) + len(values["dropped"]) == 3


def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    scores, labels = drawn(300, (1.2, 2.0), seed=1)
    choice = choose(scores, labels, COSTS[:2])
    path = choice.plot(tmp_path / "curve.png", names=("small", "large"))
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert picture.width > 600
    with pytest.raises(OptionError, match="names="):
        choice.plot(path, names=("small",))


def test_bad_input_is_refused_with_the_reason() -> None:
    scores, labels = drawn(100, (1.2, 2.0), seed=1)
    with pytest.raises(InputError, match="20 labels are too few"):
        choose([s[:20] for s in scores], labels[:20], COSTS[:2])
    with pytest.raises(InputError, match="all 100 labels are 1"):
        choose(scores, np.ones(100, int), COSTS[:2])
    with pytest.raises(InputError, match=r"stage_scores\[1\] must have shape \(100,\)"):
        choose([scores[0], scores[1][:99]], labels, COSTS[:2])
    with pytest.raises(InputError, match="costs holds 1 values for 2 stages"):
        choose(scores, labels, COSTS[:1])
    with pytest.raises(InputError, match="apply a sigmoid"):
        choose([np.log(s / (1 - s)) for s in scores], labels, COSTS[:2])
    with pytest.raises(InputError, match="0 and 1"):
        choose(scores, labels * 2, COSTS[:2])
    with pytest.raises(InputError, match="occurs 3 times"):
        choose(scores, np.arange(100) < 3, COSTS[:2])
    with pytest.raises(InputError, match="integers"):
        choose(scores, labels.astype(float), COSTS[:2])
    with pytest.raises(InputError, match="0 stages"):
        choose([], labels, ())
    with pytest.raises(OptionError, match="costs"):
        choose(scores, labels, (1e-3, 0.0))
    with pytest.raises(InputError, match="stage_labels"):
        choose(scores, labels, COSTS[:2], ThresholdOptions(task="top1"))
    with pytest.raises(InputError, match=r"stage_labels\[0\] holds 5 values"):
        choose(
            scores, labels, COSTS[:2], ThresholdOptions(task="top1"), stage_labels=[labels[:5]] * 2
        )


@pytest.mark.parametrize(
    "values",
    [
        {"task": "multi"},
        {"objective": "f1"},
        {"task": "top1", "objective": "mcc"},
        {"task": "top1", "symmetric": True},
        {"target": 1.5},
        {"tolerance": -0.1},
        {"confidence": 1.0},
        {"grid": 1},
        {"minimum": 3},
        {"decision_threshold": math.nan},
    ],
)
def test_bad_options_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(OptionError, match=next(reversed(values))):
        ThresholdOptions(**values)  # type: ignore[arg-type]
