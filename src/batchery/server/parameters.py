"""Query parameters. Unknown ones are ignored; a known one that is wrong is a 400 that names it."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import datetime
from fractions import Fraction
from urllib.parse import parse_qsl

from batchery.server.context import AnyRequest
from batchery.wire.errors import BadRequest

_WHOLE = re.compile(r"[0-9]{1,30}", re.ASCII)
_UNIX = re.compile(r"[0-9]{1,12}(?:\.[0-9]{1,9})?", re.ASCII)
# RFC 3339's date-time. A plus sign that was not percent-encoded has become a space.
_RFC3339 = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2})[Tt ]([0-9]{2}:[0-9]{2}):([0-9]{2})(\.[0-9]{1,9})?"
    r"(?:[Zz]|([+ -])([0-9]{2}):([0-9]{2}))",
    re.ASCII,
)
_EPOCH = datetime(1970, 1, 1)  # without a zone: with one, taking off the offset could overflow
MAX_WORDS = 32


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

    def words(self, name: str, accepted: tuple[str, ...]) -> tuple[str, ...] | None:
        """Some of the accepted words, separated by commas, each once; None when it was not given.

        Raises:
            BadRequest: one of them is another, or there is none.
        """
        return self.several(name, lambda word: word in accepted, f"one or several of {', '.join(accepted)}")

    def several(self, name: str, accepts: Callable[[str], bool], accepted: str) -> tuple[str, ...] | None:
        """Values separated by commas, each once; None when it was not given.

        Args:
            accepts: whether one of them is good.
            accepted: says what is, for the message.

        Raises:
            BadRequest: one of them is not, or there are none or too many.
        """
        value = self.text(name)
        if value is None:
            return None
        words = tuple(dict.fromkeys(word.strip() for word in value.split(",")))
        wrong = [word for word in words if not accepts(word)]
        if wrong or len(words) > MAX_WORDS:
            shown = wrong[0][:64] if wrong else f"{len(words)} values"
            raise BadRequest(
                f"{name} must be {accepted}, separated by commas; {shown!r} is not.", param=name, code="invalid_value"
            )
        return words

    def flag(self, name: str) -> bool:
        """`true` or `false`; false when it was not given.

        Raises:
            BadRequest: it is something else.
        """
        return self.choice(name, ("true", "false")) == "true"

    def moment(self, name: str, rounding: Callable[[Fraction], int]) -> int | None:
        """A point in time, given as Unix seconds or as RFC 3339 has it; None when it was not given.

        Args:
            rounding: what becomes of a fraction of a second: `math.ceil` or `math.floor`.

        Returns:
            Unix seconds; below 0 before 1970.

        Raises:
            BadRequest: it is something else.
        """
        value = self.text(name)
        if value is None:
            return None
        moment = _moment(value)
        if moment is None:
            raise BadRequest(
                f"{name} must be a time, as Unix seconds such as 1735689600 or as RFC 3339 has it, such as "
                f"2025-01-01T00:00:00Z, not {value[:64]!r}.",
                param=name,
                code="invalid_value",
            )
        return rounding(moment)


def _moment(text: str) -> Fraction | None:
    """Unix seconds; None where the text is no time."""
    if _UNIX.fullmatch(text):
        return Fraction(text)
    match = _RFC3339.fullmatch(text)
    if match is None:
        return None
    date, minute, second, fraction, sign, hours, minutes = match.groups()
    offset = 0 if sign is None else (-1 if sign == "-" else 1) * (int(hours) * 60 + int(minutes)) * 60
    if int(second) > 60 or (sign is not None and (int(hours) > 23 or int(minutes) > 59)):
        return None
    try:
        whole = datetime.fromisoformat(f"{date}T{minute}")
    except ValueError:  # the 30th of February, or hour 24
        return None
    return (whole - _EPOCH).days * 86_400 + (whole - _EPOCH).seconds + int(second) - offset + Fraction(fraction or 0)


def parameters_of(request: AnyRequest) -> Parameters:
    """The query parameters of a request."""
    return Parameters(request.scope["query_string"])
