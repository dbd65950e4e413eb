"""`batchery receipt`: how a job ended, again; and the words that `batchery run` ends with."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from batchery.cli.failures import told
from batchery.cli.tables import Format, FormatOption, show
from batchery.client.errors import SettingsError
from batchery.client.progress import duration, saving
from batchery.client.receipt import Receipt, load_receipt
from batchery.client.state import JobFolder

REASONS_SHOWN = 5


def receipt(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The output of a job that has ended.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print it as one JSON object.")] = False,
    format: FormatOption = Format.TABLE,
) -> None:
    """Show the receipt of a job that has ended: rows, tokens, time, cost, and whether it met its deadline.

    \b
    Examples:
      batchery receipt results.jsonl
      batchery receipt results.jsonl --format csv
    """
    with told():
        found = load_receipt(JobFolder(output.absolute()))
        if found is None:
            raise SettingsError(f"there is no receipt of a job with the output {output}")
        if format is not Format.TABLE:
            record = msgspec.to_builtins(found)
            show([record], format, whole=record)
            return
        for line in [msgspec.json.encode(found).decode()] if as_json else lines_of(found):
            typer.echo(line)


def lines_of(receipt: Receipt) -> list[str]:
    """A receipt for people."""
    counts = f"{receipt.ok} ok, {receipt.failed} failed, {receipt.not_run} not run"
    rate = f" ({receipt.rows_per_s:.0f}/s)" if receipt.rows_per_s else ""
    again = f", {receipt.retries} time{'s' * (receipt.retries > 1)} run again" if receipt.retries else ""
    lines = [
        f"{receipt.status.capitalize()}: {counts} of {receipt.rows} rows in {duration(receipt.elapsed_s)}{rate}{again}"
    ]
    if receipt.input_tokens is not None:
        cached = f" ({receipt.cached_tokens} from cache)" if receipt.cached_tokens else ""
        note = " (simulated)" if receipt.simulated else ""
        lines.append(f"Tokens: {receipt.input_tokens} in{cached}, {receipt.output_tokens} out{note}")
    if (saved := saving(receipt.deduplicated)) is not None:
        lines.append(f"Saved: {saved}")
    if receipt.cost is not None:
        lines.append(f"Cost: ${receipt.cost:.4f}, by the price table")
    if receipt.deadline is not None:
        moment = datetime.fromtimestamp(receipt.deadline, UTC).astimezone().strftime("%Y-%m-%d %H:%M")
        lines.append(f"Deadline: {moment}, {'met' if receipt.deadline_met else 'missed'}")
    if receipt.output is not None:
        lines.append(f"Results: {receipt.output}")
    if receipt.errors is not None:
        lines.append(f"Errors: {receipt.errors}")
    for reason in receipt.reasons[:REASONS_SHOWN]:
        may = {"transient": " (may pass)"}.get(str(reason.get("cause")), "")
        lines.append(f"  {reason['rows']} x {reason['reason']}{may}")
    return lines + [f"  {problem}" for problem in receipt.problems[:REASONS_SHOWN]]
