"""The options that name upstreams, and say how they are used; `batchery serve` and `batchery worker` have them.

Each but `--upstream` is given once for all upstreams, or once for each in their order.
"""

from __future__ import annotations

from typing import Annotated

import typer

UpstreamOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="URL",
        help="An inference server's base URL, as an OpenAI client takes it; a /v1 at its end is optional. Give it "
        "again for each further one: a replica, or a server of other models.",
    ),
]
UpstreamKeyEnvOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="The environment variable that holds the inference server's key; of several servers, 'none' for one "
        "without. Like the options that follow: once for all, or once for each --upstream in their order.",
    ),
]
MaxInFlightOption = Annotated[
    list[str] | None,
    typer.Option(metavar="N|auto", help="Requests at an upstream at once.", show_default="auto: as many as serve best"),
]
RequestsPerMinuteOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="N|none", help="Requests that a worker sends to an upstream in any minute.", show_default="no limit"
    ),
]
TokensPerMinuteOption = Annotated[
    list[str] | None,
    typer.Option(metavar="N|none", help="Tokens, in and out, in any minute.", show_default="no limit"),
]
YieldOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="SHARE",
        help="Share of an inference server to leave to others while their requests wait there, 0 to 1.",
        show_default="0.5, or 0 with --max-in-flight",
    ),
]
UpstreamMetricsOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="auto|off|URL",
        help="Where the inference server's own metrics are, which say whether requests wait there.",
        show_default="auto: at /metrics",
    ),
]
