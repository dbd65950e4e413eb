"""What to run again: once every batch is over, the rows that have not succeeded are sorted by cause, and those that may
yet succeed are run again, by the server itself where it can and does not run what is hopeless along with them.

Rows that the user cancelled, and those that will fail again, are left as they are.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import msgspec

from batchery.client.errors import ApiError
from batchery.client.http import Api
from batchery.client.index import ResultIndex
from batchery.client.inputs import Input, check_inputs, open_input
from batchery.client.objects import Batch
from batchery.client.results import Cause
from batchery.client.state import JobState, Part
from batchery.wire.lines import Limits

NO_RETRY = (400, 404, 405, 410, 501)
"""Answers of servers that cannot run a batch again by themselves, or will not run this one."""


class _Head(msgspec.Struct):
    custom_id: str
    url: str = ""


_read_head = msgspec.json.Decoder(_Head).decode


class Unfinished(msgspec.Struct):
    """The rows of one part that have not succeeded.

    Attributes:
        again: how many of them may, if they are run again.
        hopeless: how many will not, or are not wanted.
    """

    again: int = 0
    hopeless: int = 0


def ending(batch: Batch) -> str:
    """What tells one end of a batch from a later one, after it was run again."""
    stamps = (batch.status, batch.ended_at, batch.expires_at, batch.error_file_id, batch.completed, batch.failed)
    return " ".join(map(str, stamps))


def requests_of(source: Input) -> Iterator[tuple[str, str, bytes]]:
    """The requests in a piece of input: `custom_id`, url and the whole line."""
    left = source.size
    with open_input(Path(source.path)) as file:
        file.seek(source.start)
        for line in file:
            if left <= 0:
                return
            left -= len(line)
            text = line.strip().removeprefix(b"\xef\xbb\xbf")
            if text:
                head = _read_head(text)
                yield head.custom_id, head.url, text


def sort_rows(parts: list[Part], batches: Mapping[int, Batch], index: ResultIndex) -> dict[int, Unfinished]:
    """What is left of the job's first parts, by number; none whose rows have all succeeded.

    Args:
        parts: the job's.
        batches: as they ended.
        index: every result that there is.
    """
    found = {}
    for number, part in enumerate(parts):
        if part.round:
            continue
        batch = batches[number]
        left = Unfinished()
        for custom_id, _, _ in requests_of(part.source):
            result = index.get(custom_id)
            if result is not None and result.cause is Cause.ok:
                continue
            if may_succeed(None if result is None else result.cause, batch):
                left.again += 1
            else:
                left.hopeless += 1
        if left.again or left.hopeless:
            found[number] = left
    return found


def may_succeed(cause: Cause | None, batch: Batch) -> bool:
    """Whether a row that has not succeeded is worth another try.

    Args:
        cause: of its failure; None if it has no result at all.
        batch: the first that it was in.
    """
    if cause is None:
        # A batch that failed as a whole was refused for what is in it.
        return batch.status in ("completed", "expired") or (batch.status == "failed" and not batch.problems)
    return cause in (Cause.transient, Cause.expired)


def ask_server(api: Api, part: Part) -> bool:
    """Have the server run a part's batch again; whether it does.

    Raises:
        ClientError: nobody knows whether it does.
    """
    assert part.batch_id is not None
    try:
        api.retry_batch(part.batch_id)
    except ApiError as error:
        if error.status == 409:
            return True  # it runs already: an earlier wish was heard
        if error.status not in NO_RETRY:
            raise
        return False
    return True


def gather(
    state: JobState, left: Mapping[int, Unfinished], batches: Mapping[int, Batch], index: ResultIndex, path: Path
) -> list[Input]:
    """Write the lines that are worth another try to files, one for each url, and return these, on disk.

    Args:
        state: the job.
        left: the parts to look through.
        batches: as they ended.
        index: every result that there is.
        path: the files' path; the url's number goes before its suffix where there are several.
    """
    files: dict[str, tuple[Path, BinaryIO]] = {}
    try:
        for number in left:
            for custom_id, url, line in requests_of(state.parts[number].source):
                found = index.get(custom_id)
                cause = None if found is None else found.cause
                if cause is Cause.ok or not may_succeed(cause, batches[number]):
                    continue
                if url not in files:
                    name = path.with_stem(f"{path.stem}-{len(files) + 1}") if files else path
                    files[url] = (name, name.open("wb"))
                files[url][1].write(line + b"\n")
        for _, file in files.values():
            file.flush()
            os.fsync(file.fileno())
    finally:
        for _, file in files.values():
            file.close()
    limits = Limits(file_bytes=1 << 62, requests=1 << 40)
    return check_inputs([name for name, _ in files.values()], limits) if files else []
