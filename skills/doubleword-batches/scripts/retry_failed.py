#!/usr/bin/env python3
"""Make a batch input file of the requests that failed or never ran, and submit it, once, if told so.

A request needs running again when it has no line among the results. What would fail the same way again (a bad request,
an unknown model) is left out and its reasons are listed, unless --all is said.
"""

from __future__ import annotations

import collections
import json
import os
import sys
from pathlib import Path
from typing import Any, Dict, Optional, Set, Tuple

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also where Python is told not to, as by -I

import batch_api
import batch_lines
import batch_state
import exits
import submit_batch
import watch_batch
from exits import INVALID_INPUT, StopError

EXAMPLES = """  python retry_failed.py batch_requests.jsonl
  python retry_failed.py batch_requests.jsonl --submit
  python retry_failed.py batch_requests.jsonl --results results.jsonl --errors errors.jsonl -o again.jsonl --all"""
TRANSIENT_STATUSES = (408, 409, 425, 429)
TRANSIENT_CODES = (
    "batch_expired",
    "batch_cancelled",
    "upstream_timeout",
    "upstream_unreachable",
    "rate_limit_exceeded",
    "server_error",
    "timeout",
)


def main() -> int:
    """The script."""
    parser = exits.Parser(
        "Write FILE.retry.jsonl with the requests of FILE that failed for a passing reason (429, 5xx, timeouts) or "
        "never ran (expired, cancelled). What was done is printed as JSON.",
        EXAMPLES,
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="the batch input file that was submitted")
    parser.add_argument("--results", type=Path, metavar="PATH", help="default: FILE's name and .results.jsonl")
    parser.add_argument("--errors", type=Path, metavar="PATH", help="default: FILE's name and .errors.jsonl")
    parser.add_argument(
        "-o", "--output", type=exits.file_to_write, metavar="PATH", help="default: FILE's name and .retry.jsonl"
    )
    parser.add_argument("--all", action="store_true", help="also what failed for good")
    parser.add_argument("--submit", action="store_true", help="then submit the file as submit_batch.py does")
    submit_batch.add_options(parser)
    batch_api.add_options(parser)
    options = parser.parse_args()
    usual = watch_batch.result_paths(options.file)
    results, errors = options.results or usual[0], options.errors or usual[1]
    if not results.exists() and not errors.exists():
        raise StopError("there is neither %s nor %s; run watch_batch.py first, or name them" % (results, errors))
    fetched = batch_state.load(watch_batch.memory_path(results))
    if fetched is not None and not fetched.get("ended"):
        raise StopError(
            "the batch had not ended when its results were fetched last: what has none yet may still be running, and "
            "would be paid for twice. Follow it to its end with watch_batch.py, then run this again"
        )
    done = {custom_id for custom_id, _ in _lines(results)}
    failed = {custom_id: line for custom_id, line in _lines(errors) if custom_id not in done}
    permanent = {custom_id for custom_id, line in failed.items() if not is_transient(line)}
    _tell(failed, permanent)
    name = str(options.file)
    output = options.output or Path((name[: -len(".jsonl")] if name.endswith(".jsonl") else name) + ".retry.jsonl")
    count = _write(options.file, output, done if options.all else done | permanent)
    left_out = 0 if options.all else len(permanent)
    made: Dict[str, Any] = {"file": str(output) if count else None, "requests": count, "left_out": left_out}
    if count and options.submit:
        state = submit_batch.submit(options, output, options.state or batch_state.state_path(output))
        made.update(submit_batch.ids(state))
    print(json.dumps(made))
    return exits.SOME_FAILED if left_out else exits.OK


def is_transient(line: Dict[str, Any]) -> bool:
    """Whether a failed request may well succeed when it runs again."""
    response, error = line.get("response"), line.get("error")
    if isinstance(response, dict) and isinstance(response.get("status_code"), int):
        return response["status_code"] in TRANSIENT_STATUSES or response["status_code"] >= 500
    if isinstance(error, dict) and error.get("code"):
        return error["code"] in TRANSIENT_CODES
    # No answer and no code: it was not the request that was found wrong. One server says why in its message.
    return "NonRetriable" not in json.dumps(error)


def _lines(path: Path) -> Any:
    """The lines of a result file by `custom_id`; none of a file that is not there."""
    if not path.exists():
        return
    for number, line in batch_lines.lines_of(path):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            raise StopError("%s: line %d is not JSON; fetch it again" % (path, number), INVALID_INPUT) from None
        if isinstance(value, dict) and isinstance(value.get("custom_id"), str):
            yield value["custom_id"], value


def _reason(line: Dict[str, Any]) -> Tuple[str, str]:
    response, error = line.get("response"), line.get("error")
    status = str(response.get("status_code")) if isinstance(response, dict) else "no answer"
    message = (error.get("message") or error.get("code")) if isinstance(error, dict) else error
    if message is None and isinstance(response, dict):
        body = response.get("body")
        inner = body.get("error") if isinstance(body, dict) else None
        message = inner.get("message") if isinstance(inner, dict) else inner
    return status, str(message)[:200]


def _tell(failed: Dict[str, Dict[str, Any]], permanent: Set[str]) -> None:
    for kind, chosen in (("may succeed", failed.keys() - permanent), ("failed for good", permanent)):
        reasons = collections.Counter(_reason(failed[custom_id]) for custom_id in chosen)
        for (status, message), count in reasons.most_common(5):
            print("%s: %d with %s: %s" % (kind, count, status, message), file=sys.stderr)


def _write(source: Path, output: Path, settled: Set[str]) -> int:
    """Copy the lines that are not settled, unchanged; how many.

    Raises:
        StopError: the output is there with other content.
    """
    temporary = output.with_name(output.name + ".tmp")
    count = 0
    with temporary.open("wb") as file:
        for _, line in batch_lines.lines_of(source):
            custom_id: Optional[str] = batch_lines.custom_id_of(line)
            if custom_id is not None and custom_id not in settled:
                file.write(line + b"\n")
                count += 1
        file.flush()
        os.fsync(file.fileno())
    if not count:
        temporary.unlink()
        print("there is nothing to run again", file=sys.stderr)
        return 0
    if output.exists() and batch_lines.sha256_of(output) != batch_lines.sha256_of(temporary):
        temporary.unlink()
        raise StopError("%s is there with other requests; name another with -o, or move it away" % output)
    temporary.replace(output)
    batch_state.sync_folder(output.parent)
    print("%d requests to run again are in %s" % (count, output), file=sys.stderr)
    return count


if __name__ == "__main__":
    exits.run(main, "The same command goes on; nothing is submitted twice.")
