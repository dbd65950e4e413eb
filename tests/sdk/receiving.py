"""A model's server that answers JSON by the schema of a request, which the simulator does not."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

USAGE = {"usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}}


class JsonModel:
    """Answers chat completions with an object by `response_format`, or without one with the prompt itself.

    Attributes:
        bodies: of the requests, in order of arrival.
    """

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        model = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                content = b'{"object": "list", "data": [{"id": "my-model", "object": "model"}]}'
                self.send_response(200)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                model.bodies.append(body)
                content = json.dumps(
                    {"choices": [model.choice(body)], "model": body["model"], "id": "x"} | USAGE
                ).encode()
                self.send_response(200)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def choice(self, body: dict[str, Any]) -> dict[str, Any]:
        """What is answered."""
        prompt = body["messages"][-1]["content"]
        if "response_format" not in body:
            return {"index": 0, "message": {"role": "assistant", "content": prompt}, "finish_reason": "stop"}
        schema = body["response_format"]["json_schema"]["schema"]
        values = {"string": prompt, "number": 0.5, "integer": len(prompt), "boolean": True}
        answer = {name: values[kind["type"]] for name, kind in schema["properties"].items()}
        text = "not JSON" if "break" in prompt else json.dumps(answer)
        return {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
