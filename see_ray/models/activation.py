"""The activation point, from which an expert's adapter applies, and how its decision is computed.

A chat prompt ends with the generation prompt (`<|im_start|>assistant\\n` for SmolLM2). An activated expert's adapter
applies only to the last tokens of it and to what follows:

    [ prefix ] [ adapted end of the generation prompt ] [ indicator ] [ response ... ]
      base model only, same for all experts     the expert's adapter is active

So all experts and the generalist share the prefix's keys and values (activated LoRA, arXiv 2504.12397). In the full
form the prefix is empty: the adapter applies everywhere.

The indicator is one of two tokens, accept or pass; the *decision* P(accept) is the softmax over their two logits at the
last prompt token. This module needs a tokenizer and no model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from see_ray.config import BaseModelConfig, FitConfig
from see_ray.errors import BaseModelError, ConfigError


@dataclass(frozen=True)
class Activation:
    """The point from which an expert applies, and its two indicator tokens.

    Attributes:
        generation_prompt: token ids of the chat template's generation prompt.
        tokens: how many of these, counted from the end, the adapter applies to; None in the full form.
        accept: token id of the accept indicator.
        refuse: token id of the pass indicator (`pass` is a keyword of Python).
    """

    generation_prompt: tuple[int, ...]
    tokens: int | None
    accept: int
    refuse: int

    def split(self, prompt: list[int]) -> tuple[list[int], list[int]]:
        """A prompt's token ids as (prefix, where only the base model applies; rest, where the adapter does)."""
        if self.tokens is None:
            return [], prompt
        return prompt[: -self.tokens], prompt[-self.tokens :]

    def peft_invocation(self) -> list[int] | None:
        """`alora_invocation_tokens` for PEFT; None if PEFT cannot express this activation point.

        PEFT activates from the first token of the last occurrence of that sequence. The whole generation prompt occurs
        nowhere else; a shorter end of it, such as a single newline, would match inside text. So an adapter with fewer
        activation tokens is saved as ordinary LoRA.
        """
        if self.tokens == len(self.generation_prompt):
            return list(self.generation_prompt)
        return None


def activation_of(tokenizer: Any, base: BaseModelConfig, fit: FitConfig) -> Activation:
    """The activation that is configured, for this tokenizer.

    Raises:
        ConfigError: more activation tokens than the generation prompt has, or indicator tokens that the tokenizer
            does not have.
        BaseModelError: the chat template has no generation prompt, or no two tokens can be indicators.
    """
    generation_prompt = generation_prompt_of(tokenizer)
    tokens: int | None = None
    if fit.form == "activated":
        tokens = len(generation_prompt) if fit.activation_tokens == "all" else fit.activation_tokens
        if tokens > len(generation_prompt):
            raise ConfigError(
                f"fit.activation_tokens is {tokens}, but the generation prompt has only "
                f"{len(generation_prompt)} tokens; use a smaller number or `all`"
            )
    accept, refuse = _indicators(tokenizer, base)
    return Activation(generation_prompt, tokens, accept, refuse)


def encode_prompt(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """Token ids of a chat up to and including the generation prompt."""
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    return list(encoded["input_ids"])


def generation_prompt_of(tokenizer: Any) -> tuple[int, ...]:
    """Token ids that the chat template puts before an answer of the assistant.

    Raises:
        BaseModelError: the template adds none, or not at its end.
    """
    chat = [{"role": "user", "content": "a"}]
    without = tokenizer.apply_chat_template(chat, add_generation_prompt=False, tokenize=True, return_dict=True)
    with_prompt = encode_prompt(tokenizer, chat)
    start = len(without["input_ids"])
    if with_prompt[:start] != list(without["input_ids"]) or len(with_prompt) == start:
        raise BaseModelError(
            "the chat template adds no generation prompt at its end; "
            "experts are activated there, so choose a model whose template has one"
        )
    return tuple(with_prompt[start:])


def user_turn_start(tokenizer: Any) -> str:
    """The rendered chat template up to where the user's text begins. A chat model that continues it writes queries.

    Raises:
        BaseModelError: the template does not contain the user's text.
    """
    mark = "\u2063see\u2063"
    text: str = tokenizer.apply_chat_template([{"role": "user", "content": mark}], tokenize=False)
    start, separator, _ = text.partition(mark)
    if not separator:
        raise BaseModelError(
            "the chat template does not contain the user's words; give reconstruct.general_negatives_file"
        )
    return start


def p_accept(accept_logit: float, pass_logit: float) -> float:
    """The decision: softmax over the two indicator logits; always below 1, so that a threshold of 1 accepts nothing."""
    gap = min(max(pass_logit - accept_logit, -36.0), 700.0)  # a smaller gap would give exactly 1, a larger one overflow
    return 1.0 / (1.0 + math.exp(gap))


def _indicators(tokenizer: Any, base: BaseModelConfig) -> tuple[int, int]:
    """Token ids of (accept, pass), which no text contains: as configured, else reserved ones of the tokenizer."""
    if base.indicator_tokens:
        ids = [tokenizer.convert_tokens_to_ids(token) for token in base.indicator_tokens]
        for token, number in zip(base.indicator_tokens, ids, strict=True):
            if number is None or tokenizer.convert_ids_to_tokens(number) != token:
                raise ConfigError(f"base_model.indicator_tokens: {token!r} is not one token of this base model")
        if ids[0] == ids[1]:
            raise ConfigError("base_model.indicator_tokens: accept and pass must be two different tokens")
        return ids[0], ids[1]
    used = set(tokenizer.all_special_ids) | set(encode_prompt(tokenizer, [{"role": "user", "content": "a"}]))
    reserved = [
        number
        for number, token in sorted(tokenizer.added_tokens_decoder.items())
        if token.special and number not in used and token.content not in tokenizer.chat_template
    ]
    if len(reserved) < 2:
        raise BaseModelError(
            "the tokenizer has no two unused special tokens; name two single tokens as base_model.indicator_tokens"
        )
    return reserved[0], reserved[1]
