"""What requests would take before any is sent: tokens and cost, and whether that is more than may be spent. Pure.

Input is estimated by `tokens`. Output is what the user expects for each request, else `DEFAULT_OUTPUT_TOKENS`, and
never more than a request allows itself; where all requests have such a limit, the most that they can cost is known too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from batchery.client.prepare import Group
from batchery.client.price_tables import PriceTable, find_price
from batchery.client.tokens import METHOD
from batchery.wire.estimates import DEFAULT_OUTPUT_TOKENS, WITHOUT_OUTPUT

Basis = Literal["given", "default", "none"]


class GroupCost(msgspec.Struct, frozen=True, kw_only=True):
    """The requests for one model and endpoint, and what they would take.

    Attributes:
        size: bytes of their lines.
        basis: of the output tokens: `given` by the user, `default`, or `none` where an endpoint generates nothing.
        most_output_tokens: the most that the requests allow; None where one of them sets no limit.
        cost: in US dollars; None where the price is unknown.
        most_cost: with `most_output_tokens`; None where that or the price is unknown.
        prices: the table that the price is from.
    """

    model: str
    endpoint: str
    requests: int
    size: int
    input_tokens: int
    output_tokens: int
    basis: Basis
    most_output_tokens: int | None
    cost: float | None
    most_cost: float | None
    prices: str | None


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """What all requests would take.

    Attributes:
        window: the completion window that the prices are for.
        cost: in US dollars; None where that of a model is unknown.
        known_cost: of the models whose price is known.
        most_cost: the most that it can be; None where that is unknown for a model.
        unknown: the models without a price.
        method: how tokens were estimated, in words.
        prices: the tables that were used, in words.
    """

    window: str
    requests: int
    size: int
    input_tokens: int
    output_tokens: int
    cost: float | None
    known_cost: float
    most_cost: float | None
    unknown: tuple[str, ...]
    method: str
    prices: tuple[str, ...]
    groups: tuple[GroupCost, ...]


def estimate_cost(
    groups: Sequence[Group], tables: Sequence[PriceTable], window: str, *, output_tokens: int | None = None
) -> Cost:
    """Estimate what requests would take.

    Args:
        groups: of `prepare.Prepared`.
        tables: prices; of two for one model the first counts.
        window: the completion window.
        output_tokens: expected of each request; None for `DEFAULT_OUTPUT_TOKENS`.
    """
    costs = tuple(_group_cost(group, tables, window, output_tokens) for group in groups)
    each = output_tokens if output_tokens is not None else DEFAULT_OUTPUT_TOKENS
    found = [find_price(tables, group.model, window) for group in groups]
    used = dict.fromkeys(price[1].described for price in found if price is not None)
    return Cost(
        window=window,
        requests=sum(group.requests for group in costs),
        size=sum(group.size for group in costs),
        input_tokens=sum(group.input_tokens for group in costs),
        output_tokens=sum(group.output_tokens for group in costs),
        cost=_sum([group.cost for group in costs]),
        known_cost=_dollars(sum(group.cost or 0.0 for group in costs)),
        most_cost=_sum([group.most_cost for group in costs]),
        unknown=tuple(dict.fromkeys(group.model for group in costs if group.cost is None)),
        method=f"{METHOD}; output: {each} tokens for each request, or as many as it allows itself if that is less",
        prices=tuple(used),
        groups=costs,
    )


def over_max_cost(cost: Cost, max_cost: float) -> str | None:
    """Why a job must not be sent under a limit of cost; None if it may be.

    It is the estimate that counts. A job with an unknown price is not within any limit.

    Args:
        max_cost: US dollars.
    """
    if cost.unknown:
        names = ", ".join(cost.unknown[:5])
        return (
            f"--max-cost cannot be kept: no price is known for {names} in the window {cost.window}; name prices with "
            "--prices FILE"
        )
    assert cost.cost is not None
    if cost.cost > max_cost:
        return f"the estimate of ${cost.cost:.4f} is over --max-cost ${max_cost:.4f}"
    return None


def _group_cost(group: Group, tables: Sequence[PriceTable], window: str, output_tokens: int | None) -> GroupCost:
    basis: Basis = "default" if output_tokens is None else "given"
    each = DEFAULT_OUTPUT_TOKENS if output_tokens is None else output_tokens
    most: int | None
    if group.url in WITHOUT_OUTPUT:
        basis, output, most = "none", 0, 0
    else:
        free = group.requests - group.limited
        output = min(group.limited * each, group.limit) + free * each
        most = None if free else group.limit
    found = find_price(tables, group.model, window)
    cost = most_cost = None
    if found is not None:
        price = found[0]
        cost = _dollars((group.input_tokens * price.input + output * price.output) / 1e6)
        if most is not None:
            most_cost = _dollars((group.input_tokens * price.input + most * price.output) / 1e6)
    return GroupCost(
        model=group.model,
        endpoint=group.url,
        requests=group.requests,
        size=group.size,
        input_tokens=group.input_tokens,
        output_tokens=output,
        basis=basis,
        most_output_tokens=most,
        cost=cost,
        most_cost=most_cost,
        prices=found[1].name if found else None,
    )


def _sum(amounts: Sequence[float | None]) -> float | None:
    total = 0.0
    for amount in amounts:
        if amount is None:
            return None
        total += amount
    return _dollars(total)


def _dollars(amount: float) -> float:
    return round(amount, 6)
