"""What `/metrics` says of workers: real processes under load, through the death of a worker."""

from __future__ import annotations

import urllib.request
from pathlib import Path
from typing import Any

import openai
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from batchery.server.worker_metrics import worker_metrics
from batchery.store.workers import Distribution, Snapshot, UpstreamSnapshot
from tests.processes import Process, server, simulator, wait_for
from tests.requests import chat_line

OPERATIONS = Path(__file__).parents[2] / "docs" / "operations.md"
REQUESTS = 10_000

Sample = tuple[str, frozenset[tuple[str, str]]]


def scrape(process: Process) -> dict[str, Metric]:
    """The families of the page, which Prometheus can read."""
    with urllib.request.urlopen(process.url + "/metrics", timeout=30) as response:
        text = response.read().decode()
    check_format(text)
    return {family.name: family for family in text_string_to_metric_families(text)}


def check_format(text: str) -> None:
    """What Prometheus demands of the text format beyond that it can be parsed
    (https://prometheus.io/docs/instrumenting/exposition_formats/#text-based-format)."""
    assert text.endswith("\n")
    lines = text.splitlines()
    for kind in ("HELP", "TYPE"):
        names = [line.split()[2] for line in lines if line.startswith(f"# {kind} ")]
        assert len(names) == len(set(names)), "a metric is described twice"
    families = list(text_string_to_metric_families(text))
    assert len(families) == len({family.name for family in families}), "a metric's lines are not together"
    for family in families:
        assert family.documentation
        keys = [(sample.name, frozenset(sample.labels.items())) for sample in family.samples]
        assert len(keys) == len(set(keys)), "a series is there twice"
        if family.type == "counter":
            assert all(sample.name.endswith("_total") and sample.value >= 0 for sample in family.samples)
        if family.type == "histogram":
            check_histogram(family)


def check_histogram(family: Metric) -> None:
    for count in (sample for sample in family.samples if sample.name.endswith("_count")):
        buckets = [
            sample
            for sample in family.samples
            if sample.name.endswith("_bucket") and sample.labels | {"le": ""} == count.labels | {"le": ""}
        ]
        ends = [float(sample.labels["le"]) for sample in buckets]
        values = [sample.value for sample in buckets]
        assert ends == sorted(set(ends))
        assert values == sorted(values)
        assert (ends[-1], values[-1]) == (float("inf"), count.value)


def counters(families: dict[str, Metric]) -> dict[Sample, float]:
    """Everything that must not fall."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families.values()
        for sample in family.samples
        if family.type in ("counter", "histogram")
    }


def values(family: Metric, label: str | None = None) -> dict[str, float]:
    """A family's samples by one of their labels; of a histogram its counts."""
    suffix = "_count" if family.type == "histogram" else ""
    return {
        sample.labels[label] if label else "": sample.value for sample in family.samples if sample.name.endswith(suffix)
    }


def test_a_worker_under_load_and_after_its_death(tmp_path: Path) -> None:
    behaviour = ("--latency", "40ms", "--concurrency", "64", "--error-rate", "500=0.05")
    with (
        simulator(tmp_path, *behaviour) as upstream,
        server(tmp_path, upstream.url) as process,
    ):
        client = openai.OpenAI(base_url=process.url + "/v1", api_key="any", max_retries=0)
        data = b"".join(chat_line(f"r{i}", f"prompt {i}", model="ab"[i % 3 == 0]) for i in range(REQUESTS))
        file = client.files.create(file=("input.jsonl", data), purpose="batch")
        batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")

        def under_load() -> dict[str, Metric] | None:
            found = scrape(process)
            busy = sum(values(found["batchery_attempts"], "outcome").values()) > 100
            return found if busy and found["batchery_upstream_running"].samples else None

        first = wait_for(under_load, what="a worker under load")
        held = values(first["batchery_worker_requests"], "state")
        assert held["in_flight"] >= 1  # it may be more than is allowed now, where that has just fallen
        assert held.keys() == {"in_flight", "ready", "retrying"}
        assert values(first["batchery_in_flight_limit"])[""] >= values(first["batchery_in_flight_allowed"])[""]
        assert values(first["batchery_upstream_down"]) == {"": 0}
        assert values(first["batchery_breakers_open"]) == {"": 0}
        assert 0 <= values(first["batchery_upstream_cache_usage_ratio"])[""] <= 1
        queue = values(first["batchery_queue"], "model")
        left = values(first["batchery_live_requests"], "state")["queued"]
        assert queue.keys() <= {"a", "b"}
        assert 0 < left < REQUESTS
        assert abs(sum(queue.values()) - left) <= 1
        assert 86_000 < values(first["batchery_nearest_deadline_seconds"], "window")["24h"] <= 86_400
        assert values(first["batchery_commit_results"])[""] == values(first["batchery_commit_duration_seconds"])[""] > 0
        the_documentation_has_all(first)

        (worker,) = process.children()
        (old,) = values(first["batchery_unsent"], "worker")
        before = counters(scrape(process))
        worker.kill()

        def another() -> dict[str, Metric] | None:
            found = scrape(process)
            assert all(value >= before.get(series, 0) for series, value in counters(found).items())
            ids = values(found["batchery_unsent"], "worker")
            return found if ids and old not in ids else None

        wait_for(another, what="another worker in place of the dead one")

        def done() -> dict[str, Metric] | None:
            found = scrape(process)
            assert all(value >= before.get(series, 0) for series, value in counters(found).items())
            held = values(found["batchery_worker_requests"], "state")
            ended: Any = client.batches.retrieve(batch.id)
            settled = not any(held.values()) and found["batchery_attempts"].samples
            return found if ended.status == "completed" and settled else None

        last = wait_for(done, timeout=60, what="the end")
        outcomes = values(last["batchery_attempts"], "outcome")
        assert outcomes.keys() == {"200", "500"}
        assert 0.01 < outcomes["500"] / sum(outcomes.values()) < 0.12
        (sizes,) = (sample.value for sample in last["batchery_commit_results"].samples if sample.name.endswith("_sum"))
        assert sizes == outcomes["200"] <= REQUESTS
        assert not last["batchery_queue"].samples


def the_documentation_has_all(families: dict[str, Metric]) -> None:
    """Each metric of a real scrape has a row with its type and its labels, and each row of workers is in the scrape."""
    documented = OPERATIONS.read_text()
    rows = {line.split("`")[1]: line for line in documented.splitlines() if line.startswith("| `")}
    names = set()
    for family in families.values():
        name = family.name + ("_total" if family.type == "counter" else "")
        names.add(name)
        assert rows[name].startswith(f"| `{name}` | {family.type} |")
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        assert all(f"`{label}`" in rows[name] for label in labels), rows[name]
    assert names == set(rows), "the page and the documentation differ"


def test_a_scrape_of_several_workers() -> None:
    said = {
        "a": Snapshot(
            upstreams=[UpstreamSnapshot(name="u", attempts={"200": 5}, in_flight=3)],
            commit_seconds=Distribution([0.5, 2.0], [3, 1, 1], 9.5),
        ),
        "b": Snapshot(
            upstreams=[
                UpstreamSnapshot(name="u", attempts={"200": 7, "timeout": 1}, down=True, unsent=4, waiting=0),
                UpstreamSnapshot(name="v", attempts={"200": 2}, in_flight=2),
            ],
            ready=6,
        ),
    }
    found = {family.name: family for family in worker_metrics(said)}
    samples = {
        (sample.name, *sample.labels.values()): sample.value for family in found.values() for sample in family.samples
    }
    assert samples["batchery_attempts_total", "a", "u", "200"] == 5
    assert samples["batchery_attempts_total", "b", "u", "timeout"] == 1
    assert samples["batchery_attempts_total", "b", "v", "200"] == 2
    assert samples["batchery_unsent_total", "b", "u"] == 4
    assert [samples["batchery_upstream_down", *place] for place in (("a", "u"), ("b", "u"), ("b", "v"))] == [0, 1, 0]
    assert ("batchery_upstream_queue", "a", "u") not in samples
    assert samples["batchery_upstream_queue", "b", "u"] == 0
    assert samples["batchery_upstream_in_flight", "b", "v"] == 2
    assert samples["batchery_worker_requests", "b", "in_flight"] == 2
    assert samples["batchery_worker_requests", "b", "ready"] == 6
    buckets = [samples["batchery_commit_duration_seconds_bucket", "a", end] for end in ("0.5", "2.0", "+Inf")]
    assert buckets == [3, 4, 5]
    assert samples["batchery_commit_duration_seconds_count", "a"] == 5
    assert samples["batchery_commit_duration_seconds_sum", "a"] == 9.5
