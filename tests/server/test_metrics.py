"""`GET /metrics`: what is counted, that it is counted right, and that labels stay few."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from batchery.server import auth, metrics
from batchery.store import blobs as blob_store
from batchery.store import shards, workers
from batchery.store.errors import StoreUnavailable
from batchery.store.ids import new_id
from batchery.store.workers import Snapshot, UpstreamSnapshot, WorkerRow
from tests.requests import chat_file, chat_line
from tests.server.keys import bearing, make_key
from tests.server.rig import Growing, Rig

OPERATIONS = Path(__file__).parents[2] / "docs" / "operations.md"

Sample = tuple[str, frozenset[tuple[str, str]]]


async def scrape(rig: Rig, **headers: str) -> dict[Sample, float]:
    """Every sample, by its name and labels."""
    answer = await rig.ask("GET", "/metrics", headers=headers)
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert answer.headers["cache-control"] == "no-store"
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(answer.body.decode())
        for sample in family.samples
    }


def of(name: str, **labels: str) -> Sample:
    return f"batchery_{name}", frozenset(labels.items())


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """The database is looked at on every scrape."""
    monkeypatch.setattr(metrics, "MAX_AGE", -1.0)


async def test_requests_are_counted_by_route_and_not_by_path(rig: Rig) -> None:
    data = chat_file(100)
    id = (await rig.upload(data))["id"]
    for path in (f"/v1/files/{id}", f"/ai/v1/files/{id}", f"/v1/files/{id.removeprefix('file-')}", "/v1/files/none"):
        await rig.ask("GET", path)
    await rig.ask("HEAD", f"/v1/files/{id}")
    found = await scrape(rig)
    route = "/v1/files/{id}"
    assert found[of("http_requests_total", route=route, method="GET", status="200")] == 3
    assert found[of("http_requests_total", route=route, method="GET", status="404")] == 1
    assert found[of("http_requests_total", route=route, method="HEAD", status="200")] == 1
    assert found[of("http_request_duration_seconds_count", route=route, method="GET")] == 4
    assert found[of("http_request_duration_seconds_bucket", route=route, method="GET", le="+Inf")] == 4
    assert 0 < found[of("http_request_duration_seconds_sum", route=route, method="GET")] < 60
    assert found[of("http_requests_in_progress", route="/metrics", method="GET")] == 1
    assert found[of("http_requests_in_progress", route=route, method="GET")] == 0
    assert found[("process_start_time_seconds", frozenset())] > 0


async def test_bytes_are_those_of_the_bodies(rig: Rig) -> None:
    data = chat_file(100)
    id = (await rig.upload(data))["id"]
    route = "/v1/files/{id}/content"
    identity = {"Accept-Encoding": "identity"}
    await rig.ask("GET", f"/v1/files/{id}/content", headers=identity)
    await rig.ask("GET", f"/v1/files/{id}/content", headers=identity | {"Range": "bytes=0-9"})
    await rig.ask("HEAD", f"/v1/files/{id}/content", headers=identity)
    found = await scrape(rig)
    assert found[of("http_sent_bytes_total", route=route, method="GET")] == len(data) + 10
    assert found[of("http_sent_bytes_total", route=route, method="HEAD")] == 0
    assert len(data) < found[of("http_received_bytes_total", route="/v1/files", method="POST")] < len(data) + 1000


async def test_nobody_can_invent_labels(rig: Rig) -> None:
    before = len(await scrape(rig))
    for number in range(20):
        await rig.ask("GET", f"/no/such/path/{number}")
        await rig.ask(f"BREW{number}", "/v1/files")
        await rig.ask("GET", f"/v1/files/file-{number:032x}?limit={number}")
    found = await scrape(rig)
    assert found[of("http_requests_total", route="unknown", method="GET", status="404")] == 20
    assert found[of("http_requests_total", route="unknown", method="other", status="405")] == 20
    assert found[of("http_requests_total", route="/v1/files/{id}", method="GET", status="404")] == 20
    assert len(found) - before < 100


async def test_refusals_from_outside_the_app_are_counted_too(rig: Rig) -> None:
    await rig.ask("GET", "/v1/files?" + "x" * 10_000)
    found = await scrape(rig)
    assert found[of("http_requests_total", route="unknown", method="GET", status="414")] == 1


async def test_an_upload_is_seen_while_it_comes_in(rig: Rig) -> None:
    labels: dict[str, Any] = {"route": "/v1/files", "method": "POST"}
    _, writer = await asyncio.open_connection("127.0.0.1", rig.port)
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n'
    writer.write(
        b"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=b\r\n"
        b"Content-Length: 100000\r\n\r\n" + head
    )
    async with asyncio.timeout(10):
        while (await scrape(rig)).get(of("http_received_bytes_total", **labels)) != len(head):
            pass
    assert (await scrape(rig))[of("http_requests_in_progress", **labels)] == 1
    writer.close()
    async with asyncio.timeout(10):
        while (found := await scrape(rig))[of("http_requests_in_progress", **labels)] != 0:
            pass
    assert found[of("http_received_bytes_total", **labels)] == len(head)
    assert found[of("http_requests_total", status="400", **labels)] == 1


async def test_answers_that_are_cut_are_counted(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    id = (await rig.upload(chat_file(16_000, padding=2_000)))["id"]
    labels: dict[str, Any] = {"route": "/v1/files/{id}/content", "method": "GET"}
    request = f"GET /v1/files/{id}/content HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", rig.port, limit=1000)
    writer.write(request)
    await reader.readuntil(b"\r\n\r\n")
    writer.transport.abort()
    async with asyncio.timeout(10):
        while (await scrape(rig)).get(of("http_answers_cut_total", **labels)) != 1:
            pass
    real = type(rig.context.blobs).read
    reads = 0

    async def failing(self: blob_store.BlobStore, key: str, start: int, length: int) -> bytes:
        nonlocal reads
        reads += 1
        if reads > 5:
            raise StoreUnavailable("gone")
        return await real(self, key, start, length)

    monkeypatch.setattr(type(rig.context.blobs), "read", failing)
    reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
    writer.write(request)
    await reader.read()
    writer.close()
    found = await scrape(rig)
    assert found[of("http_answers_cut_total", **labels)] == 2
    assert found[of("http_requests_total", status="200", **labels)] == 2
    assert found[of("http_requests_in_progress", **labels)] == 0


@pytest.mark.usefixtures("fresh")
async def test_what_stands_in_the_database(either: Rig) -> None:
    empty = await scrape(either)
    for status in (
        "validating",
        "in_progress",
        "finalizing",
        "cancelling",
        "completed",
        "failed",
        "expired",
        "cancelled",
    ):
        assert empty[of("batches", status=status)] == 0
    assert empty[of("workers")] == 0
    assert empty[of("results_per_second")] == 0
    assert empty[of("results", outcome="completed")] == 0
    assert not [sample for sample in empty if sample[0].startswith(("batchery_queue", "batchery_deadline"))]
    file = (await either.upload(chat_file(10)))["id"]
    batches = [
        (await either.create(file, completion_window=window)).json["id"] for window in ("24h", "24h", "1h", "1h", "1h")
    ]
    counts = {"completed": 4, "failed": 1, "input_tokens": 30, "output_tokens": 7}
    await either.set_batch(batches[0], status="in_progress", **counts)
    await either.set_batch(batches[3], status="completed", **counts)
    await either.set_batch(batches[4], deleted_at=5, status="completed", **counts)
    now = time.time()
    async with either.context.database.write() as connection:
        for age, rate in ((0, 2.5), (5, 10.0), (20, 100.0)):
            await workers.insert(
                connection,
                WorkerRow(id=new_id(), host="h", pid=1, version="0", started_at=0, heartbeat_at=now - age, rate=rate),
            )
    found = await scrape(either)
    assert found[of("batches", status="validating")] == 2
    assert found[of("batches", status="in_progress")] == 1
    assert found[of("batches", status="completed")] == 1
    assert found[of("live_requests", window="24h", state="queued")] == 15
    assert found[of("live_requests", window="24h", state="completed")] == 4
    assert found[of("live_requests", window="24h", state="failed")] == 1
    assert found[of("live_requests", window="1h", state="queued")] == 10
    assert found[of("results", outcome="completed")] == 8
    assert found[of("results", outcome="failed")] == 2
    assert found[of("tokens", kind="input")] == 60
    assert found[of("tokens", kind="output")] == 14
    assert found[of("workers")] == 2
    assert found[of("results_per_second")] == 12.5
    assert found[of("queue", model="m", window="24h")] == 15
    assert found[of("queue", model="m", window="1h")] == 10
    assert 3500 < found[of("nearest_deadline_seconds", window="1h")] <= 3600
    # All that is due within the hour takes 10 / 12.5 s, and what is due within the day comes after it.
    assert found[of("deadline_lag_seconds", window="1h")] == pytest.approx(10 / 12.5 - 3600, abs=100)
    assert found[of("deadline_lag_seconds", window="24h")] == pytest.approx(25 / 12.5 - 86_400, abs=100)


@pytest.mark.usefixtures("fresh")
async def test_a_batch_that_will_be_late_shows(either: Rig) -> None:
    file = (await either.upload(chat_file(10)))["id"]
    late, early = [(await either.create(file, completion_window="1h")).json["id"] for _ in range(2)]
    now = int(time.time())
    await either.set_batch(late, status="in_progress", expires_at=now + 10, total=1000, completed=10, failed=90)
    await either.set_batch(early, status="in_progress", expires_at=now + 5, total=10)
    assert of("deadline_lag_seconds", window="1h") not in await scrape(either)  # nobody works on it
    async with either.context.database.write() as connection:
        row = WorkerRow(id=new_id(), host="h", pid=1, version="0", started_at=0, heartbeat_at=now, rate=10.0)
        await workers.insert(connection, row)
    found = await scrape(either)
    assert found[of("nearest_deadline_seconds", window="1h")] == pytest.approx(5, abs=2)
    assert found[of("deadline_lag_seconds", window="1h")] == pytest.approx((10 + 900) / 10 - 10, abs=2)


@pytest.mark.usefixtures("fresh")
async def test_the_queue_by_model(either: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def lines(models: dict[str, int]) -> bytes:
        return b"".join(
            chat_line(f"{model}-{i}", "p", model=model) for model, count in models.items() for i in range(count)
        )

    mixed = (await either.create((await either.upload(lines({"a": 30, "b": 10})))["id"])).json["id"]
    for model, count in (("a", 5), ("c", 3), ("d", 2), ("e", 1)):
        await either.create((await either.upload(lines({model: count})))["id"], completion_window="1h")
    found = await scrape(either)
    assert found[of("queue", model="several", window="24h")] == 40
    assert found[of("queue", model="a", window="1h")] == 5
    await either.set_batch(mixed, status="in_progress", completed=20)
    id = mixed.removeprefix("batch_")
    async with either.context.database.write() as connection:
        pieces = [(model, bytes(4 * count)) for model, count in (("a", 10), ("a", 5), ("b", 5))]
        await shards.insert(connection, [shards.Plan(id, 1, pieces)])
    monkeypatch.setattr(metrics, "MODELS", 3)
    found = await scrape(either)
    queue = {key: value for key, value in found.items() if key[0] == "batchery_queue"}
    assert queue == {
        of("queue", model="a", window="24h"): 15,
        of("queue", model="b", window="24h"): 5,
        of("queue", model="a", window="1h"): 5,
        of("queue", model="c", window="1h"): 3,
        of("queue", model="other", window="1h"): 3,
    }


async def test_however_many_ask_the_database_is_asked_once_a_second(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "MAX_AGE", 3600.0)
    looks = 0
    real = workers.all_workers

    async def counted(connection: Any) -> Any:
        nonlocal looks
        looks += 1
        return await real(connection)

    monkeypatch.setattr(workers, "all_workers", counted)
    await asyncio.gather(*(scrape(rig) for _ in range(20)))
    assert looks == 1


async def test_a_database_that_hangs_is_an_answer_in_the_end(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    async def hanging(_: Any) -> Any:
        await asyncio.Event().wait()

    monkeypatch.setattr(metrics, "PATIENCE", 0.01)
    with monkeypatch.context() as patch:
        patch.setattr(workers, "all_workers", hanging)
        answer = await rig.ask("GET", "/metrics")
        assert (answer.status, answer.error()["code"]) == (503, "storage_unavailable")
    monkeypatch.setattr(metrics, "PATIENCE", 5.0)
    assert (await scrape(rig))[of("workers")] == 0


async def test_it_needs_a_key_as_the_api_does(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "MAX_AGE", 0.0)
    assert (await rig.ask("GET", "/metrics")).status == 200
    key = await make_key(rig.context, owner="somebody")
    assert (await rig.ask("GET", "/metrics")).status == 401
    assert (await rig.ask("GET", "/metrics", headers=bearing("sk-" + "x" * 43))).status == 401
    found = await scrape(rig, **bearing(key))
    assert found[of("batches", status="failed")] == 0
    assert (await rig.ask("GET", "/v1/metrics", headers=bearing(key))).status == 404


async def test_nothing_names_an_owner_or_an_object(rig: Rig) -> None:
    growing = Growing(rig.context)
    await growing.begin()
    await growing.grow(b"a\n")
    await rig.ask("GET", f"/v1/files/{growing.file}/content")
    text = (await rig.ask("GET", "/metrics")).body.decode()
    for secret in ("local", growing.file, growing.batch):
        assert secret not in text


async def test_every_metric_is_in_the_documentation(rig: Rig) -> None:
    await rig.ask("GET", "/healthz")
    await Growing(rig.context).begin()
    async with rig.context.database.write() as connection:
        row = WorkerRow(id=new_id(), host="h", pid=1, version="0", started_at=0, heartbeat_at=time.time(), rate=1.0)
        await workers.insert(connection, row)
        everything = Snapshot(upstreams=[UpstreamSnapshot(attempts={"200": 1}, waiting=1, running=1, cache=0.5)])
        await workers.beat(connection, row.id, time.time(), 1.0, everything)
    documented = OPERATIONS.read_text()
    for family in text_string_to_metric_families((await rig.ask("GET", "/metrics")).body.decode()):
        name = family.name + ("_total" if family.type == "counter" else "")
        line = next(
            (line for line in documented.splitlines() if line.startswith(f"| `{name}` | {family.type} |")), None
        )
        assert line is not None, name
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        assert all(f"`{label}`" in line for label in labels), line
