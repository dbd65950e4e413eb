#!/usr/bin/env python3
"""List batches, look at one, cancel one, list models: single calls, whose answers are printed as they are."""

from __future__ import annotations

import json
import sys
import urllib.parse
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also where Python is told not to, as by -I

import batch_api
import batch_state
import exits
from exits import StopError

EXAMPLES = """  python manage_batches.py list --limit 10
  python manage_batches.py status batch_requests.jsonl
  python manage_batches.py cancel batch_6f3e...
  python manage_batches.py models"""


def main() -> int:
    """The script."""
    parser = exits.Parser("List batches, look at one, cancel one, or list the models that can be asked.", EXAMPLES)
    parser.add_argument("action", choices=("list", "status", "cancel", "models"))
    parser.add_argument("batch", nargs="?", metavar="FILE|BATCH_ID", help="for status and cancel")
    parser.add_argument("--limit", type=int, default=20, help="of the list (20)")
    parser.add_argument("--after", metavar="BATCH_ID", help="list those that come after this one")
    batch_api.add_options(parser)
    options = parser.parse_args()
    if (options.batch is None) != (options.action in ("list", "models")):
        parser.error("status and cancel need a FILE or a BATCH_ID, list and models take none")
    state = _state(options.batch) if options.batch else {}
    server = batch_api.server_from(options, state.get("base_url"))
    method, path = "GET", "/models"
    if options.action == "list":
        query = {"limit": str(options.limit)}
        if options.after:
            query["after"] = options.after
        path = "/batches?" + urllib.parse.urlencode(query)
    elif options.action != "models":
        path = "/batches/" + urllib.parse.quote(state["batch_id"], safe="")
        if options.action == "cancel":
            method, path = "POST", path + "/cancel"
    answer, _ = batch_api.call(server, method, path)
    print(json.dumps(answer))
    return exits.OK


def _state(name: str) -> dict:  # type: ignore[type-arg]
    path = batch_state.state_path(Path(name))
    state = batch_state.load(path) or {}
    if not state and Path(name).exists():
        raise StopError("%s has not been submitted: there is no %s; see submit_batch.py" % (name, path))
    if state and "batch_id" not in state:
        raise StopError("the submission of %s is not finished; run submit_batch.py again" % name)
    return state or {"batch_id": name}


if __name__ == "__main__":
    exits.run(main, "Nothing is known to have been done.")
