"""What a server counts, in the text format of Prometheus. Every name is declared in one table."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from threading import Lock
from types import MappingProxyType
from typing import Any, Literal

from deepstitch.errors import MissingDependency, did_you_mean

__all__ = ["CONTENT_TYPE", "METRICS", "Metric", "Metrics"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PREFIX = "deepstitch_"
# From a control message to a long prompt on a small machine
_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
Read = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric.

    Attributes:
        kind: a ``counter`` only grows; a ``gauge`` is read when asked for; a ``histogram`` sorts seconds into buckets.
        text: what it says.
        labels: what tells its values apart; a label that is not given is empty.
    """

    kind: Literal["counter", "gauge", "histogram"]
    text: str
    labels: tuple[str, ...] = ()


_TABLE = {
    "requests_total": Metric(
        "counter", "Requests that have ended, by outcome: ok or the code of an error", ("outcome",)
    ),
    "attempts_total": Metric("counter", "Attempts to get a request encoded, by outcome", ("outcome",)),
    "tokens_total": Metric("counter", "Tokens, prompt or generated", ("kind",)),
    "stage_seconds": Metric("histogram", "Seconds a request spent in a stage", ("stage",)),
    "transfers_total": Metric("counter", "Reads of a peer's pool, initial or resumed", ("kind",)),
    "transfer_bytes_total": Metric("counter", "Bytes moved between the processes, initial or resumed", ("kind",)),
    "messages_total": Metric("counter", "Messages on control connections, in or out", ("direction",)),
    "refused_connections_total": Metric("counter", "Connections refused, by the code of the error", ("reason",)),
    "connections": Metric("gauge", "Control connections that stand"),
    "rooms": Metric("gauge", "Requests that have not ended"),
    "requests_waiting": Metric("gauge", "Requests admitted that nothing works on yet"),
    "blocks_free": Metric("gauge", "Blocks of the pool nobody owns, by what they hold", ("kind",)),
    "blocks_total": Metric("gauge", "Blocks of the pool, by what they hold", ("kind",)),
    "leases": Metric("gauge", "Requests whose blocks a peer may be reading"),
    "encoder_up": Metric("gauge", "1 where the encode process answers", ("address",)),
    "cache_hits_total": Metric("counter", "Pictures and clips whose features were there"),
    "cache_misses_total": Metric("counter", "Pictures and clips that had to be encoded"),
    "local_encodes_total": Metric("counter", "Requests encoded here because no encode process could"),
    "http_responses_total": Metric("counter", "Answers to HTTP requests", ("path", "status")),
}
METRICS: Mapping[str, Metric] = MappingProxyType(_TABLE)


class Metrics:
    """The metrics of one server. Any thread may count.

    Values with labels appear when they are first counted; counters without labels are there from the beginning.
    """

    def __init__(self) -> None:
        """Make a registry of its own: two servers in one process do not mix.

        Raises:
            MissingDependency: prometheus-client is not installed.
        """
        try:
            import prometheus_client.core
        except ImportError:
            raise MissingDependency("prometheus-client", "disaggregated", "counting what a server does") from None
        self._library: Any = prometheus_client
        self._registry = prometheus_client.CollectorRegistry(auto_describe=False)
        self._lock = Lock()
        self._counts: dict[str, dict[tuple[str, ...], float]] = {
            name: {} if metric.labels else {(): 0.0} for name, metric in METRICS.items() if metric.kind == "counter"
        }
        self._reads: dict[str, dict[tuple[str, ...], Read]] = {}
        self._histograms: dict[str, Any] = {
            name: prometheus_client.Histogram(
                _PREFIX + name, metric.text, metric.labels, registry=self._registry, buckets=_SECONDS
            )
            for name, metric in METRICS.items()
            if metric.kind == "histogram"
        }
        prometheus_client.ProcessCollector(registry=self._registry)  # memory, descriptors and time of the process
        self._registry.register(_Collector(self._families))

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        """Add ``amount`` to a counter.

        Raises:
            KeyError: no such counter or label.
        """
        values = _values(_declared(name, labels, "counter"), labels)
        with self._lock:
            counts = self._counts[name]
            counts[values] = counts.get(values, 0.0) + amount

    def observe(self, name: str, seconds: float, **labels: str) -> None:
        """Sort ``seconds`` into a histogram.

        Raises:
            KeyError: no such histogram or label.
        """
        metric = _declared(name, labels, "histogram")
        histogram = self._histograms[name]
        (histogram.labels(*_values(metric, labels)) if metric.labels else histogram).observe(seconds)

    def gauge(self, name: str, read: Read, **labels: str) -> None:
        """Ask ``read`` for the value whenever the metrics are asked for; it replaces an earlier one of these labels.

        A counter that somebody else keeps is read the same way.

        Raises:
            KeyError: no such gauge, counter or label.
        """
        values = _values(_declared(name, labels, "gauge", "counter"), labels)
        with self._lock:
            self._reads.setdefault(name, {})[values] = read

    def forget(self, name: str, **labels: str) -> None:
        """Stop showing a gauge of these labels; nothing happens where there is none."""
        values = _values(_declared(name, labels, "gauge", "counter"), labels)
        with self._lock:
            self._reads.get(name, {}).pop(values, None)

    def text(self) -> bytes:
        """Everything, as :data:`CONTENT_TYPE`."""
        written: bytes = self._library.generate_latest(self._registry)
        return written

    def _families(self) -> Iterator[Any]:
        """Counters and gauges as the registry wants them. One that cannot be read is NaN; the others are shown."""
        with self._lock:
            counts = {name: dict(each) for name, each in self._counts.items()}
            reads = {name: dict(each) for name, each in self._reads.items()}
        core = self._library.core
        for name, metric in METRICS.items():
            values = {**counts.get(name, {}), **{key: _safely(read) for key, read in reads.get(name, {}).items()}}
            if metric.kind == "histogram" or not values:
                continue
            kind = core.CounterMetricFamily if metric.kind == "counter" else core.GaugeMetricFamily
            family = kind(_PREFIX + name, metric.text, labels=metric.labels)
            for key, value in values.items():
                family.add_metric(key, value)
            yield family


class _Collector:
    """What the registry calls at every scrape."""

    def __init__(self, families: Callable[[], Iterator[Any]]) -> None:
        self._families = families

    def collect(self) -> Iterator[Any]:
        return self._families()


def _declared(name: str, labels: Mapping[str, str], *kinds: str) -> Metric:
    known = [each for each, metric in METRICS.items() if metric.kind in kinds]
    if name not in known:
        raise KeyError(f"no {' or '.join(kinds)} {name!r}{did_you_mean(name, known)}; declare it in {__name__}")
    metric = METRICS[name]
    if unknown := sorted(set(labels) - set(metric.labels)):
        raise KeyError(f"{name} has no label {unknown[0]!r}{did_you_mean(unknown[0], metric.labels)}")
    return metric


def _values(metric: Metric, labels: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(str(labels.get(label, "")) for label in metric.labels)


def _safely(read: Read) -> float:
    try:
        return float(read())
    except Exception:
        return math.nan
