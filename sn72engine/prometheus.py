"""Metrics for Prometheus; needs the ``metrics`` extra.

``docs/grafana-dashboard.json`` shows them: import it into Grafana and choose the data source.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

from sn72engine import _deps
from sn72engine.closing import Closing
from sn72engine.metrics import DEFINITIONS, HistogramValue, Metrics


class Collector:
    """What a ``prometheus_client`` registry asks at each scrape.

    Args:
        metrics: what to show. Nothing is counted a second time: values are read when asked for.

    Raises:
        MissingDependencyError: ``prometheus_client`` is not installed.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._core = _client("core")

    def collect(self) -> Iterator[Any]:
        """One metric family for each of :data:`~sn72engine.metrics.DEFINITIONS`."""
        for name, values in self._metrics.snapshot().items():
            definition = DEFINITIONS[name]
            family = getattr(self._core, f"{definition.kind.capitalize()}MetricFamily")(
                name, definition.help, labels=definition.labels
            )
            for labels, value in values.items():
                if isinstance(value, HistogramValue):
                    family.add_metric(labels, _buckets(value), sum_value=value.sum)
                else:
                    family.add_metric(labels, value)
            yield family

    def describe(self) -> Iterator[Any]:
        """The same, so that a registry knows the names when the collector is registered."""
        return self.collect()


class MetricsServer(Closing):
    """Serves metrics over HTTP, on a thread. Use as a context manager, or close it.

    Args:
        metrics: what to serve.
        port: TCP port; 0 lets the system choose, see :attr:`port`.
        address: of the interface. By default only this machine can read the metrics.

    Raises:
        MissingDependencyError: ``prometheus_client`` is not installed.
        OSError: the port cannot be used.
    """

    def __init__(self, metrics: Metrics, port: int, address: str = "127.0.0.1") -> None:
        client = _client()
        registry = client.CollectorRegistry()
        registry.register(Collector(metrics))
        self._server, self._thread = client.start_http_server(port, addr=address, registry=registry)

    @property
    def port(self) -> int:
        """The TCP port."""
        return int(self._server.server_port)

    def close(self) -> None:
        """End the service."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _client(submodule: str = "") -> Any:
    return _deps.require(
        "prometheus_client", purpose="serve metrics to Prometheus", submodule=submodule
    )


def _buckets(value: HistogramValue) -> list[tuple[str, float]]:
    """Cumulative counts by upper end, as Prometheus wants them."""
    ends = ("+Inf" if math.isinf(bound) else repr(bound) for bound in value.bounds)
    return list(zip(ends, accumulate(value.counts), strict=True))
