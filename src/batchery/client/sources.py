"""Which files an input means, and of what form they are: globs, several names, and `-` for stdin, which is kept in a
file, since a job must be able to read its inputs again.
"""

from __future__ import annotations

import glob
import hashlib
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import msgspec

from batchery.client.errors import ResumeError, SettingsError
from batchery.client.inputs import CHUNK, open_input

STDIN = "-"

_EXTENSIONS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
}


class Source(msgspec.Struct, frozen=True):
    """One file of the inputs.

    Attributes:
        name: as the user knows it; `-` for stdin.
        path: where its bytes are.
        format: `jsonl`, `csv`, `tsv` or `parquet`.
    """

    name: str
    path: Path
    format: str

    @property
    def folder(self) -> Path:
        """What relative paths in it are relative to."""
        return Path.cwd() if self.name == STDIN else self.path.parent


class Fingerprint(msgspec.Struct, frozen=True):
    """By which a later run tells whether an input is still the same.

    Attributes:
        path: absolute; `-` for stdin.
        size: bytes.
        sha256: of its bytes, in hex.
    """

    path: str
    size: int
    sha256: str


def resolve_sources(
    inputs: Sequence[str], *, format: str | None = None, folder: Path | None = None, stdin: BinaryIO | None = None
) -> list[Source]:
    """The files that the inputs mean, in the order of the inputs, those of a glob by name.

    Args:
        inputs: paths, globs, `-`.
        format: of all of them; None to tell by name and content.
        folder: where stdin is kept; None for a file that is gone with this process.
        stdin: what `-` means; None where it can only mean what was kept in `folder` before.

    Raises:
        SettingsError: an input is missing, matches nothing, cannot be read, is named twice, or is not named in UTF-8.
        ResumeError: stdin is not what was kept of it before.
    """
    sources: list[Source] = []
    for name in inputs:
        if name == STDIN:
            path = spool(stdin, folder)
            sources.append(Source(STDIN, path, format or _format_of(path, "")))
            continue
        for path in _paths(name):
            sources.append(Source(str(path), path, format or _format_of(path, path.suffix)))
    seen: set[Path] = set()
    for source in sources:
        real = source.path.resolve()
        if any("\ud800" <= character <= "\udfff" for character in str(real)):
            raise SettingsError(f"the path {str(real)!a} is not UTF-8, and could not be written down; rename it")
        if real in seen:
            raise SettingsError(f"the input {source.name} is named twice")
        seen.add(real)
    if not sources:
        raise SettingsError("name at least one INPUT")
    return sources


def fingerprint(source: Source) -> Fingerprint:
    """The fingerprint of a file.

    Raises:
        SettingsError: it cannot be read.
    """
    digest, size = hashlib.sha256(), 0
    with open_input(source.path) as file:
        while piece := file.read(CHUNK):
            digest.update(piece)
            size += len(piece)
    return Fingerprint(name_of(source), size, digest.hexdigest())


def name_of(source: Source) -> str:
    """What a fingerprint calls a source: its absolute path, or `-`."""
    return STDIN if source.name == STDIN else str(source.path.resolve())


def spool(stdin: BinaryIO | None, folder: Path | None) -> Path:
    """Keep stdin in a file, durably.

    Args:
        stdin: None where it can only mean what was kept before.
        folder: to keep it in; None for one that is gone with this process.

    Raises:
        SettingsError: there is nothing to read.
        ResumeError: something else was kept before.
    """
    if folder is None:
        if stdin is None:
            raise SettingsError("the input - means stdin, but there is none")
        handle, name = tempfile.mkstemp(prefix="batchery-stdin-")
        _REMOVED_AT_EXIT.append(Path(name))
        with os.fdopen(handle, "wb") as file:
            shutil.copyfileobj(stdin, file, CHUNK)
        return Path(name)
    kept = folder / "stdin"
    if stdin is None or stdin.isatty():
        if not kept.exists():
            raise SettingsError("the input - means stdin, but nothing is piped into it")
        return kept
    new = folder / "stdin.new"
    with new.open("wb") as file:
        shutil.copyfileobj(stdin, file, CHUNK)
        file.flush()
        os.fsync(file.fileno())
    if kept.exists():
        same = _digest(kept) == _digest(new)
        empty = new.stat().st_size == 0  # a resume without a pipe, as from cron
        new.unlink()
        if not same and not empty:
            raise ResumeError("what comes from stdin is not what this job began with")
        return kept
    new.replace(kept)
    sync_folder(folder)
    return kept


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _paths(name: str) -> list[Path]:
    path = Path(name)
    if path.exists() or not glob.has_magic(name):
        if path.exists() and not path.is_file() and not path.is_dir():
            raise SettingsError(f"the input {path} is no file that can be read twice; pipe it in, and name it -")
        open_input(path).close()
        return [path]
    found = sorted(Path(match) for match in glob.iglob(name, recursive=True))  # noqa: PTH207  # absolute patterns, too
    files = [match for match in found if match.is_file()]
    if not files:
        raise SettingsError(f"the input {name} matches no file")
    for file in files:
        open_input(file).close()
    return files


def _format_of(path: Path, suffix: str) -> str:
    """By the name's end where that says it, otherwise by how the content begins."""
    known = _EXTENSIONS.get(suffix.lower())
    if known is not None:
        return known
    with open_input(path) as file:
        start = file.read(CHUNK)
    if start.startswith(b"PAR1"):
        return "parquet"
    first = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not first or first.startswith((b"{", b"[")):
        return "jsonl"
    line = first.split(b"\n", 1)[0]
    return "tsv" if b"\t" in line and b"," not in line else "csv"


class _Removed(list[Path]):
    """Temporary files, removed when the process ends."""

    def __del__(self) -> None:
        for path in self:
            path.unlink(missing_ok=True)


_REMOVED_AT_EXIT = _Removed()
