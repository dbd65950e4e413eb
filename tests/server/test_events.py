"""Event streams: what is said and when, and that no line is lost or repeated, however often a stream breaks off."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchery.server import auth, content, events, watch
from batchery.server.app import create_app
from batchery.server.events import PIECE, Position, parse_position
from batchery.server.http import serve_http
from batchery.server.port import take_port
from batchery.store import files, results
from batchery.store.errors import StoreUnavailable
from batchery.wire.errors import BadRequest
from tests.processes import serve, simulator
from tests.requests import by_custom_id, chat_file
from tests.server.following import Event, Events, Life, Watched, follow, watched
from tests.server.keys import bearing, make_key, revoke
from tests.server.rig import until
from tests.store.examples import NOW

SOON = 30.0
"""Seconds after which a test gives up on what should come at once."""


@pytest.fixture
async def served(database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Watched]:
    """A server, once over each kind of database."""
    monkeypatch.setattr(events, "RETRY", 0.01)
    async with watched(database_url, tmp_path, monkeypatch) as served:
        yield served


def joined(lines: list[bytes]) -> bytes:
    return b"".join(line + b"\n" for line in lines)


async def all_of(stream: Events) -> list[Event]:
    async with asyncio.timeout(SOON):
        return [event async for event in stream]


def said(found: list[Event]) -> list[str]:
    return [event.name for event in found]


def lines_of(found: list[Event], name: str) -> list[bytes]:
    return [event.raw for event in found if event.name == name]


# Positions.


@given(
    st.builds(
        Position,
        st.integers(0, 10**15 - 1),
        st.just(0),
        st.none() | st.from_regex(r"[0-9a-f]{32}", fullmatch=True),
        st.booleans(),
    )
    | st.builds(
        Position,
        st.integers(0, 10**15 - 1),
        st.integers(0, 10**15 - 1),
        st.from_regex(r"[0-9a-f]{32}", fullmatch=True),
        st.booleans(),
    )
)
def test_a_position_is_read_as_it_was_written(position: Position) -> None:
    assert parse_position(str(position)) == position


@given(st.text(st.sampled_from("oe-0123456789abcdefnd"), max_size=60) | st.text())
def test_what_is_no_position_is_refused(text: str) -> None:
    good = re.fullmatch(r"o[0-9]{1,15}-e([0-9]{1,15})(-[0-9a-f]{32})?(-end)?", text)
    if good is not None and (int(good[1]) == 0 or good[2] is not None):
        assert parse_position(text).errors == int(good[1])
    else:
        with pytest.raises(BadRequest) as caught:
            parse_position(text)
        assert caught.value.param == "last_event_id"


# One stream.


async def test_a_batch_is_followed_from_its_beginning_to_its_end(served: Watched) -> None:
    life = await Life(served.rig.context).begin()
    output = [b'{"n":1.0,"big":1e400, "text":"\xc3\xa9 \\u2028"}', b" {} ", b'{"dup":1,"dup":2}']
    async with follow(served.rig, life, "?lines=true") as stream:
        assert stream.answer.headers["cache-control"] == "no-store"
        assert stream.answer.headers["x-accel-buffering"] == "no"
        assert "content-length" not in stream.answer.headers
        first = await anext(stream)
        assert stream.retry == 2000
        assert first.data == (await served.rig.ask("GET", life.path)).json
        await life.grow(output[:2])
        found = [await anext(stream) for _ in range(4)]
        assert said(found) == ["counts", "lines", "output", "output"]
        assert found[0].data == {
            "id": f"batch_{life.id}",
            "request_counts": {"total": 1000, "completed": 2, "failed": 0},
            "usage": None,
            "estimated_completion_at": None,
        }
        assert found[1].data == {
            "id": f"batch_{life.id}",
            "output_file_id": f"file-{life.output_file}",
            "error_file_id": None,
            "output_lines": 2,
            "error_lines": 0,
        }
        await life.grow(output[2:], [b'{"wrong":1}'])
        found += [await anext(stream) for _ in range(4)]
        assert said(found[4:]) == ["counts", "lines", "output", "error"]
        assert found[5].data["error_file_id"] == f"file-{life.error_file}"
        await life.set(status="finalizing", finalizing_at=NOW, ending="completed")
        status = await anext(stream)
        assert (status.name, status.data["status"], status.data["finalizing_at"]) == ("status", "finalizing", NOW)
        await life.finish("expired", [b'{"never":"ran"}'])
        rest = await all_of(stream)
    assert said(rest) == ["lines", "error", "status"]
    assert (rest[0].data["output_lines"], rest[0].data["error_lines"]) == (3, 2)
    assert rest[-1].data == (await served.rig.ask("GET", life.path)).json
    assert rest[-1].id == f"o3-e2-{life.error_file}-end"
    assert lines_of(found + rest, "output") == output
    assert lines_of(found + rest, "error") == [b'{"wrong":1}', b'{"never":"ran"}']
    assert [event.id for event in found][:4] == ["o0-e0", "o0-e0", "o1-e0", "o2-e0"]


@pytest.mark.parametrize("query", ["", "?lines=false"])
async def test_without_lines_it_is_only_said_how_many_there_are(served: Watched, query: str) -> None:
    life = await Life(served.rig.context).begin()
    await life.grow([b"{}"] * 3)
    async with follow(served.rig, life, query) as stream:
        found = [await anext(stream) for _ in range(2)]
        await life.grow(None, [b"{}"])
        await stream.until("lines")
        await life.set(input_tokens=5, output_tokens=7)
        counts = await stream.until("counts")
        assert counts.data["usage"]["total_tokens"] == 12
        await life.finish("cancelled", [b"{}", b"{}"])
        found += await all_of(stream)
    assert said(found) == ["status", "lines", "lines", "status"]
    assert [(event.data["output_lines"], event.data["error_lines"]) for event in found[1:3]] == [(3, 0), (3, 3)]
    assert {event.id for event in found[:2]} == {"o0-e0"}
    assert found[-1].id == f"o0-e0-{life.error_file}-end"


async def test_the_terminal_status_of_a_batch_that_has_ended_comes_after_its_lines(served: Watched) -> None:
    life = await Life(served.rig.context).begin()
    await life.grow([b'{"a":1}'], [b'{"b":1}'])
    await life.finish()
    async with follow(served.rig, life, "?lines=true") as stream:
        assert said(await all_of(stream)) == ["lines", "output", "error", "status"]
    async with follow(served.rig, life) as stream:
        assert said(await all_of(stream)) == ["lines", "status"]


async def test_a_batch_that_failed_from_the_start(served: Watched) -> None:
    uploaded = await served.rig.upload(b"nonsense\n\xff\n")
    batch = (await served.rig.create(uploaded["id"])).json
    life = Life(served.rig.context)
    life.id = batch["id"].removeprefix("batch_")
    async with follow(served.rig, life, "?lines=true") as stream:
        found = await all_of(stream)
    assert said(found) == ["lines", "error", "error", "status"]
    assert [json.loads(line)["line"] for line in lines_of(found, "error")] == [1, 2]
    assert found[-1].data == batch


async def test_each_change_of_the_status_is_said_once(served: Watched) -> None:
    life = await Life(served.rig.context).begin()
    await life.set(status="validating")
    async with follow(served.rig, life) as stream:
        for status in ("in_progress", "finalizing", "cancelling"):
            assert (await anext(stream)).name == "status"
            await life.set(status=status)
        assert (await anext(stream)).data["status"] == "cancelling"
        await life.finish("cancelled")
        (last,) = await all_of(stream)
    assert last.data["status"] == "cancelled"


@pytest.mark.parametrize("query", ["", "?lines=true"])
async def test_a_batch_that_is_deleted_ends_the_stream(served: Watched, query: str) -> None:
    life = await Life(served.rig.context).begin()
    async with follow(served.rig, life, query) as stream:
        first = await anext(stream)
        await life.set(deleted_at=NOW)
        (last,) = await all_of(stream)
    assert (last.name, last.data) == ("deleted", {"id": f"batch_{life.id}"})
    answer = await served.rig.ask("GET", f"{life.path}/events", headers={"Last-Event-ID": first.id})
    assert answer.status == 404


async def test_a_quiet_stream_is_kept_alive(served: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "KEEP_ALIVE", 0.01)
    life = await Life(served.rig.context).begin()
    async with follow(served.rig, life) as stream:
        await anext(stream)
        reading = asyncio.create_task(anext(stream))
        await until(lambda: len(stream.comments) >= 3)
        await life.finish()
        assert (await reading).name == "status"


async def test_head_has_the_headers_only(served: Watched) -> None:
    life = await Life(served.rig.context).begin()
    answer = await served.rig.ask("HEAD", f"{life.path}/events?lines=true")
    assert (answer.status, answer.body) == (200, b"")
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-store"
    assert (await served.rig.ask("HEAD", f"{life.path}/events?last_event_id=x")).status == 400
    await life.finish()
    assert (await served.rig.ask("HEAD", f"{life.path}/events?last_event_id=o0-e0-end")).status == 204
    assert served.hub.watching == 0


async def test_whose_batch_it_is(served: Watched) -> None:
    life = await Life(served.rig.context).begin("somebody")
    for id in (life.id, "0" * 32, "nonsense", f"file-{life.id}"):
        answer = await served.rig.ask("GET", f"/ai/v1/batches/{id}/events")
        assert (answer.status, answer.error()["param"]) == (404, "id")


@pytest.mark.parametrize(
    "last",
    [
        "x",
        "0",
        "o1",
        "e1",
        "o1-e",
        "o-1-e0",
        "o1-e1",
        "O1-e0",
        "o1-e0-end-end",
        "o1-e0-" + "g" * 32,
        "o1e0",
        "\x80",
        "1,2",
    ],
)
async def test_an_event_s_id_that_is_none_is_named(served: Watched, last: str) -> None:
    life = await Life(served.rig.context).begin()
    answers = [await served.rig.ask("GET", f"{life.path}/events", params={"last_event_id": last})]
    if last.isascii():
        answers.append(await served.rig.ask("GET", f"{life.path}/events", headers={"Last-Event-ID": last}))
    for answer in answers:
        assert (answer.status, answer.error()["param"]) == (400, "last_event_id")


async def test_an_event_s_id_from_beyond_the_end_is_refused(served: Watched) -> None:
    life = await Life(served.rig.context).begin()
    await life.grow([b"{}"], [b"{}"])
    for last in ("o2-e0", f"o1-e2-{life.error_file}", "o999999999999999-e0"):
        answer = await served.rig.ask("GET", f"{life.path}/events?lines=true", headers={"Last-Event-ID": last})
        assert (answer.status, answer.error()["param"]) == (400, "last_event_id"), last


async def test_parameters_that_are_wrong(served: Watched) -> None:
    life = await Life(served.rig.context).begin()
    answer = await served.rig.ask("GET", f"{life.path}/events?lines=1")
    assert (answer.status, answer.error()["param"]) == (400, "lines")


async def test_there_is_an_end_to_the_number_of_streams(served: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "MAX_WATCHES", 1)
    life = await Life(served.rig.context).begin()
    async with follow(served.rig, life) as stream:
        await anext(stream)
        answer = await served.rig.ask("GET", f"{life.path}/events")
        assert (answer.status, answer.error()["code"]) == (429, "too_many_streams")
        assert 1 <= int(answer.headers["retry-after"]) <= 60
    await until(lambda: served.hub.watching == 0)
    async with follow(served.rig, life) as stream:
        await anext(stream)


# Broken off and begun again.


LINE = st.binary(max_size=8).map(lambda text: re.sub(rb"[\r\n]", b" ", text))
LINES = st.lists(LINE, max_size=5)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
async def test_however_it_breaks_off_no_line_is_lost_or_repeated(served: Watched, data: st.DataObject) -> None:
    """The batch grows, ends and is retried, now while a stream is read and now between two."""
    life = await Life(served.rig.context).begin()
    retries = data.draw(st.integers(0, 2), "retries")
    steps: list[tuple[str, list[bytes], Any]] = []
    for run in range(retries + 1):
        steps += [
            ("grow", data.draw(LINES, "output"), data.draw(LINES, "errors"))
            for _ in range(data.draw(st.integers(0, 3)))
        ]
        steps.append(("finish", data.draw(LINES, "never ran"), run < retries))
    steps.reverse()

    async def step() -> None:
        action, lines, more = steps.pop()
        if action == "grow":
            await life.grow(lines, more)
        else:
            await life.finish("failed", lines, drop=data.draw(st.booleans(), "drop"))
            # A retry needs something that failed, so there is an error file.
            if more and life.error_file is not None:
                await seen_to_end()
                await life.retry()
            else:
                steps.clear()

    got: list[Event] = []
    last: str | None = None

    async def read(limit: int | None) -> bool:
        """Read on for some events; whether that was the end."""
        nonlocal last
        async with follow(served.rig, life, "?lines=true", last) as stream, asyncio.timeout(SOON):
            async for event in stream:
                got.append(event)
                last = event.id
                if event.name == "status" and event.data["status"] == "failed":
                    return True
                if limit is not None and (limit := limit - 1) < 0:
                    return False
        return True

    async def seen_to_end() -> None:
        # So that no error file comes and goes unseen, which a stream does not make up for.
        while not await read(data.draw(st.integers(1, 8), "events")):
            pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(content, "SEGMENTS", 2)
        patch.setattr(events, "PIECE", data.draw(st.sampled_from([1, 20, PIECE]), "piece"))
        while steps:
            if data.draw(st.booleans(), "read first"):  # before the end, which is read once
                await read(0)
            await step()
        await seen_to_end()
    assert lines_of(got, "output") == life.output
    assert lines_of(got, "error") == [line for lines in life.errors.values() for line in lines]
    answer = await served.rig.ask("GET", f"{life.path}/events?lines=true", headers={"Last-Event-ID": last or ""})
    assert (answer.status, answer.body) == (204, b"")


async def test_a_retry_that_is_seen_by_an_open_stream(served: Watched) -> None:
    """It ends and is retried between two looks: its end is never seen, but the old error file is read to its end."""
    life = await Life(served.rig.context).begin()
    await life.grow([b'{"a":1}'], [b'{"old":1}'])
    async with follow(served.rig, life, "?lines=true") as stream:
        old = await stream.until("error")
        held = served.hub._looking  # as if the look took long
        async with held:
            await life.finish("failed", [b'{"old":2}'])
            await life.retry()
            await life.grow([b'{"a":2}'], [b'{"new":1}'])
        found = []
        async for event in stream:
            found.append(event)
            if event.name == "error" and event.raw == b'{"new":1}':
                break
        await life.finish("completed")
        found += await all_of(stream)
    assert (said(found)[0], found[0].data["status"]) == ("status", "in_progress")
    assert lines_of(found, "error") == [b'{"old":2}', b'{"new":1}']
    assert lines_of(found, "output") == [b'{"a":2}']
    new, former = life.error_file, old.id[-32:]
    assert [event.id for event in found if event.name == "error"] == [f"o1-e2-{former}", f"o2-e1-{new}"]
    assert found[-1].id == f"o2-e1-{new}-end"


async def test_what_has_been_received_whole_is_not_sent_again(served: Watched) -> None:
    life = await Life(served.rig.context).begin()
    await life.grow([b"{}"], [b"{}"])
    await life.finish("failed")

    async def status(query: str, last: str) -> int:
        path = f"{life.path}/events{query}"
        async with served.rig.http.get(served.rig.base + path, headers={"Last-Event-ID": last}) as answer:
            assert answer.status != 204 or "content-type" not in answer.headers
            return answer.status

    end = f"o1-e1-{life.error_file}-end"
    assert await status("?lines=true", end) == 204
    assert await status("", end) == 204
    # The header is the browser's, and newer than the URL.
    assert await status("?lines=true&last_event_id=o0-e0", end) == 204
    assert await status("?lines=true", end.removesuffix("-end")) == 200
    # Of a stream without lines: it has none of them.
    none = f"o0-e0-{life.error_file}-end"
    assert await status("", none) == 204
    assert await status("?lines=true", none) == 200
    # The error file may be deleted, as it is the caller's; that is no reason to begin again and again.
    async with served.rig.context.database.write() as connection:
        assert life.error_file is not None
        await files.delete(connection, life.error_file, served.rig.context.clock())
    assert await status("?lines=true", end) == 204
    await life.retry()
    async with follow(served.rig, life, "?lines=true", end) as stream:
        first = await anext(stream)
        assert first.data["status"] == "in_progress"
        await life.grow([b'{"again":1}'])
        await life.finish("completed")
        assert lines_of(await all_of(stream), "output") == [b'{"again":1}']
    assert await status("?lines=true", end) == 200


async def test_files_that_are_deleted_are_passed_over(served: Watched) -> None:
    life = await Life(served.rig.context).begin()
    await life.grow([b"{}"], [b'{"left":1}'])
    await life.finish("failed")
    async with served.rig.context.database.write() as connection:
        await files.delete(connection, life.output_file, served.rig.context.clock())
    async with follow(served.rig, life, "?lines=true") as stream:
        found = await all_of(stream)
    assert said(found) == ["lines", "error", "status"]


# What goes wrong.


@pytest.mark.parametrize("failures", [1, 3])
async def test_a_store_that_fails_for_a_while_is_survived(
    served: Watched, monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    life = await Life(served.rig.context).begin()
    output = [b'{"line":%d}' % line for line in range(30)]
    for start in range(0, 30, 3):
        await life.grow(output[start : start + 3])
    real = results.read
    reads = 0

    async def failing(*arguments: Any, **options: Any) -> Any:
        nonlocal reads
        reads += 1
        if 2 <= reads < 2 + failures:
            raise StoreUnavailable("gone for a while")
        return await real(*arguments, **options)

    monkeypatch.setattr(content, "SEGMENTS", 2)
    monkeypatch.setattr(events, "PIECE", 1)
    monkeypatch.setattr(results, "read", failing)
    async with follow(served.rig, life, "?lines=true") as stream:
        found = [await anext(stream) for _ in range(32)]
        assert len(stream.comments) == failures
        await life.finish()
        found += await all_of(stream)
    assert said(found) == ["status", "lines", *["output"] * 30, "status"]
    assert lines_of(found, "output") == output


@pytest.mark.parametrize("query", ["", "?lines=true"])
async def test_a_key_that_is_revoked_is_told_no_more(
    served: Watched, monkeypatch: pytest.MonkeyPatch, query: str
) -> None:
    monkeypatch.setattr(auth, "MAX_AGE", 0.0)
    context = served.rig.context
    key, life = await make_key(context, "ann"), await Life(context).begin("ann")
    path = f"{served.rig.base}{life.path}/events{query}"
    async with served.rig.http.get(path, headers=bearing(key)) as answer:
        stream = Events(answer)
        assert (await anext(stream)).name == "status"
        await revoke(context, key)
        await life.grow([b"{}"])
        assert await all_of(stream) == []
    async with served.rig.http.get(path, headers=bearing(key)) as answer:
        assert answer.status == 401


async def test_a_client_that_goes_away_is_forgotten(served: Watched) -> None:
    life = await Life(served.rig.context).begin()
    await life.grow([b"{}"])
    before = asyncio.all_tasks()
    for query in ("", "?lines=true"):
        async with follow(served.rig, life, query) as stream:
            await stream.until("lines")
            assert served.hub.watching == 1
        await until(lambda: served.hub.watching == 0)
    await until(lambda: len(asyncio.all_tasks()) <= len(before))


async def test_a_slow_reader_is_waited_for(served: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    life = await Life(served.rig.context).begin()
    for _ in range(40):
        await life.grow([b'"%b"' % (b"x" * 1_000_000)])
    real = results.read
    reads = 0

    async def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal reads
        reads += 1
        return await real(*arguments, **options)

    monkeypatch.setattr(content, "SEGMENTS", 1)
    monkeypatch.setattr(results, "read", counted)
    reader, writer = await asyncio.open_connection("127.0.0.1", served.rig.port, limit=1000)
    writer.write(f"GET {life.path}/events?lines=true HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    await reader.readuntil(b"\r\n\r\n")
    await until(lambda: reads > 0)
    for _ in range(20):  # whoever serves others has had the time to read on
        await served.rig.ask("GET", "/healthz")
    assert reads < 20
    before = reads
    writer.transport.abort()
    await until(lambda: served.hub.watching == 0)
    assert reads <= before + 1


async def test_many_streams_cost_one_statement_a_look(served: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.server.test_watch import Looks

    lives = [await Life(served.rig.context).begin() for _ in range(10)]
    looks = Looks(monkeypatch)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        answers = [
            await http.get(f"{served.rig.base}{life.path}/events?lines=true") for life in lives for _ in range(20)
        ]
        streams = [Events(answer) for answer in answers]
        assert {(await anext(stream)).name for stream in streams} == {"status"}
        assert served.hub.watching == 200
        looks.sizes.clear()
        await until(lambda: len(looks.sizes) >= 3)
        assert set(looks.sizes) == {10}
        await lives[4].grow([b"{}"])
        for stream in streams[80:100]:
            await stream.until("output")
        for life in lives:
            await life.finish()
        for stream in streams:
            assert (await all_of(stream))[-1].data["status"] == "completed"


# The end of the server.


@pytest.mark.parametrize("reads", [True, False], ids=["reading", "stuck"])
async def test_a_stop_ends_streams_long_before_their_grace_is_over(served: Watched, reads: bool) -> None:
    context = served.rig.context
    life = await Life(context).begin()
    await life.grow([b'"%b"' % (b"x" * 1_000_000)] * 30 if not reads else [b"{}"])
    stop, ready, port = asyncio.Event(), asyncio.Event(), take_port("127.0.0.1", 0)
    app = create_app(replace(context, stopping=stop))
    serving = asyncio.create_task(serve_http(app, port, stop, ready.set, grace=3600))
    await asyncio.wait_for(ready.wait(), SOON)
    reader, writer = await asyncio.open_connection("127.0.0.1", port.number, limit=1000)
    if not reads:
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    writer.write(f"GET {life.path}/events?lines=true HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    await reader.readuntil(b"\r\n\r\n")
    if reads:
        await reader.readuntil(b"event: output\n")
    stop.set()
    if reads:
        rest = await asyncio.wait_for(reader.read(), SOON)
        assert rest.endswith(b"\r\n0\r\n\r\n"), "the stream was cut off"
    await asyncio.wait_for(serving, SOON)
    port.close()
    writer.close()


async def test_a_real_server_that_is_told_to_stop_lets_everybody_go(tmp_path: Path) -> None:
    """Requests that wait and streams end as they should, and are not cut off after some grace."""
    process = await asyncio.to_thread(serve, tmp_path, "http://127.0.0.1:9", "--stop-grace", "0")
    try:
        async with aiohttp.ClientSession(process.url) as http:
            form = aiohttp.FormData({"purpose": "batch"})
            form.add_field("file", chat_file(3), filename="input.jsonl")
            async with http.post("/v1/files", data=form) as answer:
                file = (await answer.json())["id"]
            body = {"input_file_id": file, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
            async with http.post("/v1/batches", json=body) as answer:
                path = f"/v1/batches/{(await answer.json())['id']}"
            streams = [Events(await http.get(f"{path}/events?lines={lines}")) for lines in ("true", "false") * 5]
            for stream in streams:
                while (await stream.until("status")).data["status"] != "in_progress":
                    pass

            async def wait() -> int:
                async with http.get(path, headers={"Prefer": "wait=60"}) as answer:
                    assert (await answer.json())["status"] == "in_progress"
                    return answer.status

            waits = [asyncio.create_task(wait()) for _ in range(10)]
            rest = [asyncio.create_task(all_of(stream)) for stream in streams]
            async with http.get("/healthz") as answer:  # it has taken in what was asked before
                assert answer.status == 200
            stopped = asyncio.create_task(asyncio.to_thread(process.stop))
            assert set(await asyncio.wait_for(asyncio.gather(*waits), SOON)) == {200}
            await asyncio.wait_for(asyncio.gather(*rest), SOON)
            assert await stopped == 0
    finally:
        process.stop()
    assert "Traceback" not in process.log.read_text()


async def test_the_lines_of_a_real_batch(tmp_path: Path) -> None:
    """As a worker in a process of its own records them, while they are read."""
    data = chat_file(300)
    with simulator(tmp_path, "--latency", "5ms", "--concurrency", "16") as upstream:
        process = await asyncio.to_thread(serve, tmp_path, upstream.url)
        try:
            async with aiohttp.ClientSession(process.url) as http:
                form = aiohttp.FormData({"purpose": "batch"})
                form.add_field("file", data, filename="input.jsonl")
                async with http.post("/v1/files", data=form) as answer:
                    file = (await answer.json())["id"]
                body = {"input_file_id": file, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
                async with http.post("/v1/batches", json=body) as answer:
                    batch = await answer.json()
                async with http.get(f"/v1/batches/{batch['id']}/events?lines=true") as answer:
                    found = await all_of(Events(answer))
                async with http.get(f"/v1/files/{batch['output_file_id']}/content") as answer:
                    output = await answer.read()
        finally:
            assert await asyncio.to_thread(process.stop) == 0
    assert joined(lines_of(found, "output")) == output
    assert len(by_custom_id(output.splitlines())) == 300
    statuses = [event.data["status"] for event in found if event.name == "status"]
    assert statuses[-1] == "completed"
    assert len(statuses) == len(set(statuses))
    counted = [event.data["request_counts"]["completed"] for event in found if event.name == "counts"]
    assert counted == sorted(set(counted))
