"""`batchery serve`: the server, with a worker beside it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from batchery.cli.upstream_options import (
    MaxInFlightOption,
    RequestsPerMinuteOption,
    TokensPerMinuteOption,
    UpstreamKeyEnvOption,
    UpstreamMetricsOption,
    UpstreamOption,
    YieldOption,
)

if TYPE_CHECKING:
    from batchery.server.port import Port
    from batchery.server.settings import Settings
    from batchery.store.database import Database

MAX_FILES = 1 << 20
"""Open files that a process asks for at most; without a limit of the system's, some systems refuse."""

UPLOAD_EXPIRY = 30 * 86_400
"""Seconds that an upload is kept when its sender names no other time, as OpenAI does."""

EPILOG = r"""
Examples:

  batchery serve --upstream http://127.0.0.1:8000/v1

  batchery serve --upstream https://api.example.com/v1 --upstream-key-env EXAMPLE_API_KEY --max-in-flight 64

  batchery serve --upstream http://gpu1:8000 --upstream http://gpu2:8000 --max-in-flight 256 --max-in-flight 64

  batchery serve --upstream http://gpu:8000 --data-dir /var/lib/batchery --completion-windows 24h,1h,30m

Every option is also an environment variable (BATCHERY_UPSTREAM, BATCHERY_DATA_DIR, ...) and a key of batchery.toml in
the current folder (or of the file that --config names); an option beats the variable, which beats the file. The table
of prices, for estimates, has no option: it is \[prices."MODEL"] in the file, or JSON in BATCHERY_PRICES.
"""


def serve(
    host: Annotated[str | None, typer.Option(help="The address to listen on.", show_default="127.0.0.1")] = None,
    port: Annotated[int | None, typer.Option(help="The port; 0 takes any free one.", show_default="8080")] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Where the database and the files go.", show_default="batchery-data")
    ] = None,
    upstream: UpstreamOption = None,
    upstream_key_env: UpstreamKeyEnvOption = None,
    max_in_flight: MaxInFlightOption = None,
    requests_per_minute: RequestsPerMinuteOption = None,
    tokens_per_minute: TokensPerMinuteOption = None,
    yield_to_interactive: YieldOption = None,
    upstream_metrics: UpstreamMetricsOption = None,
    request_timeout: Annotated[
        float | None, typer.Option(help="Seconds that one request may take at the upstream.", show_default="600")
    ] = None,
    completion_windows: Annotated[
        str | None, typer.Option(help="The completion windows on offer.", show_default="24h,1h")
    ] = None,
    cancel_grace: Annotated[
        float | None,
        typer.Option(
            help="Seconds that requests in flight may take after a cancel or the window's end.", show_default="10"
        ),
    ] = None,
    stop_grace: Annotated[
        float | None, typer.Option(help="Seconds that requests in flight may take after SIGTERM.", show_default="10")
    ] = None,
    max_file_bytes: Annotated[
        int | None, typer.Option(help="The largest upload, in bytes.", show_default="209715200")
    ] = None,
    max_line_bytes: Annotated[
        int | None, typer.Option(help="The longest line, in bytes.", show_default="10485760")
    ] = None,
    max_requests: Annotated[
        int | None, typer.Option(help="The most requests in one file.", show_default="50000")
    ] = None,
    max_uploads: Annotated[
        int | None, typer.Option(help="Uploads taken in at a time; more are told to come back.", show_default="64")
    ] = None,
    max_downloads: Annotated[
        int | None, typer.Option(help="Files sent at a time; more are told to come back.", show_default="256")
    ] = None,
    database: Annotated[
        str | None, typer.Option(help="Another database than the data folder's: postgresql://user@host/name.")
    ] = None,
    store: Annotated[
        str | None, typer.Option(help="Another blob store than the data folder's: s3://bucket/prefix.")
    ] = None,
    webhook_networks: Annotated[
        str | None,
        typer.Option(
            help="Networks that webhooks may go to besides the public internet, such as 10.0.0.0/8,127.0.0.1,::1.",
            show_default="none",
        ),
    ] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.", show_default="info")] = None,
    config: Annotated[
        Path | None, typer.Option(help="The file with settings.", show_default="batchery.toml, if it is there")
    ] = None,
    exit_with_stdin: Annotated[bool, typer.Option("--exit-with-stdin", hidden=True)] = False,
) -> None:
    """Serve the Files and Batch API, and run the batches on an inference server."""
    import uvloop  # noqa: PLC0415

    from batchery.cli import logs  # noqa: PLC0415
    from batchery.cli.options import fail, read_settings  # noqa: PLC0415
    from batchery.cli.upstreams import open_upstreams  # noqa: PLC0415
    from batchery.server.port import AddressInUse, take_port  # noqa: PLC0415
    from batchery.server.supervisor import FolderInUseError, FolderLock  # noqa: PLC0415

    settings = read_settings(
        config,
        host=host,
        port=port,
        data_dir=data_dir,
        upstream=upstream,
        upstream_key_env=upstream_key_env,
        max_in_flight=max_in_flight,
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        yield_to_interactive=yield_to_interactive,
        upstream_metrics=upstream_metrics,
        request_timeout=request_timeout,
        completion_windows=completion_windows,
        cancel_grace=cancel_grace,
        stop_grace=stop_grace,
        max_file_bytes=max_file_bytes,
        max_line_bytes=max_line_bytes,
        max_requests=max_requests,
        max_uploads=max_uploads,
        max_downloads=max_downloads,
        database=database,
        store=store,
        webhook_networks=webhook_networks,
        log_level=log_level,
    )
    open_upstreams(settings)
    logs.configure(settings.log_level, "server")
    _raise_file_limit()
    lock = None
    try:
        settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)  # prompts are nobody else's business
        at = take_port(settings.host, settings.port)
        settings = settings.model_copy(update={"data_dir": settings.data_dir.resolve(), "port": at.number})
        if settings.uses_folder:
            lock = FolderLock(settings.data_dir)
    except (AddressInUse, FolderInUseError) as error:
        fail(str(error))
    except OSError as error:
        fail(f"cannot start: {error}")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        code = runner.run(_serve(settings, at, lock, exit_with_stdin))
    raise typer.Exit(code)


def _raise_file_limit() -> None:
    """Let this process, and the worker that it starts, have as many open files and connections as it may have."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FILES if most == resource.RLIM_INFINITY else min(most, MAX_FILES)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


async def _has_key(database: Database) -> bool:
    """Whether there is a key that somebody could come with."""
    from batchery.store import api_keys  # noqa: PLC0415

    async with database.read() as connection:
        return bool(await api_keys.active(connection))


def _keyless(settings: Settings) -> str:
    """What to say when nobody could use the server, or everybody."""
    import sqlalchemy as sa  # noqa: PLC0415

    where = f"--data-dir {shlex.quote(str(settings.data_dir))}"
    if settings.database is not None:
        where = f"--database {shlex.quote(sa.make_url(settings.database).render_as_string())}"
    return (
        f"batchery: --host {settings.host} can be reached from other machines, and there is no API key to keep others "
        f"out. Make one with 'batchery keys create {where}' and start this again, or listen on 127.0.0.1."
    )


async def _serve(settings: Settings, at: Port, lock: object, exit_with_stdin: bool) -> int:
    from batchery.cli.upstreams import open_upstreams  # noqa: PLC0415
    from batchery.server.supervisor import FolderLock, Supervisor  # noqa: PLC0415
    from batchery.store.blobs import open_folder, open_url  # noqa: PLC0415
    from batchery.store.database import Database  # noqa: PLC0415
    from batchery.store.errors import StoreError  # noqa: PLC0415

    started = time.time()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    database = Database(settings.database_url)
    blobs = open_folder(settings.data_dir / "blobs") if settings.store is None else open_url(settings.store)
    try:
        await database.migrate()
        if not (settings.is_loopback or await _has_key(database)):
            typer.echo(_keyless(settings), err=True)
            await database.close()
            return 1
    except StoreError as error:
        typer.echo(f"batchery: the database cannot be used: {error}", err=True)
        return 1
    assert lock is None or isinstance(lock, FolderLock)
    config = settings.config_file.resolve()
    supervisor = Supervisor(_environment(settings), lock, config if config.is_file() else None)
    await supervisor.start()  # before the web framework is imported, so that work goes on at once after a crash

    from batchery.engine.orphans import Orphans  # noqa: PLC0415
    from batchery.engine.pool import list_models  # noqa: PLC0415
    from batchery.server.app import create_app  # noqa: PLC0415
    from batchery.server.context import Context  # noqa: PLC0415
    from batchery.server.http import serve_http  # noqa: PLC0415

    upstreams = [destination.upstream for destination in open_upstreams(settings)]
    app = create_app(
        Context(
            database=database,
            blobs=blobs,
            limits=settings.limits,
            windows=settings.windows,
            prices=settings.price_list,
            may_be_open=settings.is_loopback,
            max_uploads=settings.max_uploads,
            max_downloads=settings.max_downloads,
            file_expiry=UPLOAD_EXPIRY,
            wake=supervisor.wake,
            list_models=lambda: list_models(upstreams),
            webhook_networks=settings.allowed_networks,
            stopping=stop,
        )
    )
    beside = [asyncio.create_task(_stop_with_stdin(stop))] if exit_with_stdin else []
    orphans = Orphans(database, blobs, alone=lock is not None and settings.store is None)
    beside.append(asyncio.create_task(orphans.run(started)))
    try:
        await serve_http(app, at, stop, lambda: _ready(settings))
    finally:
        for task in beside:
            task.cancel()
        await supervisor.stop(settings.stop_grace + 10)
        # A sweep may be in the middle of a transaction, and needs the database to leave it.
        await asyncio.gather(*beside, return_exceptions=True)
        for upstream in upstreams:
            await upstream.close()
        await database.close()
    return 0


def _ready(settings: Settings) -> None:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    print(f"batchery listening on http://{host}:{settings.port}", flush=True)


def _environment(settings: Settings) -> dict[str, str]:
    """The worker's environment: ours, with the settings as they came out here, so that both act on the same."""
    environment = dict(os.environ)
    for name, value in settings.model_dump().items():
        if value is None:
            environment.pop(f"BATCHERY_{name.upper()}", None)
        else:
            environment[f"BATCHERY_{name.upper()}"] = ",".join(value) if isinstance(value, tuple) else str(value)
    return environment


async def _stop_with_stdin(stop: asyncio.Event) -> None:
    """Whoever started this server holds its standard input open; when that ends, so does the server."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while await reader.read(4096):
        pass
    stop.set()
