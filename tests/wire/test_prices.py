"""The table of prices: what it may be, and what a model then costs."""

from __future__ import annotations

import re
import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchery.wire.prices import Price, parse_prices, price_of

from .json_texts import values


def test_by_model_and_by_window() -> None:
    prices = parse_prices(
        tomllib.loads(
            """
            [prices.m]
            input = 1
            output = 2.5
            [prices.m."1h"]
            input = 4.0
            output = 0
            [prices."org/n".24h]
            input = 3
            output = 3
            """
        )["prices"]
    )
    assert price_of(prices, "m", "24h") == Price(1.0, 2.5)
    assert price_of(prices, "m", "1h") == Price(4.0, 0.0)
    assert price_of(prices, "org/n", "24h") == Price(3.0, 3.0)
    assert price_of(prices, "org/n", "1h") is None
    assert price_of(prices, "other", "24h") is None
    assert parse_prices({}) == {}


GOOD = {"input": 1, "output": 2}


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ([], "prices must be a table"),
        (7, "prices must be a table"),
        ({"m": 1}, 'prices."m" must be a table'),
        ({"m": {}}, 'prices."m".input is missing'),
        ({"m": {"input": 1}}, 'prices."m".output is missing'),
        ({"m": {"output": 1}}, 'prices."m".input is missing'),
        ({"m": {"output": 1, "1h": GOOD}}, 'prices."m".input is missing'),
        ({"m": {"1h": {"input": 1}}}, 'prices."m"."1h".output is missing'),
        ({"m": {"1h": 3}}, 'prices."m"."1h" must be a table'),
        ({"m": GOOD | {"1h": GOOD | {"2h": GOOD}}}, "'2h' is neither input nor output"),
        ({"m": GOOD | {"inptu": 1}}, "'inptu' is neither input nor output nor a window such as 24h"),
        ({"m": GOOD | {"1x": GOOD}}, "'1x' is neither input nor output nor a window"),
        ({"m": GOOD | {"input": -1}}, 'prices."m".input must be a number of US dollars per million tokens'),
        ({"m": GOOD | {"input": -0.01}}, "not -0.01"),
        ({"m": GOOD | {"input": float("nan")}}, "not nan"),
        ({"m": GOOD | {"input": float("inf")}}, "not inf"),
        ({"m": GOOD | {"output": 10**400}}, "from 0 to 1000000000, not a number"),
        ({"m": GOOD | {"output": True}}, "not a boolean"),
        ({"m": GOOD | {"output": "1"}}, "not '1'"),
        ({"m": GOOD | {"output": None}}, "not null"),
        ({"a\nb": {}}, r'prices."a\nb".input'),
        ({'a"b\\': {}}, r'prices."a\"b\\".input'),
    ],
)
def test_what_is_refused_and_how(table: Any, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        parse_prices(table)


@given(values | st.dictionaries(st.sampled_from(["m", "n"]), st.dictionaries(st.sampled_from(["input", "1h"]), values)))
def test_any_value_is_read_or_refused(value: Any) -> None:
    try:
        prices = parse_prices(value)
    except ValueError:
        return
    assert list(prices) == list(value)
