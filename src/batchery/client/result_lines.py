"""Result files of any server, read line by line: `custom_id`, status, answer, error. Lines that are none are told by
their number.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from batchery.client.errors import InputError, InputProblem
from batchery.client.inputs import open_input
from batchery.wire import strict_json
from batchery.wire.lines import BOM
from batchery.wire.results import failure_of

MAX_RESULT_BYTES = 256 * 1024 * 1024


class ResultLine(msgspec.Struct, frozen=True):
    """One line of an output or error file.

    Attributes:
        number: physical line, from 1.
        raw: as it is in the file, without its line break.
        status: of the HTTP answer; None where there was none.
        body: the answer as JSON; None where there was none.
        error: the line's own `error`; None or null where all went well.
        latency: milliseconds, where the server says them.
    """

    number: int
    raw: bytes
    custom_id: str | None
    status: int | None
    body: bytes | None
    error: Any
    latency: float | None

    @property
    def ok(self) -> bool:
        """Whether it is a good answer."""
        return self.error is None and self.status is not None and 200 <= self.status < 300

    @property
    def reason(self) -> str:
        """Why it is not: status, code and message."""
        code, message = "", ""
        if type(self.error) is dict:
            code, message = str(self.error.get("code") or ""), str(self.error.get("message") or "")
        if not code and self.body is not None and self.status is not None:
            failure = failure_of(self.status, self.body)
            code, message = failure.code, message or failure.message
        words = [str(self.status) if self.status is not None else "", code or "unknown"]
        return f"{' '.join(filter(None, words))}: {message[:160]}" if message else " ".join(filter(None, words))


class _Response(msgspec.Struct):
    status_code: int | None = None
    body: msgspec.Raw = msgspec.Raw(b"null")
    latency_ms: float | None = None
    duration_ms: float | None = None


class _Line(msgspec.Struct):
    custom_id: str | None = None
    response: _Response | msgspec.UnsetType | None = msgspec.UNSET
    error: Any = msgspec.UNSET
    latency_ms: float | None = None
    duration_ms: float | None = None


_read = msgspec.json.Decoder(_Line).decode


def read_results(path: Path) -> Iterator[ResultLine]:
    """The lines of a result file.

    Raises:
        InputError: a line is not one of a result file.
        SettingsError: the file cannot be read.
    """
    with open_input(path) as file:
        number = 0
        while raw := file.readline(MAX_RESULT_BYTES):
            number += 1
            line = raw.removeprefix(BOM) if number == 1 else raw
            line = line.removesuffix(b"\n").removesuffix(b"\r")
            if not line or line.isspace():
                continue
            yield _result(line, number, path)


def _result(line: bytes, number: int, path: Path) -> ResultLine:
    try:
        found = _read(strict_json.mask_surrogates(line))
        if found.response is msgspec.UNSET and found.error is msgspec.UNSET:  # a request, or some other object
            raise msgspec.ValidationError("it has neither response nor error")
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        problem = f"Line {number} is not a result: {error}. A result has custom_id, response and error."
        raise InputError((InputProblem(str(path), number, "invalid_json_line", problem),), 1) from None
    response = found.response or None
    status = response.status_code if response else None
    body = bytes(response.body) if response and bytes(response.body) != b"null" else None
    times = [found.latency_ms, found.duration_ms]
    if response:
        times += [response.latency_ms, response.duration_ms]
    latency = next((time for time in times if time is not None), None)
    return ResultLine(
        number, line, found.custom_id, status, body, None if found.error is msgspec.UNSET else found.error, latency
    )


def is_result_file(path: Path) -> bool:
    """Whether a file has results rather than requests, by its first line.

    Raises:
        SettingsError: the file cannot be read.
    """
    with open_input(path) as file:
        for raw in file:
            line = raw.removeprefix(BOM).strip()
            if line:
                try:
                    value = msgspec.json.decode(strict_json.mask_surrogates(line), type=dict[str, msgspec.Raw])
                except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
                    return False
                return "body" not in value and ("response" in value or "error" in value)
    return False
