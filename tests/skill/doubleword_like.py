"""A server with the manners of Doubleword: 201, bare UUIDs, errors in plain text, no `status` on files, only `skip`."""

from __future__ import annotations

import json
import re
import threading
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

PAGE = 3


class DoublewordLike:
    """Use as a context manager.

    Args:
        refusals: what the first calls of `POST /files` get instead: status and `Retry-After`.
        end: the status that the batch ends with, at the third look.
        unanswered: so many of the last requests have no line in any file.
    """

    def __init__(
        self, refusals: list[tuple[int, str]] | None = None, end: str = "completed", unanswered: int = 0
    ) -> None:
        self.refusals, self.end, self.unanswered = refusals or [], end, unanswered
        self.input, self.output, self.batch = (str(uuid.uuid4()) for _ in range(3))
        self.rows: list[Any] = []
        self.looks = self.uploads = self.creations = 0
        self.queries: list[dict[str, list[str]]] = []
        like = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.path == "/v1/files":
                    like.uploads += 1
                    if like.refusals:
                        status, after = like.refusals.pop(0)
                        self._text(status, "the gate is closed", {"Retry-After": after})
                        return
                    content = body.split(b"application/jsonl\r\n\r\n")[1].split(b"\r\n--")[0]
                    like.rows = [json.loads(line) for line in content.splitlines()]
                    self._json(201, {"id": like.input, "object": "file", "bytes": len(content), "purpose": "batch"})
                elif self.path == "/v1/batches":
                    like.creations += 1
                    wanted = json.loads(body)
                    if wanted["input_file_id"] != like.input:
                        self._text(400, "Invalid file ID format")
                        return
                    self._json(201, like.shown("validating"))
                else:
                    self._text(404, "not found")

            def do_GET(self) -> None:
                parts = urlsplit(self.path)
                if parts.path == f"/v1/batches/{like.batch}":
                    like.looks += 1
                    self._json(200, like.shown(like.end if like.looks >= 3 else "in_progress"))
                elif parts.path == f"/v1/files/{like.output}/content":
                    query = parse_qs(parts.query)
                    like.queries.append(query)
                    self._content(int(query.get("skip", ["0"])[0]))
                else:
                    self._text(
                        400,
                        "Invalid file ID format"
                        if re.search("file[-_]", parts.path)
                        else f"No thing for {self.headers['Authorization']}",
                    )

            def _content(self, skip: int) -> None:
                rows = like.rows[: len(like.rows) - like.unanswered]
                page = rows[skip : skip + PAGE]
                lines = [
                    {
                        "id": f"batch_req_{uuid.uuid4()}",
                        "custom_id": row["custom_id"],
                        "response": {"status_code": 200, "request_id": None, "body": {"choices": []}},
                        "error": None,
                    }
                    for row in page
                ]
                body = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
                incomplete = str(skip + len(page) < len(rows) or like.looks < 3).lower()
                self._send(200, body, {"X-Last-Line": str(skip + len(page)), "X-Incomplete": incomplete})

            def _json(self, status: int, value: dict[str, Any]) -> None:
                self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

            def _text(self, status: int, text: str, headers: dict[str, str] | None = None) -> None:
                self._send(status, text.encode(), {"Content-Type": "text/plain", **(headers or {})})

            def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.base_url = f"http://127.0.0.1:{self._http.server_port}/v1"

    def shown(self, status: str) -> dict[str, Any]:
        done = len(self.rows) - self.unanswered
        return {
            "id": self.batch,
            "object": "batch",
            "status": status,
            "input_file_id": self.input,
            "output_file_id": self.output,
            "error_file_id": None,
            "request_counts": {"total": len(self.rows), "completed": done, "failed": 0},
        }

    def __enter__(self) -> DoublewordLike:
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
