"""Writing requests to numbered files within a server's limits, which appear under their names only when all of them are
whole and durable.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from batchery.client.inputs import Input
from batchery.client.limits import ServerLimits
from batchery.client.rows import Row
from batchery.client.sources import sync_folder

_BUFFER = 1024 * 1024
_NEW = ".new"


class NumberedFiles:
    """The numbered files that requests are written to.

    Args:
        folder: made if it is not there.
        limits: of each file.
        stem: of their names, `STEM-N.jsonl`.
    """

    def __init__(self, folder: Path, limits: ServerLimits, stem: str = "requests") -> None:
        self._folder = folder
        self._stem = stem
        self._limits = limits
        self._open: dict[tuple[str, str], _File] = {}
        self._all: list[_File] = []

    def __enter__(self) -> NumberedFiles:
        self._folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._all:
            file.discard()

    def write(self, row: Row) -> None:
        """Append a request to a file that has room for it."""
        limits = self._limits
        key = (row.model if limits.one_model else "", row.url if limits.one_url else "")
        file = self._open.get(key)
        if file is None or not file.has_room(len(row.line), limits):
            if file is not None:
                file.close()
            name = f"{self._stem}-{len(self._all) + 1}.jsonl"
            file = self._open[key] = _File(self._folder / name, row.url)
            self._all.append(file)
        file.write(row.line)

    def finish(self) -> list[Input]:
        """Make all files durable under their names; files of an earlier run that are not among them go."""
        for file in self._all:
            file.close()
        names = {file.path.name for file in self._all}
        for old in numbered(self._folder, self._stem):
            if old.name not in names:
                old.unlink()
        inputs = [file.rename() for file in self._all]
        sync_folder(self._folder)
        return inputs


def numbered(folder: Path, stem: str) -> list[Path]:
    """The files of an earlier run."""
    return [path for path in folder.glob("*.jsonl") if re.fullmatch(re.escape(stem) + r"-\d+\.jsonl", path.name)]


class _File:
    """One of them, under a passing name until all are whole."""

    def __init__(self, path: Path, url: str) -> None:
        self.path = path
        self._new = path.with_name(path.name + _NEW)
        self._file = self._new.open("wb", buffering=_BUFFER)
        self._digest = hashlib.sha256()
        self._size = 0
        self._requests = 0
        self._url = url

    def has_room(self, size: int, limits: ServerLimits) -> bool:
        return self._requests < limits.requests and self._size + size <= limits.file_bytes

    def write(self, line: bytes) -> None:
        self._file.write(line)
        self._digest.update(line)
        self._size += len(line)
        self._requests += 1

    def close(self) -> None:
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def rename(self) -> Input:
        self._new.replace(self.path)
        path = str(self.path.resolve())
        return Input(path, self._size, self._digest.hexdigest(), self._requests, self._url)

    def discard(self) -> None:
        """Leave nothing behind, if it was not renamed."""
        self._file.close()
        self._new.unlink(missing_ok=True)
