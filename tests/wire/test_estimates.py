"""Estimates of tokens and cost."""

from __future__ import annotations

from batchery.wire.estimates import DEFAULT_OUTPUT_TOKENS, estimate_groups, total_of
from batchery.wire.file_index import Counts, Groups
from batchery.wire.lines import URLS
from batchery.wire.prices import parse_prices

CHAT, EMBEDDINGS = "/v1/chat/completions", "/v1/embeddings"
PRICES = parse_prices({"m": {"input": 1, "output": 10, "1h": {"input": 2, "output": 20}}})


def test_by_history_else_by_default() -> None:
    groups: Groups = {
        "m": {CHAT: Counts(10, 4002), EMBEDDINGS: Counts(2, 400)},
        "n": {CHAT: Counts(3, 1000)},
    }
    found = estimate_groups(groups, {"m": 12.34}, PRICES, "24h")
    shown = [
        (group.model, group.endpoint, group.requests, group.bytes, group.estimated_input_tokens) for group in found
    ]
    assert shown == [("m", CHAT, 10, 4002, 1000), ("m", EMBEDDINGS, 2, 400, 100), ("n", CHAT, 3, 1000, 250)]
    assert [(group.estimated_output_tokens, group.estimate_basis) for group in found] == [
        (123, "history"),
        (0, "none"),
        (3 * DEFAULT_OUTPUT_TOKENS, "default"),
    ]
    assert [group.estimated_cost for group in found] == [(1000 + 1230) / 1e6, 0.0001, None]
    total = total_of(found)
    assert (total.input_tokens, total.output_tokens) == (1350, 123 + 3 * DEFAULT_OUTPUT_TOKENS)
    assert (total.basis, total.cost) == ("mixed", None)


def test_a_window_may_have_its_own_price() -> None:
    groups: Groups = {"m": {CHAT: Counts(1, 4_000_000)}}
    for window, cost in (("24h", 1.001), ("1h", 2.002)):
        total = total_of(estimate_groups(groups, {"m": 100.0}, PRICES, window))
        assert (total.cost, total.basis) == (cost, "history")


def test_no_requests_cost_nothing() -> None:
    total = total_of(estimate_groups({}, {}, {}, "24h"))
    assert (total.input_tokens, total.output_tokens, total.cost, total.basis) == (0, 0, 0.0, "none")


def test_only_what_generates_has_output() -> None:
    groups: Groups = {"m": {url: Counts(1, 4) for url in URLS}}
    assert {group.endpoint for group in estimate_groups(groups, {}, {}, "24h") if group.estimated_output_tokens} == {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/messages",
    }


def test_the_total_is_the_sum_of_what_is_shown() -> None:
    """Each group's cost is rounded to a millionth of a dollar, and these are summed."""
    groups: Groups = {"m": {url: Counts(1, 7) for url in URLS}}
    found = estimate_groups(groups, {"m": 0.1}, parse_prices({"m": {"input": 0.3, "output": 0.7}}), "24h")
    total = total_of(found).cost
    assert total == round(sum(group.estimated_cost or 0 for group in found), 6) > 0
