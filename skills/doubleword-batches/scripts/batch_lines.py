"""The rules of a batch input file, and reading one line by line in flat memory. It must never change a file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple, Union

MAX_FILE_BYTES = 200 * 1024 * 1024
MAX_REQUESTS = 50_000
MAX_LINE_BYTES = 10 * 1024 * 1024
MAX_CUSTOM_ID = 64
URLS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/responses",
    "/v1/messages",
    "/v1/moderations",
    "/v1/rerank",
    "/v1/score",
)
BOM = b"\xef\xbb\xbf"


class Problem(NamedTuple):
    """What is wrong with a file.

    Attributes:
        line: from 1; 0 for the file as a whole.
        code: as batchery's server has them.
        message: what is wrong, and what would be accepted.
    """

    line: int
    code: str
    message: str


class Checked(NamedTuple):
    """What a look through a file found.

    Attributes:
        requests: lines that hold something.
        size: in bytes.
        sha256: of the whole file.
        models: how many requests name each.
        urls: how many requests go to each.
        problems: why a server would refuse the file; in order of lines.
        warnings: what some servers refuse.
    """

    requests: int
    size: int
    sha256: str
    models: Dict[str, int]
    urls: Dict[str, int]
    problems: List[Problem]
    warnings: List[Problem]


class _BadLineError(Exception):
    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def lines_of(path: Path) -> Iterator[Tuple[int, bytes]]:
    """The lines of a JSONL file that hold something, with their physical numbers from 1.

    Lines end at a line feed alone; a carriage return before it, blank lines and a byte order mark are passed over. Of a
    line that is far too long only the beginning comes, so that no file can fill the memory.
    """
    most = MAX_LINE_BYTES + 4096
    with path.open("rb") as file:
        number = 0
        while True:
            line = file.readline(most)
            if not line:
                return
            number += 1
            if len(line) == most and not line.endswith(b"\n"):
                while True:
                    rest = file.readline(most)
                    if not rest or rest.endswith(b"\n"):
                        break
            if number == 1 and line.startswith(BOM):
                line = line[len(BOM) :]
            line = line.rstrip(b"\r\n") if line.endswith(b"\n") else line
            if line.strip():
                yield number, line


def check(path: Path) -> Checked:
    """Look through a file for everything that is wrong with it.

    Raises:
        OSError: it cannot be read.
    """
    problems: List[Problem] = []
    warnings: List[Problem] = []
    first_lines: Dict[str, int] = {}
    models: Dict[str, int] = {}
    urls: Dict[str, int] = {}
    count = 0
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        problems.append(
            Problem(
                0, "file_too_large", "the file has %d bytes, at most %d are allowed; split it" % (size, MAX_FILE_BYTES)
            )
        )
    for number, line in lines_of(path):
        count += 1
        if count > MAX_REQUESTS:
            problems.append(
                Problem(
                    number,
                    "too_many_requests_in_file",
                    "more than %d requests; split the file (lines from here on were not looked at)" % MAX_REQUESTS,
                )
            )
            break
        try:
            custom_id, model, url = _check_line(line)
        except _BadLineError as error:
            problems.append(Problem(number, error.code, str(error)))
            continue
        if custom_id in first_lines:
            problems.append(
                Problem(
                    number,
                    "duplicate_custom_id",
                    "custom_id %s is on line %d already; each must be unique in its file"
                    % (json.dumps(custom_id), first_lines[custom_id]),
                )
            )
            continue
        first_lines[custom_id] = number
        if not (custom_id.isascii() and custom_id.isprintable()):
            warnings.append(
                Problem(number, "custom_id_not_ascii", "Doubleword accepts only printable ASCII in custom_id")
            )
        models[model] = models.get(model, 0) + 1
        urls[url] = urls.get(url, 0) + 1
    if count == 0:
        problems.append(Problem(0, "empty_file", "there is no request in the file"))
    return Checked(count, size, sha256_of(path), models, urls, problems, warnings)


def sha256_of(path: Path) -> str:
    """Of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while True:
            block = file.read(1024 * 1024)
            if not block:
                return digest.hexdigest()
            digest.update(block)


def custom_id_of(line: bytes) -> Optional[str]:
    """The `custom_id` of an input or a result line, or None where there is none to be read."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    found = value.get("custom_id") if isinstance(value, dict) else None
    return found if isinstance(found, str) else None


def problem_in(line: bytes) -> Union[str, Problem]:
    """What is wrong with one request; its `custom_id` where nothing is."""
    try:
        return _check_line(line)[0]
    except _BadLineError as error:
        return Problem(0, error.code, str(error))


def _check_line(line: bytes) -> Tuple[str, str, str]:
    if len(line) > MAX_LINE_BYTES:
        raise _BadLineError("line_too_large", "the line has more than %d bytes" % MAX_LINE_BYTES)
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _BadLineError("invalid_utf8", "not UTF-8 at byte %d of the line" % error.start) from None
    try:
        request = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except RecursionError:
        raise _BadLineError("invalid_json_line", "nested too deeply") from None
    except ValueError as error:
        raise _BadLineError("invalid_json_line", "not valid JSON: %s" % error) from None
    if not isinstance(request, dict):
        raise _BadLineError("invalid_json_line", "a line must be a JSON object")
    custom_id = request.get("custom_id")
    if custom_id is None:
        raise _BadLineError("missing_required_parameter", "custom_id is missing")
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= MAX_CUSTOM_ID:
        raise _BadLineError("invalid_custom_id", "custom_id must be a string of 1 to %d characters" % MAX_CUSTOM_ID)
    if request.get("method") != "POST":
        raise _BadLineError("invalid_method", 'method must be "POST", not %s' % json.dumps(request.get("method")))
    url = request.get("url")
    if url not in URLS:
        raise _BadLineError("invalid_url", "url must be one of %s, not %s" % (", ".join(URLS), json.dumps(url)))
    body = request.get("body")
    if not isinstance(body, dict):
        raise _BadLineError("missing_required_parameter", "body must be an object with the request")
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise _BadLineError("missing_required_parameter", "body.model must be a string that names a model")
    if body.get("stream") is True:
        raise _BadLineError("streaming_unsupported", "body.stream must not be true: a batch cannot stream")
    _check_input(str(url), body)
    return custom_id, model, str(url)


def _check_input(url: str, body: Dict[str, Any]) -> None:
    wanted = {"/v1/chat/completions": "messages", "/v1/messages": "messages", "/v1/embeddings": "input"}.get(url)
    if wanted is not None and not body.get(wanted):
        raise _BadLineError("missing_required_parameter", "body.%s is missing or empty" % wanted)


def _no_duplicates(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError("the key %s is there twice" % json.dumps(twice))
    return made


def _no_constant(name: str) -> None:
    raise ValueError("%s is not JSON" % name)
