"""Weighted fair sharing: shares by weight in the long run, no credit for idleness, small pieces soon."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from batchery.engine.fair_share import Claim, FairShare


def serve(share: FairShare, claims: list[Claim], turns: int) -> Counter[str]:
    """What each owner gets in so many turns, if all of them always have work."""
    given: Counter[str] = Counter()
    for _ in range(turns):
        claim = share.first(claims)
        assert claim is not None
        share.charge(claim)
        given[claim.owner] += claim.size
    return given


@given(
    st.dictionaries(st.text("abcdef", min_size=1, max_size=3), st.tuples(st.integers(1, 8), st.integers(1, 256))),
    st.integers(1, 400),
)
def test_nobody_is_ever_further_behind_than_a_piece_of_each(owners: dict[str, tuple[int, int]], turns: int) -> None:
    claims = [Claim(owner, weight, size, 0) for owner, (weight, size) in owners.items()]
    share = FairShare()
    given = serve(share, claims, turns if claims else 0)
    if not claims:
        assert share.first(claims) is None
        return
    most = max(claim.size / claim.weight for claim in claims)
    normal = [given[claim.owner] / claim.weight for claim in claims]
    assert max(normal) - min(normal) <= 2 * most + 1e-6


def test_who_had_nothing_to_do_has_no_credit() -> None:
    share = FairShare()
    serve(share, [Claim("busy", 1, 256, 0)], 1_000)
    both = serve(share, [Claim("busy", 1, 256, 0), Claim("new", 1, 256, 0)], 100)
    assert abs(both["busy"] - both["new"]) <= 256


def test_a_small_piece_does_not_wait_for_a_round() -> None:
    share = FairShare()
    claims = [Claim(f"o{i}", 1, 256, 0) for i in range(300)]
    serve(share, claims, 4_567)
    following = share.first([*claims, Claim("small", 1, 10, 0)])
    assert following is not None
    assert following.owner == "small"


def test_what_is_given_back_is_not_paid_for() -> None:
    share = FairShare()
    claims = [Claim("a", 1, 100, 0), Claim("b", 1, 100, 0)]
    share.first(claims)
    share.charge(claims[0])
    share.correct("a", 1, -100)
    assert serve(share, claims, 10) == {"a": 500, "b": 500}


def test_owners_who_have_gone_are_forgotten() -> None:
    share = FairShare()
    for i in range(5_000):
        serve(share, [Claim(f"o{i}", 1, 1, 0)], 1)
    assert len(share._finish) <= 1_025
