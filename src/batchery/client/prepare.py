"""Inputs made ready to be sent: everything checked, rows made into requests, and files within the server's limits.

JSONL files of finished requests are used where they are, and nothing is copied. Everything else is written to numbered
files in the job's folder, which appear there only when all inputs are good, whole and durable.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import msgspec

from batchery.client.duplicates import Duplicates
from batchery.client.errors import InputError, InputProblem, ResumeError
from batchery.client.inputs import Input
from batchery.client.limits import ServerLimits
from batchery.client.making import Making
from batchery.client.numbered_files import NumberedFiles
from batchery.client.rows import Row, rows_of
from batchery.client.sources import Fingerprint, Source, fingerprint, name_of, resolve_sources
from batchery.client.tokens import Tokens, count_tokens
from batchery.wire.lines import MAX_PROBLEMS


class Group(msgspec.Struct):
    """The requests for one model and url.

    Attributes:
        size: bytes of their lines.
        input_tokens: estimated.
        images: in them.
        limited: how many say how many tokens their answer may have at most.
        limit: those numbers together.
    """

    model: str
    url: str
    requests: int = 0
    size: int = 0
    input_tokens: int = 0
    images: int = 0
    limited: int = 0
    limit: int = 0

    def add(self, line: bytes, tokens: Tokens) -> None:
        """Count a request in."""
        self.requests += 1
        self.size += len(line)
        self.input_tokens += tokens.input
        self.images += tokens.images
        if tokens.limit is not None:
            self.limited += 1
            self.limit += tokens.limit


class Prepared(msgspec.Struct, frozen=True):
    """What inputs became.

    Attributes:
        files: what is to be sent, each within the server's limits.
        sources: the fingerprints of the inputs themselves.
        making: the fingerprint of how they became requests.
        groups: the requests by model and url, in order of first appearance.
        rows: how many there are.
        repeats: how many have the same body as an earlier one; they cost as much, and perhaps are not meant.
    """

    files: tuple[Input, ...]
    sources: tuple[Fingerprint, ...]
    making: str
    groups: tuple[Group, ...]
    rows: int
    repeats: int

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(file.size for file in self.files)

    @property
    def requests_size(self) -> int:
        """Bytes of all requests together, also where no files were made."""
        return sum(group.size for group in self.groups)


def fingerprints(
    inputs: Sequence[str], making: Making, folder: Path | None = None, *, stdin: BinaryIO | None = None
) -> tuple[Fingerprint, ...]:
    """The fingerprints of the inputs, without a look at their rows.

    Raises:
        SettingsError: as for `prepare_inputs`.
        ResumeError: stdin is not what was kept of it before.
    """
    return tuple(
        fingerprint(source) for source in resolve_sources(inputs, format=making.format, folder=folder, stdin=stdin)
    )


def prepare_inputs(
    inputs: Sequence[str],
    making: Making,
    folder: Path | None,
    *,
    stdin: BinaryIO | None = None,
    limits: ServerLimits | None = None,
) -> Prepared:
    """Check all inputs, and make what is to be sent.

    Args:
        inputs: paths, globs, `-`.
        making: how rows become requests.
        folder: for `requests-N.jsonl` and stdin; None to only check: then nothing is written, and `files` is empty.
        stdin: what `-` means.
        limits: of the server.

    Raises:
        InputError: at least one row is bad; it has the first of all problems, and their number.
        SettingsError: an input is missing or unreadable, or `making` cannot work.
        ResumeError: stdin is not what was kept of it before, or an input changed meanwhile.
    """
    limits = limits or ServerLimits()
    sources = resolve_sources(inputs, format=making.format, folder=folder, stdin=stdin)
    reading = _Reading(sources, making, limits)
    reading.run(None)
    files: list[Input] = []
    if folder is not None:
        used = [reading.usable(source) for source in sources]
        files = [found for found in used if found is not None]
        rest = [source for source, found in zip(sources, used, strict=True) if found is None]
        if rest:
            with NumberedFiles(folder, limits) as written:
                reading.run(written, set(map(name_of, rest)))
                files += written.finish()
            for source in rest:
                if fingerprint(source) != reading.fingerprint(source):
                    raise ResumeError(
                        f"the input {source.name} changed while it was read; run this again once it rests"
                    )
    prints = tuple(reading.fingerprint(source) for source in sources)
    groups = tuple(reading.groups.values())
    return Prepared(
        tuple(files), prints, making.fingerprint, groups, sum(g.requests for g in groups), reading.repeats.count()
    )


class _Reading:
    """All inputs being read: once to check them, and once more to write them if there is something to write."""

    def __init__(self, sources: Sequence[Source], making: Making, limits: ServerLimits) -> None:
        self._sources = sources
        self._making = making
        self._limits = limits
        self.groups: dict[tuple[str, str], Group] = {}
        self.repeats = Duplicates()
        self._digests = {name_of(source): hashlib.sha256() for source in sources if source.format == "jsonl"}
        self._sizes = dict.fromkeys(self._digests, 0)
        # Before the rows are read: a change in between is then seen, and not taken for what was read.
        self._tables = {name_of(source): fingerprint(source) for source in sources if source.format != "jsonl"}
        self._counts: dict[str, dict[tuple[str, str], int]] = {}
        self._changed: set[str] = set()
        self._names = {source.name: name_of(source) for source in sources}

    def run(self, written: NumberedFiles | None, only: set[str] | None = None) -> None:
        """Read all rows.

        Args:
            written: where they go; None to check them.
            only: the sources whose rows are written.
        """
        problems: list[InputProblem] = []
        count = 0
        number = 0
        checking = written is None
        for row in rows_of(self._sources, self._making, self._limits.of_a_file, tap=self._tap if checking else None):
            if isinstance(row, InputProblem):
                count += 1
                if len(problems) < MAX_PROBLEMS and row.message:
                    problems.append(row)
                continue
            number += 1
            if checking:
                self._count(row, number)
            elif only is None or self._names[row.source] in only:
                assert written is not None
                written.write(row)
        if count:
            raise InputError(tuple(problems), count)

    def _tap(self, source: Source, piece: bytes) -> None:
        name = name_of(source)
        self._digests[name].update(piece)
        self._sizes[name] += len(piece)

    def _count(self, row: Row, number: int) -> None:
        key = (row.model, row.url)
        group = self.groups.get(key)
        if group is None:
            group = self.groups[key] = Group(*key)
        body, tokens = count_tokens(row.line, row.url)
        group.add(row.line, tokens)
        self.repeats.add(body, number)
        name = self._names[row.source]
        counts = self._counts.setdefault(name, {})
        counts[key] = counts.get(key, 0) + 1
        if row.changed:
            self._changed.add(name)

    def usable(self, source: Source) -> Input | None:
        """A source as a file that can be sent where it is; None where it must be written anew."""
        name = name_of(source)
        limits = self._limits
        counts = self._counts.get(name, {})
        requests = sum(counts.values())
        if (
            source.format != "jsonl"
            or name in self._changed
            or self._sizes[name] > limits.file_bytes
            or requests > limits.requests
            or (limits.one_model and len({model for model, _ in counts}) > 1)
            or (limits.one_url and len({url for _, url in counts}) > 1)
        ):
            return None
        url = next(iter(counts))[1]
        return Input(str(source.path.resolve()), self._sizes[name], self._digests[name].hexdigest(), requests, url)

    def fingerprint(self, source: Source) -> Fingerprint:
        """The fingerprint of a source as it was read."""
        name = name_of(source)
        if name in self._digests:
            return Fingerprint(name, self._sizes[name], self._digests[name].hexdigest())
        return self._tables[name]
