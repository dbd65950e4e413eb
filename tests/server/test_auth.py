"""Keys: who is let in, who is not, and that nobody can tell from the answer what is somebody else's."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.ext.asyncio import AsyncConnection

from batchery.server import auth
from batchery.server.auth import MAX_AGE, Keyring
from batchery.server.context import Caller
from batchery.server.routes import API
from batchery.store import api_keys
from batchery.store.database import Database
from batchery.store.errors import StoreUnavailable
from batchery.wire.errors import Unauthorized
from tests.requests import chat_file
from tests.server.keys import bearing, make_key, revoke
from tests.server.rig import BOUNDARY, Answer, Rig, field_part, file_part, form, until

UNKNOWN = "0" * 32


class Watched(Database):
    """A database that counts how often it is read, and can be made to fail or to hang."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.reads = 0
        self.broken = False
        self.stuck: asyncio.Event | None = None

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        self.reads += 1
        if self.stuck is not None:
            await self.stuck.wait()
        if self.broken:
            raise StoreUnavailable("gone")
        async with super().read() as connection:
            yield connection


class Clock:
    """A clock that is set by hand, and between that never stands still."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        self.now += 1e-6
        return self.now


class Ring:
    """A keyring over a watched database, by a clock that is set by hand."""

    def __init__(self, database: Watched, *, may_be_open: bool = True) -> None:
        self.database = database
        self.clock = Clock()
        self.ring = Keyring(database, may_be_open=may_be_open, clock=self.clock)

    async def add(self, owner: str = "local", **more: Any) -> str:
        return await make_key(self, owner, **more)  # type: ignore[arg-type]

    async def ask(self, key: str | None = None) -> Caller:
        return await self.ring.caller([] if key is None else [f"Bearer {key}"])


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Watched]:
    database = Watched(database_url)
    await database.migrate()
    database.reads = 0
    yield database
    await database.close()


@pytest.fixture
def ring(database: Watched) -> Ring:
    return Ring(database)


async def test_a_key_is_its_owner_and_its_limits(ring: Ring) -> None:
    key = await ring.add("ann", max_live_batches=3, webhook_url="https://x/", webhook_secret="s" * 32)
    caller = await ring.ask(key)
    assert caller.key is not None
    assert caller == Caller(
        owner="ann", key=caller.key, max_live_batches=3, webhook_url="https://x/", webhook_secret="s" * 32
    )


async def test_nothing_of_a_key_is_kept_but_its_digest_and_its_end(ring: Ring) -> None:
    key = await ring.add()
    assert re.fullmatch(r"sk-[A-Za-z0-9_-]{43}", key)
    async with ring.database.read() as connection:
        (row,) = await api_keys.all_keys(connection)
    assert key not in repr(row)
    assert row.hint == key[-4:]


async def test_the_database_is_not_asked_for_each_request(ring: Ring) -> None:
    key = await ring.add()
    for _ in range(100):
        await ring.ask(key)
        ring.clock.now += MAX_AGE / 110
    assert ring.database.reads == 1
    ring.clock.now += MAX_AGE
    await asyncio.gather(*(ring.ask(key) for _ in range(100)))
    assert ring.database.reads == 2


async def test_a_revoked_key_is_refused_once_the_ring_is_old(ring: Ring) -> None:
    key = await ring.add()
    await ring.ask(key)
    await revoke(ring, key)  # type: ignore[arg-type]
    ring.clock.now += MAX_AGE
    with pytest.raises(Unauthorized):
        await ring.ask(key)
    with pytest.raises(Unauthorized):  # a server whose keys are all revoked is not open
        await ring.ask()


async def test_a_new_key_works_at_once(ring: Ring) -> None:
    await ring.ask(await ring.add())
    for _ in range(3):
        with pytest.raises(Unauthorized):
            await ring.ask(api_keys.new_key())
        assert (await ring.ask(await ring.add("new"))).owner == "new"


async def test_changed_limits_are_followed(ring: Ring) -> None:
    key = await ring.add(max_live_batches=1)
    id = (await ring.ask(key)).key
    assert id is not None
    async with ring.database.write() as connection:
        await api_keys.change(connection, id, {"max_live_batches": None})
    ring.clock.now += MAX_AGE
    assert (await ring.ask(key)).max_live_batches is None


async def test_invented_keys_cannot_hammer_the_database(ring: Ring) -> None:
    key = await ring.add()
    await ring.ask(key)

    async def invent() -> None:
        with pytest.raises(Unauthorized):
            await ring.ask(api_keys.new_key())

    for _ in range(3):
        before = ring.database.reads
        await asyncio.gather(*(invent() for _ in range(200)), ring.ask(key))
        assert ring.database.reads - before <= 2
    before = ring.database.reads
    for wrong in (None, "", "sk-short", key[:-1], key + "a", key.upper(), "x" * 30_000):
        with pytest.raises(Unauthorized):
            await ring.ask(wrong)
    assert ring.database.reads == before


async def test_open_until_the_first_key_and_never_again(ring: Ring) -> None:
    assert await ring.ask() == await ring.ask("anything") == Caller(owner="local")
    key = await ring.add("ann")
    ring.clock.now += MAX_AGE
    with pytest.raises(Unauthorized):
        await ring.ask()
    assert (await ring.ask(key)).owner == "ann"
    await revoke(ring, key)  # type: ignore[arg-type]
    ring.clock.now += MAX_AGE
    with pytest.raises(Unauthorized):
        await ring.ask()


async def test_what_others_can_reach_is_never_open(database: Watched) -> None:
    ring = Ring(database, may_be_open=False)
    for key in (None, "anything", api_keys.new_key()):
        with pytest.raises(Unauthorized):
            await ring.ask(key)
    assert (await ring.ask(await ring.add("ann"))).owner == "ann"


async def test_keys_that_cannot_be_read_let_nobody_in(ring: Ring) -> None:
    ring.database.broken = True
    with pytest.raises(StoreUnavailable):
        await ring.ask()
    ring.database.broken = False
    assert (await ring.ask()).owner == "local"
    ring.database.broken = True
    ring.clock.now += MAX_AGE
    for key in (None, api_keys.new_key()):
        with pytest.raises(StoreUnavailable):
            await ring.ask(key)
    ring.database.broken = False
    assert (await ring.ask()).owner == "local"


async def test_a_database_that_hangs_is_out_of_reach(ring: Ring, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "PATIENCE", 0.05)
    key = await ring.add()
    ring.database.stuck = asyncio.Event()
    for failed in await asyncio.gather(*(ring.ask(key) for _ in range(20)), return_exceptions=True):
        assert isinstance(failed, StoreUnavailable)
    assert ring.database.reads == 1
    ring.database.stuck = None  # but for the reading that was begun, which nobody waits for any more
    assert (await ring.ask(key)).owner == "local"


async def test_who_gives_up_waiting_does_not_take_the_others_along(ring: Ring) -> None:
    key = await ring.add()
    ring.database.stuck = asyncio.Event()
    first, second = asyncio.create_task(ring.ask(key)), asyncio.create_task(ring.ask(key))
    await until(lambda: ring.database.reads)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    ring.database.stuck.set()
    assert (await second).owner == "local"
    assert ring.database.reads == 1


KEY = "sk-" + "a" * 43


@pytest.mark.parametrize(
    "header", ["Bearer {}", "bearer {}", "BEARER {}", "Bearer  {}", "Bearer\t{}", " Bearer {} ", "bEaReR   {}\t"]
)
def test_the_scheme_s_case_and_spaces_do_not_matter(header: str) -> None:
    assert auth._key([header.format(KEY)]) == KEY


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [""],
        ["Bearer"],
        ["Bearer "],
        [KEY],
        [f"Basic {KEY}"],
        [f"Bearer{KEY}"],
        [f"Bearer {KEY} {KEY}"],
        [f"Bearer {KEY},"],
        [f"Bearer {KEY}\n"],
        [f"Bearer\u00a0{KEY}"],
        [f"Bearer {KEY}", f"Bearer {KEY}"],
        [f"Bearer {KEY}", "Bearer x"],
        [f"X Bearer {KEY}"],
        [f"Bearer {KEY.upper()}"],
        ["Bearer sk-" + "\u00e4" * 43],
        ["Bearer sk-" + "\u0661" * 43],
    ],
)
def test_what_is_no_key(headers: list[str]) -> None:
    assert auth._key(headers) != KEY or len(headers) != 1
    assert not api_keys.FORM.fullmatch(auth._key(headers))


@given(st.lists(st.text(st.characters(max_codepoint=0xFF)), max_size=3))
def test_no_header_breaks_anything(headers: list[str]) -> None:
    assert not api_keys.FORM.fullmatch(auth._key(headers)) or KEY[:3] in headers[0]


# Over HTTP

ROUTES = sorted(
    (method, path)
    for handler in API
    for path in handler.paths
    for method in handler.http_methods
    if method != "OPTIONS"
)


def plain(answer: Answer) -> tuple[int, dict[str, str], bytes]:
    """An answer without what differs between any two."""
    ignored = ("date", "x-request-id")
    return answer.status, {k: v for k, v in answer.headers.items() if k not in ignored}, answer.body


async def test_without_a_good_key_every_route_gives_the_same_answer(either: Rig) -> None:
    gone, good = await make_key(either.context), await make_key(either.context)
    await revoke(either.context, gone)
    bad: list[dict[str, str]] = [
        {},
        {"Authorization": ""},
        {"Authorization": "Bearer"},
        {"Authorization": f"Basic {good}"},
        {"Authorization": good},
        bearing("any"),
        bearing(api_keys.new_key()),
        bearing(gone),
        bearing(good[:-1]),
        bearing(good + "="),
    ]
    asked = [
        (method, base + path.replace("{id:str}", UNKNOWN), headers)
        for base in ("/v1", "/ai/v1")
        for method, path in ROUTES
        for headers in bad
    ]
    answers = await asyncio.gather(*(either.ask(method, path, headers=headers) for method, path, headers in asked))
    for case, answer in zip(asked, answers, strict=True):
        assert answer.status == 401, case
        assert answer.error()["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"] == "Bearer"
    assert len({str(plain(answer)) for answer in answers}) == 1
    heads = await asyncio.gather(*(either.ask("HEAD", "/v1/files", headers=headers) for headers in bad))
    assert {(head.status, head.body) for head in heads} == {(401, b"")}
    assert (await either.ask("GET", "/v1/files", headers=bearing(good))).status == 200
    assert (await either.ask("HEAD", "/v1/files", headers=bearing(good))).status == 200


async def test_what_needs_no_key(rig: Rig) -> None:
    await make_key(rig.context)
    for path in ("/healthz", "/readyz", "/openapi.json", "/docs"):
        assert (await rig.ask("GET", path)).status == 200
    assert (await rig.ask("GET", "/v1/nothing")).status == 404


async def test_a_key_in_the_path_or_query_is_no_key(rig: Rig) -> None:
    key = await make_key(rig.context)
    assert (await rig.ask("GET", f"/v1/files?api_key={key}&key={key}")).status == 401
    assert (await rig.ask("GET", "/v1/files", headers={"X-Api-Key": key})).status == 401


@pytest.mark.parametrize("sent", [b"", b"x" * 1000])
async def test_a_body_is_not_read_before_the_key(rig: Rig, sent: bytes) -> None:
    """The answer comes although most of the body never does, and nothing is left of what came."""
    await make_key(rig.context)
    for path in ("/v1/files", "/v1/batches"):
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=x\r\n"
        async with asyncio.timeout(5):
            answer = await rig.raw(head.encode() + b"Content-Length: 200000000\r\n\r\n" + sent, finish=False)
        assert answer.status == 401
    assert rig.left_behind() == []


async def test_a_running_server_closes_and_follows_revocations(rig: Rig) -> None:
    assert (await rig.ask("GET", "/v1/files")).status == 200
    before = await rig.upload(chat_file(1))
    key = await make_key(rig.context)
    await refused(rig, {})
    listed = await rig.ask("GET", "/v1/files", headers=bearing(key))
    assert [file["id"] for file in listed.json["data"]] == [before["id"]]
    await revoke(rig.context, key)
    await refused(rig, bearing(key))
    assert (await rig.ask("GET", "/v1/files")).status == 401


async def refused(rig: Rig, headers: dict[str, str]) -> None:
    """Ask until it is refused, which must be so within 5 s, and stay so."""
    async with asyncio.timeout(5):
        while (await rig.ask("GET", "/v1/files", headers=headers)).status == 200:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert (await rig.ask("GET", "/v1/files", headers=headers)).status == 401


async def test_keys_out_of_reach_are_503_and_never_open(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "MAX_AGE", 0.0)
    assert (await rig.ask("GET", "/v1/models")).status == 200

    async def broken(*_: Any) -> None:
        raise StoreUnavailable("secret")

    monkeypatch.setattr(api_keys, "active", broken)
    for headers in ({}, bearing(api_keys.new_key())):
        answer = await rig.ask("GET", "/v1/models", headers=headers)
        assert answer.status == 503
        assert answer.error()["code"] == "storage_unavailable"
        assert 1 <= int(answer.headers["retry-after"]) <= 60


async def test_keys_of_one_owner_see_the_same(either: Rig) -> None:
    one, two = await make_key(either.context, "ann"), await make_key(either.context, "ann")
    body = form(file_part(chat_file(1)), field_part("purpose", "batch"))
    headers = bearing(one) | {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
    file = (await either.ask("POST", "/v1/files", data=body, headers=headers)).json
    assert (await either.ask("GET", f"/v1/files/{file['id']}", headers=bearing(two))).json == file


# Ownership

PART = form(file_part(b"x", name="data"))
FORM_TYPE = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
CREATE_UPLOAD = {"filename": "f.jsonl", "purpose": "batch", "bytes": 10, "mime_type": "application/jsonl"}

BODIES: dict[tuple[str, str], dict[str, Any]] = {
    ("POST", "/uploads/{id:str}/parts"): {"data": PART, "headers": FORM_TYPE},
    ("POST", "/uploads/{id:str}/complete"): {"json": {"part_ids": [f"part_{UNKNOWN}"]}},
}
"""What must be sent for a route to get as far as looking the object up."""


class Belongings:
    """Everything that one owner has, for another to reach for."""

    def __init__(self, rig: Rig, key: str) -> None:
        self._rig = rig
        self._key = key
        self.ids: dict[str, list[str]] = {}

    async def ask(self, method: str, path: str, **options: Any) -> Answer:
        options["headers"] = bearing(self._key) | options.pop("headers", {})
        return await self._rig.ask(method, path, **options)

    async def make(self) -> None:
        """One of each: uploaded, growing and error files, a live and a failed batch, a pending upload."""
        files, batches, uploads = [], [], []
        for data in (chat_file(2), b"nonsense\n"):
            uploaded = await self.ask("POST", "/v1/files", data=form(file_part(data)), headers=FORM_TYPE)
            files.append(uploaded.json["id"])
            body = {"input_file_id": files[-1], "endpoint": "/v1/chat/completions", "completion_window": "24h"}
            batch = (await self.ask("POST", "/v1/batches", json=body)).json
            batches.append(batch["id"])
            files += [id for id in (batch["output_file_id"], batch["error_file_id"]) if id is not None]
        upload = await self.ask("POST", "/v1/uploads", json=CREATE_UPLOAD)
        uploads.append(upload.json["id"])
        assert len(files) == 5
        self.ids = {"files": files, "batches": batches, "uploads": uploads}


async def test_what_is_somebody_else_s_is_not_there(either: Rig) -> None:
    """Every route with an id in its path; a new one fails this test until it is covered."""
    ann = Belongings(either, await make_key(either.context, "ann"))
    bob = Belongings(either, await make_key(either.context, "bob"))
    await ann.make()
    with_id = [(method, path) for method, path in ROUTES if "{" in path]
    assert {path for _, path in with_id} >= {"/files/{id:str}", "/batches/{id:str}"}
    for method, path in with_id:
        assert re.findall(r"\{.*?\}", path) == ["{id:str}"], path
        for id in ann.ids[path.split("/")[1]]:
            await reached_for(ann, bob, method, path, id)


async def reached_for(ann: Belongings, bob: Belongings, method: str, path: str, id: str) -> None:
    """Bob's request for what is Ann's is answered as one for what does not exist."""
    kind, bare = id[:-32], id[-32:]
    options = BODIES.get((method, path), {})
    for ours, nobody_s in ((id, kind + UNKNOWN), (bare, UNKNOWN)):
        answer, other = [
            plain(await bob.ask(method, "/v1" + path.replace("{id:str}", each), **options)) for each in (ours, nobody_s)
        ]
        assert answer[0] == 404, (method, path)
        assert json.loads(answer[2])["error"]["code"] == "not_found"
        assert answer[1] == other[1], (method, path)
        assert answer[2].replace(bare.encode(), UNKNOWN.encode()) == other[2], (method, path)
        if method == "GET":
            head = await bob.ask("HEAD", "/v1" + path.replace("{id:str}", ours))
            assert (head.status, head.body) == (404, b"")


async def test_what_is_somebody_else_s_cannot_be_named(either: Rig) -> None:
    ann = Belongings(either, await make_key(either.context, "ann"))
    bob = Belongings(either, await make_key(either.context, "bob"))
    await ann.make()
    await bob.make()
    good = {"endpoint": "/v1/chat/completions", "completion_window": "24h"}
    cases: list[tuple[str, str, int, str, list[str]]] = [
        ("POST", "/v1/batches", 404, "input_file_id", ann.ids["files"]),
        ("GET", "/v1/files?after={}", 400, "after", ann.ids["files"]),
        ("GET", "/v1/batches?after={}", 400, "after", ann.ids["batches"]),
    ]
    for method, path, status, param, ids in cases:
        for id in ids:
            answers = [
                await bob.ask(
                    method,
                    path.format(each),
                    **({"json": good | {"input_file_id": each}} if method == "POST" else {}),
                )
                for each in (id, id[:-32] + UNKNOWN)
            ]
            assert answers[0].status == status, (path, id)
            assert answers[0].error()["param"] == param
            first, second = map(plain, answers)
            assert first[1] == second[1]
            assert first[2].replace(id[-32:].encode(), UNKNOWN.encode()) == second[2]
    for path in ("/v1/files", "/v1/batches"):
        mine = {each["id"] for each in (await bob.ask("GET", path)).json["data"]}
        assert mine
        assert not mine & {id for ids in ann.ids.values() for id in ids}


async def test_a_part_of_somebody_else_s_is_no_part(either: Rig) -> None:
    ann = Belongings(either, await make_key(either.context, "ann"))
    bob = Belongings(either, await make_key(either.context, "bob"))
    await ann.make()
    await bob.make()
    path = f"/v1/uploads/{ann.ids['uploads'][0]}/parts"
    part = (await ann.ask("POST", path, data=PART, headers=FORM_TYPE)).json["id"]
    complete = f"/v1/uploads/{bob.ids['uploads'][0]}/complete"
    answer, other = [
        plain(await bob.ask("POST", complete, json={"part_ids": [each]})) for each in (part, f"part_{UNKNOWN}")
    ]
    assert answer[0] in (400, 404)
    assert answer[1] == other[1]
    assert answer[2].replace(part[-32:].encode(), UNKNOWN.encode()) == other[2]


async def test_the_same_idempotency_key_of_two_owners(either: Rig) -> None:
    """One owner's key says nothing about another's."""
    made = []
    for owner in ("ann", "bob"):
        someone = Belongings(either, await make_key(either.context, owner))
        headers = FORM_TYPE | {"Idempotency-Key": "once"}
        answer = await someone.ask("POST", "/v1/files", data=form(file_part(chat_file(1))), headers=headers)
        assert answer.status == 200
        made.append(answer.json["id"])
    assert made[0] != made[1]
