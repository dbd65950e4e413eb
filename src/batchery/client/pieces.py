"""Splitting an input that is over a server's limits into pieces: byte ranges of the file itself, cut between lines.

Nothing is copied. The same file and limits always give the same pieces, and a line is never cut or left out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import msgspec

from batchery.client.errors import ResumeError
from batchery.client.inputs import Input, open_input
from batchery.wire.lines import MAX_FILE_BYTES, MAX_REQUESTS


class _Head(msgspec.Struct):
    url: str


_read_head = msgspec.json.Decoder(_Head).decode


def split_inputs(
    inputs: Sequence[Input], *, max_bytes: int = MAX_FILE_BYTES, max_requests: int = MAX_REQUESTS
) -> list[Input]:
    """The pieces of all inputs, in order; an input within the limits is its own only piece.

    Args:
        inputs: checked files.
        max_bytes: of one piece. A line longer than this is a piece by itself.
        max_requests: of one piece.

    Raises:
        ResumeError: a file is no longer what it was when it was checked.
    """
    pieces: list[Input] = []
    for source in inputs:
        if source.size <= max_bytes and source.requests <= max_requests:
            pieces.append(source)
        else:
            pieces += _split(source, max_bytes, max_requests)
    return pieces


def _split(source: Input, max_bytes: int, max_requests: int) -> list[Input]:
    pieces: list[Input] = []
    whole, part = hashlib.sha256(), hashlib.sha256()
    start = size = requests = 0
    url: str | None = None

    def cut() -> None:
        nonlocal start, size, requests, part, url
        assert url is not None
        pieces.append(Input(source.path, size, part.hexdigest(), requests, url, start))
        start, size, requests, url, part = start + size, 0, 0, None, hashlib.sha256()

    with open_input(Path(source.path)) as file:
        for line in file:
            blank = not line.strip()
            if not blank and requests and (size + len(line) > max_bytes or requests == max_requests):
                cut()
            whole.update(line)
            part.update(line)
            size += len(line)
            if not blank:
                requests += 1
                if url is None:
                    url = source.url if start == 0 else _url(line, source)
    if requests:
        cut()
    if whole.hexdigest() != source.sha256 or sum(piece.requests for piece in pieces) != source.requests:
        raise ResumeError(f"the input {source.path} was changed after it was checked")
    return pieces


def _url(line: bytes, source: Input) -> str:
    try:
        return _read_head(line).url
    except msgspec.MsgspecError:
        raise ResumeError(f"the input {source.path} was changed after it was checked") from None
