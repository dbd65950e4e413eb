"""The options that say how rows become requests, shared by all commands that take inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from batchery.client.errors import SettingsError
from batchery.client.making import CHAT, Making, parse_setting
from batchery.client.schema import read_schema

MAX_TEXT_BYTES = 1024 * 1024

Inputs = Annotated[
    list[str] | None,
    typer.Argument(metavar="INPUT...", help="Files: JSONL, CSV, TSV, Parquet; globs; - for stdin.", show_default=False),
]
Model = Annotated[str | None, typer.Option("--model", "-m", metavar="NAME", help="The model of all requests.")]
Endpoint = Annotated[
    str | None, typer.Option("--endpoint", metavar="PATH", help="Of the requests made of rows.", show_default=CHAT)
]
TemplateText = Annotated[
    str | None,
    typer.Option("--template", "-t", metavar="TEXT|@FILE", help="The prompt of a row; {{column}} is its value."),
]
System = Annotated[
    str | None, typer.Option("--system", metavar="TEXT|@FILE", help="The system prompt; a template, too.")
]
Schema = Annotated[
    str | None,
    typer.Option(
        "--schema",
        metavar="FORM|JSON|FILE",
        help="The form of the answers: 'label: good|bad, score: number', JSON Schema, or a file with it.",
    ),
]
ImageColumn = Annotated[
    str | None, typer.Option("--image-column", metavar="NAME", help="The column with paths or URLs of images.")
]
ImageRoot = Annotated[
    Path | None,
    typer.Option(
        "--image-root", metavar="DIR", help="The folder that images must be in.", show_default="that of the input"
    ),
]
EncodeImages = Annotated[
    bool, typer.Option("--encode-images", help="Put local images that finished requests name into them.")
]
IdColumn = Annotated[
    str | None,
    typer.Option(
        "--id-column",
        metavar="NAME",
        help="The column with the custom_id.",
        show_default="custom_id, or the row number",
    ),
]
MaxTokens = Annotated[
    int | None, typer.Option("--max-tokens", metavar="N", min=1, help="The most tokens of one answer.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="body.NAME=VALUE", help="A field of every request; may be repeated."),
]
InputFormat = Annotated[
    str | None,
    typer.Option(
        "--input-format", metavar="jsonl|csv|tsv|parquet", help="Of all inputs.", show_default="by name and content"
    ),
]
Delimiter = Annotated[
    str | None, typer.Option("--delimiter", metavar="CHAR", help="Between columns.", show_default="by the header")
]


def named(inputs: list[str] | None) -> list[str]:
    """The inputs, of which there must be one.

    Raises:
        SettingsError: there is none.
    """
    if not inputs:
        raise SettingsError("name at least one file; --help has examples")
    return inputs


def making_of(
    *,
    model: str | None = None,
    endpoint: str | None = None,
    template: str | None = None,
    system: str | None = None,
    schema: str | None = None,
    image_column: str | None = None,
    image_root: Path | None = None,
    encode_images: bool = False,
    id_column: str | None = None,
    max_tokens: int | None = None,
    settings: list[str] | None = None,
    input_format: str | None = None,
    delimiter: str | None = None,
) -> Making:
    """What the options say, with the files that they name read.

    Raises:
        SettingsError: names the option and what would be accepted.
    """
    schema_name, form = read_schema(schema) if schema is not None else ("answer", None)
    if image_root is not None and not image_root.is_dir():
        raise SettingsError(f"--image-root {image_root} is not a folder")
    making = Making(
        model=model,
        endpoint=endpoint or CHAT,
        template=_text(template, "--template"),
        system=_text(system, "--system"),
        schema=form,
        schema_name=schema_name,
        image_column=image_column,
        image_root=None if image_root is None else str(image_root.absolute()),
        encode_images=encode_images,
        id_column=id_column,
        max_tokens=max_tokens,
        settings=tuple(map(parse_setting, settings or ())),
        format=input_format,
        delimiter="\t" if delimiter == "\\t" else delimiter,
    )
    making.check()
    return making


def _text(value: str | None, option: str) -> str | None:
    """The text itself, or, behind `@`, that of a file, without the line break at its end."""
    if value is None or not value.startswith("@"):
        return value
    path = Path(value[1:])
    try:
        with path.open("rb") as file:
            content = file.read(MAX_TEXT_BYTES + 1)
    except OSError as error:
        raise SettingsError(f"{option} {path}: {error.strerror}") from None
    if len(content) > MAX_TEXT_BYTES:
        raise SettingsError(f"{option} {path} is larger than {MAX_TEXT_BYTES} bytes")
    try:
        return content.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError:
        raise SettingsError(f"{option} {path} is not UTF-8") from None
