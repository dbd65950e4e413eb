"""The notation in which options are written, read into values: durations, latencies, ranges, rates.

Pure, and strict: text that could be meant in two ways, such as a duration without its unit, is refused with the
notation that would have been accepted. It must never fall back to a default for text that it does not understand.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from batchery.upstreams.simulator.behaviour import Latency, LogNormal, Schedule, Uniform

UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}

_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?|\.[0-9]+)(ms|s|m|h)", re.ASCII)
_WHOLE = re.compile(r"[0-9]{1,9}", re.ASCII)
_RATE = re.compile(r"[0-9]+(?:\.[0-9]+)?|\.[0-9]+", re.ASCII)


def parse_duration(text: str) -> float:
    """A duration in seconds: a number and `ms`, `s`, `m` or `h`, as in `50ms`, `0.05s`, `1s`; a bare `0` is allowed.

    Raises:
        ValueError: it is not such a text.
    """
    text = text.strip()
    if text == "0":
        return 0.0
    match = _DURATION.fullmatch(text)
    seconds = float(match[1]) * UNITS[match[2]] if match else math.inf
    if not math.isfinite(seconds):
        raise ValueError(f"{text[:64]!r} is not a duration; write a number and its unit, such as 50ms, 0.5s or 2m")
    return seconds


def _between(text: str, example: str) -> tuple[float, float]:
    low, dash, high = text.partition("-")
    if not dash:
        raise ValueError(f"{text[:64]!r} is not a span of time; write two durations, such as {example}")
    return parse_duration(low), parse_duration(high)


def parse_latency(text: str) -> Latency:
    """A latency: a duration, `uniform:10ms-90ms`, `lognormal:1s` (its median) or `lognormal:1s,sigma=0.8`.

    Raises:
        ValueError: it is none of these.
    """
    kind, colon, rest = text.strip().partition(":")
    if not colon:
        return parse_duration(kind)
    if kind == "uniform":
        return Uniform(*_between(rest, "uniform:10ms-90ms"))
    if kind == "lognormal":
        median, comma, setting = rest.partition(",")
        if not comma:
            return LogNormal(parse_duration(median))
        name, _, number = setting.strip().partition("=")
        if name != "sigma" or not _RATE.fullmatch(number):
            raise ValueError(f"{setting[:64]!r} is not a setting of a lognormal latency; write sigma=0.8")
        return LogNormal(parse_duration(median), float(number))
    raise ValueError(f"{kind[:64]!r} is not a kind of latency; write 50ms, uniform:10ms-90ms or lognormal:1s,sigma=0.8")


def parse_tokens(text: str) -> int | tuple[int, int]:
    """A number of tokens, `16`, or an inclusive range of them, `8-64`.

    Raises:
        ValueError: it is neither.
    """
    low, dash, high = (part.strip() for part in text.partition("-"))
    if not _WHOLE.fullmatch(low) or (dash and not _WHOLE.fullmatch(high)):
        raise ValueError(f"{text[:64]!r} is not a number of tokens; write 16, or a range such as 8-64")
    return (int(low), int(high)) if dash else int(low)


def parse_rates(texts: Iterable[str]) -> dict[int, float]:
    """Rates by HTTP status, from texts such as `500=0.01`.

    Raises:
        ValueError: one of them is not such a text, or a status stands twice.
    """
    rates: dict[int, float] = {}
    for text in texts:
        status, _, rate = (part.strip() for part in text.partition("="))
        if not re.fullmatch(r"[0-9]{3}", status, re.ASCII) or not _RATE.fullmatch(rate):
            raise ValueError(f"{text[:64]!r} is not a rate; write STATUS=RATE, such as 500=0.01 for one in a hundred")
        if int(status) in rates:
            raise ValueError(f"the status {status} stands twice")
        rates[int(status)] = float(rate)
    return rates


def parse_schedule(text: str) -> Schedule:
    """Numbers and the times from which they hold: `256`, or `256@0s,64@20s,256@40s`.

    Raises:
        ValueError: it is not such a text.
    """
    schedule = []
    for part in text.split(","):
        number, at, since = part.strip().partition("@")
        if not _RATE.fullmatch(number) or bool(at) != bool(since):
            raise ValueError(f"{part[:64]!r} is not a number and a time; write 256, or 256@0s,64@20s")
        schedule.append((parse_duration(since) if at else 0.0, float(number)))
    return tuple(schedule)


def parse_concurrency(text: str) -> int | Schedule:
    """Slots: `256`, or a schedule of them.

    Raises:
        ValueError: it is neither.
    """
    if _WHOLE.fullmatch(text.strip()):
        return int(text)
    return tuple((since, int(number)) for since, number in parse_schedule(text))


def parse_outages(texts: Iterable[str]) -> tuple[tuple[float, float], ...]:
    """Outages as seconds since the start, from texts such as `5s-8s`.

    Raises:
        ValueError: one of them is not such a text.
    """
    return tuple(_between(text, "5s-8s") for text in texts)


def parse_retry_after(text: str) -> int | None:
    """Whole seconds for `Retry-After`, or None for `none`: the header is left out.

    Raises:
        ValueError: it is neither.
    """
    text = text.strip()
    if text == "none":
        return None
    if not _WHOLE.fullmatch(text):
        raise ValueError(f"{text[:64]!r} is not a number of whole seconds; write 1, or none to leave the header out")
    return int(text)


def parse_models(text: str) -> tuple[str, ...]:
    """Model names from a comma-separated list, in its order and without repeats.

    Raises:
        ValueError: there is none in it.
    """
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise ValueError("name at least one model, such as a,b")
    return names
