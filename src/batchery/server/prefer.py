"""The `Prefer` header (RFC 7240), of which `wait` is understood: how many seconds the client would wait for the answer.

It is a wish and never an error: whatever is malformed in it is passed over.
"""

from __future__ import annotations

import re

LONGEST_WAIT = 60
"""Seconds; a longer wish is cut down to this."""

MAX_LENGTH = 1_000
"""A header longer than this is passed over, as reading a hostile one takes the square of its length."""

_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # noqa: S105
_QUOTED = r'"(?:[^"\\]|\\.)*"'
_PARAMETER = rf"{_TOKEN}(?:[ \t]*=[ \t]*(?:{_TOKEN}|{_QUOTED}))?"
_PREFERENCE = re.compile(
    rf"[ \t]*({_TOKEN})(?:[ \t]*=[ \t]*(?:({_TOKEN})|({_QUOTED})))?"
    rf"(?:[ \t]*;[ \t]*(?:{_PARAMETER})?)*[ \t]*(?:,|$)",
    re.ASCII,
)
_NEXT = re.compile(rf'(?:{_QUOTED}|[^",]|")*?(?:,|$)')
_ESCAPED = re.compile(r"\\(.)")
_SECONDS = re.compile(r"[0-9]+", re.ASCII)


def wait_of(headers: list[str]) -> int | None:
    """For how many seconds the client would wait, from 0 to `LONGEST_WAIT`; None when it did not say.

    Args:
        headers: the values of all `Prefer` headers, in order. Of a preference that is there more than once, the first
            counts.
    """
    text = ",".join(headers)
    if len(text) > MAX_LENGTH:
        return None
    position = 0
    while position < len(text):
        match = _PREFERENCE.match(text, position)
        if match is not None and match[1].lower() == "wait":
            quoted = match[3]
            value = match[2] if quoted is None else _ESCAPED.sub(r"\1", quoted[1:-1])
            return min(int(value), LONGEST_WAIT) if value is not None and _SECONDS.fullmatch(value) else None
        skipped = match or _NEXT.match(text, position)
        assert skipped is not None
        position = max(skipped.end(), position + 1)
    return None
