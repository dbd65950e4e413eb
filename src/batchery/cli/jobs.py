"""Carrying out a job for a command: what `batchery run` asked for, from its inputs to its receipt, and the words on
stderr and the exit code that it ends with.

It puts the pieces of `batchery.client` together. It must never show a traceback for something the user can mend, nor
write anything but data to stdout.
"""

from __future__ import annotations

import contextlib
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime

import msgspec
import typer

from batchery.cli.cancel import offer_to_cancel
from batchery.cli.cost_report import show_report
from batchery.cli.exit_codes import DETACHED, LOST, exit_code_of_error
from batchery.cli.failures import show_problems, tell, unheard
from batchery.cli.receipt import lines_of
from batchery.cli.request import Request
from batchery.cli.tables import Format
from batchery.client.carry_out import (
    WHOLE,
    carry_out,
    checked_output,
    checked_server,
    limits_of_job,
    tables_of_job,
    window_of,
)
from batchery.client.errors import ClientError, DetachedError, InputError, NotFoundError
from batchery.client.http import Api
from batchery.client.inputs import megabytes
from batchery.client.job import Progress
from batchery.client.prepare import prepare_inputs
from batchery.client.progress import Display, display_for
from batchery.client.receipt import Receipt
from batchery.client.spending import costs_of
from batchery.client.state import JobFolder
from batchery.client.windows import deadline_of


class _Telling:
    """Says on stderr how a job goes."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._display: Display | None = None

    def say(self, text: str) -> None:
        self._request.say(text)

    def begin(self, api: Api) -> None:
        self._display = display_for(sys.stderr, quiet=self._request.quiet)

    def update(self, progress: Progress) -> None:
        if self._display is not None:
            with unheard():
                self._display.update(progress)

    def end(self) -> None:
        if self._display is not None:
            with unheard():
                self._display.close()


def run_job(request: Request) -> int:
    """Do what was asked for, and say on stderr how it went; returns the exit code."""
    try:
        with _sigterm_as_interrupt():
            if request.dry_run:
                return _show_plan(request)
            found = carry_out(request, _Telling(request), stdin=sys.stdin.buffer)
            _show_receipt(request, found)
            return found.exit_code
    except (KeyboardInterrupt, DetachedError):
        own = request.upstream is not None
        tell(f"\n{'Stopped, and the server with it.' if own else 'Detached; what the server has begun goes on there.'}")
        _fail(request, DETACHED, "detached", resumable=True)
        _offer_to_cancel(request)
        return DETACHED
    except ClientError as error:
        code = exit_code_of_error(error)
        tell(f"Error: {error}")
        if isinstance(error, InputError):
            with unheard():
                show_problems(error)
        if isinstance(error, NotFoundError) and _has_batches(request):
            tell("The job's batch is no longer there. What has come of it is kept until --overwrite begins anew")
        _fail(request, code, str(error), resumable=code == LOST)
        return code
    except OSError as error:
        tell(f"Error: {error.strerror or error}: {error.filename or 'while writing'}")
        _fail(request, LOST, str(error), resumable=True)
        return LOST


def _show_plan(request: Request) -> int:
    """What a dry run says: that all is good, and what it would take."""
    checked_output(request)
    limits = limits_of_job(request, checked_server(request))
    window = window_of(request, deadline_of(request.by, request.within, datetime.now().astimezone()), request.say)
    whole = msgspec.structs.replace(limits, **WHOLE)
    prepared = prepare_inputs(request.inputs, request.making, None, stdin=sys.stdin.buffer, limits=whole)
    typer.echo(f"{prepared.rows} requests, all good; nothing was sent", err=True)
    costs = costs_of(prepared, tables_of_job(request, limits), [window], request.output_tokens)
    code = show_report(prepared, costs, Format.JSON if request.as_json else Format.TABLE, max_cost=request.max_cost)
    typer.echo(f"A batch takes {limits.requests} requests and {megabytes(limits.file_bytes)} on this server.", err=True)
    return code


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Be told to end as by Ctrl-C: children are stopped in order, and the state is saved."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _fail(request: Request, code: int, message: str, *, resumable: bool) -> None:
    """The end of a job that did not come to its end."""
    if resumable:
        without = ", without --overwrite" if request.overwrite else ""
        tell(f"To go on, run the same command again{without}:\n  {_this_command()}")
    if request.as_json:
        with contextlib.suppress(OSError):  # perhaps that is what went wrong
            _print_json({"exit_code": code, "error": message, "resumable": resumable})


def _has_batches(request: Request) -> bool:
    state = None if request.output is None else JobFolder(request.output.absolute()).load()
    return state is not None and any(part.batch_id for part in state.parts)


def _offer_to_cancel(request: Request) -> None:
    """After a Ctrl-C, on a server that goes on without us."""
    server = checked_server(request)
    if server is not None and request.output is not None:
        offer_to_cancel(server, JobFolder(request.output.absolute()))


def _this_command() -> str:
    """The command that goes on: one that overwrites would begin anew, and pay again."""
    return shlex.join(["batchery", *(argument for argument in sys.argv[1:] if argument != "--overwrite")])


def _show_receipt(request: Request, found: Receipt) -> None:
    for line in lines_of(found):
        request.say(line)
    if request.as_json:
        _print_json({name: value for name, value in msgspec.to_builtins(found).items() if name != "inputs"})


def _print_json(value: dict[str, object]) -> None:
    typer.echo(msgspec.json.encode(value).decode())
