"""From a row to a request: its body by endpoint, and finished lines changed as asked. Pure but for image files, which
`images` reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from batchery.client.making import CHAT, MAX_TOKENS_FIELD, Making
from batchery.client.template import MissingColumn, Template, value_of
from batchery.wire import strict_json
from batchery.wire.lines import MAX_CUSTOM_ID


class BadRow(ValueError):
    """A row cannot become a request.

    Args:
        code: for programs.
        message: what is wrong and what would be accepted, without the place.
        columns: whether the columns that there are should be told.
    """

    def __init__(self, code: str, message: str, *, columns: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.columns = columns


class Maker:
    """Makes requests as one `Making` says.

    Raises:
        SettingsError: from the constructor, when the making itself is wrong.
    """

    def __init__(self, making: Making) -> None:
        making.check()
        self._making = making
        self._model = None if making.model is None else Template(making.model, "--model")
        self._template = None if making.template is None else Template(making.template)
        self._system = None if making.system is None else Template(making.system, "--system")

    def custom_id(self, data: Mapping[str, Any], number: int) -> str:
        """The `custom_id` of a row.

        Args:
            data: its columns.
            number: the row's, counted through all inputs.

        Raises:
            BadRow: the column is missing, empty or too long.
        """
        column = self._making.id_column
        if column is None:
            if "custom_id" not in data:
                return f"row-{number}"
            column = "custom_id"
        value = _column(data, column, "--id-column")
        if type(value) is int:
            value = str(value)
        if type(value) is not str:
            raise BadRow("invalid_custom_id", f"the column {column!r} must have a text or a whole number as custom_id")
        if not 1 <= len(value) <= MAX_CUSTOM_ID:
            raise BadRow(
                "invalid_custom_id",
                f"the column {column!r} must have 1 to {MAX_CUSTOM_ID} characters as custom_id, not {len(value)}",
            )
        return value

    def body(self, data: Mapping[str, Any], images: list[str]) -> dict[str, Any]:
        """The body of a row's request.

        Args:
            data: its columns.
            images: URLs.

        Raises:
            BadRow: a column is missing, or the row has no prompt.
        """
        making = self._making
        body: dict[str, Any] = {}
        if self._model is None:
            raise BadRow("missing_required_parameter", "no model is named; say --model")
        body["model"] = _render(self._model, data, "--model")
        if not body["model"]:
            raise BadRow("missing_required_parameter", "the model is empty")
        prompt, messages = self._prompt(data)
        system = None if self._system is None else _render(self._system, data, "--system")
        body |= _PROMPTS[making.endpoint](prompt, messages, system, images)
        self._finish(body, making.endpoint)
        return body

    def change(self, request: dict[str, Any]) -> None:
        """Change the body of a finished request as asked; its url stays.

        Raises:
            BadRow: what is asked does not fit it.
        """
        body = request["body"]
        if self._model is not None:
            body["model"] = _render(self._model, {}, "--model")
        self._finish(body, request["url"])

    def _finish(self, body: dict[str, Any], url: str) -> None:
        making = self._making
        if making.schema is not None:
            _set_schema(body, url, making.schema_name, making.schema)
        if making.max_tokens is not None:
            field = MAX_TOKENS_FIELD.get(url)
            if field is None:
                raise BadRow("invalid_value", f"--max-tokens has no meaning at {url}")
            for other in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
                body.pop(other, None)
            body[field] = making.max_tokens
        for path, value in making.settings:
            _set(body, path, value)

    def _prompt(self, data: Mapping[str, Any]) -> tuple[str, list[Any] | None]:
        """The user's text, or the messages that the row brings itself."""
        if self._template is not None:
            text = _render(self._template, data, "--template")
            if not self._template.columns and (column := next((c for c in data if f"{{{c}}}" in text), None)):
                # Every row would get the same prompt, braces and all.
                raise BadRow("missing_column", f"--template has {{{column}}}; write {{{{{column}}}}}", columns=True)
            return text, None
        messages = data.get("messages")
        if type(messages) is list:
            if not messages or not all(type(message) is dict and "role" in message for message in messages):
                raise BadRow("invalid_value", "messages must be a list of objects with role and content")
            return "", messages
        prompt = data.get("prompt")
        if type(prompt) is str:
            if not prompt:
                raise BadRow("missing_required_parameter", "prompt is empty")
            return prompt, None
        if prompt is not None:
            raise BadRow("invalid_value", f"prompt must be a text, not {strict_json.kind(prompt)}")
        raise BadRow(
            "missing_required_parameter",
            "there is neither prompt nor messages; say with --template what to ask, such as --template 'Summarise: "
            "{{text}}'",
            columns=True,
        )


def _render(template: Template, data: Mapping[str, Any], option: str) -> str:
    try:
        return template.render(data)
    except MissingColumn as error:
        raise BadRow("missing_column", f"{option} names the column {error.column!r}", columns=True) from None


def _column(data: Mapping[str, Any], column: str, option: str) -> Any:
    try:
        return value_of(data, column)
    except MissingColumn:
        raise BadRow("missing_column", f"{option} names the column {column!r}", columns=True) from None


def _chat(prompt: str, messages: list[Any] | None, system: str | None, images: list[str]) -> dict[str, Any]:
    if messages is None:
        content: Any = prompt
        if images:
            content = [{"type": "text", "text": prompt}]
            content += ({"type": "image_url", "image_url": {"url": url}} for url in images)
        messages = [{"role": "user", "content": content}]
    elif images:
        messages = _with_images(messages, [{"type": "image_url", "image_url": {"url": url}} for url in images], "text")
    if system is not None and messages[0].get("role") not in ("system", "developer"):
        messages = [{"role": "system", "content": system}, *messages]
    return {"messages": messages}


def _responses(prompt: str, messages: list[Any] | None, system: str | None, images: list[str]) -> dict[str, Any]:
    body: dict[str, Any] = {} if system is None else {"instructions": system}
    parts = [{"type": "input_image", "image_url": url} for url in images]
    if messages is not None:
        body["input"] = _with_images(messages, parts, "input_text") if parts else messages
    elif parts:
        body["input"] = [{"role": "user", "content": [{"type": "input_text", "text": prompt}, *parts]}]
    else:
        body["input"] = prompt
    return body


def _messages(prompt: str, messages: list[Any] | None, system: str | None, images: list[str]) -> dict[str, Any]:
    body: dict[str, Any] = {} if system is None else {"system": system}
    parts = [{"type": "image", "source": _source(url)} for url in images]
    if messages is not None:
        body["messages"] = _with_images(messages, parts, "text") if parts else messages
    else:
        content: Any = [*parts, {"type": "text", "text": prompt}] if parts else prompt
        body["messages"] = [{"role": "user", "content": content}]
    return body


def _source(url: str) -> dict[str, str]:
    if url.startswith("data:"):
        kind, _, data = url.removeprefix("data:").partition(";base64,")
        return {"type": "base64", "media_type": kind, "data": data}
    return {"type": "url", "url": url}


def _text(field: str) -> Any:
    def make(prompt: str, messages: list[Any] | None, system: str | None, images: list[str]) -> dict[str, Any]:
        if messages is not None:
            raise BadRow("invalid_value", f"messages have no place in a request whose body has {field}; use prompt")
        return {field: prompt}

    return make


_PROMPTS = {
    CHAT: _chat,
    "/v1/responses": _responses,
    "/v1/messages": _messages,
    "/v1/completions": _text("prompt"),
    "/v1/embeddings": _text("input"),
    "/v1/moderations": _text("input"),
}


def _with_images(messages: list[Any], parts: list[dict[str, Any]], text_type: str) -> list[Any]:
    """The messages, with the images in the last one of the user."""
    for place in range(len(messages) - 1, -1, -1):
        message = messages[place]
        if message.get("role") == "user":
            content = message.get("content")
            if type(content) is str:
                content = [{"type": text_type, "text": content}]
            if type(content) is not list:
                break
            return [*messages[:place], message | {"content": [*content, *parts]}, *messages[place + 1 :]]
    raise BadRow("invalid_value", "the images have no message of the user to go into")


def _set_schema(body: dict[str, Any], url: str, name: str, schema: dict[str, Any]) -> None:
    form = {"name": name, "strict": True, "schema": schema}
    if url == "/v1/responses":
        text = body.get("text")
        body["text"] = (text if type(text) is dict else {}) | {"format": {"type": "json_schema", **form}}
    elif url == CHAT:
        body["response_format"] = {"type": "json_schema", "json_schema": form}
    else:
        raise BadRow("invalid_value", f"--schema works with {CHAT} and /v1/responses, not with {url}")


def _set(body: dict[str, Any], path: str, value: Any) -> None:
    names = path.split(".")[1:]
    place = body
    for name in names[:-1]:
        inner = place.setdefault(name, {})
        if type(inner) is not dict:
            raise BadRow("invalid_value", f"--set {path}: {name!r} is {strict_json.kind(inner)}, not an object")
        place = inner
    place[names[-1]] = value
