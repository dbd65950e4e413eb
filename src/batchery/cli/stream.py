"""`batchery stream`: result lines on stdout as they land, of inputs that it runs or of batches that run already."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from batchery.cli.cost_report import MaxCost, OutputTokens, PricesFile
from batchery.cli.failures import told
from batchery.cli.jobs import run_job
from batchery.cli.making_options import (
    Delimiter,
    EncodeImages,
    Endpoint,
    IdColumn,
    ImageColumn,
    ImageRoot,
    InputFormat,
    MaxTokens,
    Model,
    Schema,
    Settings,
    System,
    TemplateText,
    making_of,
)
from batchery.cli.request import Request
from batchery.cli.server_options import ApiKeyEnv, BaseUrl, Deduplicate, NamedServer
from batchery.cli.targets import calling_for, find_batches
from batchery.cli.watch import code_of, progress_of
from batchery.client.errors import SettingsError
from batchery.client.making import PROMPT_ENDPOINTS
from batchery.client.objects import Batch
from batchery.client.progress import display_for
from batchery.client.watching import Fetching


def stream(
    inputs: Annotated[
        list[str] | None, typer.Argument(metavar="INPUT...|BATCH_ID...", help="Inputs as for run, or ids of batches.")
    ] = None,
    *,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT",
            help="The job's output, beside which its state is kept.",
            show_default="INPUT.results.jsonl",
        ),
    ] = None,
    base_url: BaseUrl = None,
    server: NamedServer = None,
    upstream: Annotated[
        str | None,
        typer.Option(metavar="URL|MODEL.gguf|simulator", help="Start a server here for this job, as run does."),
    ] = None,
    window: Annotated[str | None, typer.Option(metavar="24h|1h|30m...", help="Time the batch may take.")] = None,
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
    max_cost: MaxCost = None,
    output_tokens: OutputTokens = None,
    prices: PricesFile = None,
    retries: Annotated[
        int, typer.Option(metavar="N", min=0, max=20, help="How often rows that may yet succeed are run again.")
    ] = 2,
    deduplicate: Deduplicate = False,
    api_key_env: ApiKeyEnv = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors.")] = False,
) -> None:
    """Print result lines as they land: run INPUT and print, or print what batches that exist give.

    The lines come as the server writes them, in the order in which they land. A row that failed and was run again has
    a line for each try; OUT has one outcome for each row. A server without early results gives all lines at the end.

    \b
    Examples:
      batchery stream requests.jsonl --upstream simulator | jq .custom_id
      batchery stream batch_0123456789abcdef --server doubleword

    \b
    Exit codes: those of batchery run.
    """
    with told():
        if not inputs:
            raise SettingsError("name at least one INPUT, or the id of a batch; --help has examples")
        if not any(map(_is_input, inputs)):
            raise typer.Exit(_stream_batches(inputs, base_url, server, api_key_env, quiet=quiet))
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
    first = "stdin" if inputs[0] == "-" else inputs[0]
    raise typer.Exit(
        run_job(
            Request(
                inputs=tuple(inputs),
                output=output or Path(f"{first}.results.jsonl"),
                base_url=base_url,
                server=server,
                upstream=upstream,
                window=window,
                making=making,
                retries=retries,
                endpoint=endpoint,
                api_key_env=api_key_env,
                quiet=quiet,
                prices=None if prices is None else str(prices),
                output_tokens=output_tokens,
                max_cost=max_cost,
                deduplicate=deduplicate,
                lines_to=print_line,
            )
        )
    )


def _is_input(name: str) -> bool:
    """Whether it names files: an id has none of these characters."""
    return name == "-" or Path(name).exists() or any(character in name for character in "./*?[")


def print_line(line: bytes) -> None:
    """Write a line to stdout, at once."""
    sys.stdout.buffer.write(line)
    sys.stdout.buffer.flush()


def _stream_batches(
    ids: Sequence[str], base_url: str | None, server: str | None, api_key_env: str | None, *, quiet: bool
) -> int:
    found = find_batches(ids)
    known: dict[int, Batch] = {}
    display = display_for(sys.stderr, quiet=quiet)

    def heard(number: int, batch: Batch) -> None:
        known[number] = batch
        display.update(progress_of(list(known.values())))

    with (
        tempfile.TemporaryDirectory(prefix="batchery-stream-") as folder,
        calling_for(found, base_url, server, api_key_env) as api,
    ):
        fetching = Fetching(api, found.ids, Path(folder), print_line)
        try:
            return code_of(fetching.to_the_end(heard))
        finally:
            fetching.close()
            display.close()
