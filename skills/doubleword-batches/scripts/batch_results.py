"""A local file of result lines that grows as they land. It must never hold a line twice or half a line.

The file itself is the memory: whatever stops the process, the next one cuts off half a line at its end and goes on
after the lines that are there. Lines are told apart by `custom_id`, so a server that repeats what it sent already, or
that knows no way to start in the middle, does no harm.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import BinaryIO, Iterable, Iterator, Set, Tuple

import batch_api
from batch_state import sync_folder
from exits import StopError

Key = Tuple[str, object]


class ResultFile:
    """A result file, and what is in it. Use as a context manager.

    Args:
        path: of the file; made if it is not there.

    Attributes:
        lines: that are in it.
        keys: of these lines.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines = 0
        self.keys: Set[Key] = set()
        self._file: BinaryIO = path.open("a+b")

    def __enter__(self) -> ResultFile:
        self._file.seek(0)
        whole = 0
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            whole += len(line)
            self.lines += 1
            self.keys.add(key_of(line))
        self._file.truncate(whole)
        self._file.seek(0, os.SEEK_END)
        sync_folder(self.path.parent)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        # What could not be written, and has been told, is tried once more by `close`.
        with contextlib.suppress(OSError) if kind else contextlib.nullcontext():
            self._file.close()

    def append(self, blocks: Iterable[bytes]) -> int:
        """Take the new ones among the lines of a download, as far as it comes.

        Returns:
            How many there were.

        Raises:
            LostError: it ended within a line. The lines before it are taken.
        """
        before = self.lines
        try:
            for line, ended in _lines(blocks):
                if not ended and not _is_json(line):
                    raise batch_api.LostError("the download broke off within a line")
                key = key_of(line)
                if line.strip() and key not in self.keys:
                    with self._told():
                        self._file.write(line + b"\n")
                    self.keys.add(key)
                    self.lines += 1
        finally:
            with self._told():
                self._file.flush()
                os.fsync(self._file.fileno())
        return self.lines - before

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        # Beside a download, an error of this disk would be taken for one of the connection.
        try:
            yield
        except OSError as error:
            raise StopError("%s cannot be written: %s" % (self.path, error.strerror or error)) from None

    def start_over(self) -> None:
        """Put the file aside, as `NAME.old`, and begin an empty one."""
        self._file.close()
        self.path.replace(self.path.with_name(self.path.name + ".old"))
        self._file = self.path.open("a+b")
        self.lines, self.keys = 0, set()


def key_of(line: bytes) -> Key:
    """What tells a result line from the others of its file.

    That is its `custom_id`; bad lines of an input may share one, and have their line number besides.
    """
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return "", line.rstrip(b"\r\n")
    if not isinstance(value, dict) or not isinstance(value.get("custom_id"), str):
        return "", line.rstrip(b"\r\n")
    number = value.get("line")
    return value["custom_id"], number if isinstance(number, int) else None


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _lines(blocks: Iterable[bytes]) -> Iterator[Tuple[bytes, bool]]:
    """The lines in blocks of any size, and of each whether its end came."""
    rest = []
    for block in blocks:
        start = 0
        end = block.find(b"\n")
        while end >= 0:
            rest.append(block[start:end])
            yield b"".join(rest).rstrip(b"\r"), True
            rest = []
            start, end = end + 1, block.find(b"\n", end + 1)
        if start < len(block):
            rest.append(block[start:])
    if rest:
        yield b"".join(rest), False
