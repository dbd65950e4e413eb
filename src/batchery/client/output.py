"""A file that results are appended to, line by line, and never in halves.

A record that broke off on its way is taken back, so that what is in the file is a prefix of what the server has; the
number of its lines is all that a resume needs.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from batchery.wire import strict_json

CHUNK = 1024 * 1024


class LineFile:
    """An append-only file of lines. It is created with its first byte.

    Args:
        path: where. What is there is kept, but for a last line without an end.

    Attributes:
        lines: complete lines in the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines, self._size = _complete_lines(path)
        self._file: BinaryIO | None = None
        if path.exists() and path.stat().st_size > self._size:
            self._writable().truncate(self._size)

    @property
    def size(self) -> int:
        """Bytes of the lines in it."""
        return self._size

    def append(self, chunks: Iterable[bytes], skip: int = 0) -> int:
        """Append the complete lines of a body, also where the body breaks off with an exception, which passes through.

        A last line without a line break is taken as complete if it is a JSON object, which a cut one cannot be.

        Args:
            chunks: the body; lines end with `\\n` alone.
            skip: how many lines at its beginning to leave out, because they are here already.

        Returns:
            The lines in the body, with those left out.
        """
        seen = 0
        pending = 0  # bytes at the end of the file that are not yet a line
        try:
            for chunk in chunks:
                piece, skipped = _after_lines(chunk, skip - seen)
                seen += skipped
                if not piece:
                    continue
                file = self._writable()
                file.write(piece)
                breaks = piece.count(b"\n")
                if breaks:
                    whole = pending + piece.rindex(b"\n") + 1
                    self._size += whole
                    pending += len(piece) - whole
                    self.lines += breaks
                    seen += breaks
                else:
                    pending += len(piece)
            if pending and self._tail_is_object(pending):
                self._writable().write(b"\n")
                self._size += pending + 1
                self.lines += 1
                seen += 1
                pending = 0
        finally:
            if self._file is not None:
                self._file.flush()
                if pending:
                    self._file.truncate(self._size)
                    self._file.seek(self._size)
        return seen

    def cut(self, lines: int) -> None:
        """Keep only the first lines.

        Args:
            lines: how many; at most as many as there are.
        """
        self.lines, self._size = _complete_lines(self.path, lines)
        if self.path.exists():
            file = self._writable()
            file.truncate(self._size)
            file.seek(self._size)

    def flush(self) -> None:
        """Let others who read the file see everything appended."""
        if self._file is not None:
            self._file.flush()

    def sync(self) -> None:
        """Return when everything appended is on disk."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Sync, and close."""
        if self._file is not None:
            self.sync()
            self._file.close()
            self._file = None

    def _writable(self) -> BinaryIO:
        if self._file is None:
            self._file = self.path.open("r+b" if self.path.exists() else "x+b")
            self._file.seek(self._size)
        return self._file

    def _tail_is_object(self, length: int) -> bool:
        file = self._writable()
        file.seek(self._size)
        tail = file.read(length)
        file.seek(self._size + length)
        # By grammar, not by decoding: a model's answer may hold half an emoji or a number beyond any float.
        return tail.lstrip().startswith(b"{") and strict_json.is_json(tail)


def _after_lines(chunk: bytes, count: int) -> tuple[bytes, int]:
    """What is left of a piece after so many lines, and how many of them ended in it."""
    if count <= 0:
        return chunk, 0
    start = skipped = 0
    while skipped < count:
        end = chunk.find(b"\n", start)
        if end < 0:
            return b"", skipped
        start = end + 1
        skipped += 1
    return chunk[start:], skipped


def _complete_lines(path: Path, most: int | None = None) -> tuple[int, int]:
    """How many complete lines a file has, counted up to `most`, and the bytes that they take; (0, 0) without one."""
    lines = size = position = 0
    try:
        with path.open("rb") as file:
            while (most is None or lines < most) and (chunk := file.read(CHUNK)):
                breaks = chunk.count(b"\n")
                if most is not None and lines + breaks >= most:
                    rest = _after_lines(chunk, most - lines)[0]
                    return most, position + len(chunk) - len(rest)
                if breaks:
                    size = position + chunk.rindex(b"\n") + 1
                lines += breaks
                position += len(chunk)
    except FileNotFoundError:
        return 0, 0
    return lines, size
