"""What a server counts, as Prometheus reads it."""

from __future__ import annotations

import math
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from deepstitch.errors import MissingDependency
from deepstitch.runtime.disaggregated import metrics as metrics_module
from deepstitch.runtime.disaggregated.metrics import METRICS, Metrics

parser = pytest.importorskip("prometheus_client.parser")


def samples(metrics: Metrics) -> dict[tuple[str, ...], float]:
    """``(name, label values…)`` to value."""
    families = parser.text_string_to_metric_families(metrics.text().decode())
    return {
        (sample.name.removeprefix("deepstitch_"), *sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
    }


def test_counters_count_by_label():
    metrics = Metrics()
    for outcome in ("ok", "ok", "busy"):
        metrics.count("requests_total", outcome=outcome)
    metrics.count("transfer_bytes_total", 4096, kind="initial")
    found = samples(metrics)
    assert found["requests_total", "ok"] == 2 and found["requests_total", "busy"] == 1
    assert found["transfer_bytes_total", "initial"] == 4096


def test_a_counter_without_labels_is_there_from_the_beginning():
    assert samples(Metrics())["local_encodes_total",] == 0


def test_histograms_sort_seconds():
    metrics = Metrics()
    metrics.observe("stage_seconds", 0.003, stage="encode")
    metrics.observe("stage_seconds", 0.3, stage="encode")
    found = samples(metrics)
    assert found["stage_seconds_count", "encode"] == 2
    assert found["stage_seconds_bucket", "0.005", "encode"] == 1
    assert found["stage_seconds_sum", "encode"] == pytest.approx(0.303)


def test_gauges_are_read_when_asked_for():
    metrics, free = Metrics(), [7]
    metrics.gauge("blocks_free", lambda: free[0], kind="tokens")
    metrics.gauge("encoder_up", lambda: True, address="unix:/run/e.sock")
    metrics.gauge("cache_hits_total", lambda: 5)  # kept by the cache itself
    free[0] = 3
    found = samples(metrics)
    assert found["blocks_free", "tokens"] == 3
    assert found["encoder_up", "unix:/run/e.sock"] == 1
    assert found["cache_hits_total",] == 5
    metrics.forget("encoder_up", address="unix:/run/e.sock")
    assert ("encoder_up", "unix:/run/e.sock") not in samples(metrics)


def test_a_gauge_that_fails_does_not_hide_the_others():
    metrics = Metrics()
    metrics.gauge("rooms", lambda: 1 / 0)
    metrics.gauge("leases", lambda: 2)
    found = samples(metrics)
    assert math.isnan(found["rooms",]) and found["leases",] == 2


def test_two_servers_do_not_mix():
    one, other = Metrics(), Metrics()
    one.count("requests_total", outcome="ok")
    assert ("requests_total", "ok") not in samples(other)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.count("request_total", outcome="ok"), "did you mean 'requests_total'"),
        (lambda m: m.count("requests_total", result="ok"), "no label 'result'"),
        (lambda m: m.count("rooms"), "no counter 'rooms'"),
        (lambda m: m.observe("requests_total", 1.0), "no histogram"),
        (lambda m: m.gauge("stage_seconds", lambda: 1), "no gauge or counter"),
    ],
)
def test_what_is_not_declared_is_an_error(call, message):
    with pytest.raises(KeyError, match=re.escape(message)):
        call(Metrics())


def test_threads_lose_no_count():
    metrics = Metrics()

    def work(_: int) -> None:
        for _ in range(500):
            metrics.count("attempts_total", outcome="ok")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert samples(metrics)["attempts_total", "ok"] == 2000


def test_every_name_is_used():
    """What is declared and never set says nothing."""
    folder = Path(metrics_module.__file__).parents[1]
    source = "".join(path.read_text("utf-8") for path in folder.rglob("*.py") if path != Path(metrics_module.__file__))
    assert [name for name in METRICS if not re.search(rf'\.(count|gauge|observe)\(\s*"{name}"', source)] == []


def test_names_follow_the_conventions_of_prometheus():
    for name, metric in METRICS.items():
        assert re.fullmatch(r"[a-z][a-z_]*", name)
        assert name.endswith("_total") == (metric.kind == "counter" or name == "blocks_total")
        assert name.endswith("_seconds") == (metric.kind == "histogram")


def test_the_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "prometheus_client", None)
    with pytest.raises(MissingDependency, match=r"prometheus-client.*deepstitch\[disaggregated\]"):
        Metrics()
