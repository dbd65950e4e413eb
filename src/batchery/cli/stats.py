"""`batchery stats`: what is in a request or a result file, in numbers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from batchery.cli.failures import told
from batchery.cli.making_options import named
from batchery.cli.tables import Format, FormatOption, show
from batchery.client.errors import SettingsError
from batchery.client.limits import ServerLimits
from batchery.client.making import Making
from batchery.client.prepare import prepare_inputs
from batchery.client.result_lines import is_result_file
from batchery.client.stats import ResultStats, result_stats

TOP = 10


def stats(
    files: Annotated[list[str] | None, typer.Argument(metavar="FILE...", help="Request or result files.")] = None,
    *,
    top: Annotated[int, typer.Option(metavar="N", min=1, help="How many reasons, models and so on.")] = TOP,
    format: FormatOption = Format.TABLE,
) -> None:
    """Count what is in files: of requests models, endpoints, bytes and tokens; of results statuses, tokens, reasons.

    Latencies are there where the server writes latency_ms or duration_ms into its lines.

    \b
    Examples:
      batchery stats requests.jsonl
      batchery stats results.jsonl results.errors.jsonl --format json

    \b
    Exit codes:
      0  counted
      1  wrong usage
      2  a line is neither
    """
    with told():
        names = named(files)
        kinds = {is_result_file(Path(name)) for name in names}
        if len(kinds) > 1:
            raise SettingsError("some files have requests and some results; name files of one kind")
        if True in kinds:
            found = result_stats([Path(name) for name in names])
            show(_records(found, top), format, whole=_whole(found, top))
            return
        prepared = prepare_inputs(names, Making(format="jsonl"), None, limits=ServerLimits())
        records = [
            {
                "model": group.model,
                "endpoint": group.url,
                "requests": group.requests,
                "bytes": group.size,
                "input_tokens_estimated": group.input_tokens,
                "images": group.images,
                "with_max_tokens": group.limited,
            }
            for group in prepared.groups
        ]
        show(records, format)
        if prepared.repeats:
            typer.echo(f"{prepared.repeats} requests have the same body as an earlier one.", err=True)


def _top(counts: Counter[str], top: int) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:top]


def _records(found: ResultStats, top: int) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = [
        {"what": "rows", "value": found.rows},
        {"what": "ok", "value": found.ok},
        {"what": "failed", "value": found.failed},
    ]
    records += ({"what": f"{name}", "value": value} for name, value in msgspec.to_builtins(found.usage).items())
    records.append({"what": "answers with tokens", "value": found.counted})
    for name, counts in _kinds(found):
        records += ({"what": f"{name} {key}", "value": value} for key, value in _top(counts, top))
    if found.timed:
        records += ({"what": f"latency {name} ms", "value": value} for name, value in _latency(found).items())
    return records


def _whole(found: ResultStats, top: int) -> dict[str, Any]:
    return {
        "rows": found.rows,
        "ok": found.ok,
        "failed": found.failed,
        "usage": msgspec.to_builtins(found.usage),
        "answers_with_tokens": found.counted,
        "latency_ms": _latency(found) if found.timed else None,
        **{name: dict(_top(counts, top)) for name, counts in _kinds(found)},
    }


def _kinds(found: ResultStats) -> list[tuple[str, Counter[str]]]:
    return [
        ("status", found.statuses),
        ("model", found.models),
        ("finish_reason", found.finish_reasons),
        ("reason", found.reasons),
    ]


def _latency(found: ResultStats) -> dict[str, float | None]:
    return {"p50": found.latency(0.5), "p95": found.latency(0.95), "p99": found.latency(0.99), "max": found.latency(1)}
