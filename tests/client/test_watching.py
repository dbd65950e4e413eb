"""Following batches that exist already."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from batchery.client import follow
from batchery.client.http import Api
from batchery.client.server import Server
from batchery.client.watching import Fetching
from tests.client.fake_server import FakeServer, Manners, custom_ids, requests


def test_what_lands_late_among_what_was_given_out_is_given_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "pause_between_polls", lambda *_, **__: 0.01)
    content = requests(8)
    given: list[bytes] = []
    with FakeServer(Manners(reorders=True)) as fake:
        api = Api(Server(f"{fake.base_url}/v1"))
        file_id = api.upload("in.jsonl", len(content), lambda: io.BytesIO(content), "upload", lambda _: None)
        batch = api.create_batch(
            file_id=file_id, endpoint="/v1/chat/completions", window="24h", metadata={}, key="key", tag="key"
        )
        fetching = Fetching(api, [batch.id], tmp_path, given.append)
        fetching.to_the_end(lambda *_: None)
        fetching.close()
        api.close()
    assert set(custom_ids(b"".join(given))) == {f"row-{number}" for number in range(8)}
