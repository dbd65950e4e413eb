"""What a job would take, shown before it is sent: the options that say with which prices, and the report that `check`,
`estimate` and a dry run print.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from batchery.cli.exit_codes import OVER_COST
from batchery.cli.tables import Format, show
from batchery.client.errors import SettingsError
from batchery.client.estimate import Cost, over_max_cost
from batchery.client.limits import SERVERS, ServerLimits, limits_named
from batchery.client.prepare import Prepared
from batchery.wire.windows import window_seconds

ServerName = Annotated[
    str | None,
    typer.Option("--server", metavar="|".join(SERVERS), help="Whose limits and prices.", show_default="any prices"),
]
PricesFile = Annotated[
    Path | None, typer.Option("--prices", metavar="FILE", help="Your own price table (TOML), before the shipped ones.")
]
OutputTokens = Annotated[
    int | None,
    typer.Option("--output-tokens", metavar="N", min=0, help="Expected of each answer.", show_default="256"),
]
MaxCost = Annotated[
    float | None,
    typer.Option("--max-cost", metavar="DOLLARS", min=0, help="More than this, or unknown: exit code 7."),
]


def limits_of(server: str | None) -> ServerLimits:
    """The limits of the server that is meant; batchery's where none is named.

    Raises:
        SettingsError: it is not known.
    """
    return ServerLimits() if server is None else limits_named(server)


def checked_window(window: str) -> str:
    """A window, if it is one.

    Raises:
        SettingsError: it is not.
    """
    try:
        window_seconds(window)
    except ValueError as error:
        raise SettingsError(f"--window: {error}") from None
    return window


def show_report(prepared: Prepared, costs: Sequence[Cost], format: Format, *, max_cost: float | None = None) -> int:
    """Print the report: the requests by model, endpoint and window to stdout, how that was reckoned to stderr.

    Returns:
        The exit code: 0, or 7 if the first window's cost is over `max_cost` or unknown.
    """
    records = [record for cost in costs for record in _records(cost)]
    whole = {
        "requests": prepared.rows,
        "bytes": prepared.requests_size,
        "repeated_bodies": prepared.repeats,
        "windows": [_totals(cost) for cost in costs],
        "groups": records,
    }
    if format is Format.TABLE and len(prepared.groups) > 1:
        records += [_total_record(cost) for cost in costs]
    show(records, format, whole=whole)
    _explain(prepared, costs)
    over = over_max_cost(costs[0], max_cost) if max_cost is not None else None
    if over is not None:
        typer.echo(f"Error: {over}", err=True)
        return OVER_COST
    return 0


def _records(cost: Cost) -> list[dict[str, Any]]:
    return [
        {
            "model": group.model,
            "endpoint": group.endpoint,
            "requests": group.requests,
            "bytes": group.size,
            "input_tokens": group.input_tokens,
            "output_tokens": group.output_tokens,
            "window": cost.window,
            "cost": group.cost,
            "most_cost": group.most_cost,
            "prices": group.prices,
        }
        for group in cost.groups
    ]


def _total_record(cost: Cost) -> dict[str, Any]:
    return {
        "model": "all",
        "endpoint": "",
        "requests": cost.requests,
        "bytes": cost.size,
        "input_tokens": cost.input_tokens,
        "output_tokens": cost.output_tokens,
        "window": cost.window,
        "cost": cost.cost,
        "most_cost": cost.most_cost,
        "prices": "",
    }


def _totals(cost: Cost) -> dict[str, Any]:
    totals: dict[str, Any] = msgspec.to_builtins(cost)
    del totals["groups"]
    totals["bytes"] = totals.pop("size")
    return totals


def _explain(prepared: Prepared, costs: Sequence[Cost]) -> None:
    def say(text: str) -> None:
        typer.echo(text, err=True)

    say(f"Estimated. {costs[0].method[0].upper()}{costs[0].method[1:]}.")
    for described in dict.fromkeys(table for cost in costs for table in cost.prices):
        say(f"Prices: {described}. They may have changed since.")
    unknown = dict.fromkeys(model for cost in costs for model in cost.unknown if all(model in c.unknown for c in costs))
    if unknown:
        names = ", ".join(list(unknown)[:5]) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
        say(f"No price is known for {names}; name prices with --prices FILE.")
    if prepared.repeats:
        say(f"{prepared.repeats} requests have the same body as an earlier one.")
