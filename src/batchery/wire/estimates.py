"""What a batch would take, estimated from the counts of its input file: tokens, and what they cost.

No tokenizer and no body is looked at. Input is counted as one token for each four bytes of the lines; output as what
the owner's earlier batches with that model had for each completed request, or `DEFAULT_OUTPUT_TOKENS` where there were
none, and 0 at urls that generate nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import msgspec

from batchery.wire.file_index import Groups
from batchery.wire.prices import Prices, price_of

BYTES_PER_TOKEN = 4
DEFAULT_OUTPUT_TOKENS = 256
WITHOUT_OUTPUT = frozenset({"/v1/embeddings", "/v1/moderations", "/v1/rerank", "/v1/score"})

EstimateBasis = Literal["history", "default", "none", "mixed"]


class GroupEstimate(msgspec.Struct, kw_only=True):
    """The requests of a file for one model and url, and what they would take.

    Attributes:
        bytes: of their lines.
        estimate_basis: where the output tokens come from: `history`, the owner's earlier batches with this model;
            `default`, a fixed number a request, because there were none; `none`, because this url generates nothing.
        estimated_cost: in US dollars; null where the server knows no price.
    """

    model: str
    endpoint: str
    requests: int
    bytes: int
    estimated_input_tokens: int
    estimated_output_tokens: int
    estimate_basis: Literal["history", "default", "none"]
    estimated_cost: float | None


class Estimate(msgspec.Struct, frozen=True):
    """What all groups together would take.

    Attributes:
        cost: in US dollars; None where the price of a model is unknown.
        basis: that of the groups, or `mixed`.
    """

    input_tokens: int
    output_tokens: int
    cost: float | None
    basis: EstimateBasis


def estimate_groups(groups: Groups, history: Mapping[str, float], prices: Prices, window: str) -> list[GroupEstimate]:
    """Estimate each group.

    Args:
        groups: the counts of the input file.
        history: output tokens for each completed request, by model, as far as they are known.
        prices: the server's.
        window: the completion window, by which prices may differ.
    """
    estimates = []
    for model, urls in groups.items():
        price = price_of(prices, model, window)
        for url, counts in urls.items():
            basis: Literal["history", "default", "none"]
            if url in WITHOUT_OUTPUT:
                basis, each = "none", 0.0
            elif model in history:
                basis, each = "history", history[model]
            else:
                basis, each = "default", float(DEFAULT_OUTPUT_TOKENS)
            input_tokens = round(counts.bytes / BYTES_PER_TOKEN)
            output_tokens = round(counts.requests * each)
            cost = None
            if price is not None:
                cost = _dollars((input_tokens * price.input + output_tokens * price.output) / 1e6)
            estimates.append(
                GroupEstimate(
                    model=model,
                    endpoint=url,
                    requests=counts.requests,
                    bytes=counts.bytes,
                    estimated_input_tokens=input_tokens,
                    estimated_output_tokens=output_tokens,
                    estimate_basis=basis,
                    estimated_cost=cost,
                )
            )
    return estimates


def total_of(estimates: Iterable[GroupEstimate]) -> Estimate:
    """Sum up the groups of a file."""
    input_tokens = output_tokens = 0
    cost: float | None = 0.0
    bases: set[EstimateBasis] = set()
    for group in estimates:
        input_tokens += group.estimated_input_tokens
        output_tokens += group.estimated_output_tokens
        cost = None if cost is None or group.estimated_cost is None else cost + group.estimated_cost
        bases.add(group.estimate_basis)
    bases.discard("none")
    basis: EstimateBasis = "none" if not bases else "mixed" if len(bases) > 1 else bases.pop()
    return Estimate(input_tokens, output_tokens, None if cost is None else _dollars(cost), basis)


def _dollars(amount: float) -> float:
    return round(amount, 6)
