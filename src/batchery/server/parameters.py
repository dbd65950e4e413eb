"""Query parameters. Unknown ones are ignored; a known one that is wrong is a 400 that names it."""

from __future__ import annotations

import re
from urllib.parse import parse_qsl

from batchery.server.context import AnyRequest
from batchery.wire.errors import BadRequest

_WHOLE = re.compile(r"[0-9]{1,30}", re.ASCII)


class Parameters:
    """The query parameters of a request.

    Args:
        query: the query string as it came, percent-encoded.
    """

    def __init__(self, query: bytes) -> None:
        self._values: dict[str, list[str]] = {}
        for name, value in parse_qsl(query.decode("latin-1"), keep_blank_values=True):
            self._values.setdefault(name, []).append(value)

    def text(self, name: str) -> str | None:
        """The value as it was given; None when it was not.

        Raises:
            BadRequest: it was given twice, with different values.
        """
        values = self._values.get(name)
        if values is None:
            return None
        if len(set(values)) > 1:
            raise BadRequest(f"{name} was given {len(values)} times; give it once.", param=name, code="invalid_value")
        return values[0]

    def whole(self, name: str, low: int, high: int | None = None) -> int | None:
        """A whole number from `low` to `high`, in decimal digits; None when it was not given.

        Raises:
            BadRequest: it is something else.
        """
        value = self.text(name)
        if value is None:
            return None
        number = int(value) if _WHOLE.fullmatch(value) else -1
        if number < low or (high is not None and number > high):
            accepted = f"of at least {low}" if high is None else f"from {low} to {high}"
            raise BadRequest(
                f"{name} must be a whole number {accepted}, not {value[:64]!r}.", param=name, code="invalid_value"
            )
        return number

    def choice(self, name: str, accepted: tuple[str, ...]) -> str | None:
        """One of some words; None when it was not given.

        Raises:
            BadRequest: it is another.
        """
        value = self.text(name)
        if value is not None and value not in accepted:
            raise BadRequest(
                f"{name} must be one of {', '.join(accepted)}, not {value[:64]!r}.", param=name, code="invalid_value"
            )
        return value


def parameters_of(request: AnyRequest) -> Parameters:
    """The query parameters of a request."""
    return Parameters(request.scope["query_string"])
