"""Validating a whole input file as it streams by, and the index that this leaves behind.

`LineValidator` takes a file's bytes in pieces of any size and keeps, for each request, where it is, which model and url
it names, and, for what is wrong, a `Problem`. It never raises for content: any bytes either are requests or leave
located problems. Beyond the line at hand its memory is about 40 bytes a request and the beginnings of prompts that
`prefixes` keeps, whatever the size of the file.

Of bad lines the first are spelled out, and all are in the index, so that a batch can pass over them and still say of
each what is wrong: `problem_of` makes its `Problem` again.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Iterable
from heapq import merge
from itertools import accumulate, compress

import msgspec

from batchery.wire.file_index import (
    ONE_MODEL_TOO_MANY,
    PARSE,
    BadLines,
    Counts,
    FileIndex,
    Groups,
    duplicate,
    one_model_too_many,
)
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
from batchery.wire.prefixes import Prefixes, PrefixTree

_MAX_LENGTH = (1 << 32) - 1


_BLANK_LINES = re.compile(rb"(?:[ \t]{0,16}\r?\n)+")
_LONGEST_BLANK = 16


class LineValidator:
    """Validates an input file as it streams by.

    Feed it the file's bytes in order, then call `finish`. What comes out does not depend on how the bytes were cut.
    Requests with equal `custom_id` are only suspected while reading, by hash, because keeping a million ids would not
    be flat; `finish` takes a function that reads a line back and settles each suspicion.
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
        self._url = ""  # of the last request
        self._urls: dict[str, int] = {}
        self._url_runs: tuple[array[int], array[int]] = array("I"), array("B")  # where the url changes, and to which
        self._prefixes = PrefixTree()
        self._bad = BadLines(limits.line_bytes)
        self._bad_count = 0
        self._problems: list[Problem] = []

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
        start = whole = self._offset
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
        if len(self._starts) + self._bad_count >= self._limits.requests:
            self._stopped = True
            return
        if too_large:
            # As long as it is in the file: while it is skipped, nobody sees how it begins and ends.
            self._add_bad(line_too_large(self._lines, self._limits), whole, min(length, _MAX_LENGTH))
            return
        parsed = parse_line(line, self._lines, self._limits)
        if type(parsed) is Request:
            self._add_request(parsed, start, line)
        else:
            assert isinstance(parsed, Problem)
            self._add_bad(parsed, start, len(line))

    def _add_request(self, request: Request, start: int, line: bytes) -> None:
        length = len(line)
        index = len(self._starts)
        requests = self._models.get(request.model)
        if requests is None:
            if len(self._models) >= MAX_MODELS:
                problem = one_model_too_many(request.custom_id, self._lines)
                self._add_bad(problem, start, length, ONE_MODEL_TOO_MANY)
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
        self._prefixes.add(line, request.url)
        if request.url != self._url:
            self._url = request.url
            places, urls = self._url_runs
            places.append(index)
            urls.append(self._urls.setdefault(request.url, len(self._urls)))

    def _add_bad(self, problem: Problem, start: int, length: int, first: int = PARSE) -> None:
        self._bad_count += 1
        bad = self._bad
        bad.starts.append(start)
        bad.lengths.append(length)
        bad.numbers.append(self._lines)
        bad.firsts.append(first)
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
        repeats, named = self._repeats(read)
        index, groups = self._index(repeats)
        problems = self._problems + [
            duplicate(custom_id, self._number(repeat), self._number(repeats[repeat]))
            for repeat, custom_id in named.items()
        ]
        # Each kind is listed from its first on, so the first by line of all together are the first of the file.
        problems.sort(key=lambda problem: problem.line or 0)
        count = len(index.bad)
        if self._stopped:
            count += 1
            problems.append(
                Problem(
                    "too_many_requests_in_file",
                    f"The file has more than {self._limits.requests} requests; line {self._lines} is the first too "
                    "many. Split it into smaller files.",
                    line=self._lines,
                )
            )
        elif not len(index) and not count:
            count = 1
            problems = [Problem("empty_file", "The file has no requests: it needs at least one line of JSON.")]
        return Report(index, groups, tuple(problems[:MAX_PROBLEMS]), count, self._lines)

    def _number(self, request: int) -> int:
        """The physical line of a request as they were counted while reading, repeats included."""
        return request + 1 if self._numbers is None else self._numbers[request]

    def _repeats(self, read: Callable[[int, int], bytes]) -> tuple[dict[int, int], dict[int, str]]:
        """The requests whose `custom_id` was used before.

        Returns:
            For each the first one with its `custom_id`, and for as many as are reported also that `custom_id`: each
            of those costs two reads. Of the rest equal hashes, of 64 bits, are proof enough.
        """
        repeats: dict[int, int] = {}
        named: dict[int, str] = {}
        if len(set(self._hashes)) == len(self._hashes):
            return repeats, named

        def custom_id(request: int) -> str:
            return read_request(read(self._starts[request], self._lengths[request])).custom_id

        first: dict[int, int] = {}
        for request, hashed in enumerate(self._hashes):
            slot = hashed
            while (earlier := first.setdefault(slot, request)) != request:
                if len(named) < MAX_PROBLEMS:
                    known = custom_id(request)
                    if known != custom_id(earlier):
                        slot += 1  # equal hashes by chance
                        continue
                    named[request] = known
                repeats[request] = earlier
                break
        return repeats, named

    def _index(self, repeats: dict[int, int]) -> tuple[FileIndex, Groups]:
        """The index, with the repeats taken out of the requests and put among the bad lines; and the groups."""
        starts, lengths, numbers, url_of = self._starts, self._lengths, self._numbers, self._url_of()
        by_model, bad, prefixes = self._models, self._bad, self._prefixes.finish()
        if repeats:
            keep = bytearray(b"\1") * len(starts)
            for request in repeats:
                keep[request] = 0
            new = array("I", accumulate(keep))  # plus one: how many requests are kept up to this one
            bad = self._with_repeats({request: new[first] - 1 for request, first in repeats.items()})
            numbers = array("I", compress(range(1, len(starts) + 1) if numbers is None else numbers, keep))
            if not numbers or numbers[-1] == len(numbers):
                numbers = None
            starts, lengths = array("Q", compress(starts, keep)), array("I", compress(lengths, keep))
            url_of = bytes(compress(url_of, keep))
            if prefixes.groups is not None:
                prefixes = Prefixes(array("H", compress(prefixes.groups, keep)), prefixes.keys)
            kept = {
                model: array("I", (new[request] - 1 for request in requests if keep[request]))
                for model, requests in by_model.items()
            }
            by_model = {model: requests for model, requests in kept.items() if requests}
        urls = tuple(self._urls)
        index = FileIndex(
            starts,
            lengths,
            numbers,
            tuple(by_model),
            tuple(map(prefixes.in_order, by_model.values())),
            urls if not repeats else tuple(urls[url] for url in dict.fromkeys(url_of)),
            bad,
            prefixes,
        )
        return index, {model: _count(requests, lengths, url_of, urls) for model, requests in by_model.items()}

    def _url_of(self) -> bytes:
        """For each request, repeats included, the number of its url."""
        places, urls = self._url_runs
        ends = places[1:]
        ends.append(len(self._starts))
        return b"".join(bytes((url,)) * (end - start) for start, end, url in zip(places, ends, urls, strict=False))

    def _with_repeats(self, repeats: dict[int, int]) -> BadLines:
        """The bad lines with the repeats among them, in file order."""
        bad = self._bad
        both = merge(
            zip(bad.numbers, bad.starts, bad.lengths, bad.firsts, strict=True),
            (
                (self._number(request), self._starts[request], self._lengths[request], first)
                for request, first in repeats.items()
            ),
        )
        merged = BadLines(bad.limit)
        for number, start, length, first in both:
            merged.starts.append(start)
            merged.lengths.append(length)
            merged.numbers.append(number)
            merged.firsts.append(first)
        return merged


def _count(requests: array[int], lengths: array[int], url_of: bytes, urls: tuple[str, ...]) -> dict[str, Counts]:
    """The requests of one model by url."""
    if len(urls) == 1:
        alone = len(requests) == len(lengths)
        return {urls[0]: Counts(len(requests), sum(lengths if alone else map(lengths.__getitem__, requests)))}
    found: dict[int, list[int]] = {}
    for request in requests:
        counts = found.setdefault(url_of[request], [0, 0])
        counts[0] += 1
        counts[1] += lengths[request]
    return {urls[url]: Counts(*counts) for url, counts in found.items()}


class Report(msgspec.Struct, frozen=True):
    """What validation found.

    Attributes:
        index: the good requests, and where the bad lines are.
        groups: the good requests by model and url.
        problems: the first `MAX_PROBLEMS` problems, by line.
        problem_count: how many there are in all: one for each bad line, or for what is wrong with the whole file.
        lines: physical lines read.
    """

    index: FileIndex
    groups: Groups
    problems: tuple[Problem, ...]
    problem_count: int
    lines: int

    @property
    def ok(self) -> bool:
        """Whether a batch over the file can run."""
        return self.problem_count == 0

    @property
    def can_skip(self) -> bool:
        """Whether a batch that passes over bad lines can run: nothing is wrong but single lines."""
        return self.problem_count == len(self.index.bad)

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
