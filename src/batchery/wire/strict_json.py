"""Strict JSON: what msgspec leaves open, closed.

msgspec is fast and checks the grammar, but it accepts a repeated key (the last one wins), recurses as deep as the
interpreter allows, and does not look at the UTF-8 inside strings that it skips. Here all three are errors, at a cost of
about one more pass over the bytes.
"""

from __future__ import annotations

import json
import re
from array import array
from itertools import accumulate
from typing import Any

import msgspec

MAX_DEPTH = 128

_decode = msgspec.json.Decoder().decode
_skip = msgspec.json.Decoder(msgspec.Raw).decode
_encode = msgspec.json.Encoder().encode

_ESCAPED_COLON = re.compile(rb"\\u003[aA]")
_ESCAPE = re.compile(rb"\\(?:u[dD][89a-fA-F][0-9a-fA-F]{2}|.)", re.DOTALL)


class NotJson(ValueError):
    """The bytes are not strict JSON; the message says why, in a few words without the data itself."""


class NotUtf8(NotJson):
    """The bytes are not UTF-8.

    Args:
        offset: the first bad byte, from 0.
    """

    def __init__(self, offset: int) -> None:
        super().__init__(f"not valid UTF-8 at byte {offset}")
        self.offset = offset


def loads(data: bytes) -> Any:
    """Decode strict JSON: UTF-8 throughout, no key twice in one object, at most `MAX_DEPTH` levels.

    Raises:
        NotJson: with the reason. No other exception comes out, whatever the bytes.
    """
    if _count(data, b"[") + _count(data, b"{") > MAX_DEPTH:
        _check_depth(data)
    try:
        value = _decode(data)
    except msgspec.MsgspecError as error:
        _check_utf8(data)
        if mask_surrogates(data) is not data and is_json(data):
            raise NotJson("a \\u escape is half of a surrogate pair, as of an emoji cut in two") from None
        raise NotJson(str(error)) from None
    except UnicodeDecodeError:
        _check_utf8(data)
        raise NotJson("a string is not valid Unicode") from None
    except RecursionError:
        raise NotJson(f"nested deeper than {MAX_DEPTH} levels") from None
    except ValueError:
        raise NotJson("a number is too long") from None
    if _may_repeat_keys(data, value):
        _check_keys(data)
    return value


def check_grammar(data: bytes) -> None:
    """Refuse what is not UTF-8 and JSON by its grammar alone, without building it.

    It takes what `loads` takes, and also repeated keys, numbers of any size, halves of surrogate pairs as escapes, and
    nesting as deep as the interpreter goes (hundreds of levels).

    Raises:
        NotJson: with the reason. No other exception comes out, whatever the bytes.
    """
    _check_utf8(data)
    try:
        _skip(mask_surrogates(data))
    except msgspec.MsgspecError as error:
        raise NotJson(str(error)) from None
    except RecursionError:
        raise NotJson("nested too deep") from None


def is_json(data: bytes) -> bool:
    """Whether `check_grammar` takes it."""
    try:
        check_grammar(data)
    except NotJson:
        return False
    return True


def mask_surrogates(data: bytes) -> bytes:
    """JSON with each escape of a surrogate, \\ud800 to \\udfff, replaced by \\ufffd; the same object if there is none.

    msgspec refuses half a pair, which JSON's grammar allows and some models emit. Valid JSON stays valid, invalid JSON
    invalid, and all offsets hold.
    """
    if rb"\ud" not in data and rb"\uD" not in data:
        return data
    return _ESCAPE.sub(lambda match: rb"\ufffd" if len(match[0]) == 6 else match[0], data)


def describe(value: Any) -> str:
    """A decoded value in a few words for a message, such as `'gpt-5'`, `7` or `an array`."""
    if type(value) is str:
        return repr(value if len(value) <= 64 else value[:61] + "...")
    if type(value) is float or (type(value) is int and abs(value) < 1 << 64):
        return repr(value)
    return kind(value)


def kind(value: Any) -> str:
    """What a decoded value is, in JSON's words: `an object`, `null`."""
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _check_utf8(data: bytes) -> None:
    try:
        data.decode()
    except UnicodeDecodeError as error:
        raise NotUtf8(error.start) from None


# Of the bytes of JSON without its escapes, those that decide how deep it is.
_NOT_STRUCTURE = bytes(set(range(256)) - set(b'"[]{}'))
_STEPS = bytes(1 if byte in b"[{" else 255 for byte in range(256))  # as a signed byte: one down, or one up


def _check_depth(data: bytes) -> None:
    """Refuse more than `MAX_DEPTH` open brackets; run only when a line has that many, some perhaps inside strings.

    With escaped backslashes gone and then escaped quotes, the quotes left are those around strings, and each second
    piece between them is outside.
    """
    bare = data.replace(rb"\\", b"").replace(rb"\"", b"").translate(None, _NOT_STRUCTURE)
    brackets = b"".join(bare.split(b'"')[::2])
    if len(brackets) > MAX_DEPTH and max(accumulate(array("b", brackets.translate(_STEPS)))) > MAX_DEPTH:
        raise NotJson(f"nested deeper than {MAX_DEPTH} levels")


def _count(data: bytes, byte: bytes) -> int:
    """`data.count(byte)`, but several times as fast for a rare byte: `replace` jumps from one to the next (memchr)."""
    return len(data) - len(data.replace(byte, b""))


def _may_repeat_keys(data: bytes, value: Any) -> bool:
    """Whether a key may stand twice in one object.

    Decoding drops all but the last of a repeated key, and with it at least one colon; nothing else loses or gains
    one, except a colon written as the escape \\u003a. So without that escape, equal numbers of colons before and after
    prove that no key repeats. It never says no wrongly; a yes is checked key by key.
    """
    if _ESCAPED_COLON.search(data) is not None:
        return True
    try:
        return _count(data, b":") != _count(_encode(value), b":")
    except (msgspec.MsgspecError, OverflowError, ValueError):
        return True


class _Repeated(Exception):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> None:
    seen = set()
    for key, _ in pairs:
        if key in seen:
            raise _Repeated(key)
        seen.add(key)


def _check_keys(data: bytes) -> None:
    try:
        json.loads(data, object_pairs_hook=_unique, parse_int=len, parse_float=len)
    except _Repeated as error:
        raise NotJson(f"the key {str(error)[:64]!r} stands twice in one object") from None
    except RecursionError:
        raise NotJson(f"nested deeper than {MAX_DEPTH} levels") from None
    except ValueError as error:
        raise NotJson(str(error)) from None
