"""`batchery run`: a file of requests becomes a file of results, on a server that is named or one started for the job.

It is thin: it reads the options, puts the pieces of `batchery.client` together, and turns how the job ended into words
on stderr and an exit code. It must never show a traceback for something the user can mend, nor write anything but data
to stdout.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from batchery.cli.local_server import local_server
from batchery.cli.progress import display_for, duration, megabytes
from batchery.client import errors
from batchery.client.errors import ClientError, ConnectionLostError, DetachedError, InputError, SettingsError
from batchery.client.http import Api
from batchery.client.inputs import check_inputs
from batchery.client.job import Job, Outcome, errors_path
from batchery.client.server import Server, normalise_base_url, resolve_server
from batchery.client.state import JobFolder, new_state, resume_state
from batchery.wire.windows import window_seconds

OK, USAGE, INVALID, SOME_FAILED, BATCH_FAILED, REFUSED, LOST, DETACHED = 0, 1, 2, 3, 4, 5, 6, 130

PROBLEMS_SHOWN = 100
REASONS_SHOWN = 5


def run(
    inputs: Annotated[
        list[str] | None, typer.Argument(metavar="INPUT...", help="Batch files (JSONL), one batch each.")
    ] = None,
    *,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="OUT", help="Where results go; failures go to OUT's name with .errors."),
    ] = None,
    base_url: Annotated[
        str | None, typer.Option(metavar="URL", help="The batch server, with or without /v1 at its end.")
    ] = None,
    upstream: Annotated[
        str | None,
        typer.Option(
            metavar="URL|simulator",
            help="Start a server here for this job, in front of this inference server; simulator: made-up answers.",
        ),
    ] = None,
    window: Annotated[
        str, typer.Option(metavar="24h|1h|30m...", help="Time the batch may take (units s, m, h, d).")
    ] = "24h",
    endpoint: Annotated[
        str | None, typer.Option(metavar="PATH", help="The batch's endpoint.", show_default="the first request's url")
    ] = None,
    api_key_env: Annotated[
        str | None, typer.Option(metavar="NAME", help="Environment variable with the server's key.")
    ] = None,
    upstream_key_env: Annotated[
        str | None, typer.Option(metavar="NAME", help="Environment variable with the upstream's key.")
    ] = None,
    max_in_flight: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Requests in flight to the upstream.", show_default="the server's own"),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Data folder of the started server; kept.",
            show_default="a hidden folder beside OUT, removed after success",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start anew, even if OUT or an unfinished job for it is there.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a summary as one JSON object on stdout.")] = False,
) -> None:
    """Run a file of requests as a batch, and collect the results as they land.

    Every input is checked before anything is sent.
    The same command again goes on where an interrupted one stopped, and pays for nothing twice.

    \b
    Examples:
      batchery run requests.jsonl -o results.jsonl --upstream simulator
      batchery run requests.jsonl -o results.jsonl --upstream http://127.0.0.1:8000
      batchery run requests.jsonl -o results.jsonl --base-url https://api.doubleword.ai --window 1h

    \b
    Server and key, where no option names them:
      BATCHERY_BASE_URL with BATCHERY_API_KEY, then DOUBLEWORD_API_KEY,
      then OPENAI_BASE_URL with OPENAI_API_KEY. A key goes only to the server it belongs to.

    \b
    Exit codes:
        0  all rows ok
        1  wrong usage
        2  input invalid; nothing was sent
        3  some rows failed
        4  the batch failed, expired or was cancelled
        5  the server refused: key or quota
        6  connection lost; the same command goes on
      130  detached by Ctrl-C; the same command goes on
    """
    raise typer.Exit(
        run_job(
            Request(
                inputs=tuple(inputs or ()),
                output=output,
                base_url=base_url,
                upstream=upstream,
                window=window,
                endpoint=endpoint,
                api_key_env=api_key_env,
                upstream_key_env=upstream_key_env,
                max_in_flight=max_in_flight,
                data_dir=data_dir,
                overwrite=overwrite,
                quiet=quiet,
                as_json=as_json,
            )
        )
    )


class Request(msgspec.Struct, frozen=True):
    """What was asked for on the command line; see the options of `run`."""

    inputs: tuple[str, ...]
    output: Path | None
    base_url: str | None
    upstream: str | None
    window: str
    endpoint: str | None
    api_key_env: str | None
    upstream_key_env: str | None
    max_in_flight: int | None
    data_dir: Path | None
    overwrite: bool
    quiet: bool
    as_json: bool

    def say(self, text: str) -> None:
        """Tell the user something that is not an error."""
        if not self.quiet:
            typer.echo(text, err=True)


def run_job(request: Request) -> int:
    """Do what was asked for, and say on stderr how it went; returns the exit code."""
    try:
        with _sigterm_as_interrupt():
            return _run(request)
    except (KeyboardInterrupt, DetachedError):
        own = request.upstream is not None
        typer.echo(
            f"\n{'Stopped, and the server with it.' if own else 'Detached; what the server has begun goes on there.'}",
            err=True,
        )
        _fail(request, DETACHED, "detached", resumable=True)
        return DETACHED
    except ClientError as error:
        code = exit_code_of_error(error)
        typer.echo(f"Error: {error}", err=True)
        _show_problems(error)
        _fail(request, code, str(error), resumable=code == LOST)
        return code
    except OSError as error:
        typer.echo(f"Error: {error.strerror or error}: {error.filename or 'while writing'}", err=True)
        _fail(request, LOST, str(error), resumable=True)
        return LOST


def exit_code(outcome: Outcome) -> int:
    """The exit code of a job that came to its end."""
    if any(batch.status != "completed" for batch in outcome.batches):
        return BATCH_FAILED
    return OK if outcome.tally.ok == outcome.tally.rows else SOME_FAILED


def exit_code_of_error(error: ClientError) -> int:
    """The exit code of a job that could not come to its end."""
    if isinstance(error, errors.InputError):
        return INVALID
    if isinstance(error, errors.AuthError | errors.QuotaError):
        return REFUSED
    if isinstance(error, errors.ConnectionLostError | errors.ServerError):
        return LOST
    return USAGE


def _run(request: Request) -> int:
    """The command, from options to exit code; raises what `run_job` tells the user."""
    output = _checked_output(request)
    remote = _checked_server(request)
    inputs = check_inputs([Path(name) for name in request.inputs])
    rows, size = sum(i.requests for i in inputs), sum(i.size for i in inputs)

    folder = JobFolder(output)
    with folder.locked():
        data_dir = (request.data_dir or folder.path / "server").absolute()
        kept = "" if request.data_dir is None else f", data in {data_dir}"
        described = remote.base_url if remote else f"a server of its own, upstream {request.upstream}{kept}"
        _make_room(request, folder, output)
        saved = folder.load()
        state = resume_state(
            saved, new_state(inputs, server=described, window=request.window, endpoint=request.endpoint)
        )

        where = _key_note(remote) if remote else described
        request.say(f"{'Resuming' if saved else 'Running'} {rows} requests ({megabytes(size)}) on {where}")
        if request.upstream == "simulator":
            request.say("The answers are SIMULATED: no model runs, they are made up from the prompts.")
        began = time.monotonic()
        with ExitStack() as stack:
            watch: Callable[[], None] = _nothing
            if remote is None:
                remote, watch = _started(stack, request, data_dir)
            display = display_for(sys.stderr, quiet=request.quiet)
            stack.callback(display.close)
            api = Api(remote)
            outcome = _follow(Job(api, folder, state, output, display.update), api, watch)
            elapsed = time.monotonic() - began
        code = exit_code(outcome)
        if code == OK:
            folder.discard()
    _show_outcome(request, outcome, code, output, elapsed)
    return code


def _checked_output(request: Request) -> Path:
    """The output, after a look at all options that can be wrong without a look at the network."""
    if not request.inputs:
        raise SettingsError(
            "name at least one INPUT: a batch file with a request on each line. See batchery run --help"
        )
    if "-" in request.inputs:
        raise SettingsError("the input cannot be read from stdin; save it to a file, so that the job can be resumed")
    if request.output is None:
        raise SettingsError("say where the results go: -o OUT")
    output = request.output
    if output.is_dir():
        raise SettingsError(f"the output {output} is a folder; name a file in it")
    if not output.parent.is_dir():
        raise SettingsError(f"the folder {output.parent} for the output does not exist")
    if any(Path(name).resolve() == output.resolve() for name in request.inputs):
        raise SettingsError(f"{output} is both input and output")
    try:
        window_seconds(request.window)
    except ValueError as error:
        raise SettingsError(f"--window: {error}") from None
    if request.endpoint is not None and not request.endpoint.startswith("/"):
        raise SettingsError(f"--endpoint is a path such as /v1/chat/completions, not {request.endpoint!r}")
    return output.absolute()


def _checked_server(request: Request) -> Server | None:
    """The server that is named, with its key; None if one is to be started."""
    own = {
        "--upstream-key-env": request.upstream_key_env,
        "--max-in-flight": request.max_in_flight,
        "--data-dir": request.data_dir,
    }
    if request.upstream is None:
        alone = [name for name, value in own.items() if value is not None]
        if alone:
            raise SettingsError(f"{alone[0]} is for a server started here; it needs --upstream")
        return resolve_server(request.base_url, request.api_key_env, os.environ)
    if request.base_url is not None:
        raise SettingsError("--base-url names a server and --upstream starts one; say one of them")
    if request.api_key_env is not None:
        raise SettingsError("--api-key-env is for --base-url; the upstream's key is named by --upstream-key-env")
    if request.upstream != "simulator":
        normalise_base_url(request.upstream)
    if request.upstream_key_env is not None and not os.environ.get(request.upstream_key_env):
        raise SettingsError(f"--upstream-key-env names {request.upstream_key_env}, but that variable is not set")
    return None


def _make_room(request: Request, folder: JobFolder, output: Path) -> None:
    """Refuse to touch results that are not this job's, or, if told so, take them away."""
    results = (output, errors_path(output))
    if request.overwrite:
        folder.discard()
        for path in results:
            path.unlink(missing_ok=True)
    elif not folder.has_state:
        for path in results:
            if path.exists():
                raise SettingsError(f"{path} exists already; move it away, or say --overwrite")


def _key_note(server: Server) -> str:
    return f"{server.base_url} ({f'key from {server.key_from}' if server.key_from else 'no key'})"


def _started(stack: ExitStack, request: Request, data_dir: Path) -> tuple[Server, Callable[[], None]]:
    """A server of our own, and what to call to see whether it lives."""
    assert request.upstream is not None
    server = stack.enter_context(
        local_server(
            data_dir,
            request.upstream,
            upstream_key_env=request.upstream_key_env,
            max_in_flight=request.max_in_flight,
            window=request.window,
        )
    )
    return Server(normalise_base_url(server.base_url)), server.check


def _follow(job: Job, api: Api, watch: Callable[[], None]) -> Outcome:
    """Run a job in a thread, since a call under way there would keep a Ctrl-C from being seen until it is answered."""
    with ThreadPoolExecutor(1, "job") as pool:
        future = pool.submit(job.run)
        try:
            while not future.done():
                try:
                    return future.result(timeout=0.2)
                except TimeoutError:
                    watch()
            return future.result()
        except ConnectionLostError:
            watch()  # if our own server has died, that is the reason to tell
            raise
        finally:
            api.close()


def _nothing() -> None:
    """Nothing to watch: the server is not ours."""


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


def _show_problems(error: ClientError) -> None:

    if not isinstance(error, InputError):
        return
    for problem in error.problems[:PROBLEMS_SHOWN]:
        place = problem.path if problem.line is None else f"{problem.path}:{problem.line}"
        typer.echo(f"{place}: {problem.message} [{problem.code}]", err=True)
    if error.count > PROBLEMS_SHOWN:
        typer.echo(f"... and {error.count - PROBLEMS_SHOWN} more", err=True)


def _fail(request: Request, code: int, message: str, *, resumable: bool) -> None:
    """The end of a job that did not come to its end."""
    if resumable:
        typer.echo(f"To go on, run the same command again:\n  {_this_command()}", err=True)
    if request.as_json:
        _print_json({"exit_code": code, "error": message, "resumable": resumable})


def _this_command() -> str:
    return shlex.join(["batchery", *sys.argv[1:]])


def _show_outcome(request: Request, outcome: Outcome, code: int, output: Path, elapsed: float) -> None:

    counts, usage = outcome.tally, outcome.usage
    statuses = " ".join(dict.fromkeys(batch.status for batch in outcome.batches))
    rate = outcome.received / elapsed if elapsed > 0 else 0.0
    failures = errors_path(output) if errors_path(output).exists() else None
    words = [f"{counts.ok} ok", f"{counts.failed} failed", f"{counts.not_run} not run"]
    request.say(
        f"{statuses.capitalize()}: {', '.join(words)} of {counts.rows} rows in {duration(elapsed)} ({rate:.0f}/s)"
    )
    if usage is not None:
        note = " (simulated)" if request.upstream == "simulator" else ""
        request.say(f"Tokens: {usage.input_tokens} in, {usage.output_tokens} out{note}")
    if output.exists():
        request.say(f"Results: {output}")
    if failures is not None:
        request.say(f"Errors: {failures}")
    for reason in counts.reasons[:REASONS_SHOWN]:
        request.say(f"  {reason.rows} x {reason.text}")
    for problem in _problems(outcome)[:REASONS_SHOWN]:
        request.say(f"  {problem}")
    if request.as_json:
        _print_json(
            {
                "exit_code": code,
                "status": statuses,
                "rows": counts.rows,
                "ok": counts.ok,
                "failed": counts.failed,
                "not_run": counts.not_run,
                "input_tokens": usage.input_tokens if usage else None,
                "output_tokens": usage.output_tokens if usage else None,
                "elapsed_s": round(elapsed, 3),
                "rows_per_s": round(rate, 1),
                "output": str(output) if output.exists() else None,
                "errors": str(failures) if failures else None,
                "batches": [batch.id for batch in outcome.batches],
                "reasons": [{"reason": reason.text, "rows": reason.rows} for reason in counts.reasons],
                "problems": _problems(outcome),
                "simulated": request.upstream == "simulator",
            }
        )


def _problems(outcome: Outcome) -> Sequence[str]:
    """Why batches failed as a whole."""
    return [problem for batch in outcome.batches for problem in batch.problems]


def _print_json(value: dict[str, object]) -> None:
    typer.echo(msgspec.json.encode(value).decode())
