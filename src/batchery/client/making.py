"""How the rows of an input become requests: everything that a user may say about it, as one value.

It only holds and checks what was said. It opens no file: what the options of a command name as a file has been read
before, so that the same `Making` always makes the same requests, and its fingerprint says so.
"""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec

from batchery.client.errors import SettingsError
from batchery.client.template import Template
from batchery.wire import strict_json

CHAT = "/v1/chat/completions"

PROMPT_ENDPOINTS = (CHAT, "/v1/responses", "/v1/completions", "/v1/embeddings", "/v1/moderations", "/v1/messages")
"""Where a prompt alone makes a request."""

CONVERSATIONS = (CHAT, "/v1/responses", "/v1/messages")
"""Where a request is a list of messages: they take a system prompt and images."""

MAX_TOKENS_FIELD = {
    CHAT: "max_completion_tokens",
    "/v1/responses": "max_output_tokens",
    "/v1/completions": "max_tokens",
    "/v1/messages": "max_tokens",
}
"""By endpoint, the field of the body that limits the answer; the others generate nothing."""

FORMATS = ("jsonl", "csv", "tsv", "parquet")


class Making(msgspec.Struct, frozen=True, kw_only=True):
    """How rows become requests. Of a line that is a finished request already, only `model`, `max_tokens`, `settings`,
    `schema` and `encode_images` change something.

    Attributes:
        model: for each row; a template, such as `{{model}}`.
        endpoint: the `url` of requests that are made.
        template: of the user's message.
        system: of the system prompt.
        schema: JSON Schema that answers must follow, as `schema.read_schema` gives it.
        schema_name: letters, digits, `_` and `-`.
        image_column: the column with the path or URL of an image, or several.
        image_root: the folder that image files must be in; None for that of the input itself.
        encode_images: put local files that finished requests name as images into them.
        id_column: the column with the `custom_id`; None for `custom_id` where there is one, else the row's number.
        max_tokens: the most tokens of an answer.
        settings: what `--set` says: dotted path below the request, such as `body.temperature`, and value.
        format: of the inputs, one of `FORMATS`; None to tell by name and content.
        delimiter: between the columns of a CSV file; None to tell by its header.
    """

    model: str | None = None
    endpoint: str = CHAT
    template: str | None = None
    system: str | None = None
    schema: dict[str, Any] | None = None
    schema_name: str = "answer"
    image_column: str | None = None
    image_root: str | None = None
    encode_images: bool = False
    id_column: str | None = None
    max_tokens: int | None = None
    settings: tuple[tuple[str, Any], ...] = ()
    format: str | None = None
    delimiter: str | None = None

    @property
    def changes_requests(self) -> bool:
        """Whether it changes lines that are finished requests already."""
        return bool(self.settings or self.encode_images) or not (
            self.model is None and self.max_tokens is None and self.schema is None
        )

    @property
    def fingerprint(self) -> str:
        """SHA-256 in hex of all it says; equal for what makes equal requests of equal rows."""
        return hashlib.sha256(msgspec.json.encode(self, order="deterministic")).hexdigest()

    def check(self) -> None:
        """Refuse what no input could make good.

        Raises:
            SettingsError: names the option and what would be accepted.
        """
        if self.endpoint not in PROMPT_ENDPOINTS:
            raise SettingsError(
                f"requests for {self.endpoint!r} cannot be made from rows; --endpoint takes one of: "
                f"{', '.join(PROMPT_ENDPOINTS)}. Write other requests as finished lines with custom_id, method, url "
                "and body"
            )
        for option, text in (("--model", self.model), ("--template", self.template), ("--system", self.system)):
            if text is not None:
                Template(text, option)
        conversation = self.endpoint in CONVERSATIONS
        if self.system is not None and not conversation:
            raise SettingsError(f"--system has no place in a request for {self.endpoint}")
        if self.image_column is not None and not conversation:
            raise SettingsError(f"--image-column has no place in a request for {self.endpoint}")
        if self.schema is not None and self.endpoint not in (CHAT, "/v1/responses"):
            raise SettingsError(f"--schema works with {CHAT} and /v1/responses, not with {self.endpoint}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise SettingsError("--max-tokens must be at least 1")
        if self.max_tokens is not None and self.endpoint not in MAX_TOKENS_FIELD:
            raise SettingsError(f"--max-tokens has no meaning at {self.endpoint}, which generates no text")
        if self.endpoint == "/v1/messages" and self.max_tokens is None and not self._sets("body.max_tokens"):
            raise SettingsError("/v1/messages needs --max-tokens")
        if self.format is not None and self.format not in FORMATS:
            raise SettingsError(f"--input-format is one of {', '.join(FORMATS)}, not {self.format!r}")
        if self.delimiter is not None and (len(self.delimiter) != 1 or self.delimiter in '"\r\n'):
            raise SettingsError("--delimiter is one character, such as ';'; write a tab as '\\t'")

    def _sets(self, path: str) -> bool:
        return any(name == path for name, _ in self.settings)


def parse_setting(text: str) -> tuple[str, Any]:
    """One `--set`, such as `body.temperature=0`: where, and what, read as JSON where it is JSON and as text otherwise.

    Raises:
        SettingsError: it has no `=`, or its path does not lie in the body.
    """
    path, equals, value = text.partition("=")
    names = path.strip().split(".")
    if not equals or names[0] != "body" or len(names) < 2 or not all(names):
        raise SettingsError(f"--set takes body.NAME=VALUE, such as body.temperature=0, not {text!r}")
    try:
        return ".".join(names), strict_json.loads(value.encode())
    except strict_json.NotJson:
        return ".".join(names), value
