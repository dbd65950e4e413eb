"""Contract: `GET /batches/{id}/results`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchery.server.results import result_line
from batchery.store import result_index
from batchery.store.result_index import DamagedIndexError, ResultIndex
from batchery.wire.results import Failure, failure_line, success_line
from tests.requests import chat_line
from tests.whole import whole

FILE = (
    b"\n"
    + chat_line("a", "one")
    + b"  \n"
    + chat_line("b", "[[simulate status=400]]")
    + chat_line('größe\u2028"\\', "three")
    + chat_line("d", "[[simulate status=500 times=2]]")
)


async def test_one_line_per_request_in_input_order(database_url: str, tmp_path: Path) -> None:
    async with whole(database_url, tmp_path) as one:
        created = await one.batch(FILE)
        pending = await one.rig.ask("GET", f"/v1/batches/{created['id']}/results")
        assert (pending.headers["x-last-line"], pending.headers["x-incomplete"]) == ("4", "true")
        lines = [json.loads(line) for line in pending.body.split(b"\n")[:-1]]
        assert [(line["custom_id"], line["line"], line["status"]) for line in lines] == [
            ("a", 2, "pending"),
            ("b", 4, "pending"),
            ('größe\u2028"\\', 5, "pending"),
            ("d", 6, "pending"),
        ]
        assert all(line["response"] is None and line["error"] is None and line["attempts"] == 0 for line in lines)
        async with one.working():
            await one.until(created["id"])
        answer = await one.rig.ask("GET", f"/v1/batches/{created['id']}/results")
        assert (answer.headers["x-last-line"], answer.headers["x-incomplete"]) == ("4", "false")
        lines = [json.loads(line) for line in answer.body.split(b"\n")[:-1]]
        assert [list(line) for line in lines] == [["custom_id", "line", "status", "response", "error", "attempts"]] * 4
        assert [(line["custom_id"], line["line"], line["status"], line["attempts"]) for line in lines] == [
            ("a", 2, "completed", 1),
            ("b", 4, "failed", 1),
            ('größe\u2028"\\', 5, "completed", 1),
            ("d", 6, "completed", 3),
        ]
        assert lines[0]["response"]["status_code"] == 200
        assert lines[1]["response"]["status_code"] == 400
        assert lines[1]["error"]["code"]


async def test_pages_and_statuses(database_url: str, tmp_path: Path) -> None:
    async with whole(database_url, tmp_path) as one, one.working():
        created = await one.batch(FILE)
        await one.until(created["id"])
        path = f"/v1/batches/{created['id']}/results"
        page = await one.rig.ask("GET", f"{path}?offset=1&limit=2")
        assert [json.loads(line)["line"] for line in page.body.split(b"\n")[:-1]] == [4, 5]
        assert (page.headers["x-last-line"], page.headers["x-incomplete"]) == ("3", "true")
        good = await one.results(created["id"], "?status=completed&skip=1")
        assert [line["line"] for line in good] == [5, 6]
        beyond = await one.rig.ask("GET", f"{path}?offset=99")
        assert (beyond.body, beyond.headers["x-last-line"]) == (b"", "4")
        head = await one.rig.ask("HEAD", path)
        assert (head.status, head.body, head.headers["x-last-line"]) == (200, b"", "4")
        for query in ("status=done", "limit=0", "offset=-1", "offset=1&skip=2"):
            assert (await one.rig.ask("GET", f"{path}?{query}")).status == 400, query
        assert (await one.rig.ask("GET", f"/v1/batches/batch_{'0' * 32}/results")).status == 404


async def test_a_batch_of_a_bad_file_has_no_requests(database_url: str, tmp_path: Path) -> None:
    async with whole(database_url, tmp_path) as one:
        created = await one.batch(b"nonsense\n")
        answer = await one.rig.ask("GET", f"/v1/batches/{created['id']}/results")
        assert (answer.status, answer.body, answer.headers["x-last-line"]) == (200, b"", "0")
        assert answer.headers["x-incomplete"] == "false"


async def test_results_of_a_running_batch_are_those_there_are(database_url: str, tmp_path: Path) -> None:
    data = chat_line("stuck", "[[simulate stall]]") + b"".join(chat_line(f"r{i}", f"go {i}") for i in range(600))
    async with whole(database_url, tmp_path) as one, one.working(cancel_grace=0):
        created = await one.batch(data)

        async def running() -> list[dict[str, Any]]:
            while True:
                lines = await one.results(created["id"])
                assert len(lines) == 601
                assert [line["line"] for line in lines] == list(range(1, 602))
                if sum(line["status"] == "completed" for line in lines) == 600:
                    return lines

        lines = await running()
        assert [line["custom_id"] for line in lines] == ["stuck", *(f"r{i}" for i in range(600))]
        assert lines[0]["status"] == "pending"
        await one.rig.ask("POST", f"/v1/batches/{created['id']}/cancel")
        await one.until(created["id"])
        ended = await one.results(created["id"])
        assert ended[1:] == lines[1:]
        assert (ended[0]["status"], ended[0]["error"]["code"]) == ("cancelled", "batch_cancelled")


async def test_results_are_gone_with_their_file(database_url: str, tmp_path: Path) -> None:
    async with whole(database_url, tmp_path) as one, one.working():
        created = await one.batch(FILE)
        await one.until(created["id"])
        await one.rig.ask("DELETE", f"/v1/files/{created['output_file_id']}")
        gone = await one.rig.ask("GET", f"/v1/batches/{created['id']}/results")
        assert gone.status == 404
        assert "output file" in gone.error()["message"]
        assert [line["line"] for line in await one.results(created["id"], "?status=failed")] == [4]


ID = "batch_req_" + "0f" * 16
TEXTS = st.text(max_size=30).filter(lambda text: not any(0xD800 <= ord(character) < 0xE000 for character in text))


@given(
    TEXTS, st.sampled_from([b'{"a":"\\ud800"}', b"1e999", b'"response"', b'{"line":7}', b'",\\"custom_id\\":"']), TEXTS
)
def test_lines_are_spliced_whatever_they_hold(custom_id: str, body: bytes, message: str) -> None:
    made = result_line(success_line(ID, custom_id, 200, "r", body), number=7, status="completed", attempts=2)
    head = b'{"custom_id":%b,"line":7,"status":"completed","response":{' % json_text(custom_id)
    assert made.startswith(head)
    assert made.endswith(b'"body":' + body + b'},"error":null,"attempts":2}\n')
    for line in (None, 7):
        failed = failure_line(ID, custom_id, Failure("c", message), line=line)
        made = result_line(failed, number=7, status="failed", attempts=0)
        assert json.loads(made) == {
            "custom_id": custom_id,
            "line": 7,
            "status": "failed",
            "response": None,
            "error": {"code": "c", "message": message},
            "attempts": 0,
        }


def json_text(text: str) -> bytes:
    line = success_line(ID, text, 200, "r", b"null")
    return line[len(b'{"id":"') + len(ID) + len(b'","custom_id":') : line.index(b',"response":{"status_code"')]


@given(st.lists(st.tuples(st.integers(0, 5), *[st.integers(0, 2**32 - 1)] * 4), max_size=20), st.data())
def test_a_result_index_comes_back_as_it_was(
    entries: list[tuple[int, int, int, int, int]], data: st.DataObject
) -> None:
    from array import array

    index = ResultIndex.empty(array("I", [number for _, number, *_ in entries]))
    for request, (code, _, start, length, attempts) in enumerate(entries):
        index.put(request, result_index.STATUSES[code], start << 8, length, attempts)
    blob = b"".join(result_index.encode(index))
    assert result_index.decode(blob) == index
    cut = data.draw(st.integers(0, len(blob) - 1))
    with pytest.raises(DamagedIndexError):
        result_index.decode(blob[:cut])
    assert index.to_retry() == [i for i, (code, *_) in enumerate(entries) if code not in (1, 5)]
