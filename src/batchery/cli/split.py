"""`batchery split`: request files in pieces that a server takes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from batchery.cli.cost_report import limits_of
from batchery.cli.failures import told
from batchery.cli.making_options import named
from batchery.cli.tables import Format, FormatOption, show
from batchery.client.errors import SettingsError
from batchery.client.limits import SERVERS
from batchery.client.requests_file import split_requests


def split(
    inputs: Annotated[list[str] | None, typer.Argument(metavar="INPUT...", help="Request files (JSONL).")] = None,
    *,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Their folder.", show_default="that of INPUT")
    ] = None,
    server: Annotated[
        str | None, typer.Option(metavar="|".join(SERVERS), help="Whose limits.", show_default="batchery")
    ] = None,
    requests: Annotated[int | None, typer.Option(metavar="N", min=1, help="The most in one file.")] = None,
    megabytes: Annotated[int | None, typer.Option(metavar="N", min=1, help="The most in one file.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace such files of an earlier split.")] = False,
    format: FormatOption = Format.TABLE,
) -> None:
    """Split request files into numbered ones within a server's limits: 200 MB, 50 000 requests, 10 MB a line.

    For OpenAI, each file also gets requests of one model and one endpoint only. Every line is checked first.

    \b
    Examples:
      batchery split requests.jsonl
      batchery split requests.jsonl --server openai -o parts
      batchery split requests.jsonl --requests 1000

    \b
    Exit codes:
      0  written
      1  wrong usage
      2  input invalid; nothing was written
    """
    with told():
        names = named(inputs)
        limits = limits_of(server)
        if requests is not None:
            limits = msgspec.structs.replace(limits, requests=min(requests, limits.requests))
        if megabytes is not None:
            size = min(megabytes * 1024 * 1024, limits.file_bytes)
            limits = msgspec.structs.replace(limits, file_bytes=size, line_bytes=min(size - 1, limits.line_bytes))
        if "-" in names:
            raise SettingsError("split reads files; save stdin to one")
        first = Path(names[0])
        files = split_requests(names, output or first.parent, first.stem, limits, overwrite=overwrite)
        show(
            [
                {"path": file.path, "requests": file.requests, "bytes": file.size, "endpoint": file.url}
                for file in files
            ],
            format,
        )
