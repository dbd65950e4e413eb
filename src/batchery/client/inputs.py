"""Checking input files before anything is sent: every problem with its file and line, and the fingerprint by which a
later run tells whether a file is still the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import msgspec

from batchery.client.errors import InputError, InputProblem, ResumeError, SettingsError
from batchery.wire.file_index import FileIndex
from batchery.wire.lines import MAX_PROBLEMS, Limits, Problem, read_request
from batchery.wire.validation import validate

CHUNK = 256 * 1024


class Input(msgspec.Struct, frozen=True):
    """An input file that was found good, or a piece of one.

    Attributes:
        path: absolute.
        size: bytes.
        sha256: of these bytes, in hex.
        requests: how many are in them.
        url: what the first request is for.
        start: where in the file they begin; 0 unless this is a later piece.
    """

    path: str
    size: int
    sha256: str
    requests: int
    url: str
    start: int = 0


def check_inputs(paths: Sequence[Path], limits: Limits | None = None) -> list[Input]:
    """Check batch files in the JSONL form of OpenAI's batch API, one after the other.

    Args:
        paths: the files. A `custom_id` may appear once in all of them together, since their results go to one place.
        limits: the server's, as far as they are known.

    Raises:
        InputError: at least one line is bad; it has all problems of all files.
        SettingsError: a file is missing or cannot be read.
    """
    limits = limits or Limits()
    inputs: list[Input] = []
    problems: list[InputProblem] = []
    count = 0
    seen: dict[str, tuple[Path, int]] | None = {} if len(paths) > 1 else None
    for path in paths:
        with open_input(path) as file:
            digest = hashlib.sha256()
            report = validate(_hashed(file, digest.update), limits, _reader(file))
            # Reading ends early at the first request too many, and the size is then not the file's.
            size = file.seek(0, 2)
            found = list(report.problems)
            count += report.problem_count
            if size > limits.file_bytes:
                found.insert(0, _too_large(size, limits))
                count += 1
            if seen is not None:
                repeated = _repeated(path, report.index, _reader(file), seen)
                found += repeated
                count += len(repeated)
        problems += (InputProblem(str(path), problem.line, problem.code, problem.message) for problem in found)
        if not found:
            url = report.index.urls[0]
            inputs.append(Input(str(path.resolve()), size, digest.hexdigest(), len(report.index), url))
    if count:
        raise InputError(tuple(problems[:MAX_PROBLEMS]), count)
    return inputs


def open_input(path: Path) -> BinaryIO:
    """Open an input for reading.

    Raises:
        SettingsError: it is missing, a folder, or not readable.
    """
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise SettingsError(f"the input {path} does not exist") from None
    except IsADirectoryError:
        raise SettingsError(f"the input {path} is a folder; name the files in it") from None
    except OSError as error:
        raise SettingsError(f"the input {path} cannot be read: {error.strerror}") from None


class VerifiedFile:
    """An input, or a piece of one, opened for its upload. It lets its last bytes go only if they are still those that
    were checked, so that what was changed in between is never sent whole.
    """

    def __init__(self, source: Input) -> None:
        self._source = source
        self._file = open_input(Path(source.path))
        self._file.seek(source.start)
        self._digest = hashlib.sha256()
        self._read = 0

    def __enter__(self) -> VerifiedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, size: int) -> bytes:
        """The next bytes, at most `size`.

        Raises:
            ResumeError: the file is no longer what it was when it was checked.
        """
        piece = self._file.read(min(size, self._source.size - self._read))
        self._digest.update(piece)
        self._read += len(piece)
        if not piece and self._read < self._source.size:
            raise ResumeError(f"the input {self._source.path} changed its size while it was being sent")
        if self._read == self._source.size and self._digest.hexdigest() != self._source.sha256:
            raise ResumeError(f"the input {self._source.path} was changed after it was checked")
        return piece


def _hashed(file: BinaryIO, update: Callable[[bytes], None]) -> Iterator[bytes]:
    while piece := file.read(CHUNK):
        update(piece)
        yield piece


def _reader(file: BinaryIO) -> Callable[[int, int], bytes]:
    def read(start: int, length: int) -> bytes:
        file.seek(start)
        return file.read(length)

    return read


def _too_large(size: int, limits: Limits) -> Problem:
    return Problem(
        "file_too_large", f"The file has {size} bytes; the most is {limits.file_bytes}. Split it into smaller files."
    )


def _repeated(
    path: Path, index: FileIndex, read: Callable[[int, int], bytes], seen: dict[str, tuple[Path, int]]
) -> list[Problem]:
    """The `custom_id`s of this file that an earlier one has; notes the rest as seen. Repeats within a file are not its
    business.
    """
    problems = []
    for request in range(len(index)):
        custom_id = read_request(read(index.starts[request], index.lengths[request])).custom_id
        line = index.number(request)
        other, other_line = seen.setdefault(custom_id, (path, line))
        if other is not path:
            problems.append(
                Problem(
                    "duplicate_custom_id",
                    f"Line {line}: custom_id {custom_id!r} was already used in {other} on line {other_line}. "
                    "Results of all inputs go to one file, so each must be unique.",
                    "custom_id",
                    line,
                    custom_id,
                )
            )
    return problems


def megabytes(size: int) -> str:
    """A size in bytes as people read it."""
    if size < 1000:
        return f"{size} bytes"
    return f"{size / 1000:.0f} kB" if size < 1_000_000 else f"{size / 1_000_000:.1f} MB"
