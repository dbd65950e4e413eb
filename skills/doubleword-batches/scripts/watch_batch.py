#!/usr/bin/env python3
"""Follow a batch to its end and keep its results as they land. It never loses or doubles a line, and makes no batch.

Each look at the batch fetches only what is new, where the server can say so (`X-Last-Line`; the start is asked for as
`offset` and as `skip`, since servers differ); from other servers the files are fetched once, at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
import urllib.parse
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also where Python is told not to, as by -I

import batch_api
import batch_results
import batch_state
import exits
from exits import StopError

EXAMPLES = """  python watch_batch.py batch_requests.jsonl
  python watch_batch.py batch_requests.jsonl --once
  python watch_batch.py batch_6f3e... -o results.jsonl --errors errors.jsonl"""
TERMINAL = ("completed", "failed", "expired", "cancelled")
LONGEST_INTERVAL = 60.0
WAIT = 30  # seconds for which a server that can is asked to hold its answer
Batch = Dict[str, Any]


def main() -> int:
    """The script."""
    parser = exits.Parser(
        "Follow a batch, appending its results to a file as they land. The same command again goes on where it "
        "stopped. At the end the batch's ids, status, counts and files are printed as JSON.",
        EXAMPLES,
    )
    parser.add_argument("batch", metavar="FILE|BATCH_ID", help="the input file that was submitted, or a batch's id")
    parser.add_argument(
        "--state", type=exits.file_to_write, metavar="PATH", help="the state file; default FILE.batch.json"
    )
    add_options(parser)
    batch_api.add_options(parser)
    options = parser.parse_args()
    source = Path(options.batch)
    path = options.state or batch_state.state_path(source)
    if not path.exists() and (options.state or source.exists()):
        raise StopError("%s has not been submitted: there is no %s; see submit_batch.py" % (source, path))
    state = batch_state.load(path) or {"batch_id": options.batch}
    if "batch_id" not in state:
        raise StopError("the submission of %s is not finished; run submit_batch.py again" % source)
    code = watch(options, source, state)
    if code != exits.STILL_RUNNING:
        batch_state.forget_new(path)
    return code


def add_options(parser: argparse.ArgumentParser) -> None:
    """How to watch."""
    group = parser.add_argument_group("watching")
    group.add_argument(
        "-o", "--output", type=exits.file_to_write, metavar="PATH", help="default: FILE's name and .results.jsonl"
    )
    group.add_argument(
        "--errors", type=exits.file_to_write, metavar="PATH", help="default: FILE's name and .errors.jsonl"
    )
    group.add_argument("--once", action="store_true", help="look once, take the results that are there, and end")
    group.add_argument(
        "--timeout", type=float, metavar="SECONDS", help="stop watching after so long; the batch goes on"
    )
    group.add_argument(
        "--interval", type=float, default=5.0, metavar="SECONDS", help="first pause between looks (5); it grows to 60"
    )


def result_paths(source: Path) -> Any:
    """Where the results and the errors of an input file go, unless it is said."""
    name = str(source)[: -len(".jsonl")] if source.name.endswith(".jsonl") else str(source)
    return Path(name + ".results.jsonl"), Path(name + ".errors.jsonl")


def memory_path(output: Path) -> Path:
    """Where it is kept which batch a result file is of, and whether all of it is there."""
    return output.with_name(output.name + ".watch.json")


def watch(options: argparse.Namespace, source: Path, state: Dict[str, Any]) -> int:
    """Follow a batch as the options say.

    Args:
        options: those of `add_options` and of `batch_api`.
        source: what the default names of the result files are made from.
        state: with `batch_id`, and `base_url` if it is known.

    Returns:
        The exit code.

    Raises:
        StopError: it cannot be followed, or not now.
    """
    server = batch_api.server_from(options, state.get("base_url"))
    output, errors = (given or usual for given, usual in zip((options.output, options.errors), result_paths(source)))
    memory = memory_path(output)
    if not memory.exists():
        # A wrong id or key leaves no files behind.
        batch_api.call(server, "GET", "/batches/" + urllib.parse.quote(state["batch_id"], safe=""))
    with contextlib.ExitStack() as stack:
        stack.enter_context(batch_state.locked(memory))
        watcher = Watcher(server, state["batch_id"], output, errors, memory, stack)
        batch = watcher.follow(options)
    status = batch.get("status")
    summary = {
        "batch_id": state["batch_id"],
        "status": status,
        "request_counts": batch.get("request_counts"),
        "input_file_id": batch.get("input_file_id"),
        "output_file_id": batch.get("output_file_id"),
        "error_file_id": batch.get("error_file_id"),
        "results": str(output),
        "result_lines": watcher.output.lines,
        "errors": str(errors),
        "error_lines": watcher.errors.lines,
    }
    print(json.dumps(summary))
    if status not in TERMINAL:
        print("still running; the same command goes on", file=sys.stderr)
        return exits.STILL_RUNNING
    if status != "completed":
        return exits.BATCH_FAILED
    return exits.SOME_FAILED if watcher.errors.lines or _failed(batch) else exits.OK


class Watcher:
    """A batch, and the two files that follow its.

    Args:
        memory: a small file that says which batch the two belong to.
        stack: closes the files.

    Raises:
        StopError: the files belong to something else.
    """

    def __init__(
        self,
        server: batch_api.Server,
        batch_id: str,
        output: Path,
        errors: Path,
        memory: Path,
        stack: contextlib.ExitStack,
    ) -> None:
        self._server, self._batch_id, self._memory = server, batch_id, memory
        known = batch_state.load(memory)
        # Relative, so that the folder with all of it may move.
        beside = os.path.relpath(str(errors.resolve()), str(memory.resolve().parent))
        self._known = known or {"batch_id": batch_id, "errors": beside}
        for path in (output, errors):
            if known is None and path.exists() and path.stat().st_size:
                raise StopError("%s is there already, and not known to be of this batch; move it, or say -o" % path)
        if self._known["batch_id"] != batch_id or self._known["errors"] != beside:
            raise StopError(
                "%s and %s belong to batch %s; say -o and --errors, or name batch %s itself instead of its input file"
                % (output, errors, known["batch_id"] if known else "", batch_id)
            )
        batch_state.save(memory, self._known)
        self.output = stack.enter_context(batch_results.ResultFile(output))
        self.errors = stack.enter_context(batch_results.ResultFile(errors))
        self._resumable = True
        self._told = ""

    def follow(self, options: argparse.Namespace) -> Batch:
        """Look until the batch has ended, or the options say to stop; the batch as last seen."""
        began, pause = time.monotonic(), max(0.05, options.interval)
        wait = 0 if options.once else 1  # whether the server can hold its answer shows at once
        while True:
            batch, held, advice = self._look(wait)
            over = batch.get("status") in TERMINAL
            self._tell(batch)
            if not over:
                self._note(ended=False)
            self._fetch(batch, over)
            left = None if options.timeout is None else options.timeout - (time.monotonic() - began)
            if over or options.once or (left is not None and left <= 0):
                if over:
                    self._complete(batch)
                    self._note(ended=True)
                return batch
            wait = WAIT
            rest = min(1.0, options.interval) if held else max(pause, advice)
            pause = min(LONGEST_INTERVAL, pause * 1.5)
            time.sleep(rest if left is None else min(rest, left))

    def _note(self, ended: bool) -> None:
        """Keep whether all results of a batch that has ended are here: until then, what has none may still run."""
        if self._known.get("ended") is not ended:
            self._known["ended"] = ended
            batch_state.save(self._memory, self._known)

    def _look(self, wait: int) -> Tuple[Batch, bool, float]:
        """The batch, whether the server held its answer, and the seconds that it asks us to stay away."""
        headers = {"Prefer": "wait=%d" % wait} if wait else {}
        path = "/batches/" + urllib.parse.quote(self._batch_id, safe="")
        batch, answered = batch_api.call(self._server, "GET", path, headers=headers)
        if not isinstance(batch, dict):
            raise StopError("what the server has as batch %s is no object" % self._batch_id)
        advice = batch_api.retry_after(answered.get("retry-after")) or 0.0
        return batch, "wait" in answered.get("preference-applied", "").lower(), min(advice, LONGEST_INTERVAL)

    def _fetch(self, batch: Batch, over: bool) -> None:
        if batch.get("output_file_id"):
            self._follow_file(batch["output_file_id"], self.output, over)
        error_file, known = batch.get("error_file_id"), self._known.get("error_file_id")
        if error_file != known:
            if known is not None:
                # The failed requests run again: their old errors are history, and new ones have a file of their own.
                self.errors.start_over()
            self._known["error_file_id"] = error_file
            batch_state.save(self._memory, self._known)
        if error_file:
            self._follow_file(error_file, self.errors, over)

    def _follow_file(self, file_id: str, into: batch_results.ResultFile, over: bool) -> None:
        """Take what there is of a growing file, all of it if the batch is over."""
        if not over and not self._resumable:
            return
        began, tries = time.monotonic(), 0
        while True:
            before = into.lines
            try:
                incomplete = self._download(file_id, into, into.lines)
            except (batch_api.HttpError, batch_api.LostError) as error:
                if isinstance(error, batch_api.HttpError) and error.status == 404 and not over:
                    return  # some servers have no file before the end
                if into.lines > before:
                    began, tries = time.monotonic(), 0
                tries += 1
                pause = batch_api.pause_for(error, tries)
                if pause is None or time.monotonic() - began + pause > self._server.patience:
                    raise
                batch_api.wait_to_retry(error, pause)
                continue
            if into.lines == before or not incomplete:
                return

    def _download(self, file_id: str, into: batch_results.ResultFile, after: int) -> bool:
        """One answer; whether the server says that there is more."""
        path = "/files/%s/content" % urllib.parse.quote(file_id, safe="")
        if after:
            path += "?offset=%d&skip=%d" % (after, after)
        with batch_api.opened(self._server, path) as (response, headers):
            into.append(batch_api.blocks_of(response))
        self._resumable = "x-last-line" in headers
        return headers.get("x-incomplete", "").lower() == "true"

    def _complete(self, batch: Batch) -> None:
        """Where fewer results came than the batch counts, lines were passed over: look at the whole file again."""
        counts = batch.get("request_counts") or {}
        wanted = counts.get("completed")
        if isinstance(wanted, int) and self.output.lines < wanted and batch.get("output_file_id"):
            with contextlib.suppress(batch_api.HttpError):
                self._download(batch["output_file_id"], self.output, 0)
            if self.output.lines < wanted:
                print(
                    "note: the batch counts %d results, its file has %d" % (wanted, self.output.lines), file=sys.stderr
                )
        for problem in ((batch.get("errors") or {}).get("data") or [])[:10]:
            if isinstance(problem, dict):
                line = " line %s" % problem["line"] if problem.get("line") else ""
                print("error:%s %s (%s)" % (line, problem.get("message"), problem.get("code")), file=sys.stderr)

    def _tell(self, batch: Batch) -> None:
        counts = batch.get("request_counts") or {}
        told = "%s: %s of %s done, %s failed" % (
            batch.get("status"),
            counts.get("completed", "?"),
            counts.get("total", "?"),
            counts.get("failed", "?"),
        )
        if told != self._told:
            self._told = told
            print("%s %s" % (time.strftime("%H:%M:%S"), told), file=sys.stderr, flush=True)


def _failed(batch: Batch) -> Optional[int]:
    failed = (batch.get("request_counts") or {}).get("failed")
    return failed if isinstance(failed, int) else None


if __name__ == "__main__":
    exits.run(main, "The batch goes on; the same command follows it again.")
