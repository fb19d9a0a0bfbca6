"""Is there a second owner in another domain for each rank, and are as few pairs of losses fatal as can be?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import combinations, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from concertina.elastic.second_owners import place_seconds

pytestmark = pytest.mark.unit

Placement = Sequence[int | None]

worlds = st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=40)


def sized(*sizes: int) -> list[str]:
    return [f"n{node}" for node, size in enumerate(sizes) for _ in range(size)]


def is_fatal(nodes: Sequence[str], seconds: Placement, lost: set[str]) -> bool:
    """Whether somebody's first and second copy are both on lost nodes."""
    return any(node in lost and nodes[second] in lost for node, second in zip(nodes, seconds, strict=True))


def fatal_pairs(nodes: Sequence[str], seconds: Placement) -> int:
    return sum(is_fatal(nodes, seconds, set(pair)) for pair in combinations(sorted(set(nodes)), 2))


def largest_load(seconds: Placement) -> int:
    return max(Counter(seconds).values())


def ring(nodes: Sequence[str]) -> list[int]:
    """Each domain has its copies on the next; domains of one size."""
    size = len(nodes) // len(set(nodes))
    return [(rank + size) % len(nodes) for rank in range(len(nodes))]


@given(worlds)
def test_no_second_is_in_its_own_domain(nodes: list[str]) -> None:
    seconds = place_seconds(nodes)
    assert len(seconds) == len(nodes)
    if len(set(nodes)) > 1:
        assert all(nodes[second] != node for node, second in zip(nodes, seconds, strict=True) if second is not None)
        assert None not in seconds
        assert not any(is_fatal(nodes, seconds, {lost}) for lost in nodes)


@pytest.mark.parametrize("ranks", range(2, 6))
def test_one_domain_uses_another_rank_of_it(ranks: int) -> None:
    seconds = place_seconds(["a"] * ranks)
    assert sorted(second for second in seconds if second is not None) == list(range(ranks))
    assert all(second != rank for rank, second in enumerate(seconds))


def test_a_single_rank_has_none() -> None:
    assert place_seconds(["a"]) == (None,)


@pytest.mark.parametrize("num_nodes", range(2, 12))
@pytest.mark.parametrize("size", [1, 3])
def test_equal_domains_have_one_each_and_fewer_fatal_pairs_than_a_ring(num_nodes: int, size: int) -> None:
    nodes = sized(*[size] * num_nodes)
    seconds = place_seconds(nodes)
    assert largest_load(seconds) == 1
    fatal = fatal_pairs(nodes, seconds)
    assert fatal == (num_nodes // 2 if num_nodes % 2 == 0 else (num_nodes - 3) // 2 + 3)
    in_a_ring = fatal_pairs(nodes, ring(nodes))
    assert fatal < in_a_ring if num_nodes > 3 else fatal == in_a_ring


@pytest.mark.parametrize("sizes", [(1, 1), (1, 1, 1), (1,) * 4, (1,) * 5, (1,) * 6, (2, 2), (2, 2, 2)])
def test_no_placement_with_one_copy_a_rank_has_fewer_fatal_pairs(sizes: tuple[int, ...]) -> None:
    """Every placement there is, tried."""
    nodes = sized(*sizes)
    ranks = range(len(nodes))
    options = [[second for second in ranks if nodes[second] != nodes[rank]] for rank in ranks]
    balanced = (seconds for seconds in product(*options) if largest_load(seconds) == 1)
    assert fatal_pairs(nodes, place_seconds(nodes)) == min(fatal_pairs(nodes, seconds) for seconds in balanced)


@given(st.lists(st.integers(1, 9), min_size=2, max_size=9))
def test_load_is_bounded_by_neighbours_in_size(sizes: list[int]) -> None:
    """No rank has more copies than the largest ratio that pairing by size leaves."""
    nodes = sized(*sizes)
    ordered = sorted(sizes, reverse=True)
    if len(ordered) % 2 == 0:
        bound = max(-(-a // b) for a, b in zip(ordered[::2], ordered[1::2], strict=True))
        assert largest_load(place_seconds(nodes)) == bound
    else:  # three in a ring at the best place, or better
        rings = []
        for at in range(0, len(ordered) - 2, 2):
            a, b, c = ordered[at : at + 3]
            others = [*ordered[:at], *ordered[at + 3 :]]
            pairs = [-(-x // y) for x, y in zip(others[::2], others[1::2], strict=True)]
            rings.append(max([*pairs, -(-a // b), -(-b // c), -(-a // c)]))
        assert largest_load(place_seconds(nodes)) <= min(rings)


def test_copies_of_a_domain_are_spread_over_its_partner() -> None:
    for sizes in [(8, 8), (5, 3), (8, 7, 6, 5), (4, 4, 4)]:
        nodes = sized(*sizes)
        seconds = place_seconds(nodes)
        by_domain: dict[str, list[int]] = {}
        for rank in range(len(nodes)):
            by_domain.setdefault(nodes[rank], []).append(seconds.count(rank))
        assert all(max(loads) - min(loads) <= 1 for loads in by_domain.values())


def test_a_small_domain_does_not_get_the_copies_of_a_large_one() -> None:
    nodes = sized(8, 8, 1)
    assert largest_load(place_seconds(nodes)) == 2
    assert fatal_pairs(nodes, place_seconds(nodes)) == 2


def test_like_sizes_are_paired() -> None:
    nodes = sized(2, 8, 2, 8)
    partners = {(nodes[rank], nodes[second]) for rank, second in enumerate(place_seconds(nodes)) if second is not None}
    assert partners == {("n1", "n3"), ("n3", "n1"), ("n0", "n2"), ("n2", "n0")}


@given(worlds)
def test_it_is_a_function_of_who_is_with_whom(nodes: list[str]) -> None:
    renamed = {name: str(number) for number, name in enumerate(reversed(list(dict.fromkeys(nodes))))}
    assert place_seconds([renamed[node] for node in nodes]) == place_seconds(nodes)
