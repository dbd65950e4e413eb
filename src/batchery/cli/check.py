"""`batchery check`: what is wrong with inputs and what they would take, without sending anything."""

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


def check(
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
    window: Annotated[str, typer.Option(metavar="24h|1h|...", help="Of the prices.")] = "24h",
    prices: PricesFile = None,
    output_tokens: OutputTokens = None,
    max_cost: MaxCost = None,
    format: FormatOption = Format.TABLE,
) -> None:
    """Check inputs, offline: every problem with its line, or what the requests would take.

    \b
    Examples:
      batchery check requests.jsonl
      batchery check reviews.csv --model my-model --template 'Classify: {{text}}'
      batchery check requests.jsonl --max-cost 5 --format json

    \b
    Exit codes:
      0  all good
      1  wrong usage
      2  input invalid; each problem is on stderr
      7  it would cost more than --max-cost, or nobody knows
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
        window = checked_window(window)
        prepared = prepare_inputs(named(inputs), making, None, stdin=sys.stdin.buffer, limits=limits_of(server))
        code = show_report(prepared, costs_of(prepared, tables, [window], output_tokens), format, max_cost=max_cost)
    raise typer.Exit(code)
