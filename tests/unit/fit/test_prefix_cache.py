"""Prefixes of a fit: read once, kept as far as the memory goes, and the same whether kept or read again."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from see_ray.config import FitConfig
from see_ray.data.reconstruct import Example
from see_ray.fit.peft_adapter import with_adapter
from see_ray.fit.prefix_cache import PrefixCache
from see_ray.fit.rank_model import RankModel
from see_ray.fit.schedule import Schedule
from see_ray.models.activation import Activation
from see_ray.models.prefix_kv import Prefix, kv_bytes_per_token

ACTIVATION = Activation((1, 2), 1, 60, 61)
LENGTHS = [3, 8, 5, 4]
EXAMPLES = [Example((*range(5, 5 + length - 1), 1, 2), (61,), "general") for length in LENGTHS]


@pytest.fixture(scope="module")
def model() -> RankModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    shape = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    peft = with_adapter(LlamaForCausalLM(shape).eval(), FitConfig(r=4))
    return RankModel(SimpleNamespace(module=SimpleNamespace(model=peft)), ACTIVATION)


def cache_of(model: RankModel, tokens: int) -> PrefixCache:
    config = FitConfig(kv_store_gb=tokens * kv_bytes_per_token(model.transformer, torch.float32) / 1e9)
    cache = PrefixCache(model, EXAMPLES, Schedule(LENGTHS, config, 1), config)
    cache.fill(lambda progress: None)
    return cache


def tensors(prefix: Prefix) -> list[torch.Tensor]:
    return [tensor for layer in prefix.layers for tensor in layer]


def test_with_room_for_all_every_prefix_is_kept(model: RankModel) -> None:
    cache = cache_of(model, sum(LENGTHS) + 7)
    assert cache.get([1, 0], all_planned=True).lengths == (8, 3)
    assert cache.hit_rate() == 1.0
    assert cache.free_tokens == 7


def test_without_room_the_longest_are_read_again_with_the_same_keys_and_values(model: RankModel) -> None:
    small = cache_of(model, 12)
    assert [small.is_planned(index) for index in range(4)] == [True, False, True, True]
    kept = cache_of(model, 100).get([0, 1, 2], all_planned=True)
    read_again = small.get([0, 1, 2], all_planned=False)
    assert small.hit_rate() == pytest.approx(2 / 3, abs=1e-4)
    assert read_again.lengths == kept.lengths == (3, 8, 5)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(tensors(read_again), tensors(kept), strict=True))


def test_the_padding_behind_a_shorter_prefix_is_zero(model: RankModel) -> None:
    prefix = cache_of(model, 100).get([1, 0], all_planned=True)
    assert all(not tensor[1, :, 3:].any() and tensor[0, :, 7].any() for tensor in tensors(prefix))
