#!/usr/bin/env python3
"""Check a batch input file on this machine: every problem with its line. Nothing is sent and no file is changed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also where Python is told not to, as by -I

import batch_lines
import exits

EXAMPLES = """  python validate_batch_file.py batch_requests.jsonl
  python validate_batch_file.py part-*.jsonl
  python validate_batch_file.py batch_requests.jsonl --json"""


def main() -> int:
    """The script."""
    parser = exits.Parser(
        "Check batch input files offline: every problem with its line. Limits: 200 MB, 50 000 requests, 10 MB a line, "
        "64 characters of custom_id.",
        EXAMPLES,
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--json", action="store_true", help="print one JSON object for each file")
    parser.add_argument("--most", type=int, default=100, help="problems to print for each file (100)")
    options = parser.parse_args()
    bad = False
    for path in options.files:
        found = batch_lines.check(path)
        bad = bad or bool(found.problems)
        if options.json:
            print(
                json.dumps(
                    {
                        "file": str(path),
                        "valid": not found.problems,
                        "requests": found.requests,
                        "bytes": found.size,
                        "models": found.models,
                        "urls": found.urls,
                        "problems": [problem._asdict() for problem in found.problems],
                        "warnings": [problem._asdict() for problem in found.warnings],
                    }
                )
            )
            continue
        report(path, found, options.most)
        if not found.problems:
            models = ", ".join("%s (%d)" % pair for pair in sorted(found.models.items()))
            print("%s: valid, %d requests, %d bytes; models: %s" % (path, found.requests, found.size, models))
    return exits.INVALID_INPUT if bad else exits.OK


def report(path: Path, found: batch_lines.Checked, most: int = 100) -> None:
    """Say on stderr what is wrong, `most` problems at most."""
    for kind, problems in (("", found.problems), ("warning: ", found.warnings)):
        for problem in problems[:most]:
            place = "%s:%d" % (path, problem.line) if problem.line else str(path)
            print("%s: %s%s (%s)" % (place, kind, problem.message, problem.code), file=sys.stderr)
        if len(problems) > most:
            print("%s: %sand %d more" % (path, kind, len(problems) - most), file=sys.stderr)


if __name__ == "__main__":
    exits.run(main, "Nothing was sent.")
