#!/usr/bin/env python3
"""Validate a batch file, upload it and create the batch: once, however often the command is run and wherever it dies.

Each step is written to a state file beside the input before and after it is asked for. A step that may have been
carried out unseen is first looked for on the server, by the name under which the file was uploaded and by the file that
the batch was made from; a server that knows Idempotency-Key recognises the repeated call besides.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import urllib.parse
import uuid
from pathlib import Path
from typing import Any, Callable, Dict, Optional

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also where Python is told not to, as by -I

import batch_api
import batch_lines
import batch_state
import exits
import validate_batch_file
import watch_batch
from exits import StopError

EXAMPLES = """  python submit_batch.py batch_requests.jsonl
  python submit_batch.py batch_requests.jsonl --window 1h --metadata job=nightly
  python submit_batch.py batch_requests.jsonl --wait
  python submit_batch.py batch_requests.jsonl --base-url http://127.0.0.1:8080/v1 --api-key-env MY_KEY"""
PAGES = 20  # of a list that is searched for what was made before


def main() -> int:
    """The script."""
    parser = exits.Parser(
        "Validate, upload and create, once: the ids are kept in FILE.batch.json, and the same command again goes on "
        "where it stopped. The ids are printed as JSON.",
        EXAMPLES,
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="the batch input file, JSONL")
    add_options(parser)
    parser.add_argument("--wait", action="store_true", help="then do as watch_batch.py does")
    watch_batch.add_options(parser)
    batch_api.add_options(parser)
    options = parser.parse_args()
    state = submit(options, options.file, options.state or batch_state.state_path(options.file))
    if not options.wait:
        print(json.dumps(ids(state)))
        return exits.OK
    code = watch_batch.watch(options, options.file, state)
    if code != exits.STILL_RUNNING:
        batch_state.forget_new(options.state or batch_state.state_path(options.file))
    return code


def add_options(parser: argparse.ArgumentParser) -> None:
    """What can be said about a batch to make."""
    parser.add_argument("--window", default="24h", help="24h (better pricing) or 1h (faster); default 24h")
    parser.add_argument("--endpoint", help="default: the url of the requests")
    parser.add_argument(
        "--metadata", action="append", default=[], metavar="NAME=VALUE", help="kept with the batch; repeatable"
    )
    parser.add_argument(
        "--state", type=exits.file_to_write, metavar="PATH", help="the state file; default FILE.batch.json"
    )
    parser.add_argument(
        "--deduplicate",
        action="store_true",
        help="send identical requests that leave nothing to chance once, on a server that can",
    )
    parser.add_argument("--new", action="store_true", help="make another batch, although one was made from this file")


def ids(state: Dict[str, Any]) -> Dict[str, Any]:
    """What a caller needs of a state."""
    return {name: state.get(name) for name in ("batch_id", "input_file_id", "requests", "base_url")}


def submit(options: argparse.Namespace, source: Path, path: Path) -> Dict[str, Any]:
    """Take a file to its batch, from wherever that stands.

    Args:
        options: those of `add_options` and of `batch_api`.
        source: the input.
        path: of the state.

    Returns:
        The state, with `batch_id`.

    Raises:
        StopError: it cannot be done, or not now.
    """
    checked = batch_lines.check(source)
    validate_batch_file.report(source, checked)
    if checked.problems:
        raise StopError("%s has %d problems; nothing was sent" % (source, len(checked.problems)), exits.INVALID_INPUT)
    with batch_state.locked(path):
        before = batch_state.load(path)
        if options.new and not (before or {}).get("new"):
            before = None
        server = batch_api.server_from(options, before.get("base_url") if before else None)
        wanted = {
            "base_url": server.base_url,
            "sha256": checked.sha256,
            "bytes": checked.size,
            "endpoint": options.endpoint or max(checked.urls, key=lambda url: checked.urls[url]),
            "window": options.window,
            "metadata": _metadata(options.metadata),
            "deduplicate": options.deduplicate,
        }
        if options.new and before is not None and any(before.get(name) != value for name, value in wanted.items()):
            before = None
        state = _resume(before, wanted, source, path)
        if options.new:
            # Until the command has ended well, the same one again goes on with the batch that it makes.
            state["new"] = True
        state.update(input=str(source.resolve()), requests=checked.requests)
        if "batch_id" in state:
            print("already submitted: batch %s (%s)" % (state["batch_id"], path), file=sys.stderr)
        else:
            if "input_file_id" not in state:
                _upload(server, source, state, path)
            _create(server, state, path)
        if not getattr(options, "wait", False):
            batch_state.forget_new(path)
    return state


def _metadata(pairs: Any) -> Dict[str, str]:
    metadata = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name or len(name) > 64 or len(value) > 512:
            raise StopError("--metadata %r must be NAME=VALUE, with at most 64 and 512 characters" % pair)
        metadata[name] = value
    if len(metadata) > 16:
        raise StopError("at most 16 --metadata are allowed, not %d" % len(metadata))
    return metadata


def _resume(before: Optional[Dict[str, Any]], wanted: Dict[str, Any], source: Path, path: Path) -> Dict[str, Any]:
    if before is not None:
        before.setdefault("deduplicate", False)  # of before there was this option
    if before is not None and "creating" not in before and "batch_id" not in before:
        # Nothing that costs money was asked for: what differs may simply replace it.
        before = before if all(before.get(name) == value for name, value in wanted.items()) else None
    if before is None:
        return dict(wanted, submission=uuid.uuid4().hex, begun_at=int(time.time()))
    if before.get("sha256") != wanted["sha256"]:
        raise StopError(
            "%s has changed since it was first submitted (%s bytes then, %d now). To submit the new content as another "
            "batch, say --new" % (source, before.get("bytes"), wanted["bytes"]),
            exits.INVALID_INPUT,
        )
    for name in ("base_url", "endpoint", "window", "metadata", "deduplicate"):
        if before.get(name) != wanted[name]:
            raise StopError(
                "%s was first submitted with %s %s, now it is %s. Say the same again, or --new to make another batch"
                % (source, name, json.dumps(before.get(name)), json.dumps(wanted[name]))
            )
    return before


def _upload(server: batch_api.Server, source: Path, state: Dict[str, Any], path: Path) -> None:
    # The name is the mark by which an upload whose answer was lost is found again.
    name = "%s-%s.jsonl" % (
        source.stem[:80].encode("ascii", "replace").decode().replace("?", "_"),
        state["submission"][:16],
    )

    def find() -> Any:
        try:
            return _find(server, "/files?purpose=batch&", lambda file: file.get("filename") == name)
        except batch_api.HttpError:
            return None  # not every server lists files, and a second upload costs nothing

    told = [time.monotonic()]

    def progress(sent: int) -> None:
        if time.monotonic() - told[0] >= 2:
            told[0] = time.monotonic()
            print("uploading: %d of %d bytes" % (sent, state["bytes"]), file=sys.stderr)

    file = find() if state.get("uploading") else None
    if file is None:
        state["uploading"] = True
        batch_state.save(path, state)
        body = batch_api.FileBody(source, name, state["bytes"], state["sha256"], progress)
        headers = {"Idempotency-Key": state["submission"] + "-file"}
        file, _ = batch_api.call(server, "POST", "/files", body, headers, find)
    state["input_file_id"] = _id_of(file, "the upload")
    if file.get("status") == "error":
        raise StopError("the server finds %s invalid: %s" % (source, file.get("status_details")), exits.INVALID_INPUT)
    batch_state.save(path, state)
    print("uploaded %s as %s" % (source, state["input_file_id"]), file=sys.stderr)


def _create(server: batch_api.Server, state: Dict[str, Any], path: Path) -> None:
    file = _bare(state["input_file_id"])

    def find() -> Any:
        # The upload was made for this batch alone, so a batch over it is this one.
        return _find(server, "/batches?", lambda batch: _bare(str(batch.get("input_file_id"))) == file)

    batch = find() if state.get("creating") else None
    if batch is None:
        state["creating"] = True
        batch_state.save(path, state)
        wanted: Dict[str, Any] = {
            "input_file_id": state["input_file_id"],
            "endpoint": state["endpoint"],
            "completion_window": state["window"],
        }
        if state["metadata"]:
            wanted["metadata"] = state["metadata"]
        if state["deduplicate"]:
            wanted["deduplicate"] = True
        headers = {"Idempotency-Key": state["submission"] + "-batch"}
        batch, _ = batch_api.call(server, "POST", "/batches", json.dumps(wanted).encode(), headers, find)
    state["batch_id"] = _id_of(batch, "the new batch")
    batch_state.save(path, state)
    if state["deduplicate"] and not batch.get("deduplicated"):
        print("warning: this server does not do --deduplicate; every request is sent, and paid for", file=sys.stderr)
    print(
        "created batch %s, %d requests; ids are in %s" % (state["batch_id"], state["requests"], path), file=sys.stderr
    )


def _find(server: batch_api.Server, query: str, match: Callable[[Dict[str, Any]], bool]) -> Any:
    """An object of a list, or None where the list does not have it.

    Raises:
        StopError: it cannot be told.
    """
    after = ""
    for _ in range(PAGES):
        page, _ = batch_api.call(server, "GET", "%slimit=100%s" % (query, after))
        rows = [row for row in (page or {}).get("data") or [] if isinstance(row, dict)]
        for row in rows:
            if match(row):
                return row
        if not rows or not page.get("has_more"):
            return None
        after = "&after=" + urllib.parse.quote(str(rows[-1].get("id")), safe="")
    return None


def _bare(id: str) -> str:
    for prefix in ("file-", "file_"):
        if id.startswith(prefix):
            return id[len(prefix) :]
    return id


def _id_of(value: Any, what: str) -> str:
    found = value.get("id") if isinstance(value, dict) else None
    if not isinstance(found, str) or not found:
        raise StopError("the server's answer has no id for %s: %s" % (what, json.dumps(value)[:300]))
    return found


if __name__ == "__main__":
    exits.run(main, "The same command goes on where this one stopped; nothing is submitted twice.")
