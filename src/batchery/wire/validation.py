"""Validating a whole input file as it streams by, and the index that this leaves behind.

`LineValidator` takes a file's bytes in pieces of any size and keeps, for each request, where it is, which model it
names, and, for what is wrong, a `Problem`. It never raises for content: any bytes either are requests or leave located
problems. Beyond the line at hand its memory is about 30 bytes a request, whatever the size of the file.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Iterable, Iterator

import msgspec

from batchery.wire import strict_json
from batchery.wire.lines import (
    BOM,
    MAX_MODELS,
    MAX_PROBLEMS,
    Limits,
    Problem,
    Request,
    line_too_large,
    parse_line,
    read_request,
)


class FileIndex(msgspec.Struct, frozen=True):
    """Where each request of a file is, and which model it asks for. Requests are counted from 0 in file order.

    Attributes:
        starts: byte offset of each request's line, unsigned 64 bit.
        lengths: bytes of each line without its line break, unsigned 32 bit.
        numbers: the physical line of each, from 1, unsigned 32 bit; None when request i is line i + 1.
        models: the models named, in order of first appearance.
        by_model: for each of them its requests in file order, unsigned 32 bit.
        urls: the urls named, in order of first appearance.
    """

    starts: array[int]
    lengths: array[int]
    numbers: array[int] | None
    models: tuple[str, ...]
    by_model: tuple[array[int], ...]
    urls: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.starts)

    def number(self, index: int) -> int:
        """The physical line, from 1, of the request with this index."""
        return index + 1 if self.numbers is None else self.numbers[index]


class SuspectedDuplicate(msgspec.Struct, frozen=True):
    """Two requests whose `custom_id`s have the same 64-bit hash; only the bytes can tell whether they are equal."""

    first: int
    second: int


_BLANK_LINES = re.compile(rb"(?:[ \t]{0,16}\r?\n)+")
_LONGEST_BLANK = 16


class LineValidator:
    """Validates an input file as it streams by.

    Feed it the file's bytes in order, then call `finish`. What comes out does not depend on how the bytes were cut.
    Requests with equal `custom_id` are only suspected here, by hash, because keeping a million ids would not be flat;
    `finish` takes a function that reads a line back and settles each suspicion.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._tail = bytearray()
        self._tail_length = 0
        self._skipping = False  # inside a line that is already known to be too long
        self._offset = 0  # of the start of the current line
        self._first = True
        self._stopped = False
        self._lines = 0
        self._starts = array("Q")
        self._lengths = array("I")
        self._numbers: array[int] | None = None
        self._hashes = array("q")
        self._models: dict[str, array[int]] = {}
        self._urls: dict[str, None] = {}
        self._problems: list[Problem] = []
        self._problem_count = 0

    @property
    def stopped(self) -> bool:
        """Whether reading has ended early, at the first request too many."""
        return self._stopped

    def feed(self, chunk: bytes) -> None:
        """The next bytes of the file. CPU-bound: about 3 ms a megabyte; call it off the event loop."""
        if self._stopped or not chunk:
            return
        position = chunk.find(b"\n")
        if self._tail or self._skipping:
            if position < 0:
                self._keep(chunk)
                return
            self._keep(chunk[:position])
            self._end_tail()
            start = position + 1
            position = chunk.find(b"\n", start)
        else:
            start = 0
        may_skip = self._limits.line_bytes >= _LONGEST_BLANK
        while position >= 0:
            if self._stopped:
                return
            if may_skip and chunk[start] <= 0x20 and not self._first and (blank := _BLANK_LINES.match(chunk, start)):
                # A file may be a hundred million blank lines: they are passed over together.
                self._lines += chunk.count(b"\n", start, blank.end())
                self._offset += blank.end() - start
                start = blank.end()
            else:
                line = chunk[start:position]
                self._line(line, len(line))
                start = position + 1
            position = chunk.find(b"\n", start)
        if start < len(chunk) and not self._stopped:
            self._keep(chunk[start:])

    def _keep(self, piece: bytes) -> None:
        """Hold the beginning of a line whose end has not come; beyond the limit only its length is held."""
        self._tail_length += len(piece)
        if self._skipping:
            return
        self._tail += piece
        # One byte of grace for a trailing \r and three for a BOM, which do not count as the line's own.
        if len(self._tail) > self._limits.line_bytes + 4:
            self._tail.clear()
            self._skipping = True

    def _end_tail(self) -> None:
        """The line that was held is whole."""
        line, length = bytes(self._tail), self._tail_length
        self._tail.clear()
        self._tail_length = 0
        self._line(line, length)
        self._skipping = False

    def _line(self, line: bytes, length: int) -> None:
        """One physical line of this length; `line` is empty while `_skipping`."""
        self._lines += 1
        start = self._offset
        self._offset += length + 1
        if self._first:
            self._first = False
            if line.startswith(BOM):
                line = line[3:]
                start += 3
        if line.endswith(b"\r"):
            line = line[:-1]
        too_large = self._skipping or len(line) > self._limits.line_bytes
        if not too_large and (not line or line.isspace()):
            return
        if len(self._starts) + self._problem_count >= self._limits.requests:
            self._stopped = True
            self._add_problem(
                Problem(
                    "too_many_requests_in_file",
                    f"The file has more than {self._limits.requests} requests; line {self._lines} is the first too "
                    "many. Split it into smaller files.",
                    line=self._lines,
                )
            )
            return
        if too_large:
            self._add_problem(line_too_large(self._lines, self._limits))
            return
        parsed = parse_line(line, self._lines, self._limits)
        if type(parsed) is Request:
            self._add_request(parsed, start, len(line))
        else:
            assert isinstance(parsed, Problem)
            self._add_problem(parsed)

    def _add_request(self, request: Request, start: int, length: int) -> None:
        index = len(self._starts)
        requests = self._models.get(request.model)
        if requests is None:
            if len(self._models) >= MAX_MODELS:
                self._add_problem(
                    Problem(
                        "missing_required_parameter",
                        f"Line {self._lines} names one more than {MAX_MODELS} different models, the most that one file "
                        "may have.",
                        "body.model",
                        self._lines,
                        request.custom_id,
                    )
                )
                return
            requests = self._models[request.model] = array("I")
        self._hashes.append(hash(request.custom_id))
        if self._numbers is not None:
            self._numbers.append(self._lines)
        elif self._lines != index + 1:
            self._numbers = array("I", range(1, index + 1))
            self._numbers.append(self._lines)
        self._starts.append(start)
        self._lengths.append(length)
        requests.append(index)
        self._urls.setdefault(request.url)

    def _add_problem(self, problem: Problem) -> None:
        self._problem_count += 1
        if len(self._problems) < MAX_PROBLEMS:
            self._problems.append(problem)

    def finish(self, read: Callable[[int, int], bytes]) -> Report:
        """The verdict, after the last byte.

        Args:
            read: gives the bytes of the file from an offset, of a length; called once for each of two lines whose
                `custom_id`s seem equal, for up to `MAX_PROBLEMS` such pairs.
        """
        if (self._tail or self._skipping) and not self._stopped:
            self._end_tail()
        index = FileIndex(
            self._starts,
            self._lengths,
            self._numbers,
            tuple(self._models),
            tuple(self._models.values()),
            tuple(self._urls),
        )
        # Each list is the first of its kind by line, so the first of both together are the first of all.
        self._problems += self._settle_duplicates(index, read)
        if not len(index) and not self._problem_count:
            self._add_problem(Problem("empty_file", "The file has no requests: it needs at least one line of JSON."))
        self._problems.sort(key=lambda problem: problem.line or 0)
        return Report(index, tuple(self._problems[:MAX_PROBLEMS]), self._problem_count, self._lines)

    def _suspects(self) -> Iterator[SuspectedDuplicate]:
        if len(set(self._hashes)) == len(self._hashes):
            return
        first: dict[int, int] = {}
        for index, hashed in enumerate(self._hashes):
            earlier = first.setdefault(hashed, index)
            if earlier != index:
                yield SuspectedDuplicate(earlier, index)

    def _settle_duplicates(self, index: FileIndex, read: Callable[[int, int], bytes]) -> list[Problem]:
        """Count all, and spell out as many as can be reported: each of those costs two reads."""
        found: list[Problem] = []
        for suspect in self._suspects():
            if len(found) == MAX_PROBLEMS:
                self._problem_count += 1
                continue
            first, second = (
                read_request(read(index.starts[i], index.lengths[i])).custom_id for i in (suspect.first, suspect.second)
            )
            if first != second:
                continue
            self._problem_count += 1
            line = index.number(suspect.second)
            found.append(
                Problem(
                    "duplicate_custom_id",
                    f"Line {line}: custom_id {strict_json.describe(first)} was already used on line "
                    f"{index.number(suspect.first)}. Each custom_id must be unique in its file.",
                    "custom_id",
                    line,
                    second,
                )
            )
        return found


class Report(msgspec.Struct, frozen=True):
    """What validation found.

    Attributes:
        index: the good requests.
        problems: the first `MAX_PROBLEMS` problems, by line.
        problem_count: how many there are in all.
        lines: physical lines read.
    """

    index: FileIndex
    problems: tuple[Problem, ...]
    problem_count: int
    lines: int

    @property
    def ok(self) -> bool:
        """Whether a batch over the file can run."""
        return self.problem_count == 0

    def summary(self) -> str | None:
        """One sentence on what is wrong, for `status_details`: the first problem and how many there are."""
        if self.ok:
            return None
        more = "" if self.problem_count == 1 else f" ({self.problem_count} problems in all)"
        return self.problems[0].message + more


def validate(chunks: Iterable[bytes], limits: Limits, read: Callable[[int, int], bytes]) -> Report:
    """Validate a whole file from its pieces; for files at hand, such as a client's before it uploads.

    Args:
        chunks: the file's bytes, in order.
        limits: the server's, as far as they are known.
        read: as for `LineValidator.finish`.
    """
    validator = LineValidator(limits)
    for chunk in chunks:
        validator.feed(chunk)
    return validator.finish(read)
