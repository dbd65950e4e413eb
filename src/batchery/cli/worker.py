"""`batchery worker`: a process that runs requests. `batchery serve` keeps one beside itself; more can run anywhere."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import sys
import threading
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
    from batchery.engine.worker import Worker

LAST_WORDS = 3.0
"""Seconds within which the process ends after its server has gone."""


def worker(
    database: Annotated[
        str | None, typer.Option(help="The database that the server uses, such as postgresql://user@host/name.")
    ] = None,
    store: Annotated[str | None, typer.Option(help="The blob store that the server uses, such as s3://bucket.")] = None,
    data_dir: Annotated[str | None, typer.Option(help="The data folder, where there is no --database.")] = None,
    upstream: UpstreamOption = None,
    upstream_key_env: UpstreamKeyEnvOption = None,
    max_in_flight: MaxInFlightOption = None,
    requests_per_minute: RequestsPerMinuteOption = None,
    tokens_per_minute: TokensPerMinuteOption = None,
    yield_to_interactive: YieldOption = None,
    upstream_metrics: UpstreamMetricsOption = None,
    webhook_networks: Annotated[
        str | None, typer.Option(help="Networks that webhooks may go to besides the public internet.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="The file with settings.", show_default="batchery.toml, if it is there")
    ] = None,
    exit_with_stdin: Annotated[bool, typer.Option("--exit-with-stdin", hidden=True)] = False,
    alone: Annotated[bool, typer.Option("--alone", hidden=True)] = False,
) -> None:
    """Run requests for a batchery server.

    Settings come from flags, from BATCHERY_... variables, or from batchery.toml, as for `batchery serve`. It waits for
    a database that is not there yet, or that a server has not brought up to date.
    """
    import uvloop  # noqa: PLC0415

    from batchery.cli import logs  # noqa: PLC0415
    from batchery.cli.options import fail, read_settings  # noqa: PLC0415
    from batchery.cli.upstreams import open_upstreams  # noqa: PLC0415
    from batchery.cli.worker_database import NewerDatabaseError, wait_for_database  # noqa: PLC0415
    from batchery.engine.worker import Worker, WorkerSettings  # noqa: PLC0415
    from batchery.server.settings import Settings  # noqa: PLC0415
    from batchery.store.blobs import open_folder, open_url  # noqa: PLC0415
    from batchery.store.database import Database  # noqa: PLC0415
    from batchery.store.errors import StoreError  # noqa: PLC0415

    settings = read_settings(
        config,
        database=database,
        store=store,
        data_dir=data_dir,
        upstream=upstream,
        upstream_key_env=upstream_key_env,
        max_in_flight=max_in_flight,
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        yield_to_interactive=yield_to_interactive,
        upstream_metrics=upstream_metrics,
        webhook_networks=webhook_networks,
    )
    logs.configure(settings.log_level, "worker")
    if settings.uses_folder:
        try:
            settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)  # as batchery serve makes it
        except OSError as error:
            fail(f"cannot make the data folder {settings.data_dir}: {error.strerror}")

    async def main(settings: Settings) -> int:
        database = Database(settings.database_url)
        blobs = open_folder(settings.data_dir / "blobs") if settings.store is None else open_url(settings.store)
        destinations = open_upstreams(settings)
        runner = Worker(
            database,
            blobs,
            destinations,
            WorkerSettings(
                cancel_grace=settings.cancel_grace,
                stop_grace=settings.stop_grace,
                alone=alone,
                webhook_networks=settings.allowed_networks,
            ),
        )
        stopped = asyncio.Event()

        def stop() -> None:
            stopped.set()
            runner.stop()

        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop)
        listening = asyncio.create_task(_listen(runner)) if exit_with_stdin else None
        code = 0
        try:
            if await wait_for_database(database, stopped):
                await runner.run()
        except (NewerDatabaseError, StoreError) as error:
            typer.echo(f"batchery: {str(error).partition(chr(10))[0]}", err=True)
            code = 1
        if listening is not None:
            listening.cancel()
        for destination in destinations:
            await destination.upstream.close()
        await database.close()
        return code

    # What has been made so far stays, and what requests leave has no cycles, so looking for some is rarely worth it.
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        code = runner.run(main(settings))
    raise typer.Exit(code)


async def _listen(runner: Worker) -> None:
    """Be woken by bytes on standard input; at its end the server is gone, and nothing may be left running.

    A new server may be waiting for the data folder already, so this process ends without ceremony: answers that have
    arrived are recorded, and whatever that takes, it is over within `LAST_WORDS`.
    """
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    with contextlib.suppress(ConnectionError):
        while await reader.read(4096):
            runner.wake()
    deadline = threading.Timer(LAST_WORDS, os._exit, (1,))
    deadline.daemon = True
    deadline.start()
    runner.abandon()
    await runner.ended.wait()
    os._exit(0)
