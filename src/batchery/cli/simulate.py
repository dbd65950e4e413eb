"""`batchery simulate`: run the inference simulator in the foreground.

It reads the options' text into a behaviour and runs the server until it is told to stop. It must never start with an
option that it did not understand, and it says on stderr that no model answers here.
"""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import Annotated, TypeVar

import typer
import uvloop

from batchery.upstreams.simulator import Behaviour, options, running_simulator

V = TypeVar("V")
T = TypeVar("T")

FILES = 65_536

_WHAT, _WRONG = "What it does", "What goes wrong"


CONTEXT_SETTINGS = {"auto_envvar_prefix": "BATCHERY_SIMULATE"}
"""Every option is also an environment variable, such as `BATCHERY_SIMULATE_LATENCY`."""


def simulate(
    *,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes any free one.")] = 9000,
    latency: Annotated[
        str,
        typer.Option(
            rich_help_panel=_WHAT,
            help="Time to an answer, with a unit (ms, s, m): 50ms, uniform:10ms-90ms, or lognormal:1s,sigma=0.8 "
            "(its median, and the sigma of its logarithm; 0.5 where not given).",
        ),
    ] = "50ms",
    token_latency: Annotated[
        str, typer.Option(rich_help_panel=_WHAT, help="Time that each completion token adds to an answer: 2ms.")
    ] = "0",  # noqa: S107 — tokens of text, not a secret
    concurrency: Annotated[
        str,
        typer.Option(
            rich_help_panel=_WHAT,
            help="Requests worked on at once; more wait in order. 0: no limit. Or as it changes: 256@0s,64@20s.",
        ),
    ] = "256",
    slowdown: Annotated[
        float,
        typer.Option(
            min=0, rich_help_panel=_WHAT, help="How much longer it takes with all slots taken: 1 for twice as long."
        ),
    ] = 0.0,
    interactive: Annotated[
        str | None,
        typer.Option(
            metavar="RATE",
            rich_help_panel=_WHAT,
            help="Requests a second that others send to the same slots: 20, or 0@0s,50@10s.",
            show_default="none",
        ),
    ] = None,
    max_queue: Annotated[
        int | None,
        typer.Option(
            min=0,
            rich_help_panel=_WHAT,
            help="Requests that may wait; one more is answered 429.",
            show_default="no limit",
        ),
    ] = None,
    tokens: Annotated[
        str,
        typer.Option(
            rich_help_panel=_WHAT,
            help="Completion tokens of an answer: 16, or a range such as 8-64; a request's own limit cuts it.",
        ),
    ] = "16",
    dimensions: Annotated[
        int, typer.Option(rich_help_panel=_WHAT, help="Numbers in an embedding where the request does not say.")
    ] = 8,
    prefix_cache: Annotated[
        int,
        typer.Option(
            min=0,
            rich_help_panel=_WHAT,
            help="Blocks of 16 tokens in the prefix cache, which usage reports as cached_tokens. 0: no cache.",
        ),
    ] = 0,
    uncached_latency: Annotated[
        str,
        typer.Option(rich_help_panel=_WHAT, help="Time that each prompt token adds that is not in the cache: 0.1ms."),
    ] = "0",
    models: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=_WHAT, help="Models served, others are answered 404: a,b.", show_default="any model"
        ),
    ] = None,
    api_key_env: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=_WHAT,
            help="Environment variable with the key that requests must carry, else 401.",
            show_default="no key",
        ),
    ] = None,
    line_separator: Annotated[
        bool,
        typer.Option(
            "--line-separator",
            rich_help_panel=_WHAT,
            help="Put U+2028, U+2029 and U+0085 into answers, and raw newlines between the parts of their JSON.",
        ),
    ] = False,
    seed: Annotated[
        int, typer.Option(rich_help_panel=_WHAT, help="The same seed gives the same outcome to each request.")
    ] = 1,
    error_rate: Annotated[
        list[str] | None,
        typer.Option(
            metavar="STATUS=RATE",
            rich_help_panel=_WRONG,
            help="Share of requests answered with this status (400-599): 500=0.01. Repeatable.",
        ),
    ] = None,
    html_rate: Annotated[
        list[str] | None,
        typer.Option(
            metavar="STATUS=RATE",
            rich_help_panel=_WRONG,
            help="Share answered with a page of HTML, also with 200: 502=0.01. Repeatable.",
        ),
    ] = None,
    stall_rate: Annotated[
        float, typer.Option(rich_help_panel=_WRONG, help="Share never answered, until the client gives up: 0.01.")
    ] = 0.0,
    reset_rate: Annotated[
        float, typer.Option(rich_help_panel=_WRONG, help="Share whose connection is reset before any answer: 0.01.")
    ] = 0.0,
    truncate_rate: Annotated[
        float,
        typer.Option(rich_help_panel=_WRONG, help="Share whose connection closes halfway through the body: 0.01."),
    ] = 0.0,
    malformed_rate: Annotated[
        float, typer.Option(rich_help_panel=_WRONG, help="Share answered 200 with JSON cut short: 0.01.")
    ] = 0.0,
    fail_attempts: Annotated[
        int,
        typer.Option(
            min=0,
            rich_help_panel=_WRONG,
            help="Fail the first N attempts at each prompt, and none after; the rates then say only in which mix "
            "(without any: 500).",
        ),
    ] = 0,
    retry_after: Annotated[
        str,
        typer.Option(
            metavar="SECONDS",
            rich_help_panel=_WRONG,
            help="Whole seconds in Retry-After of a 429 or 503; none: no header.",
        ),
    ] = "1",
    outage: Annotated[
        list[str] | None,
        typer.Option(
            metavar="START-END",
            rich_help_panel=_WRONG,
            help="Answer 503 to everything between these times since the start: 5s-8s. Repeatable.",
        ),
    ] = None,
) -> None:
    """Run an OpenAI-compatible server that only pretends, for tests, demos and benchmarks.

    Its answers are made from the prompt, without a model. All rates together may be at most 1.
    A prompt may aim a fault at itself: with simulate status=500 in double square brackets it is always answered 500.
    """
    try:
        behaviour = Behaviour(
            latency=_read("--latency", options.parse_latency, latency),
            token_latency=_read("--token-latency", options.parse_duration, token_latency),
            concurrency=_read("--concurrency", options.parse_concurrency, concurrency),
            slowdown=slowdown,
            interactive=() if interactive is None else _read("--interactive", options.parse_schedule, interactive),
            max_queue=max_queue,
            tokens=_read("--tokens", options.parse_tokens, tokens),
            dimensions=dimensions,
            error_rates=_read("--error-rate", options.parse_rates, error_rate or ()),
            html_rates=_read("--html-rate", options.parse_rates, html_rate or ()),
            stall_rate=stall_rate,
            reset_rate=reset_rate,
            truncate_rate=truncate_rate,
            malformed_rate=malformed_rate,
            fail_attempts=fail_attempts,
            retry_after=_read("--retry-after", options.parse_retry_after, retry_after),
            outages=_read("--outage", options.parse_outages, outage or ()),
            prefix_cache=prefix_cache,
            uncached_latency=_read("--uncached-latency", options.parse_duration, uncached_latency),
            line_separator=line_separator,
            models=() if models is None else _read("--models", options.parse_models, models),
            seed=seed,
            api_key=None if api_key_env is None else _read("--api-key-env", _key_from, api_key_env),
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None

    _raise_file_limit()
    try:
        uvloop.run(_run(behaviour, host, port))
    except OSError as error:
        typer.echo(f"batchery simulate: cannot listen on {host} port {port}: {error.strerror or error}", err=True)
        raise typer.Exit(1) from None


def _read(option: str, parse: Callable[[V], T], value: V) -> T:
    try:
        return parse(value)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from None


def _key_from(name: str) -> str:
    key = os.environ.get(name, "")
    if not key:
        raise ValueError(f"the environment variable {name} is not set, or is empty")
    return key


def _raise_file_limit() -> None:
    """Every connection is an open file, and the usual soft limit of 1024 is fewer than a load test opens."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if hard == resource.RLIM_INFINITY else min(hard, FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


async def _run(behaviour: Behaviour, host: str, port: int) -> None:
    """Serve until SIGTERM or SIGINT."""
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    async with running_simulator(behaviour, host=host, port=port) as simulator:
        typer.echo("This is a simulator: no model runs here, and its answers are made up from the prompts.", err=True)
        typer.echo(f"batchery simulator listening on {simulator.url}")
        sys.stdout.flush()
        await stopped.wait()
