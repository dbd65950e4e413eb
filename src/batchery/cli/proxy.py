"""`batchery proxy`: an OpenAI-compatible server on loopback for tools that only take a base URL; what it is asked is
gathered into batches on a batch server.

It only reads the options and owns the process; `sdk.proxy` is the app.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import Annotated

import typer

from batchery.cli.cost_report import checked_window
from batchery.cli.failures import told
from batchery.cli.server_options import ApiKeyEnv, BaseUrl, NamedServer, server_of
from batchery.client.server import Server

HOST = "127.0.0.1"


def proxy(
    *,
    base_url: BaseUrl = None,
    server: NamedServer = None,
    api_key_env: ApiKeyEnv = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1; 0 takes any free one.")] = 8090,
    window: Annotated[str, typer.Option(metavar="24h|1h|...", help="Completion window of the batches.")] = "24h",
    gather_seconds: Annotated[
        float, typer.Option(metavar="S", min=0, max=3600, help="How long a request waits for others.")
    ] = 1.0,
    gather_requests: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="How many make a batch at once.", show_default="the server's limit"),
    ] = None,
    max_batches: Annotated[
        int,
        typer.Option(metavar="N", min=1, max=256, help="Batches at a time; while there are so many, requests gather."),
    ] = 16,
    retries: Annotated[
        int, typer.Option(metavar="N", min=0, max=20, help="How often requests that may yet succeed are run again.")
    ] = 2,
) -> None:
    """Be an OpenAI-compatible server on this machine, and run what it is asked as batches elsewhere.

    A request to /v1/chat/completions, /v1/responses or /v1/embeddings is answered when its result lands: set the
    tool's timeout to the window, and let it send many at once. The tool needs no key; the batch server's is added here.

    \b
    Examples:
      batchery proxy --server doubleword --window 1h
      OPENAI_BASE_URL=http://127.0.0.1:8090/v1 OPENAI_API_KEY=any some-tool

    \b
    Exit codes:
      0  told to stop; what waited was refused, and its batches were cancelled
      1  wrong usage, or the port is taken
    """
    with told():
        target = server_of(base_url, server, api_key_env)
        checked_window(window)
    options = {
        "window": window,
        "seconds": gather_seconds,
        "requests": gather_requests,
        "batches": max_batches,
        "retries": retries,
    }
    try:
        asyncio.run(_serve(target, port, options))
    except OSError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from None
    sys.stdout.flush()
    sys.stderr.flush()
    # Whoever waited has been told, and nothing is left to save. A thread may still be in a call to the batch server, in
    # native code that aborts when the interpreter ends beneath it.
    os._exit(0)


async def _serve(target: Server, port: int, options: dict[str, object]) -> None:
    """Serve until SIGTERM or SIGINT."""
    from batchery.client.gatherer import Gatherer  # noqa: PLC0415
    from batchery.client.http import Api  # noqa: PLC0415
    from batchery.sdk.proxy import create_proxy  # noqa: PLC0415
    from batchery.server.http import serve_http  # noqa: PLC0415
    from batchery.server.port import take_port  # noqa: PLC0415

    at = take_port(HOST, port)
    asked, stop = asyncio.Event(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, asked.set)
    gatherer, api = Gatherer(target, **options), Api(target)  # type: ignore[arg-type]

    async def wind_down() -> None:
        await asked.wait()
        await gatherer.close()  # whoever waits is told, before connections are cut
        stop.set()

    key = f"key from {target.key_from}" if target.key_from else "no key"
    winding = asyncio.create_task(wind_down())
    try:
        await serve_http(create_proxy(gatherer, api), at, stop, lambda: _ready(target, key, at.number))
    finally:
        winding.cancel()
        await gatherer.close()
        api.close()


def _ready(target: Server, key: str, port: int) -> None:
    typer.echo(f"Requests run as batches on {target.base_url} ({key}).", err=True)
    print(f"batchery proxy listening on http://{HOST}:{port}", flush=True)
