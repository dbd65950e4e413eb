"""`batchery run`: a file of requests becomes a file of results, on a server that is named or one started for the job.

It only reads the options; `jobs` carries them out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from batchery.cli.cost_report import MaxCost, OutputTokens, PricesFile
from batchery.cli.failures import told
from batchery.cli.jobs import run_job
from batchery.cli.making_options import (
    Delimiter,
    EncodeImages,
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
)
from batchery.cli.request import Request
from batchery.cli.server_options import Deduplicate, NamedServer
from batchery.client.carry_out import DEFAULT_WINDOW
from batchery.client.making import PROMPT_ENDPOINTS


def run(
    inputs: Inputs = None,
    *,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="OUT", help="Where results go; its suffix says in which format."),
    ] = None,
    base_url: Annotated[
        str | None, typer.Option(metavar="URL", help="The batch server, with or without /v1 at its end.")
    ] = None,
    server: NamedServer = None,
    upstream: Annotated[
        str | None,
        typer.Option(
            metavar="URL|MODEL.gguf|simulator",
            help="Start a server here for this job, in front of this inference server (or of several, separated by "
            "commas), or of this local model; simulator: made-up answers.",
        ),
    ] = None,
    window: Annotated[
        str | None,
        typer.Option(
            metavar="24h|1h|30m...", help="Time the batch may take (units s, m, h, d).", show_default=DEFAULT_WINDOW
        ),
    ] = None,
    by: Annotated[
        str | None, typer.Option(metavar="06:00", help="When it should be done; chooses the window that fits.")
    ] = None,
    within: Annotated[
        str | None, typer.Option(metavar="4h", help="In what time it should be done; chooses the window that fits.")
    ] = None,
    model: Model = None,
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
    max_cost: MaxCost = None,
    output_tokens: OutputTokens = None,
    prices: PricesFile = None,
    retries: Annotated[
        int, typer.Option(metavar="N", min=0, max=20, help="How often rows that may yet succeed are run again.")
    ] = 2,
    deduplicate: Deduplicate = False,
    output_format: Annotated[
        str | None,
        typer.Option(
            metavar="jsonl|csv|parquet|raw",
            help="One outcome a row in input order; raw: the two files of the Batch API, OUT and OUT's .errors.",
            show_default="by OUT's suffix",
        ),
    ] = None,
    max_file_bytes: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Bytes of one uploaded file.", show_default="the server's limit"),
    ] = None,
    max_requests: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Requests of one batch.", show_default="the server's limit"),
    ] = None,
    endpoint: Annotated[
        str | None, typer.Option(metavar="PATH", help="The batch's endpoint.", show_default="the first request's url")
    ] = None,
    api_key_env: Annotated[
        str | None, typer.Option(metavar="NAME", help="Environment variable with the server's key.")
    ] = None,
    upstream_key_env: Annotated[
        str | None, typer.Option(metavar="NAME", help="Environment variable with the upstream's key.")
    ] = None,
    max_in_flight: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Requests in flight to the upstream.", show_default="the server's own"),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Data folder of the started server; kept.",
            show_default="a hidden folder beside OUT, removed after success",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the inputs, say what would be sent, and send nothing.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start anew, even if OUT or an unfinished job for it is there.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a summary as one JSON object on stdout.")] = False,
) -> None:
    """Run rows or requests as batches, and collect the results as they land.

    Every input is checked before anything is sent.
    The same command again goes on where an interrupted one stopped, and pays for nothing twice.

    \b
    Examples:
      batchery run requests.jsonl -o results.jsonl --upstream simulator
      batchery run requests.jsonl -o results.jsonl --upstream http://127.0.0.1:8000
      batchery run requests.jsonl -o results.jsonl --base-url https://api.doubleword.ai --by 06:00
      batchery run reviews.csv -o answers.csv --model my-model --template 'Classify: {{text}}'

    \b
    Server and key, where no option names them:
      BATCHERY_BASE_URL with BATCHERY_API_KEY, then DOUBLEWORD_API_KEY,
      then OPENAI_BASE_URL with OPENAI_API_KEY, then the settings file. A key goes only to the server it belongs to.

    \b
    Exit codes:
        0  all rows ok
        1  wrong usage
        2  input invalid; nothing was sent
        3  some rows failed
        4  the batch failed, expired or was cancelled
        5  the server refused: key or quota
        6  connection lost; the same command goes on
        7  it would cost more than --max-cost, or nobody knows; nothing was sent
      130  detached by Ctrl-C; the same command goes on
    """
    with told():
        making = making_of(
            model=model,
            endpoint=endpoint if endpoint in PROMPT_ENDPOINTS else None,
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
    raise typer.Exit(
        run_job(
            Request(
                inputs=tuple(inputs or ()),
                output=output,
                base_url=base_url,
                server=server,
                upstream=upstream,
                window=window,
                by=by,
                within=within,
                making=making,
                retries=retries,
                output_format=output_format,
                max_file_bytes=max_file_bytes,
                max_requests=max_requests,
                dry_run=dry_run,
                endpoint=endpoint,
                api_key_env=api_key_env,
                upstream_key_env=upstream_key_env,
                max_in_flight=max_in_flight,
                data_dir=data_dir,
                overwrite=overwrite,
                quiet=quiet,
                as_json=as_json,
                prices=None if prices is None else str(prices),
                output_tokens=output_tokens,
                max_cost=max_cost,
                deduplicate=deduplicate,
            )
        )
    )
