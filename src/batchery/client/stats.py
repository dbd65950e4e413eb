"""What is in a result file, in numbers: answers, failures and their reasons, statuses, tokens, models, latencies.
Memory stays flat: of latencies a sample is kept, of reasons the first thousand kinds.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from batchery.client.result_lines import read_results
from batchery.wire.results import InvalidBody, Usage, check_answer

_MOST_KINDS = 1_000
_LATENCIES = 20_000


class ResultStats(msgspec.Struct):
    """The numbers.

    Attributes:
        statuses: lines by HTTP status; `none` where there was no answer.
        reasons: failures by reason.
        models: answers by the model that they name.
        finish_reasons: answers by why they end.
        usage: tokens, summed.
        counted: how many answers say their tokens.
        latencies: milliseconds, of the lines that have them, or a random sample of them.
        timed: how many have them.
    """

    rows: int = 0
    ok: int = 0
    failed: int = 0
    statuses: Counter[str] = msgspec.field(default_factory=Counter)
    reasons: Counter[str] = msgspec.field(default_factory=Counter)
    models: Counter[str] = msgspec.field(default_factory=Counter)
    finish_reasons: Counter[str] = msgspec.field(default_factory=Counter)
    usage: Usage = msgspec.field(default_factory=Usage)
    counted: int = 0
    latencies: list[float] = msgspec.field(default_factory=list)
    timed: int = 0

    def latency(self, share: float) -> float | None:
        """The latency that this share of the lines stays within; None where no line has one."""
        if not self.latencies:
            return None
        ordered = sorted(self.latencies)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


class _Answer(msgspec.Struct):
    model: Any = None
    choices: Any = None
    status: Any = None


_read = msgspec.json.Decoder(_Answer).decode


def result_stats(paths: Sequence[Path]) -> ResultStats:
    """Count the lines of result files.

    Raises:
        InputError: a line is not a result.
        SettingsError: a file cannot be read.
    """
    stats = ResultStats()
    chance = random.Random(0)  # noqa: S311  # which latencies are kept is no secret
    for path in paths:
        for line in read_results(path):
            stats.rows += 1
            stats.statuses[str(line.status) if line.status is not None else "none"] += 1
            if line.latency is not None:
                stats.timed += 1
                if len(stats.latencies) < _LATENCIES:
                    stats.latencies.append(line.latency)
                elif (place := chance.randrange(stats.timed)) < _LATENCIES:
                    stats.latencies[place] = line.latency
            if not line.ok:
                stats.failed += 1
                _add(stats.reasons, line.reason)
                continue
            stats.ok += 1
            if line.body is not None:
                _look(stats, line.body)
    return stats


def _look(stats: ResultStats, body: bytes) -> None:
    try:
        usage = check_answer(body)[1]
        answer = _read(body)
    except (InvalidBody, msgspec.MsgspecError, RecursionError):
        return
    if usage is not None:
        stats.usage.add(usage)
        stats.counted += 1
    if type(answer.model) is str:
        _add(stats.models, answer.model)
    if type(answer.choices) is list:
        for choice in answer.choices:
            if type(choice) is dict and type(choice.get("finish_reason")) is str:
                _add(stats.finish_reasons, choice["finish_reason"])
    elif type(answer.status) is str:
        _add(stats.finish_reasons, answer.status)


def _add(counts: Counter[str], key: str) -> None:
    counts[key if key in counts or len(counts) < _MOST_KINDS else "other"] += 1
