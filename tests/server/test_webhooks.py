"""Webhooks at a batch's creation: which URLs are taken, what is remembered, and the batch that has failed at once."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa
from pydantic import ValidationError

from batchery.engine.egress import parse_networks
from batchery.server.settings import Settings
from batchery.store import api_keys, batches
from batchery.store.batches import BatchRow
from batchery.store.ids import new_id
from batchery.store.schema import webhooks as table
from batchery.store.webhooks import WebhookRow
from batchery.wire.webhooks import Event
from tests.receivers import SECRET
from tests.requests import chat_file, chat_line
from tests.server.rig import Rig, running

URL = "https://example.com/hooks"


@pytest.fixture
async def allowing(database_url: str, tmp_path: Path) -> AsyncIterator[Rig]:
    """A server that may send into one private network."""
    async with running(database_url, tmp_path, webhook_networks=parse_networks("10.0.0.0/8")) as rig:
        yield rig


async def outbox(rig: Rig) -> list[WebhookRow]:
    async with rig.context.database.read() as connection:
        return [WebhookRow(**row._mapping) for row in await connection.execute(sa.select(table))]


async def row_of(rig: Rig, id: str) -> BatchRow:
    async with rig.context.database.read() as connection:
        row = await batches.get(connection, id.removeprefix("batch_"))
    assert row is not None
    return row


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "127.0.0.1:8000",
        "2130706433",
        "0177.0.0.1",
        "0x7f000001",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "169.254.169.254",
        "192.168.0.1",
        "[fd00::1]",
        "0.0.0.0",
        "127.1.",
        "1.2.3.4.5",
        "a..b",
        "exa%6dple.com",
        "example.com:0",
    ],
)
async def test_where_nothing_is_sent(rig: Rig, host: str) -> None:
    file = await rig.upload(chat_file(1))
    answer = await rig.create(file["id"], webhook={"url": f"http://{host}/latest?x=y", "secret": SECRET})
    assert answer.status == 400
    error = answer.error()
    assert (error["param"], error["code"]) == ("webhook.url", "invalid_value")
    assert "--webhook-networks" in error["message"]
    assert (await rig.openai.batches.list()).data == []


@pytest.mark.parametrize(
    "webhook",
    [
        "https://example.com",
        [],
        {},
        {"url": None},
        {"url": 5, "secret": SECRET},
        {"url": "ftp://example.com", "secret": SECRET},
        {"url": "https://user:pass@example.com", "secret": SECRET},
        {"url": "https://example.com/" + "a" * 2048, "secret": SECRET},
        {"url": "https://ex\u00e4mple.com/", "secret": SECRET},
        {"url": "https://example.com:99999/", "secret": SECRET},
        {"url": "https://[::1/", "secret": SECRET},
        {"url": URL},
        {"url": URL, "secret": "short"},
        {"url": URL, "secret": "whsec_not base64 at all"},
        {"url": URL, "secret": "a secret with \0 in it, which no database keeps"},
        {"url": URL, "secret": 5},
    ],
)
async def test_a_bad_webhook(rig: Rig, webhook: Any) -> None:
    file = await rig.upload(chat_file(1))
    answer = await rig.create(file["id"], webhook=webhook)
    assert answer.status == 400
    error = answer.error()
    assert error["param"].startswith("webhook")
    assert "short" not in error["message"]
    assert SECRET not in error["message"]


async def test_what_is_remembered(allowing: Rig) -> None:
    """And shown to nobody."""
    rig = allowing
    file = await rig.upload(chat_file(1))
    for url in (URL, "http://10.1.2.3:8080/hook", "https://hooks.example:8443/?a=b"):
        answer = await rig.create(file["id"], webhook={"url": url, "secret": SECRET})
        assert answer.status == 200
        assert b"webhook" not in answer.body
        row = await row_of(rig, answer.json["id"])
        assert (row.webhook_url, row.webhook_secret) == (url, SECRET)
    answer = await rig.create(file["id"], webhook=None)
    row = await row_of(rig, answer.json["id"])
    assert (row.webhook_url, row.webhook_secret) == (None, None)
    assert await outbox(rig) == []
    refused = await rig.create(file["id"], webhook={"url": "http://192.168.0.1/", "secret": SECRET})
    assert refused.status == 400


async def test_a_batch_that_has_failed_at_once(allowing: Rig) -> None:
    """It ended, so its end is told; the event is there with it, once, and the worker is woken."""
    rig = allowing
    file = await rig.upload(chat_line("a", "hello") + b"{oops\n")
    wanted = {"webhook": {"url": URL, "secret": SECRET}, "metadata": {"job": "x"}}
    headers = {"Idempotency-Key": "once"}
    body = {"input_file_id": file["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"} | wanted
    first = await rig.ask("POST", "/v1/batches", json=body, headers=headers)
    again = await rig.ask("POST", "/v1/batches", json=body, headers=headers)
    assert first.json == again.json
    assert first.json["status"] == "failed"
    (row,) = await outbox(rig)
    assert (row.url, row.secret, row.type, row.attempts) == (URL, SECRET, "batch.failed", 0)
    event = msgspec.json.decode(row.body, type=Event)
    assert event.created_at == first.json["failed_at"]
    assert event.data.id == first.json["id"]
    assert event.data.error_file_id == first.json["error_file_id"]
    assert event.data.output_file_id == first.json["output_file_id"]
    assert event.data.metadata == {"job": "x"}
    assert len(rig.wakes) == 1
    await rig.create(file["id"])
    assert len(await outbox(rig)) == 1


async def test_a_key_s_webhook(allowing: Rig) -> None:
    """Stands for every batch that names none; a batch that names only a URL is signed with the key's secret."""
    rig = allowing
    key = api_keys.new_key()
    async with rig.context.database.write() as connection:
        await api_keys.insert(
            connection, id=new_id(), key=key, owner="ann", now=1, webhook_url=URL, webhook_secret=SECRET
        )
    rig.openai.api_key = key
    file = await rig.openai.files.create(file=("a.jsonl", chat_file(1)), purpose="batch")

    async def create(**extra: Any) -> BatchRow:
        batch = await rig.openai.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h", extra_body=extra
        )
        return await row_of(rig, batch.id)

    row = await create()
    assert (row.webhook_url, row.webhook_secret) == (URL, SECRET)
    row = await create(webhook={"url": "https://other.example/"})
    assert (row.webhook_url, row.webhook_secret) == ("https://other.example/", SECRET)
    row = await create(webhook={"url": "https://other.example/", "secret": "another secret of mine"})
    assert row.webhook_secret == "another secret of mine"


def settings_of(**given: Any) -> Settings:
    """Settings as a command makes them."""
    return Settings(**{"upstream": "http://127.0.0.1:9"} | given)


@pytest.mark.parametrize("given", ["10.0.0.0/8, ::1", ["10.0.0.0/8", "::1"], ("10.0.0.0/8", "::1")])
def test_the_setting(given: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As text or as a list, and through the environment, by which a worker gets its server's."""
    settings = settings_of(webhook_networks=given)
    assert settings.allowed_networks == parse_networks("10.0.0.0/8,::1")
    assert settings_of().allowed_networks == ()
    for text, networks in ((",".join(settings.webhook_networks), settings.allowed_networks), ("", ())):
        monkeypatch.setenv("BATCHERY_WEBHOOK_NETWORKS", text)
        assert settings_of().allowed_networks == networks


@pytest.mark.parametrize("given", ["all", "10.0.0.1/8", 5, [5], {"a": "b"}])
def test_a_bad_setting(given: Any) -> None:
    with pytest.raises(ValidationError, match="webhook_networks"):
        settings_of(webhook_networks=given)
