"""Carrying out a job, from what was asked for to its receipt: inputs made ready, a server found or started, the state
saved or resumed, the batches followed to their end.

It puts the pieces of this package together for whoever asks, a command or a program. It must never print, nor end the
process: what it has to say goes through what it is given, and what goes wrong is raised.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import BinaryIO, Protocol

import msgspec

from batchery.client.errors import ConnectionLostError, InputProblem, OverCostError, ResumeError, SettingsError
from batchery.client.estimate import over_max_cost
from batchery.client.http import Api
from batchery.client.inputs import Input, megabytes
from batchery.client.job import Job, Outcome, Progress, errors_path
from batchery.client.job_request import JobRequest, save_request
from batchery.client.join import InputRow, format_of
from batchery.client.limits import ServerLimits, limits_named, server_name_of
from batchery.client.local_server import check_upstream, local_server, silent_upstreams
from batchery.client.pieces import split_inputs
from batchery.client.prepare import Prepared, fingerprints, prepare_inputs
from batchery.client.price_tables import PriceTable
from batchery.client.receipt import Receipt, load_receipt, save_receipt
from batchery.client.rows import Row, read_rows
from batchery.client.server import Server, normalise_base_url, resolve_server
from batchery.client.sources import STDIN
from batchery.client.spending import cost_by_model, cost_of, costs_of, price_of_all, tables_of
from batchery.client.state import JobFolder, JobState, new_state, resume_state
from batchery.client.stored_servers import stored_servers
from batchery.client.windows import choose_window, deadline_of, windows_offered
from batchery.wire.windows import window_seconds

DEFAULT_WINDOW = "24h"
WHOLE = {"file_bytes": 1 << 62, "requests": 1 << 40}
"""No limits: what is too large for one batch is split."""


class Listener(Protocol):
    """Who is told how a job goes; from the thread that carries it out, but for `update`."""

    def say(self, text: str) -> None:
        """A sentence that the user should know."""

    def begin(self, api: Api) -> None:
        """It begins. Closing these calls, from any thread, stops the job."""

    def update(self, progress: Progress) -> None:
        """Where the job is now."""

    def end(self) -> None:
        """No more progress is to come, however it went."""


def carry_out(
    request: JobRequest, listener: Listener, *, stdin: BinaryIO | None = None, server: Server | None = None
) -> Receipt:
    """Do what is asked for; the job goes on where an earlier run of it stopped.

    Args:
        request: what is asked for.
        listener: told how it goes.
        stdin: what the input `-` means.
        server: the server and its key, where the request itself does not lead to them.

    Returns:
        The receipt; that of the earlier run if the very same job has ended well before.

    Raises:
        ClientError: as `batchery.client.errors` lists them.
        OSError: results cannot be written.
    """
    output = checked_output(request)
    format = format_of(output, request.output_format)
    folder = JobFolder(output)
    deadline = _deadline(request, folder)
    remote = server or checked_server(request)
    with folder.locked():
        limits = limits_of_job(request, remote)
        whole = msgspec.structs.replace(limits, **WHOLE)
        source = partial(read_rows, request.inputs, request.making, folder=folder.path)
        _make_room(request, folder, output, format)
        prepared = prepare_inputs(request.inputs, request.making, folder.path, stdin=stdin, limits=whole)
        if (ended := _ended_before(request, listener, folder, output, prepared)) is not None:
            return ended
        data_dir = (request.data_dir or folder.path / "server").absolute()
        kept = "" if request.data_dir is None else f", data in {data_dir}"
        described = remote.base_url if remote else f"a server of its own, upstream {request.upstream}{kept}"
        saved = folder.load()
        window = saved.window if saved and deadline and saved.deadline else window_of(request, deadline, listener.say)
        tables = tables_of_job(request, limits)
        if saved is None or not saved.begun:
            _check_cost(request, prepared, tables, window)
        state = resume_state(
            saved,
            new_state(
                prepared.files,
                server=described,
                window=window,
                endpoint=request.endpoint,
                pieces=None if saved else _pieces(prepared, limits),
                sources=[Input(print.path, print.size, print.sha256, 0, "") for print in prepared.sources],
                making=prepared.making,
                format=format,
                now=time.time(),
                deadline=deadline,
                deduplicate=request.deduplicate,
            ),
        )
        if state.deduplicate != request.deduplicate:
            listener.say(
                f"The job has begun {'with' if state.deduplicate else 'without'} --deduplicate, and goes on so"
            )

        where = _key_note(remote) if remote else described
        batches = f", {len(state.parts)} batches" if len(state.parts) > 1 else ""
        listener.say(
            f"{'Resuming' if saved else 'Running'} {state.rows} requests ({megabytes(prepared.size)}{batches}) on "
            f"{where}, window {state.window}"
        )
        if request.upstream == "simulator":
            listener.say("The answers are SIMULATED: no model runs, they are made up from the prompts.")
        began = time.monotonic()
        with ExitStack() as stack:
            watch: Callable[[], None] = _nothing
            if remote is None:
                remote, watch = _started(stack, request, data_dir, state.window)
                for warning in silent_upstreams(request.upstream or ""):
                    listener.say(warning)
            price = price_of_all(prepared.groups, tables, state.window)

            def show(progress: Progress) -> None:
                listener.update(msgspec.structs.replace(progress, cost=cost_of(progress.usage, price)))

            save_request(folder, request)
            api = Api(remote)
            stack.callback(listener.end)
            listener.begin(api)
            job = Job(
                api,
                folder,
                state,
                output,
                show,
                listener.say,
                retries=request.retries,
                rows=partial(_unchanged_rows, source, request, folder, state),
                on_line=request.lines_to,
            )
            outcome = _follow(job, api, watch)
        found = _receipt(request, state, outcome, output, time.monotonic() - began)
        cost = cost_of(outcome.usage, price)
        # By model, tokens are counted in the result lines: an answer once for each row that it was given to.
        if price is None and not (outcome.deduplicated and outcome.deduplicated.requests):
            cost = cost_by_model(outcome.tally.models, prepared.groups, tables, state.window)
        found = msgspec.structs.replace(found, cost=cost, currency=None if cost is None else "USD")
        save_receipt(folder, found)
        if found.exit_code == 0:
            folder.discard(keep_receipt=True)
    return found


def limits_of_job(request: JobRequest, remote: Server | None) -> ServerLimits:
    """The limits of the server, or those that are asked for.

    Args:
        request: what is asked for.
        remote: the server; None for one that is started.
    """
    limits = limits_named(server_name_of(remote.base_url) if remote else "batchery")
    changes = {"file_bytes": request.max_file_bytes, "requests": request.max_requests}
    return msgspec.structs.replace(limits, **{name: value for name, value in changes.items() if value is not None})


def _pieces(prepared: Prepared, limits: ServerLimits) -> list[Input]:
    return split_inputs(prepared.files, max_bytes=limits.file_bytes, max_requests=limits.requests)


def _deadline(request: JobRequest, folder: JobFolder) -> float | None:
    """The deadline, in Unix seconds. A job that goes on keeps its own, which may be over by now."""
    try:
        return deadline_of(request.by, request.within, datetime.now().astimezone())
    except SettingsError:
        saved = folder.load()
        if saved is None or saved.deadline is None:
            raise
        return saved.deadline


def window_of(request: JobRequest, deadline: float | None, say: Callable[[str], None]) -> str:
    """The window that is named, or that meets the deadline."""
    if deadline is None:
        return request.window or DEFAULT_WINDOW
    if request.window is not None:
        return request.window
    window, why = choose_window(windows_offered(None), deadline - time.time())
    say(f"Window {window}: {why}")
    return window


def input_rows(source: Callable[[], Iterator[Row | InputProblem]]) -> Iterator[InputRow]:
    """The rows of inputs as they are joined to results.

    Args:
        source: gives them.
    """
    number = 0
    for row in source():
        if isinstance(row, Row):
            number += 1
            yield InputRow(row.custom_id, number, row.data)


def _unchanged_rows(
    source: Callable[[], Iterator[Row | InputProblem]], request: JobRequest, folder: JobFolder, state: JobState
) -> Iterator[InputRow]:
    """As `input_rows`, but it raises at the end if the inputs are no longer those that were sent: answers would stand
    beside rows that were never asked.
    """
    try:
        yield from input_rows(source)
        now = fingerprints(request.inputs, request.making, folder.path)
    except SettingsError as error:
        raise ResumeError(f"{error}. {_kept(folder)}") from None
    if [found.sha256 for found in now] != [before.sha256 for before in state.sources]:
        sent = {before.sha256 for before in state.sources}
        changed = [Path(found.path).name for found in now if found.sha256 not in sent]
        what = f"changed while the job ran: {', '.join(changed)}" if changed else "are others than when the job began"
        raise ResumeError(f"the inputs {what}. {_kept(folder)}")


def _kept(folder: JobFolder) -> str:
    return (
        f"Nothing is lost: the answers are in {folder.path / 'results.jsonl'}, by custom_id. With the inputs as they "
        "were, the same command puts rows and answers together"
    )


def tables_of_job(request: JobRequest, limits: ServerLimits) -> list[PriceTable]:
    """The price tables that count for the job."""
    return tables_of(limits.name, None if request.prices is None else Path(request.prices))


def _check_cost(request: JobRequest, prepared: Prepared, tables: Sequence[PriceTable], window: str) -> None:
    """Refuse a job that would cost more than it may."""
    if request.max_cost is not None:
        (cost,) = costs_of(prepared, tables, [window], request.output_tokens)
        over = over_max_cost(cost, request.max_cost)
        if over is not None:
            raise OverCostError(f"{over}; nothing was sent")


def _ended_before(
    request: JobRequest, listener: Listener, folder: JobFolder, output: Path, prepared: Prepared
) -> Receipt | None:
    """The receipt of this very job if it has succeeded before; None if there is something to do."""
    found = None if folder.has_state else load_receipt(folder)
    if found is None or not output.exists():
        return None
    now = [*(source.sha256 for source in prepared.sources), prepared.making]
    if found.inputs != now:
        changed = [Path(s.path).name for s in prepared.sources if s.sha256 not in found.inputs]
        why = f"{', '.join(changed)} differs" if changed else "the options that make requests of rows differ"
        if not changed and found.inputs[-1:] == now[-1:]:
            why = "there were other ones, or in another order"
        raise SettingsError(
            f"{output} exists already, and was made of other inputs: {why}. Move it away, or say --overwrite"
        )
    listener.say("This job has ended already; nothing was sent.")
    return found


def checked_output(request: JobRequest) -> Path:
    """The output, after a look at all options that can be wrong without a look at the network."""
    if not request.inputs:
        raise SettingsError(
            "name at least one INPUT: a batch file with a request on each line. See batchery run --help"
        )
    if request.output is None:
        raise SettingsError("say where the results go: -o OUT")
    output = request.output
    if str(output) == STDIN:
        raise SettingsError("results go to a file, not to stdout: name one, or take batchery stream, which prints them")
    if output.is_dir():
        raise SettingsError(f"the output {output} is a folder; name a file in it")
    if output.exists() and not output.is_file():
        raise SettingsError(f"the output {output} is no ordinary file, which could be gone on with; name one")
    if not output.parent.is_dir():
        raise SettingsError(f"the folder {output.parent} for the output does not exist")
    if any(Path(name).resolve() == output.resolve() for name in request.inputs):
        raise SettingsError(f"{output} is both input and output")
    try:
        window_seconds(request.window or DEFAULT_WINDOW)
    except ValueError as error:
        raise SettingsError(f"--window: {error}") from None
    if request.endpoint is not None and not request.endpoint.startswith("/"):
        raise SettingsError(f"--endpoint is a path such as /v1/chat/completions, not {request.endpoint!r}")
    return output.absolute()


def checked_server(request: JobRequest) -> Server | None:
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
        return resolve_server(
            request.base_url, request.api_key_env, os.environ, stored=stored_servers(os.environ), name=request.server
        )
    if request.server is not None:
        raise SettingsError("--server names a server and --upstream starts one; say one of them")
    if request.base_url is not None:
        raise SettingsError("--base-url names a server and --upstream starts one; say one of them")
    if request.api_key_env is not None:
        raise SettingsError("--api-key-env is for --base-url; the upstream's key is named by --upstream-key-env")
    check_upstream(request.upstream, request.upstream_key_env)
    return None


def _make_room(request: JobRequest, folder: JobFolder, output: Path, format: str) -> None:
    """Refuse to touch results that are not this job's, or, if told so, take them away."""
    results = (output, errors_path(output)) if format == "raw" else (output,)
    if request.overwrite:
        folder.discard()
        for path in results:
            path.unlink(missing_ok=True)
    elif not folder.has_state and load_receipt(folder) is None:
        for path in results:
            if path.exists():
                raise SettingsError(f"{path} exists already; move it away, or say --overwrite")


def _key_note(server: Server) -> str:
    return f"{server.base_url} ({f'key from {server.key_from}' if server.key_from else 'no key'})"


def _started(stack: ExitStack, request: JobRequest, data_dir: Path, window: str) -> tuple[Server, Callable[[], None]]:
    """A server of our own, and what to call to see whether it lives."""
    assert request.upstream is not None
    server = stack.enter_context(
        local_server(
            data_dir,
            request.upstream,
            upstream_key_env=request.upstream_key_env,
            max_in_flight=request.max_in_flight,
            window=window,
        )
    )
    return Server(normalise_base_url(server.base_url)), server.check


def _follow(job: Job, api: Api, watch: Callable[[], None]) -> Outcome:
    """Run a job in a thread, since a call under way there would keep a Ctrl-C from being seen until it is answered."""
    future: Future[Outcome] = Future()

    def work() -> None:
        try:
            future.set_result(job.run())
        except BaseException as error:
            future.set_exception(error)

    # A daemon, so that a program which ends can stop it, and does not wait for it first.
    thread = threading.Thread(target=work, name="job", daemon=True)
    thread.start()
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
        thread.join()


def _nothing() -> None:
    """Nothing to watch: the server is not ours."""


def exit_code(outcome: Outcome) -> int:
    """The exit code of a job that came to its end, of those that `docs/client.md` lists: 0, 3 or 4."""
    if outcome.tally.ok == outcome.tally.rows:
        return 0  # also where a batch expired, and what it left was run again
    # What was run again counts by how it ended then.
    return 4 if any(batch.status != "completed" for batch in outcome.batches) else 3


def _receipt(request: JobRequest, state: JobState, outcome: Outcome, output: Path, elapsed: float) -> Receipt:
    counts, usage, now = outcome.tally, outcome.usage, time.time()
    failures = errors_path(output)
    has_failures = state.format == "raw" and failures.exists()
    return Receipt(
        exit_code=exit_code(outcome),
        status=" ".join(dict.fromkeys(batch.status for batch in outcome.batches)),
        server=state.server,
        rows=counts.rows,
        ok=counts.ok,
        failed=counts.failed,
        not_run=counts.not_run,
        input_tokens=usage.input_tokens if usage else None,
        output_tokens=usage.output_tokens if usage else None,
        cached_tokens=usage.cached_tokens if usage else None,
        deduplicated=outcome.deduplicated,
        began_at=state.began_at,
        ended_at=now,
        elapsed_s=round(elapsed, 3),
        rows_per_s=round(outcome.received / elapsed, 1) if elapsed > 0 else 0.0,
        window=state.window,
        deadline=state.deadline,
        deadline_met=None if state.deadline is None else now <= state.deadline,
        retries=state.round,
        output=str(output) if output.exists() else None,
        errors=str(failures) if has_failures else None,
        batches=[batch.id for batch in outcome.batches],
        reasons=[{"reason": r.text, "rows": r.rows, "cause": r.cause.value} for r in counts.reasons],
        problems=list(_problems(outcome)),
        simulated=request.upstream == "simulator",
        inputs=[*(source.sha256 for source in state.sources), state.making],
    )


def _problems(outcome: Outcome) -> Sequence[str]:
    """Why batches failed as a whole."""
    return [problem for batch in outcome.batches for problem in batch.problems]
