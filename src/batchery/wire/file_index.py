"""The index that validating a file leaves behind: where its requests are, and its bad lines.

Of a bad line it keeps what it takes to say again what is wrong with it.
"""

from __future__ import annotations

from array import array

import msgspec

from batchery.wire import strict_json
from batchery.wire.lines import MAX_LINE_BYTES, MAX_MODELS, Limits, Problem, line_too_large, parse_line
from batchery.wire.prefixes import Prefixes

PARSE = -1
"""In `BadLines.firsts`: parsing the line again says what is wrong with it."""

ONE_MODEL_TOO_MANY = -2
"""In `BadLines.firsts`: the line is good by itself, but names one model more than a file may have."""


class BadLines(msgspec.Struct, frozen=True):
    """The bad lines of a file, counted from 0 in file order, and what it takes to say again what is wrong with each.

    Attributes:
        limit: the most bytes that a line could have when the file was validated.
        starts: byte offset of each line, unsigned 64 bit.
        lengths: bytes of each without its line break, unsigned 32 bit; of a line over the limit, which is not to be
            read, with a BOM and a carriage return, and at most 2**32 - 1.
        numbers: the physical line of each, from 1, unsigned 32 bit.
        firsts: signed 32 bit; for a line whose `custom_id` was used before, the request that used it first, otherwise
            `PARSE` or `ONE_MODEL_TOO_MANY`.
    """

    limit: int = MAX_LINE_BYTES
    starts: array[int] = msgspec.field(default_factory=lambda: array("Q"))
    lengths: array[int] = msgspec.field(default_factory=lambda: array("I"))
    numbers: array[int] = msgspec.field(default_factory=lambda: array("I"))
    firsts: array[int] = msgspec.field(default_factory=lambda: array("i"))

    def __len__(self) -> int:
        return len(self.starts)

    def is_too_large(self, bad: int) -> bool:
        """Whether the line is over the limit, so that nothing needs to be read to know its problem."""
        return self.lengths[bad] > self.limit


class FileIndex(msgspec.Struct, frozen=True):
    """Where each request of a file is, and which model it asks for. Requests are counted from 0 in file order.

    Attributes:
        starts: byte offset of each request's line, unsigned 64 bit.
        lengths: bytes of each line without its line break, unsigned 32 bit.
        numbers: the physical line of each, from 1, unsigned 32 bit; None when request i is line i + 1.
        models: the models named, in order of first appearance.
        by_model: for each of them its requests in the order in which they go out, unsigned 32 bit: those whose prompts
            begin alike side by side, otherwise in file order.
        urls: the urls named, in order of first appearance.
        bad: the lines that are no requests; a later use of a `custom_id` is one of them.
        prefixes: which of them have prompts that begin alike.
    """

    starts: array[int]
    lengths: array[int]
    numbers: array[int] | None
    models: tuple[str, ...]
    by_model: tuple[array[int], ...]
    urls: tuple[str, ...]
    bad: BadLines = msgspec.field(default_factory=BadLines)
    prefixes: Prefixes = msgspec.field(default_factory=Prefixes)

    def __len__(self) -> int:
        return len(self.starts)

    def number(self, index: int) -> int:
        """The physical line, from 1, of the request with this index."""
        return index + 1 if self.numbers is None else self.numbers[index]


class Counts(msgspec.Struct, frozen=True, array_like=True):
    """How many requests there are of a kind, and the bytes of their lines together."""

    requests: int
    bytes: int


Groups = dict[str, dict[str, Counts]]
"""The good requests of a file by model and then by url, both in order of first appearance."""


def problem_of(index: FileIndex, bad: int, line: bytes) -> Problem:
    """What is wrong with a bad line: the same `Problem` that validation found.

    Args:
        index: of the file.
        bad: which of its bad lines.
        line: the bytes of the file from `index.bad.starts[bad]`, `index.bad.lengths[bad]` long; of no matter for a
            line that `is_too_large`. Parsing is CPU-bound.
    """
    lines = index.bad
    number, first = lines.numbers[bad], lines.firsts[bad]
    limits = Limits(line_bytes=lines.limit)
    if lines.is_too_large(bad):
        return line_too_large(number, limits)
    parsed = parse_line(line, number, limits)
    if isinstance(parsed, Problem):
        return parsed
    if first >= 0:
        return duplicate(parsed.custom_id, number, index.number(first))
    if first == ONE_MODEL_TOO_MANY:
        return one_model_too_many(parsed.custom_id, number)
    return Problem(
        "invalid_json_line",
        f"Line {number} was refused when the file was uploaded, by rules that have changed since. Upload it again.",
        line=number,
        custom_id=parsed.custom_id,
    )


def duplicate(custom_id: str, number: int, first: int) -> Problem:
    return Problem(
        "duplicate_custom_id",
        f"Line {number}: custom_id {strict_json.describe(custom_id)} was already used on line {first}. Each custom_id "
        "must be unique in its file.",
        "custom_id",
        number,
        custom_id,
    )


def one_model_too_many(custom_id: str, number: int) -> Problem:
    return Problem(
        "missing_required_parameter",
        f"Line {number} names one more than {MAX_MODELS} different models, the most that one file may have.",
        "body.model",
        number,
        custom_id,
    )
