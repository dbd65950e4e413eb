"""Generators of JSON as bytes: well-formed in every spelling the grammar allows, almost well-formed, and hostile."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

EXAMPLES = settings.default.max_examples if settings.default is not None else 100

prove = settings(max_examples=2 * EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""The settings of this folder's properties."""

prove_more = settings(prove, max_examples=6 * EXAMPLES)
"""For those where a rare combination of bytes is the danger."""

# Each is a line break to some reader, or means something to a JSON scanner.
SPECIAL = '\u2028\u2029\u0085\x0b\x0c\x1c\x1d\x1e\x7f\xa0\ufeff\n\r\t"\\/:,[]{}a\x00é漢😀'

characters = st.one_of(st.sampled_from(SPECIAL), st.characters(exclude_categories=["Cs"]))
texts = st.text(characters, max_size=12)
few_keys = st.sampled_from(["a", "b", ":", "a:", "é", "\\", '"', "", "[", "😀", "\u2028"])
"""So few that objects often have one twice."""

numbers = st.one_of(
    st.integers(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([0, -1, 2**63, 2**64, -(2**63) - 1, 10**400, -0.0, 5e-324, 1.7976931348623157e308, 0.1]),
)
values: st.SearchStrategy[Any] = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts),
    lambda children: st.one_of(st.lists(children, max_size=5), st.dictionaries(texts, children, max_size=5)),
    max_leaves=12,
)
objects = st.dictionaries(texts, values, max_size=5)

_blank = st.sampled_from(["", "", "", " ", "\t", "\r", "  "])
_SHORT = {'"': '\\"', "\\": "\\\\", "/": "\\/", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


@st.composite
def spelled(draw: Callable[..., Any], text: str) -> str:
    """A JSON string for the text: each character raw where it may be, in its short escape, or as \\u in either case."""
    out = []
    for char in text:
        how = draw(st.integers(0, 3))
        if how <= 1 and char >= " " and char not in '"\\':
            out.append(char)
        elif how <= 2 and char in _SHORT:
            out.append(_SHORT[char])
        else:
            units = char.encode("utf-16-be", "surrogatepass").hex()
            escape = "".join(f"\\u{units[i : i + 4]}" for i in range(0, len(units), 4))
            out.append(escape if draw(st.booleans()) else "\\u" + escape[2:].upper().replace("\\U", "\\u"))
    return '"' + "".join(out) + '"'


@st.composite
def spellings(
    draw: Callable[..., Any], value: Any, *, repeat_keys: bool = False, blank: st.SearchStrategy[str] = _blank
) -> str:
    """A JSON text for the value with whitespace and escapes anywhere; with `repeat_keys`, pairs may come twice."""

    def write(value: Any) -> str:
        before, body, after = draw(blank), "", draw(blank)
        if isinstance(value, str):
            body = draw(spelled(value))
        elif isinstance(value, list):
            body = "[" + ",".join(write(item) for item in value) + draw(blank) + "]"
        elif isinstance(value, dict):
            pairs = list(value.items())
            if repeat_keys and pairs and draw(st.booleans()):
                pairs.insert(draw(st.integers(0, len(pairs))), (draw(st.sampled_from(pairs))[0], None))
            body = "{" + ",".join(f"{write(key)}:{write(item)}" for key, item in pairs) + draw(blank) + "}"
        else:
            body = json.dumps(value)
        return f"{before}{body}{after}"

    return write(value)


well_formed = values.flatmap(spellings).map(str.encode)
repeating = st.recursive(
    st.one_of(st.none(), st.integers(), few_keys),
    lambda children: st.one_of(st.lists(children, max_size=3), st.dictionaries(few_keys, children, max_size=4)),
    max_leaves=8,
).flatmap(lambda value: spellings(value, repeat_keys=True).map(str.encode))

_PIECES = [
    *(b"{", b"}", b"[", b"]", b":", b",", b'"', b"\\", b"\\\\", b'\\"', b" ", b"\n", b"\r", b"\t", b"\x00", b"\x0b"),
    *(b'"a"', b'"a":', b'"\\u0061":1', b'"\\u003a"', b'"\\u003A":', b"\\u", b"\\ud83d", b"\\udE00", b"\\ud83d\\ude00"),
    *(b"0", b"-", b"1", b"01", b"1.", b".5", b"1e5", b"1E+5", b"1e400", b"-0", b"1e-400", b"123456789012345678901234"),
    *(b"true", b"false", b"null", b"nul", b"NaN", b"Infinity", b"-Infinity", b"'a'", b"/**/", b"\xef\xbb\xbf"),
    *(b"\xff", b"\xc3\xa9", b"\xc3", b"\xed\xa0\x80", b"\xe2\x80\xa8", b"\xc2\x85", b"\xf0\x9f\x98\x80", b"\xc0\x80"),
]
pieces = st.sampled_from(_PIECES)
soup = st.lists(pieces, max_size=12).map(b"".join)
"""Pieces of JSON in no order."""


@st.composite
def mutated(draw: Callable[..., Any], source: st.SearchStrategy[bytes] = well_formed) -> bytes:
    """Well-formed JSON with a few bytes cut out or pieces put in."""
    data: bytes = draw(source)
    for _ in range(draw(st.integers(1, 3))):
        at, cut = draw(st.integers(0, len(data))), draw(st.integers(0, 3))
        data = data[:at] + draw(st.one_of(st.just(b""), pieces)) + data[at + cut :]
    return data


anything = st.one_of(st.binary(max_size=40), soup, mutated(), well_formed, repeating, mutated(repeating))
