"""Prompts that are kept: found by their beginnings, bounded, and forgotten with their expert."""

from __future__ import annotations

import torch

from see_ray.engine.forward_batch import DecisionRows
from see_ray.engine.prefix_cache import MIN_SHARED_TOKENS, DecisionRow, PrefixCache
from see_ray.models.prefix_kv import Prefix


def prefix(length: int) -> Prefix:
    return Prefix(((torch.arange(float(length))[None, None, :, None],) * 2,), (length,))


def ids(*numbers: int) -> tuple[int, ...]:
    """A prompt that starts with 20 tokens of its own for each number."""
    return tuple(number * 100 + index for number in numbers for index in range(20))


def test_a_new_prompt_starts_with_the_longest_prefix_that_it_shares() -> None:
    cache = PrefixCache(1000)
    cache.insert(ids(1, 2), None, prefix(39))
    cache.insert(ids(1, 3), None, prefix(39))
    matched = cache.match((*ids(1, 3)[:30], 7, 8), None)
    assert matched.num_cached == 30
    assert matched.num_uncached == 1
    assert matched.prefix.layers[0][0].flatten().tolist() == list(range(30))
    assert (cache.queries, cache.hits) == (31, 30)


def test_the_last_token_is_never_cached() -> None:
    cache = PrefixCache(1000)
    cache.insert(ids(1, 2), None, prefix(39))
    assert cache.match(ids(1), None).num_cached == 19


def test_few_shared_tokens_are_not_used() -> None:
    cache = PrefixCache(1000)
    cache.insert(ids(1), None, prefix(19))
    for shared in (MIN_SHARED_TOKENS - 1, MIN_SHARED_TOKENS):
        matched = cache.match((*ids(1)[:shared], *ids(2)), None)
        assert matched.num_cached == (shared if shared >= MIN_SHARED_TOKENS else 0)


def test_prompts_with_an_adapter_are_not_shared() -> None:
    cache = PrefixCache(1000)
    cache.insert(ids(1), "tickets", prefix(19))
    assert cache.match(ids(1), None).num_cached == 0
    assert cache.match(ids(1), "tickets").num_cached == 19


def test_what_is_known_is_not_replaced_by_less() -> None:
    cache = PrefixCache(1000)
    cache.insert(ids(1), None, prefix(19))
    cache.insert(ids(1), None, prefix(5))
    assert cache.match(ids(1), None).num_cached == 19


def test_the_least_recently_used_are_evicted_but_none_in_use() -> None:
    cache = PrefixCache(50)
    for number in range(1, 6):
        cache.insert(ids(number), None, prefix(19))
    in_use = cache.match(ids(1), None)
    in_use.ref_count += 1
    cache.match(ids(2), None)
    cache.evict()
    assert [prompt.token_ids for prompt in cache] == [ids(5), ids(1), ids(2)]


def test_the_last_prompt_stays_however_long_it_is() -> None:
    cache = PrefixCache(10)
    cache.insert(ids(1), None, prefix(19))
    cache.insert(ids(2), None, prefix(19))
    cache.evict()
    assert [prompt.token_ids for prompt in cache] == [ids(2)]


def test_decision_rows_count_once_however_many_experts_share_them() -> None:
    cache = PrefixCache(1000)
    prompt = cache.match(ids(1), None)
    rows = DecisionRows(19, (119,), (1, 2))
    prompt.decisions |= {name: DecisionRow(rows, index, 0.5, False) for index, name in enumerate(("a", "b"))}
    assert prompt.num_tokens == 2


def test_an_expert_is_forgotten_with_its_decisions_and_its_prompts() -> None:
    cache = PrefixCache(1000)
    prompt = cache.match(ids(1), None)
    rows = DecisionRows(19, (119,), (1, 2))
    prompt.decisions |= {name: DecisionRow(rows, index, 0.5, False) for index, name in enumerate(("a", "b"))}
    cache.insert(ids(1), "a", prefix(19))
    cache.invalidate("a")
    assert [(each.token_ids, each.owner) for each in cache] == [(ids(1), None)]
    assert set(prompt.decisions) == {"b"}
