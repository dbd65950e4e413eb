"""`batchery estimate`: what inputs would cost, in one completion window or in each of the usual ones."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from batchery.cli.cost_report import (
    MaxCost,
    OutputTokens,
    PricesFile,
    ServerName,
    checked_window,
    limits_of,
    show_report,
)
from batchery.cli.failures import told
from batchery.cli.making_options import (
    Delimiter,
    EncodeImages,
    Endpoint,
    IdColumn,
    ImageColumn,
    ImageRoot,
    InputFormat,
    Inputs,
    MaxTokens,
    Model,
    Schema,
    Settings,
    System,
    TemplateText,
    making_of,
    named,
)
from batchery.cli.tables import Format, FormatOption
from batchery.client.prepare import prepare_inputs
from batchery.client.spending import costs_of, tables_of
from batchery.wire.windows import DEFAULT_WINDOWS


def estimate(
    inputs: Inputs = None,
    *,
    model: Model = None,
    endpoint: Endpoint = None,
    template: TemplateText = None,
    system: System = None,
    schema: Schema = None,
    image_column: ImageColumn = None,
    image_root: ImageRoot = None,
    encode_images: EncodeImages = False,
    id_column: IdColumn = None,
    max_tokens: MaxTokens = None,
    settings: Settings = None,
    input_format: InputFormat = None,
    delimiter: Delimiter = None,
    server: ServerName = None,
    window: Annotated[
        list[str] | None,
        typer.Option(metavar="24h|1h|...", help="May be repeated.", show_default=" and ".join(DEFAULT_WINDOWS)),
    ] = None,
    prices: PricesFile = None,
    output_tokens: OutputTokens = None,
    max_cost: MaxCost = None,
    format: FormatOption = Format.TABLE,
) -> None:
    """Estimate tokens and cost, offline, by model and completion window.

    \b
    Examples:
      batchery estimate requests.jsonl
      batchery estimate requests.jsonl --window 1h --output-tokens 500
      batchery estimate requests.jsonl --prices my-prices.toml --format csv

    \b
    Exit codes:
      0  estimated
      1  wrong usage
      2  input invalid
      7  the first window would cost more than --max-cost, or nobody knows
    """
    with told():
        making = making_of(
            model=model,
            endpoint=endpoint,
            template=template,
            system=system,
            schema=schema,
            image_column=image_column,
            image_root=image_root,
            encode_images=encode_images,
            id_column=id_column,
            max_tokens=max_tokens,
            settings=settings,
            input_format=input_format,
            delimiter=delimiter,
        )
        tables = tables_of(server, prices)
        windows = [checked_window(name) for name in window or DEFAULT_WINDOWS]
        prepared = prepare_inputs(named(inputs), making, None, stdin=sys.stdin.buffer, limits=limits_of(server))
        code = show_report(prepared, costs_of(prepared, tables, windows, output_tokens), format, max_cost=max_cost)
    raise typer.Exit(code)
