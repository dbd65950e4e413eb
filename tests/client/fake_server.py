"""A batch server for tests of the client: real sockets, no engine, and any misbehaviour that a test asks for.

It answers each request of a batch with its own `custom_id`, a few more at every look at the batch, and keeps a record
of all calls. What a test can turn is in `Manners`.
"""

from __future__ import annotations

import json
import re
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit


@dataclass
class Manners:
    """How the server behaves.

    Attributes:
        early: `output_file_id` is there from creation, and grows; else it is null until the end.
        numbered: it sends `X-Last-Line` and `X-Incomplete`, and heeds `offset`.
        ignores_offset: it sends the headers, but the file always from its first line.
        idempotent: it honours `Idempotency-Key`.
        honours_wait: it says that it heeds `Prefer: wait`.
        steps: looks at the batch until all its requests are answered.
        end: the terminal status.
        failing: the `custom_id`s that end as errors.
        never_run: the `custom_id`s that an expired or cancelled batch leaves.
        usage: it counts tokens.
        breaks: for each content call in turn, after how many bytes its body breaks off; None: it does not.
        troubles: answers to give instead of the real one: (method, pattern of the path, status, headers), each once.
        lost_answers: (method, pattern) of calls that are carried out but whose connection is cut before the answer.
        finish: while it is not set, no batch comes to its end.
        key: the bearer token that it wants.
        no_final_newline: the last line of a result file has no line break.
        skip_only: it knows `skip`, and no `offset`.
        passing: the `custom_id`s that fail with 503 until they are run again.
        retries: it has `/retry`.
        reorders: the result that lands last stands first, before what it has given out already.
        repeats: each result line comes twice.
        wrapped: batches come inside a `job`.
        plain_errors: error answers are plain text.
        validating: looks at a batch at which it is still `validating`, with no counts.
        windows: the completion windows that it takes; None: any.
        bare_ids: ids are UUIDs, without a prefix.
        created: the status of the answer to what was created.
        deduplicates: it knows `deduplicate`, and says in `deduplicated` that every completed request but one was saved.
        unknown: a field of a new batch that it refuses.
        altered: what of each result line is replaced by what.
        on_call: told the number of each call, from 0, and whether it has been carried out, before it is answered.
    """

    early: bool = True
    numbered: bool = True
    ignores_offset: bool = False
    idempotent: bool = True
    honours_wait: bool = True
    steps: int = 4
    end: str = "completed"
    failing: set[str] = field(default_factory=set)
    never_run: set[str] = field(default_factory=set)
    usage: bool = True
    breaks: list[int | None] = field(default_factory=list)
    troubles: list[tuple[str, str, int, dict[str, str]]] = field(default_factory=list)
    lost_answers: list[tuple[str, str]] = field(default_factory=list)
    finish: threading.Event = field(default_factory=threading.Event)
    key: str | None = None
    no_final_newline: bool = False
    skip_only: bool = False
    passing: set[str] = field(default_factory=set)
    retries: bool = False
    reorders: bool = False
    repeats: bool = False
    wrapped: bool = False
    plain_errors: bool = False
    validating: int = 0
    windows: tuple[str, ...] | None = None
    bare_ids: bool = False
    created: int = 200
    deduplicates: bool = False
    unknown: str | None = None
    altered: dict[str, str] = field(default_factory=dict)
    on_call: Callable[[int, bool], None] = lambda number, done: None

    def __post_init__(self) -> None:
        self.finish.set()


@dataclass
class Call:
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]


class FakeServer:
    """Use as a context manager; `base_url` is without `/v1`."""

    def __init__(self, manners: Manners | None = None) -> None:
        self.manners = manners or Manners()
        self.calls: list[Call] = []
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.keys: dict[str, dict[str, Any]] = {}
        self.aliases: dict[str, str] = {}
        self.lock = threading.RLock()
        self.looked = threading.Condition(self.lock)
        fake = self

        class Handler(_Handler):
            server_state = fake

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.base_url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> FakeServer:
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def count(self, method: str, pattern: str) -> int:
        """How many calls there were."""
        with self.lock:
            return sum(c.method == method and re.fullmatch(pattern, c.path) is not None for c in self.calls)

    def wait_until(self, condition: Callable[[], bool], seconds: float = 10) -> None:
        """Wait for something to become true, looking after every call."""
        deadline = time.monotonic() + seconds
        with self.looked:
            while not condition():
                left = deadline - time.monotonic()
                assert left > 0, "the awaited condition did not come true"
                self.looked.wait(min(left, 0.2))

    def alias(self, file_id: str) -> str:
        """A bare id for a file."""
        bare = str(uuid.uuid5(uuid.NAMESPACE_URL, file_id))
        self.aliases[bare] = file_id
        return bare

    def result_lines(self, batch: dict[str, Any]) -> tuple[list[bytes], list[bytes]]:
        """The output and the error lines that a batch has by now."""
        manners = self.manners
        rows = [json.loads(line) for line in self.files[batch["input_file_id"]].split(b"\n") if line.strip()]
        done = rows if batch["step"] >= manners.steps else rows[: len(rows) * batch["step"] // manners.steps]
        output: list[dict[str, Any]] = []
        errors: list[dict[str, Any]] = []
        for row in done:
            name = row["custom_id"]
            record: dict[str, Any] = {"id": f"batch_req_{name}", "custom_id": name, "response": None, "error": None}
            body: dict[str, Any] = {"echo": name, "separator": "\u2028"}
            if name in manners.never_run and name not in batch["again"]:
                record["error"] = {"code": f"batch_{manners.end}", "message": "never run"}
                errors.append(record)
                continue
            if name in manners.failing:
                body = {"error": {"code": "bad_prompt", "type": "invalid_request_error", "message": f"no {name}"}}
            else:
                body["usage"] = {"prompt_tokens": 2, "completion_tokens": 3}
            status = 400 if name in manners.failing else 200
            if name in manners.passing and name not in batch["again"]:
                status, body = 503, {"error": {"type": "overloaded_error", "message": f"busy {name}"}}
            record["response"] = {"status_code": status, "request_id": name, "body": body}
            (output if status == 200 else errors).append(record)
        # What was run again lands behind what was there.
        output.sort(key=lambda record: record["custom_id"] in batch["again"])
        if manners.reorders and len(done) == len(rows):
            output = output[-1:] + output[:-1]
        times = 2 if manners.repeats else 1
        return tuple(  # type: ignore[return-value]
            [self._line(record) for record in records for _ in range(times)] for records in (output, errors)
        )

    def _line(self, record: dict[str, Any]) -> bytes:
        line = json.dumps(record, ensure_ascii=False)
        for old, new in self.manners.altered.items():
            line = line.replace(old, new)
        return line.encode()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes, and would cost 40 ms a call
    server_state: FakeServer

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._serve("GET")

    def do_POST(self) -> None:
        self._serve("POST")

    def do_DELETE(self) -> None:
        self._serve("DELETE")

    def _serve(self, method: str) -> None:
        fake, parts = self.server_state, urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        headers = {name.lower(): value for name, value in self.headers.items()}
        with fake.looked:
            fake.calls.append(Call(method, parts.path, query, headers))
            self._number = len(fake.calls) - 1
            fake.manners.on_call(self._number, False)
            try:
                self._answer(method, parts.path, query, headers, body)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True
            fake.looked.notify_all()

    def _answer(self, method: str, path: str, query: dict[str, str], headers: dict[str, str], body: bytes) -> None:
        fake, manners = self.server_state, self.server_state.manners
        for trouble in manners.troubles:
            wanted, pattern, status, extra = trouble
            if wanted == method and re.fullmatch(pattern, path):
                manners.troubles.remove(trouble)
                self._send(status, {"error": {"message": f"trouble {status}", "code": "trouble"}}, extra)
                return
        if manners.key is not None and headers.get("authorization") != f"Bearer {manners.key}":
            wrong = headers.get("authorization", "").removeprefix("Bearer ")
            self._send(401, {"error": {"message": f"wrong key {wrong}".strip(), "code": "invalid_api_key"}})
            return
        for alias, real in fake.aliases.items():
            path = path.replace(alias, real)
        if path == "/v1/files" and method == "POST":
            self._once(method, path, headers, lambda: self._upload(headers, body))
        elif path == "/v1/batches" and method == "POST":
            window = json.loads(body)["completion_window"]
            if manners.windows is not None and window not in manners.windows:
                offered = ", ".join(manners.windows)
                text = f"Invalid completion_window {window!r}: use one of {offered}"
                self._send(400, {"error": {"message": text, "param": "completion_window"}})
                return
            if manners.unknown is not None and manners.unknown in json.loads(body):
                text = f"Unknown parameter: {manners.unknown!r}."
                self._send(400, {"error": {"message": text, "param": manners.unknown}})
                return
            self._once(method, path, headers, lambda: self._create(json.loads(body)))
        elif path == "/v1/batches":
            rows = [self._show(batch) for batch in reversed(fake.batches.values())]
            self._send(200, {"object": "list", "data": rows, "has_more": False})
        elif (match := re.fullmatch(r"/v1/batches/([\w-]+)/retry", path)) and manners.retries and method == "POST":
            batch = fake.batches[match[1]]
            batch["again"] |= manners.passing | manners.never_run
            batch["retries"] = batch.get("retries", 0) + 1
            batch["step"] = manners.steps - 1
            self._send(200, self._show(batch))
        elif (match := re.fullmatch(r"/v1/batches/([\w-]+)/cancel", path)) and method == "POST":
            if fake.batches[match[1]]["step"] >= manners.steps:
                self._send(409, {"error": {"message": "it is over", "code": "conflict"}})
                return
            manners.finish.set()
            manners.end = "cancelled"
            self._send(200, self._show(fake.batches[match[1]]))
        elif path == "/v1/files":
            rows = [self._file(file_id) for file_id in reversed(fake.files)]
            self._send(200, {"object": "list", "data": rows, "has_more": False})
        elif (match := re.fullmatch(r"/v1/files/(file-\d+|[\w-]{36})", path)) and match[1] in fake.files:
            if method == "DELETE":
                del fake.files[match[1]]
                self._send(200, {"id": match[1], "object": "file", "deleted": True})
            else:
                self._send(200, self._file(match[1]))
        elif (match := re.fullmatch(r"/v1/files/(file-\d+|[\w-]{36})/content", path)) and match[1] in fake.files:
            self.send_response(200)
            self.send_header("Content-Length", str(len(fake.files[match[1]])))
            self.end_headers()
            self.wfile.write(fake.files[match[1]])
        elif path == "/v1/models":
            self._send(200, {"object": "list", "data": [{"id": "m", "object": "model", "owned_by": "fake"}]})
        elif (match := re.fullmatch(r"/v1/batches/([\w-]+)", path)) and match[1] in fake.batches:
            self._look(fake.batches[match[1]])
        elif match := re.fullmatch(r"/v1/files/(out|err)-([\w-]+)/content", path):
            self._content(match[1], fake.batches[re.sub("r+$", "", match[2])], query)
        else:
            self._send(404, {"error": {"message": f"{path} does not exist", "code": "not_found"}})

    def _file(self, file_id: str) -> dict[str, Any]:
        size = len(self.server_state.files[file_id])
        return {"id": file_id, "object": "file", "purpose": "batch", "bytes": size, "created_at": 1_700_000_000}

    def _once(self, method: str, path: str, headers: dict[str, str], do: Callable[[], dict[str, Any]]) -> None:
        fake, manners = self.server_state, self.server_state.manners
        key = headers.get("idempotency-key")
        if manners.idempotent and key in fake.keys:
            answer = fake.keys[key]
        else:
            answer = do()
            if key is not None:
                fake.keys[key] = answer
        for lost in manners.lost_answers:
            if lost[0] == method and re.fullmatch(lost[1], path):
                manners.lost_answers.remove(lost)
                self.close_connection = True
                return
        self._send(manners.created, answer)

    def _upload(self, headers: dict[str, str], body: bytes) -> dict[str, Any]:
        fake = self.server_state
        boundary = headers["content-type"].split("boundary=")[1].strip('"').encode()
        part = next(p for p in body.split(b"--" + boundary) if b'name="file"' in p)
        file_id = str(uuid.uuid4()) if fake.manners.bare_ids else f"file-{len(fake.files)}"
        fake.files[file_id] = part.split(b"\r\n\r\n", 1)[1][:-2]
        return {"id": file_id, "object": "file", "bytes": len(fake.files[file_id])}

    def _create(self, wanted: dict[str, Any]) -> dict[str, Any]:
        fake = self.server_state
        batch_id = str(uuid.uuid4()) if fake.manners.bare_ids else f"batch_{len(fake.batches)}"
        content = fake.files[wanted["input_file_id"]]
        earlier = b"".join(fake.files[batch["input_file_id"]] for batch in fake.batches.values())
        names = {json.loads(line)["custom_id"] for line in content.split(b"\n") if line.strip()}
        again = {name for name in names if f'"{name}"'.encode() in earlier}
        fake.batches[batch_id] = {"id": batch_id, "step": 0, "again": again, **wanted}
        return self._show(fake.batches[batch_id])

    def _look(self, batch: dict[str, Any]) -> None:
        manners = self.server_state.manners
        batch["looks"] = batch.get("looks", 0) + 1
        if batch["looks"] <= manners.validating:
            pass
        elif batch["step"] < manners.steps - 1 or manners.finish.is_set():
            batch["step"] = min(manners.steps, batch["step"] + 1)
        self._send(200, self._show(batch), {"Preference-Applied": "wait"} if manners.honours_wait else {})

    def _show(self, batch: dict[str, Any]) -> dict[str, Any]:
        fake, manners = self.server_state, self.server_state.manners
        over = batch["step"] >= manners.steps
        output, errors = fake.result_lines(batch)
        rows = [line for line in fake.files[batch["input_file_id"]].split(b"\n") if line.strip()]
        error_file = f"err-{batch['id']}{'r' * batch.get('retries', 0)}"
        output_file = f"out-{batch['id']}"
        if manners.bare_ids:
            output_file, error_file = fake.alias(output_file), fake.alias(error_file)
        validating = batch.get("looks", 0) <= manners.validating and manners.validating > 0
        return {
            "id": batch["id"],
            "object": "batch",
            "endpoint": batch["endpoint"],
            "input_file_id": batch["input_file_id"],
            "completion_window": batch["completion_window"],
            "completed_at": 1000 + batch.get("retries", 0) if over else None,
            "status": manners.end if over else "validating" if validating else "in_progress",
            "output_file_id": output_file if manners.early or (over and output) else None,
            "error_file_id": error_file if errors and (manners.early or over) else None,
            "errors": None,
            "request_counts": {
                "total": 0 if validating else len(rows),
                "completed": len(output),
                "failed": len(errors),
            },
            "usage": {"input_tokens": 5, "output_tokens": 7} if over and manners.usage else None,
            "metadata": batch.get("metadata"),
            **({"deduplicated": self._saved(batch, len(output))} if manners.deduplicates else {}),
        }

    def _saved(self, batch: dict[str, Any], completed: int) -> dict[str, int] | None:
        saved = max(0, completed - 1)
        return (
            {"requests": saved, "input_tokens": 2 * saved, "output_tokens": 3 * saved}
            if "deduplicate" in batch
            else None
        )

    def _content(self, kind: str, batch: dict[str, Any], query: dict[str, str]) -> None:
        fake, manners = self.server_state, self.server_state.manners
        lines = fake.result_lines(batch)[0 if kind == "out" else 1]
        headers = {}
        after = 0
        if manners.numbered:
            headers = {"X-Last-Line": str(len(lines)), "X-Incomplete": str(batch["step"] < manners.steps).lower()}
            after = 0 if manners.ignores_offset else int(query.get("skip" if manners.skip_only else "offset", "0"))
        body = b"".join(line + b"\n" for line in lines[after:])
        if manners.no_final_newline:
            body = body.removesuffix(b"\n")
        broken = manners.breaks.pop(0) if manners.breaks else None
        manners.on_call(self._number, True)
        self.send_response(200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body if broken is None else body[:broken])
        if broken is not None and broken < len(body):
            self.close_connection = True

    def _send(self, status: int, value: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        manners = self.server_state.manners
        manners.on_call(self._number, True)
        if manners.wrapped and value.get("object") == "batch":
            value = {"job": value}
        body = json.dumps(value).encode()
        if manners.plain_errors and "error" in value:
            body = value["error"]["message"].encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(body)


def requests(count: int, prefix: str = "row") -> bytes:
    """A batch file with so many good lines."""
    return b"".join(
        json.dumps(
            {
                "custom_id": f"{prefix}-{number}",
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": {"model": "m", "messages": [{"role": "user", "content": f"Say {number}"}]},
            }
        ).encode()
        + b"\n"
        for number in range(count)
    )


def custom_ids(content: bytes) -> list[str]:
    """The `custom_id` of each line of a result file, all of which must be whole."""
    assert not content or content.endswith(b"\n")
    return [json.loads(line)["custom_id"] for line in content.split(b"\n")[:-1]]
