"""Offline work on request files: making one of any inputs, and parting one by a server's limits. Nothing appears under
its name before all rows have been found good.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from batchery.client.errors import InputError, InputProblem, SettingsError
from batchery.client.inputs import Input
from batchery.client.limits import ServerLimits
from batchery.client.making import Making
from batchery.client.numbered_files import NumberedFiles, numbered
from batchery.client.rows import Row, rows_of
from batchery.client.sources import Source, resolve_sources, sync_folder
from batchery.wire.lines import MAX_PROBLEMS, Limits


def make_requests(
    inputs: Sequence[str],
    making: Making,
    out: Path,
    *,
    stdin: BinaryIO | None = None,
    limits: Limits | None = None,
) -> int:
    """Write the requests of all inputs to one file, and say how many there are.

    Raises:
        InputError: at least one row is bad; the file is as it was before.
        SettingsError: an input is missing or unreadable, or it is also the output.
    """
    sources = resolve_sources(inputs, format=making.format, stdin=stdin)
    _refuse_own_input(sources, [out])
    new = out.with_name(out.name + ".new")
    rows = 0
    try:
        with new.open("wb") as file:
            for row in _good(sources, making, limits):
                file.write(row.line)
                rows += 1
            file.flush()
            os.fsync(file.fileno())
        new.replace(out)
    finally:
        new.unlink(missing_ok=True)
    sync_folder(out.parent)
    return rows


def split_requests(
    inputs: Sequence[str], folder: Path, stem: str, limits: ServerLimits, *, overwrite: bool = False
) -> list[Input]:
    """Part request files into `STEM-N.jsonl` in a folder, each within the limits.

    Raises:
        InputError: at least one line is bad; nothing is written.
        SettingsError: an input is missing or unreadable, or such files are there already.
    """
    sources = resolve_sources(inputs, format="jsonl")
    there = numbered(folder, stem) if folder.is_dir() else []
    _refuse_own_input(sources, there)
    if there and not overwrite:
        raise SettingsError(f"{there[0]} exists already; move it away, name another folder with -o, or say --overwrite")
    with NumberedFiles(folder, limits, stem) as files:
        for row in _good(sources, Making(), limits.of_a_file):
            files.write(row)
        return files.finish()


def _good(sources: Sequence[Source], making: Making, limits: Limits | None) -> Iterator[Row]:
    """The rows; behind the last of them it raises if any was bad."""
    problems: list[InputProblem] = []
    count = 0
    for row in rows_of(sources, making, limits):
        if isinstance(row, Row):
            yield row
            continue
        count += 1
        if len(problems) < MAX_PROBLEMS and row.message:
            problems.append(row)
    if count:
        raise InputError(tuple(problems), count)


def _refuse_own_input(sources: Sequence[Source], outputs: Sequence[Path]) -> None:
    real = {source.path.resolve() for source in sources}
    for path in outputs:
        if path.resolve() in real:
            raise SettingsError(f"{path} is both input and output")
