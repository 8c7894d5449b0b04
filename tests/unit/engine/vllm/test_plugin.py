"""The plugin's parts on vLLM's own objects: which versions it fits, and which KV blocks are the same."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here; `make test-vllm` runs these tests")

from see_ray.engine.vllm import plugin as vllm_plugin
from see_ray.engine.vllm.plugin import ACTIVATION_POINT

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

BLOCK = 16
PROMPT = list(range(100, 170))  # four whole blocks and six tokens


@pytest.fixture(scope="module", autouse=True)
def plugin() -> None:
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    assert vllm_plugin.problem() is None


@pytest.fixture(scope="module")
def hasher() -> Any:
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash

    init_none_hash(sha256)
    return get_request_block_hasher(BLOCK, sha256)


def blocks(
    hasher: Any, adapter: str | None = None, point: int | None = None, prompt: list[int] | None = None
) -> list[bytes]:
    """Hashes of a request's whole KV blocks."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.v1.request import Request

    params = SamplingParams(max_tokens=1, extra_args=None if point is None else {ACTIVATION_POINT: point})
    lora = None if adapter is None else LoRARequest(adapter, 1, f"/adapters/{adapter}")
    return Request("r", PROMPT, params, None, lora_request=lora, block_hasher=hasher).block_hashes


def test_blocks_before_the_point_are_the_base_models(hasher: Any) -> None:
    base = blocks(hasher)
    assert blocks(hasher, "a", 69) == blocks(hasher, "b", 66) == base
    assert len(base) == 4


@pytest.mark.parametrize(("point", "shared"), [(64, 4), (63, 3), (49, 3), (48, 3), (47, 2), (1, 0), (0, 0)])
def test_a_block_is_shared_if_it_ends_at_the_point_or_before(hasher: Any, point: int, shared: int) -> None:
    same = [ours == theirs for ours, theirs in zip(blocks(hasher, "a", point), blocks(hasher), strict=True)]
    assert same == [True] * shared + [False] * (4 - shared)


def test_behind_the_point_each_adapter_has_its_own_blocks(hasher: Any) -> None:
    assert blocks(hasher, "a", 40)[2:] != blocks(hasher, "b", 40)[2:]
    assert blocks(hasher, "a", 40) == blocks(hasher, "a", 40)


def test_the_same_tokens_with_another_point_are_other_blocks(hasher: Any) -> None:
    assert blocks(hasher, "a", 40)[2] != blocks(hasher, "a", 41)[2]


def test_a_full_form_adapter_shares_no_block(hasher: Any) -> None:
    full = blocks(hasher, "a")
    assert not set(full) & (set(blocks(hasher)) | set(blocks(hasher, "a", 0)) | set(blocks(hasher, "a", 69)))


def test_requests_without_a_point_are_hashed_as_vllm_does(hasher: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.core import kv_cache_utils

    patched = [blocks(hasher), blocks(hasher, "a")]
    own = kv_cache_utils.generate_block_hash_extra_keys.__wrapped__
    monkeypatch.setattr(kv_cache_utils, "generate_block_hash_extra_keys", own)
    assert [blocks(hasher), blocks(hasher, "a")] == patched


def test_the_patch_reaches_modules_that_imported_by_name() -> None:
    from vllm.v1.core import block_pool, kv_cache_utils

    assert block_pool.generate_block_hash_extra_keys is kv_cache_utils.generate_block_hash_extra_keys
    assert hasattr(kv_cache_utils.generate_block_hash_extra_keys, "__wrapped__")


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "0.33.0rc1", "1.0.0+cpu", "dev"])
def test_another_version_of_vllm_is_left_alone(
    version: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import vllm
    from vllm.v1.core import kv_cache_utils

    before = kv_cache_utils.generate_block_hash_extra_keys
    monkeypatch.setattr(vllm, "__version__", version)
    monkeypatch.setattr(vllm_plugin, "_problem", "not loaded")
    vllm_plugin.register()
    assert version in (vllm_plugin.problem() or "")
    assert kv_cache_utils.generate_block_hash_extra_keys is before
    assert version in caplog.text


def test_a_function_that_is_not_what_it_was_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    monkeypatch.setattr(vllm_plugin, "_problem", "not loaded")
    monkeypatch.setattr(LoRAModelRunnerMixin, "set_active_loras", lambda self, batch: None)
    vllm_plugin.register()
    assert "LoRAModelRunnerMixin.set_active_loras" in (vllm_plugin.problem() or "")


def test_registering_again_changes_nothing() -> None:
    from vllm.v1.core import kv_cache_utils

    before = kv_cache_utils.generate_block_hash_extra_keys
    vllm_plugin.register()
    assert kv_cache_utils.generate_block_hash_extra_keys is before


def test_rows_without_adapter_are_left_alone_by_the_cpu_kernels() -> None:
    import torch
    from vllm.lora.ops.torch_ops import lora_ops

    weights = torch.ones(2, 1, 3, 4)
    inputs, slots = torch.ones(3, 4), torch.tensor([-1, 0, -1])
    output = torch.zeros(3, 3)
    lora_ops.bgmv_expand(inputs, weights, output, slots)
    assert output.tolist() == [[0.0] * 3, [4.0] * 3, [0.0] * 3]
    output.zero_()
    lora_ops.bgmv_expand.__wrapped__(inputs, weights, output, slots)
    assert output[0].tolist() == [4.0] * 3, "vLLM has mended this; the plugin need not any more"


def test_requests_of_one_step_get_each_the_log_probabilities_they_ask_for() -> None:
    import torch
    from vllm.v1.sample.logits_processor import LogitsProcessors
    from vllm.v1.sample.metadata import SamplingMetadata
    from vllm.v1.sample.sampler import Sampler

    metadata = SamplingMetadata(
        temperature=None, all_greedy=True, all_random=False, top_p=None, top_k=None, generators={},
        max_num_logprobs=3, logprob_token_ids={1: [5, 6]}, prompt_token_ids=None, no_penalties=True,
        frequency_penalties=torch.empty(0), presence_penalties=torch.empty(0), repetition_penalties=torch.empty(0),
        output_token_ids=[[], []], allowed_token_ids_mask=None, bad_words_token_ids={}, logitsprocs=LogitsProcessors(),
    )  # fmt: skip
    logits = torch.arange(20.0).repeat(2, 1)
    known = logits.log_softmax(dim=-1)
    found = Sampler()(logits=logits, sampling_metadata=metadata).logprobs_tensors  # as vLLM calls it
    assert found.logprob_token_ids[0].tolist() == [19, 19, 18, 17]
    assert found.logprobs[0].tolist() == pytest.approx(known[0, [19, 19, 18, 17]].tolist())
    assert found.logprob_token_ids[1, :3].tolist() == [19, 5, 6]
    assert found.logprobs[1, :3].tolist() == pytest.approx(known[1, [19, 5, 6]].tolist())
