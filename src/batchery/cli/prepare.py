"""`batchery prepare`: any inputs as one file of finished requests, to look at, keep or send by other means."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

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
from batchery.client.requests_file import make_requests


def prepare(
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
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="OUT", help="The file.", show_default="stdout")
    ] = None,
) -> None:
    """Make a file of finished requests (JSONL) of any inputs, or change one; offline.

    Finished requests among the inputs take --model, --set, --max-tokens, --schema and --encode-images, and stay as they
    are otherwise.

    \b
    Examples:
      batchery prepare reviews.csv -m my-model -t 'Classify: {{text}}' --schema 'label: good|bad' -o requests.jsonl
      batchery prepare requests.jsonl --model other --set body.temperature=0 > changed.jsonl
      batchery prepare with-images.jsonl --encode-images -o requests.jsonl

    \b
    Exit codes:
      0  written
      1  wrong usage
      2  input invalid; nothing was written
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
        stdin = sys.stdin.buffer
        if output is not None:
            rows = make_requests(named(inputs), making, output, stdin=stdin)
            typer.echo(f"{rows} requests in {output}", err=True)
            return
        with tempfile.TemporaryDirectory(prefix="batchery-prepare-") as folder:
            made = Path(folder) / "requests.jsonl"
            make_requests(named(inputs), making, made, stdin=stdin)
            with made.open("rb") as file:
                shutil.copyfileobj(file, sys.stdout.buffer)
            sys.stdout.flush()
