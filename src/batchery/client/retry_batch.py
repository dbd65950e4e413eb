"""Running the failed requests of a batch again, when nothing of it is known but its id: by the server itself where it
can, else as a new batch made of the lines of its input that have not succeeded.
"""

from __future__ import annotations

import tempfile
import uuid
from pathlib import Path

from batchery.client.errors import ApiError, SettingsError
from batchery.client.finish import NO_RETRY, requests_of
from batchery.client.http import Api
from batchery.client.index import ResultIndex
from batchery.client.inputs import Input
from batchery.client.objects import TAG, Batch, read_batch
from batchery.client.results import Cause
from batchery.client.watching import Fetching


def retry_batch(api: Api, batch_id: str) -> Batch:
    """Run what has not succeeded again; the batch that does so, the same or a new one.

    Raises:
        ClientError: it is not over, or there is nothing to run again, or the server says no.
    """
    value = api.get_batch(batch_id).value
    batch = read_batch(value)
    if not batch.terminal:
        raise SettingsError(f"the batch {batch_id} is {batch.status}; it can be run again once it is over")
    try:
        return api.retry_batch(batch_id)
    except ApiError as error:
        if error.status not in NO_RETRY or error.status == 400:
            raise
    with tempfile.TemporaryDirectory(prefix="batchery-retry-") as name:
        return _as_new_batch(api, batch, value, Path(name))


def _as_new_batch(api: Api, batch: Batch, value: dict[str, object], folder: Path) -> Batch:
    fetching = Fetching(api, [batch.id], folder, lambda _: None)
    try:
        fetching.now()
    finally:
        fetching.close()
    whole, again = folder / "input.jsonl", folder / f"retry-of-{batch.id}.jsonl"
    with whole.open("wb") as file, api.content(str(value.get("input_file_id"))) as content:
        for chunk in content.chunks():
            file.write(chunk)
    count = 0
    with ResultIndex(folder / "index.sqlite", fetching.files) as index, again.open("wb") as file:
        for custom_id, _, line in requests_of(Input(str(whole), whole.stat().st_size, "", 0, "")):
            found = index.get(custom_id)
            if found is None or found.cause is not Cause.ok:
                file.write(line + b"\n")
                count += 1
    if not count:
        raise SettingsError(f"every request of the batch {batch.id} has succeeded; there is nothing to run again")
    key = f"retry-{uuid.uuid4()}"
    file_id = api.upload(again.name, again.stat().st_size, lambda: again.open("rb"), f"{key}-file", lambda _: None)
    return api.create_batch(
        file_id=file_id,
        endpoint=str(value.get("endpoint") or "/v1/chat/completions"),
        window=batch.window or "24h",
        metadata={TAG: key, "retry_of": batch.id},
        key=key,
        tag=key,
        deduplicate=batch.deduplicated is not None,
    )
