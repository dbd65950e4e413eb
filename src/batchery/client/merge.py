"""Output and error files of several batches made one, with one line for each `custom_id`.

Of several lines for one `custom_id` a good answer wins over a failure, as after a retry, and among equals the first.
Memory is about 17 bytes a line: lines are told apart by hash, and equal hashes are looked at again before one goes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from batchery.client.duplicates import Duplicates
from batchery.client.errors import SettingsError
from batchery.client.result_lines import ResultLine, read_results
from batchery.client.sources import sync_folder


class Merged(msgspec.Struct, frozen=True):
    """What became of the lines.

    Attributes:
        rows: written.
        ok: of them good answers.
        failed: of them failures.
        same: left out because an equal line was written.
        superseded: failures left out for a good answer.
        conflicting: left out for an earlier line that says something else.
        conflicts: the first `custom_id`s of those.
    """

    rows: int
    ok: int
    failed: int
    same: int
    superseded: int
    conflicting: int
    conflicts: tuple[str, ...]


def merge_results(paths: Sequence[Path], out: Path, *, strict: bool = False) -> Merged:
    """Write one file of all.

    Args:
        strict: refuse, and write nothing, when two lines of one `custom_id` say different things.

    Raises:
        InputError: a line is not a result.
        SettingsError: a file cannot be read or is also the output; or `strict`, and there are conflicts.
    """
    for path in paths:
        if path.resolve() == out.resolve():
            raise SettingsError(f"{path} is both input and output")
    ids = Duplicates()
    good = bytearray()
    for number, line in _numbered(paths):
        good.append(line.ok)
        ids.add(line.custom_id if line.custom_id is not None else f"\0{number}", number)  # no id: never a double
    pairs = ids.pairs()
    left_out, same, superseded, conflicts = _losers(paths, pairs, good)
    if strict and conflicts:
        raise SettingsError(f"{len(conflicts)} custom_ids have different results, such as {conflicts[0]!r}")
    ok = rows = 0
    new = out.with_name(out.name + ".new")
    try:
        with new.open("wb") as file:
            for number, line in _numbered(paths):
                if number not in left_out:
                    file.write(line.raw + b"\n")
                    rows += 1
                    ok += line.ok
            file.flush()
            os.fsync(file.fileno())
        new.replace(out)
    finally:
        new.unlink(missing_ok=True)
    sync_folder(out.parent)
    return Merged(rows, ok, rows - ok, same, superseded, len(conflicts), tuple(conflicts[:10]))


def _numbered(paths: Sequence[Path]) -> Iterator[tuple[int, ResultLine]]:
    number = 0
    for path in paths:
        for line in read_results(path):
            yield number, line
            number += 1


def _losers(
    paths: Sequence[Path], pairs: list[tuple[int, int]], good: bytearray
) -> tuple[set[int], int, int, list[str]]:
    """The lines that are left out: how many are equal to one that stays, how many failures gave way to an answer, and
    the `custom_id`s of the others."""
    left_out: set[int] = set()
    same = superseded = 0
    conflicts: list[str] = []
    if not pairs:
        return left_out, same, superseded, conflicts
    involved = {number for pair in pairs for number in pair}
    seen = {number: (line.custom_id, hash(line.raw)) for number, line in _numbered(paths) if number in involved}
    winners: dict[int, int] = {}
    for later, first in pairs:
        if seen[later][0] != seen[first][0]:
            continue  # equal hashes by chance
        winner = winners.get(first, first)
        if seen[later][1] == seen[winner][1]:
            left_out.add(later)
            same += 1
        elif good[later] and not good[winner]:
            left_out.add(winner)
            winners[first] = later
            superseded += 1
        else:
            left_out.add(later)
            if good[winner] and not good[later]:
                superseded += 1
            else:
                conflicts.append(seen[later][0] or "")
    return left_out, same, superseded, conflicts
