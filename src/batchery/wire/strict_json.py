"""Strict JSON: what msgspec leaves open, closed.

msgspec is fast and checks the grammar, but it accepts a repeated key (the last one wins), recurses as deep as the
interpreter allows, and does not look at the UTF-8 inside strings that it skips. Here all three are errors, at a cost of
about one more pass over the bytes.
"""

from __future__ import annotations

import json
from typing import Any

import msgspec

MAX_DEPTH = 128

_decode = msgspec.json.Decoder().decode
_encode = msgspec.json.Encoder().encode


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
    if data.count(b"[") + data.count(b"{") > MAX_DEPTH:
        _check_depth(data)
    try:
        value = _decode(data)
    except msgspec.MsgspecError as error:
        _check_utf8(data)
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


def _check_utf8(data: bytes) -> None:
    try:
        data.decode()
    except UnicodeDecodeError as error:
        raise NotUtf8(error.start) from None


def _check_depth(data: bytes) -> None:
    """Refuse more than `MAX_DEPTH` open brackets; a scan that skips strings, run only when a line has that many."""
    depth = 0
    in_string = False
    escaped = False
    for byte in data:
        if in_string:
            if escaped:
                escaped = False
            elif byte == 0x5C:
                escaped = True
            elif byte == 0x22:
                in_string = False
        elif byte == 0x22:
            in_string = True
        elif byte in (0x5B, 0x7B):
            depth += 1
            if depth > MAX_DEPTH:
                raise NotJson(f"nested deeper than {MAX_DEPTH} levels")
        elif byte in (0x5D, 0x7D):
            depth -= 1


def _may_repeat_keys(data: bytes, value: Any) -> bool:
    """Whether a key may stand twice in one object.

    Decoding drops all but the last of a repeated key, and with it at least one colon; nothing else loses or gains
    one, except a colon written as the escape \\u003a. So without that escape, equal numbers of colons before and after
    prove that no key repeats. It never says no wrongly; a yes is checked key by key.
    """
    if b"\\u003" in data:
        return True
    try:
        return data.count(b":") != _encode(value).count(b":")
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
