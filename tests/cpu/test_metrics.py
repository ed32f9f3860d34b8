"""Metrics against sums by hand, what Prometheus reads of them, and the dashboard's queries."""

from __future__ import annotations

import json
import logging
import math
import re
import sys
import threading
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sn72engine import _deps
from sn72engine.batching import BatchingOptions, MicroBatcher
from sn72engine.cascade import Cascade
from sn72engine.cascade.report import StageCounts
from sn72engine.cascade.result import Result, Status
from sn72engine.cascade.spec import CascadeSpec, StageSpec
from sn72engine.errors import MissingDependencyError, OptionError
from sn72engine.events import BatchEvent, CallEvent, RequestsEvent, ShadowEvent
from sn72engine.metrics import DEFINITIONS, HistogramValue, Metrics
from sn72engine.prometheus import Collector, MetricsServer

DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana-dashboard.json"

needs_client = pytest.mark.skipif(
    not _deps.available("prometheus_client"), reason="prometheus_client is not installed"
)


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "sn72engine")


def call(counts: StageCounts, *statuses: Status, seconds: float = 0.1) -> CallEvent:
    results = [Result(0.5, 0, "a", status) for status in statuses]
    return CallEvent(seconds, results, ("a",), [counts])


def full() -> Metrics:
    """Every metric has a value."""
    metrics = Metrics()
    counts = StageCounts(1, 15, 1, 2, 3, 4, 5, 6, 0.2, 0.03, 0.004)
    metrics(call(counts, Status.DONE, Status.DONE, Status.DEADLINE))
    metrics(BatchEvent(3, 0.05, (0.001, 0.002, 0.003), 7))
    metrics(RequestsEvent("answered", (0.06, 0.07)))
    metrics(RequestsEvent("refused", (0.0,)))
    metrics(ShadowEvent("compared", 3, 2, 1, (0.0, 0.02, 0.6), 0.3))
    metrics(ShadowEvent("skipped", 1))
    return metrics


# ---------------------------------------------------------------- values


def test_every_event_is_counted_once() -> None:
    metrics = full()
    outcomes = {"negative": 1, "positive": 2, "escalated": 3, "failed": 4, "late": 5}
    for outcome, number in outcomes.items():
        assert metrics.value("sn72_stage_samples", stage="a", outcome=outcome) == number
    assert metrics.value("sn72_stage_padding_rows", stage="a") == 6
    assert metrics.value("sn72_results", status="done") == 2
    assert metrics.value("sn72_results", status="deadline") == 1
    assert metrics.value("sn72_results", status="undecided") == 0
    assert metrics.value("sn72_queue_length") == 7
    assert metrics.value("sn72_requests", outcome="answered") == 2
    assert metrics.value("sn72_requests", outcome="refused") == 1
    assert metrics.value("sn72_shadow_calls", outcome="skipped") == 1
    assert metrics.value("sn72_shadow_samples", outcome="differed") == 1
    assert metrics.histogram("sn72_shadow_difference").counts[-3:-1] == (0, 1)
    for name, mean, count in [
        ("sn72_call_seconds", 0.1, 1),
        ("sn72_batch_size", 3, 1),
        ("sn72_batch_seconds", 0.05, 1),
        ("sn72_queue_wait_seconds", 0.002, 3),
        ("sn72_request_seconds", 0.065, 2),
        ("sn72_shadow_seconds", 0.3, 1),
    ]:
        histogram = metrics.histogram(name)
        assert (histogram.mean, histogram.count) == (pytest.approx(mean), count), name
    for name, total in [("", 0.2), ("_decode", 0.03), ("_wait", 0.004)]:
        assert metrics.histogram(f"sn72_stage{name}_seconds", stage="a").sum == total


def test_a_stage_that_was_not_asked_leaves_no_trace() -> None:
    metrics = Metrics()
    metrics(call(StageCounts(), Status.DONE))
    assert metrics.snapshot()["sn72_stage_samples"] == {}
    assert metrics.histogram("sn72_stage_seconds", stage="a").count == 0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 20), max_size=30), st.floats(0, 1))
def test_a_histogram_counts_and_bounds_every_value(values: list[float], share: float) -> None:
    metrics = Metrics()
    for value in values:
        metrics(RequestsEvent("answered", (value,)))
    histogram = metrics.histogram("sn72_request_seconds")
    ends = histogram.bounds
    for low, high, count in zip((-1.0, *ends), ends, histogram.counts, strict=False):
        assert count == sum(low < value <= high for value in values)
    assert histogram.sum == pytest.approx(math.fsum(values))
    quantile = histogram.quantile(share)
    if not values:
        assert math.isnan(quantile)
        assert math.isnan(histogram.mean)
    else:
        exact = sorted(values)[max(math.ceil(share * len(values)), 1) - 1]
        assert quantile == min(end for end in ends if end >= exact)


def test_bounds_ascend_and_end_in_infinity() -> None:
    for definition in DEFINITIONS.values():
        assert (definition.kind == "histogram") == bool(definition.bounds)
        assert list(definition.bounds) == sorted(set(definition.bounds))
    assert Metrics().histogram("sn72_batch_size").bounds[-1] == math.inf


def test_wrong_names_and_labels_are_refused() -> None:
    metrics = Metrics()
    for name, labels, error in [
        ("sn72_nonsense", {}, "no counter or gauge; those are: sn72_calls"),
        ("sn72_call_seconds", {}, "no counter or gauge"),
        ("sn72_results", {}, r"labels \['status'\], got \[\]"),
        ("sn72_calls", {"stage": "a"}, r"labels \[\], got \['stage'\]"),
    ]:
        with pytest.raises(OptionError, match=error):
            metrics.value(name, **labels)
    with pytest.raises(OptionError, match="no histogram"):
        metrics.histogram("sn72_calls")
    with pytest.raises(OptionError, match="share="):
        HistogramValue((math.inf,), (1,), 0.0).quantile(2)


def test_threads_lose_no_count() -> None:
    metrics = Metrics()

    def work() -> None:
        for _ in range(500):
            metrics(RequestsEvent("answered", (0.001, 0.1)))

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert metrics.value("sn72_requests", outcome="answered") == 8000
    assert metrics.histogram("sn72_request_seconds").count == 8000


# ---------------------------------------------------------------- with the real thing


def grey(images: Sequence[np.ndarray]) -> np.ndarray:
    return np.array([image.mean() / 255 for image in images])


def test_a_cascade_and_its_batcher_report_what_they_did() -> None:
    metrics = Metrics()
    spec = CascadeSpec((StageSpec("first"), StageSpec("second")))
    images: list[Any] = [np.full((2, 2, 3), v, np.uint8) for v in (0, 120, 255, 128)]
    images.append(b"no image")
    with Cascade(spec, {"first": grey, "second": grey}, observe=metrics) as cascade:
        options = BatchingOptions(max_batch=5, max_wait=3600)
        with MicroBatcher(cascade, options, observe=metrics) as batcher:
            for future in [batcher.submit(image) for image in images]:
                future.result(60)
        report = cascade.report()
    for stage in report.stages:
        for outcome in ("negative", "positive", "escalated", "failed", "late"):
            counted = metrics.value("sn72_stage_samples", stage=stage.name, outcome=outcome)
            assert counted == getattr(stage.counts, outcome)
        seconds = metrics.histogram("sn72_stage_seconds", stage=stage.name)
        assert (seconds.count, seconds.sum) == (1, pytest.approx(stage.counts.seconds))
    assert metrics.value("sn72_calls") == report.calls == 1
    assert metrics.value("sn72_results", status="done") == 2
    assert metrics.value("sn72_results", status="undecided") == 2
    assert metrics.value("sn72_results", status="stage_failed") == 1
    assert metrics.value("sn72_requests", outcome="answered") == 5
    assert metrics.histogram("sn72_batch_size").sum == 5


def test_an_observer_that_raises_does_not_break_a_cascade() -> None:
    def broken(event: object) -> None:
        raise ValueError("observer")

    with Cascade(CascadeSpec((StageSpec("a"),)), {"a": grey}, observe=broken) as cascade:
        assert len(cascade([np.zeros((1, 1, 3), np.uint8)])) == 1


# ---------------------------------------------------------------- Prometheus


def exposition(metrics: Metrics) -> dict[str, float]:
    """What a scrape returns: sample name with labels, to value."""
    with MetricsServer(metrics, 0) as server:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics") as response:
            text = response.read().decode()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


@needs_client
def test_a_scrape_has_every_value() -> None:
    samples = exposition(full())
    assert samples['sn72_stage_samples_total{outcome="escalated",stage="a"}'] == 3
    assert samples["sn72_queue_length"] == 7
    assert samples["sn72_queue_wait_seconds_count"] == 3
    assert samples["sn72_queue_wait_seconds_sum"] == pytest.approx(0.006)
    # Cumulative, and the end of a bucket belongs to it.
    assert samples['sn72_queue_wait_seconds_bucket{le="0.001"}'] == 1
    assert samples['sn72_queue_wait_seconds_bucket{le="0.0025"}'] == 2
    assert samples['sn72_queue_wait_seconds_bucket{le="+Inf"}'] == 3
    named = {re.split(r"\{", name)[0] for name in samples}
    for definition in DEFINITIONS.values():
        suffix = {"counter": "_total", "gauge": "", "histogram": "_bucket"}[definition.kind]
        assert definition.name + suffix in named


@needs_client
def test_values_are_read_at_each_scrape_and_the_port_is_given_back() -> None:
    metrics = Metrics()
    with MetricsServer(metrics, 0) as server:
        port = server.port
        for expected in (1, 2):
            metrics(call(StageCounts(1, 1)))
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
                assert f"sn72_calls_total {expected}.0" in response.read().decode()
    with MetricsServer(metrics, port) as server:
        assert server.port == port


def test_without_the_client_the_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.setitem(sys.modules, "prometheus_client.core", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'sn72engine\[metrics\]'"):
        Collector(Metrics())
    with pytest.raises(MissingDependencyError, match="serve metrics"):
        MetricsServer(Metrics(), 0)


# ---------------------------------------------------------------- the dashboard


def queries() -> list[tuple[str, str]]:
    """Title and expression of every query."""
    board = json.loads(DASHBOARD.read_text())
    return [
        (panel["title"], target["expr"])
        for panel in board["panels"]
        for target in panel.get("targets", [])
    ]


def families() -> dict[str, tuple[str, ...]]:
    """Name of every series that a scrape can have, to its labels."""
    names = {}
    for d in DEFINITIONS.values():
        if d.kind == "histogram":
            names[f"{d.name}_bucket"] = (*d.labels, "le")
            names[f"{d.name}_sum"] = names[f"{d.name}_count"] = d.labels
        else:
            names[f"{d.name}_total" if d.kind == "counter" else d.name] = d.labels
    return names


@pytest.mark.parametrize(("title", "query"), queries())
def test_the_dashboard_asks_for_metrics_that_exist(title: str, query: str) -> None:
    known = families()
    asked = re.findall(r"\bsn72_\w+", query)
    assert asked
    assert set(asked) <= set(known), title
    labels = set(known[asked[0]])
    for by in re.findall(r"by \(([^)]*)\)", query):
        assert set(re.split(r",\s*", by)) <= labels, title
    for label in re.findall(r"(\w+)=~?\"", query):
        assert label in labels, title
    assert query.count("(") == query.count(")")


def test_the_dashboard_shows_every_metric_and_no_label_in_vain() -> None:
    shown = " ".join(query for _, query in queries())
    for definition in DEFINITIONS.values():
        assert re.search(rf"\b{definition.name}(_bucket|_sum|_total)?\b", shown), definition.name
    board = json.loads(DASHBOARD.read_text())
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))
    for panel in board["panels"]:
        for target in panel.get("targets", []):
            for label in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
                groups = re.findall(r"by \(([^)]*)\)", target["expr"])
                assert label in re.split(r",\s*", groups[0]), panel["title"]
