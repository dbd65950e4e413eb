#!/usr/bin/env python3
"""Write a batch input file: from the list below, or from a JSONL or CSV file. The file is whole or not there at all.

Edit `requests` for a batch of your own, or leave it and name an input.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also where Python is told not to, as by -I

import batch_lines
import exits
from batch_state import sync_folder
from exits import INVALID_INPUT, StopError

requests: List[Dict[str, Any]] = [
    {
        "custom_id": "req-1",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {
            "model": "anthropic/claude-3-5-sonnet",
            "messages": [{"role": "user", "content": "What is 2+2?"}],
        },
    },
    {
        "custom_id": "req-2",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {
            "model": "anthropic/claude-3-5-sonnet",
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
        },
    },
]

EXAMPLES = """  python create_batch_file.py batch_requests.jsonl
  python create_batch_file.py batch_requests.jsonl --input prompts.jsonl --model my-model
  python create_batch_file.py batch_requests.jsonl --input reviews.csv --id-column review_id \\
      --template 'Is this review positive? {{text}}' --model my-model --set temperature=0 --set max_tokens=5"""
FIELD = re.compile(r"\{\{\s*([^{}]+?)\s*\}\}")


def main() -> int:
    """The script."""
    parser = exits.Parser(
        'Write a batch input file. Rows of --input are whole requests, {"messages": [...]}, {"prompt": "..."}, or '
        "any columns that --template names.",
        EXAMPLES,
    )
    parser.add_argument("output", type=exits.file_to_write, metavar="OUTPUT", help="the batch input file to write")
    parser.add_argument("--input", metavar="PATH", help="JSONL, or CSV or TSV with a header; - for JSONL on stdin")
    parser.add_argument("--model", help="of the rows that name none")
    parser.add_argument("--template", help="the prompt, with {{column}} for what a row has there")
    parser.add_argument("--system", help="a system message before each prompt")
    parser.add_argument("--id-column", metavar="NAME", help="the column with custom_id; default: custom_id, else row-N")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=JSON", help="a body parameter; repeatable")
    parser.add_argument("--split", action="store_true", help="into OUTPUT-1, -2 ... at 50 000 requests and 200 MB")
    options = parser.parse_args()
    extra = dict(_parameter(text) for text in options.set)
    rows = enumerate(requests, 1) if options.input is None else _rows(options.input)
    written = Parts(options.output, options.split)
    with written:
        for number, row in rows:
            request = _request(number, row, options, extra)
            written.add(number, json.dumps(request, ensure_ascii=False, separators=(",", ":")).encode("utf-8") + b"\n")
    for path, count in written.done:
        print(json.dumps({"file": str(path), "requests": count, "bytes": path.stat().st_size}))
    return exits.OK


def _parameter(text: str) -> Tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise StopError("--set %r must be NAME=JSON, such as temperature=0" % text)
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _rows(name: str) -> Iterator[Tuple[int, Dict[str, Any]]]:
    """The rows of an input with their numbers: of the line in JSONL, of the record in CSV."""
    path = Path(name)
    if name != "-" and path.suffix.lower() in (".csv", ".tsv"):
        csv.field_size_limit(batch_lines.MAX_LINE_BYTES)
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
            try:
                for number, record in enumerate(reader, 1):
                    if None in record or None in record.values():
                        raise StopError(
                            "%s: row %d has not as many columns as the header" % (name, number), INVALID_INPUT
                        )
                    yield number, dict(record)
            except UnicodeDecodeError:
                raise StopError(
                    "%s is not UTF-8. Save it as UTF-8, such as with iconv -f latin1 -t utf-8" % name, INVALID_INPUT
                ) from None
            except csv.Error as error:
                raise StopError("%s: line %d: %s" % (name, reader.line_num, error), INVALID_INPUT) from None
        return
    lines = enumerate(sys.stdin.buffer, 1) if name == "-" else batch_lines.lines_of(path)
    for number, line in lines:
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise StopError("%s: line %d is not JSON: %s" % (name, number, error), INVALID_INPUT) from None
        if not isinstance(row, dict):
            raise StopError("%s: line %d is not a JSON object" % (name, number), INVALID_INPUT)
        yield number, row


def _request(number: int, row: Dict[str, Any], options: argparse.Namespace, extra: Dict[str, Any]) -> Dict[str, Any]:
    if isinstance(row.get("body"), dict):
        body = dict({"model": options.model} if options.model else {}, **dict(row["body"], **extra))
        usual = {"custom_id": "row-%d" % number, "method": "POST", "url": "/v1/chat/completions"}
        return dict(usual, **dict(row, body=body))
    messages = row.get("messages")
    if options.template is not None:
        messages = [{"role": "user", "content": _filled(options.template, number, row)}]
    elif messages is None and row.get("prompt"):
        messages = [{"role": "user", "content": str(row["prompt"])}]
    if not isinstance(messages, list) or not messages:
        raise StopError(
            "row %d has neither messages nor a prompt; say --template, such as '{{%s}}'"
            % (number, next(iter(row), "text")),
            INVALID_INPUT,
        )
    if options.system:
        messages = [{"role": "system", "content": options.system}, *messages]
    model = row.get("model") or options.model
    if not model:
        raise StopError("row %d names no model; say --model" % number, INVALID_INPUT)
    column = options.id_column or "custom_id"
    if options.id_column and row.get(column) in (None, ""):
        raise StopError("row %d has nothing in its column %r, for custom_id" % (number, column), INVALID_INPUT)
    custom_id = str(row[column]) if row.get(column) not in (None, "") else "row-%d" % number
    body = dict({"model": model, "messages": messages}, **extra)
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def _filled(template: str, number: int, row: Dict[str, Any]) -> str:
    def value(match: Any) -> str:
        name = match.group(1)
        if name not in row:
            raise StopError(
                "row %d has no %r, which --template names; it has %s" % (number, name, ", ".join(row)), INVALID_INPUT
            )
        found = row[name]
        return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)

    if not FIELD.search(template):
        for name in row:
            if "{%s}" % name in template:  # every row would get the same prompt, braces and all
                raise StopError("--template has {%s}; write {{%s}}" % (name, name), INVALID_INPUT)
    return FIELD.sub(value, template)


class Parts:
    """The file or files that are written: under other names until all is well, so that none is ever half a file.

    Attributes:
        done: each file and its number of requests.
    """

    def __init__(self, path: Path, split: bool) -> None:
        self._path, self._split = path, split
        self._open: List[Tuple[Path, Any, int, int]] = []
        self._ids: Dict[str, int] = {}
        self.done: List[Tuple[Path, int]] = []

    def __enter__(self) -> Parts:
        self._begin()
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        for _path, file, _count, _size in self._open:
            file.flush()
            os.fsync(file.fileno())
            file.close()
        if kind is not None or not self._open[0][2]:
            for entry in self._open:
                entry[0].unlink()
            if kind is None:
                raise StopError("there is no request to write", INVALID_INPUT)
            return
        for number, (path, _file, count, _size) in enumerate(self._open, 1):
            name = self._path
            if len(self._open) > 1:
                name = self._path.with_name("%s-%d%s" % (self._path.stem, number, self._path.suffix))
            path.replace(name)
            self.done.append((name, count))
        sync_folder(self._path.parent)

    def _begin(self) -> None:
        path = self._path.with_name("%s.%d.tmp" % (self._path.name, len(self._open) + 1))
        self._open.append((path, path.open("wb"), 0, 0))

    def add(self, number: int, line: bytes) -> None:
        """A request.

        Args:
            number: of its row, for messages.
            line: with its end.

        Raises:
            StopError: it is invalid, or the file would be over its limits.
        """
        found = batch_lines.problem_in(line[:-1])
        if isinstance(found, batch_lines.Problem):
            raise StopError("row %d: %s (%s)" % (number, found.message, found.code), INVALID_INPUT)
        if self._ids.setdefault(found, number) != number:
            raise StopError(
                "rows %d and %d have the same custom_id %s" % (self._ids[found], number, json.dumps(found)),
                INVALID_INPUT,
            )
        path, file, count, size = self._open[-1]
        if count + 1 > batch_lines.MAX_REQUESTS or size + len(line) > batch_lines.MAX_FILE_BYTES:
            if not self._split:
                raise StopError(
                    "there is more than a batch may have (50 000 requests, 200 MB): say --split", INVALID_INPUT
                )
            self._begin()
            path, file, count, size = self._open[-1]
        file.write(line)
        self._open[-1] = (path, file, count + 1, size + len(line))


if __name__ == "__main__":
    exits.run(main, "Nothing was written.")
