"""Two request files or two result files, compared by `custom_id`. What differs by nature in two runs over the same
requests (ids, times, counts of tokens) is not a difference of results; the answer, the status and the error are.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec

from batchery.client.errors import InputError, InputProblem, SettingsError
from batchery.client.inputs import open_input
from batchery.client.result_lines import is_result_file
from batchery.wire import strict_json
from batchery.wire.lines import BOM

Change = Literal["added", "removed", "changed"]
_PATHS_TOLD = 5
_VALUE_TOLD = 60
_NOT_RESULT = frozenset(
    {"id", "request_id", "created", "created_at", "completed_at", "usage", "system_fingerprint", "service_tier"}
)
_MISSING = object()


class Difference(msgspec.Struct, frozen=True):
    """One `custom_id` that is not the same in both files.

    Attributes:
        what: the places that changed, with both values; empty for what is in one file only.
    """

    custom_id: str
    change: Change
    what: str


def diff_files(old: Path, new: Path) -> Iterator[Difference]:
    """The differences, in the order of the new file; what is only in the old one comes last.

    Raises:
        InputError: a line is not an object with a `custom_id`, or has one that came before.
        SettingsError: a file cannot be read, or one has requests and the other results.
    """
    results = is_result_file(old)
    if results != is_result_file(new):
        raise SettingsError("one file has requests and the other results; compare two of a kind")
    places: dict[str, int] = {}
    for custom_id, _, place in _lines(old):
        places[custom_id] = place
    with open_input(old) as file:
        for custom_id, value, _ in _lines(new):
            if custom_id not in places:
                yield Difference(custom_id, "added", "")
                continue
            file.seek(places.pop(custom_id))
            before = strict_json.loads(strict_json.mask_surrogates(file.readline().removeprefix(BOM)))
            what = list(_changes(_bare(before, results), _bare(value, results), ""))
            if what:
                more = f"; and {len(what) - _PATHS_TOLD} more" if len(what) > _PATHS_TOLD else ""
                yield Difference(custom_id, "changed", "; ".join(what[:_PATHS_TOLD]) + more)
    for custom_id in places:
        yield Difference(custom_id, "removed", "")


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any], int]]:
    seen: set[str] = set()
    place = number = 0
    with open_input(path) as file:
        while raw := file.readline():
            start, place, number = place, place + len(raw), number + 1
            line = raw.removeprefix(BOM)
            if line.isspace():
                continue
            problem = None
            try:
                value = strict_json.loads(strict_json.mask_surrogates(line))
            except strict_json.NotJson as error:
                value, problem = None, f"is not JSON: {error}"
            named = value.get("custom_id") if type(value) is dict else None
            custom_id = named if type(named) is str else ""
            if problem is None and type(named) is not str:
                problem = "has no custom_id"
            elif problem is None and custom_id in seen:
                problem = f"has a custom_id that came before, {custom_id!r}; merge makes one line of each"
            if problem is not None:
                found = InputProblem(str(path), number, "invalid_json_line", f"Line {number} {problem}.")
                raise InputError((found,), 1)
            seen.add(custom_id)
            yield custom_id, value, start


def _bare(value: Any, results: bool) -> Any:
    """What counts of a line."""
    if not results:
        return {key: inner for key, inner in value.items() if key != "custom_id"}
    response = value.get("response")
    error = value.get("error")
    body = response.get("body") if type(response) is dict else None
    return {
        "status_code": response.get("status_code") if type(response) is dict else None,
        "error": error.get("code") if type(error) is dict else error,
        "body": {key: inner for key, inner in body.items() if key not in _NOT_RESULT} if type(body) is dict else body,
    }


def _changes(old: Any, new: Any, path: str) -> Iterator[str]:
    if type(old) is dict and type(new) is dict:
        for key in dict.fromkeys([*old, *new]):
            yield from _changes(old.get(key, _MISSING), new.get(key, _MISSING), f"{path}.{key}" if path else key)
    elif type(old) is list and type(new) is list and len(old) == len(new):
        for number, (one, other) in enumerate(zip(old, new, strict=True)):
            yield from _changes(one, other, f"{path}[{number}]")
    elif old is _MISSING or new is _MISSING or type(old) is not type(new) or old != new:
        yield f"{path}: {_told(old)} -> {_told(new)}"


def _told(value: Any) -> str:
    if value is _MISSING:
        return "nothing"
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= _VALUE_TOLD else text[: _VALUE_TOLD - 3] + "..."
