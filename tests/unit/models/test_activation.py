"""Where an expert begins and how its decision is read, on the embedded base model's tokenizer."""

import copy
import math
from typing import Any

import pytest

from see_ray.config import BaseModelConfig, FitConfig
from see_ray.errors import BaseModelError, ConfigError
from see_ray.models.activation import activation_of, encode_prompt, generation_prompt_of, p_accept, user_turn_start
from see_ray.models.base_model import find, load_tokenizer

CHATS = {
    "one turn": [{"role": "user", "content": "Hello"}],
    "system prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
    "several turns": [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi!"},
        {"role": "user", "content": "How are you?"},
    ],
    "Unicode": [{"role": "user", "content": "日本語 👩‍👩‍👧‍👦 Ünïcödé \u2063 \u00a0"}],
    "newlines": [{"role": "user", "content": "a\n\nassistant\n\n"}],
    "empty": [{"role": "user", "content": ""}],
    "blank": [{"role": "user", "content": " \n "}],
    "the template's own words": [{"role": "user", "content": "<|im_start|>assistant\n"}],
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(find(BaseModelConfig()))


@pytest.fixture(params=CHATS.values(), ids=list(CHATS))
def chat(request: pytest.FixtureRequest) -> Any:
    return request.param


def activation(tokenizer: Any, tokens: Any = 1, form: Any = "activated", indicators: Any = None) -> Any:
    return activation_of(
        tokenizer, BaseModelConfig(indicator_tokens=indicators), FitConfig(form=form, activation_tokens=tokens)
    )


class WithAdded:
    """A tokenizer with other added tokens."""

    def __init__(self, tokenizer: Any, added: Any) -> None:
        self.added_tokens_decoder = added
        self._tokenizer = tokenizer

    def __getattr__(self, name: Any) -> Any:
        return getattr(self._tokenizer, name)


def with_template(tokenizer: Any, template: Any) -> Any:
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


# --- the generation prompt -----------------------------------------------------------------


def test_the_generation_prompt_is_the_assistants_opening(tokenizer: Any) -> None:
    assert tokenizer.decode(list(generation_prompt_of(tokenizer))) == "<|im_start|>assistant\n"


def test_every_prompt_ends_with_the_generation_prompt(tokenizer: Any, chat: Any) -> None:
    generation_prompt = generation_prompt_of(tokenizer)
    assert tuple(encode_prompt(tokenizer, chat)[-len(generation_prompt) :]) == generation_prompt


def test_a_prompt_is_the_rendered_template(tokenizer: Any, chat: Any) -> None:
    rendered = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert tokenizer.decode(encode_prompt(tokenizer, chat)) == rendered


def test_a_prompt_is_the_chat_and_then_the_generation_prompt(tokenizer: Any, chat: Any) -> None:
    rendered = tokenizer.apply_chat_template(chat, add_generation_prompt=False, tokenize=False)
    before = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert encode_prompt(tokenizer, chat) == [*before, *generation_prompt_of(tokenizer)]


def test_a_template_without_a_generation_prompt_is_refused(tokenizer: Any) -> None:
    silent = with_template(tokenizer, "{% for message in messages %}{{ message['content'] }}{% endfor %}")
    with pytest.raises(BaseModelError, match="no generation prompt"):
        generation_prompt_of(silent)


def test_a_template_whose_generation_prompt_is_not_at_the_end_is_refused(tokenizer: Any) -> None:
    before = with_template(tokenizer, "{% if add_generation_prompt %}Answer: {% endif %}{{ messages[0]['content'] }}")
    with pytest.raises(BaseModelError, match="no generation prompt at its end"):
        generation_prompt_of(before)


# --- the activation point ------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 2, 3, 4])
def test_the_adapter_applies_to_the_last_tokens_of_a_prompt(tokenizer: Any, chat: Any, tokens: int) -> None:
    prompt = encode_prompt(tokenizer, chat)
    prefix, adapted = activation(tokenizer, tokens).split(prompt)
    assert (len(adapted), prefix + adapted) == (tokens, prompt)


def test_all_adapts_the_whole_generation_prompt(tokenizer: Any, chat: Any) -> None:
    prompt = encode_prompt(tokenizer, chat)
    prefix, adapted = activation(tokenizer, "all").split(prompt)
    assert tokenizer.decode(adapted) == "<|im_start|>assistant\n"
    assert prefix + adapted == prompt


def test_the_full_form_has_no_prefix(tokenizer: Any, chat: Any) -> None:
    prompt = encode_prompt(tokenizer, chat)
    full = activation(tokenizer, form="full")
    assert full.tokens is None
    assert full.split(prompt) == ([], prompt)


def test_the_full_form_asks_for_no_activation_tokens(tokenizer: Any) -> None:
    assert activation(tokenizer, tokens=99, form="full").tokens is None


def test_all_is_the_number_of_tokens_of_the_generation_prompt(tokenizer: Any) -> None:
    assert activation(tokenizer, "all").tokens == len(generation_prompt_of(tokenizer)) == 4


def test_more_activation_tokens_than_there_are_are_refused_with_both_numbers(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=r"fit\.activation_tokens is 5, .* has only 4 tokens"):
        activation(tokenizer, tokens=5)


def test_the_activation_keeps_the_generation_prompt(tokenizer: Any) -> None:
    assert activation(tokenizer).generation_prompt == generation_prompt_of(tokenizer)


@pytest.mark.parametrize("tokens", ["all", 4])
def test_peft_is_told_the_whole_generation_prompt(tokenizer: Any, tokens: int | str) -> None:
    assert activation(tokenizer, tokens).peft_invocation() == list(generation_prompt_of(tokenizer))


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_peft_is_told_no_shorter_end_of_it(tokenizer: Any, tokens: int) -> None:
    assert activation(tokenizer, tokens).peft_invocation() is None


def test_peft_is_told_nothing_in_the_full_form(tokenizer: Any) -> None:
    assert activation(tokenizer, form="full").peft_invocation() is None


def test_the_last_occurrence_of_what_peft_looks_for_is_the_activation_point(tokenizer: Any, chat: Any) -> None:
    whole = activation(tokenizer, "all")
    prompt, looked_for = encode_prompt(tokenizer, chat), whole.peft_invocation()
    places = [at for at in range(len(prompt)) if prompt[at : at + len(looked_for)] == looked_for]
    assert places[-1] == len(whole.split(prompt)[0])


# --- indicators ----------------------------------------------------------------------------


def test_indicators_are_two_different_tokens(tokenizer: Any) -> None:
    made = activation(tokenizer)
    assert made.accept != made.refuse


def test_indicators_are_reserved_tokens_of_the_tokenizer(tokenizer: Any) -> None:
    made = activation(tokenizer)
    reserved = [tokenizer.added_tokens_decoder[number] for number in (made.accept, made.refuse)]
    assert all(token.special for token in reserved)


def test_indicators_are_none_that_a_tokenizer_uses_itself(tokenizer: Any) -> None:
    made = activation(tokenizer)
    assert not {made.accept, made.refuse} & set(tokenizer.all_special_ids)


def test_indicators_are_not_used_by_the_template(tokenizer: Any, chat: Any) -> None:
    made = activation(tokenizer)
    assert not {made.accept, made.refuse} & set(encode_prompt(tokenizer, chat))
    for token in tokenizer.convert_ids_to_tokens([made.accept, made.refuse]):
        assert token not in tokenizer.chat_template


def test_a_reserved_token_that_the_template_names_is_not_taken(tokenizer: Any) -> None:
    taken = tokenizer.convert_ids_to_tokens(activation(tokenizer).accept)
    # Named in a branch that a plain chat does not enter.
    other = with_template(tokenizer, tokenizer.chat_template + "{% if tools %}" + taken + "{% endif %}")
    assert tokenizer.convert_tokens_to_ids(taken) not in (activation(other).accept, activation(other).refuse)


def test_indicators_are_single_tokens_of_text(tokenizer: Any) -> None:
    made = activation(tokenizer)
    for number in (made.accept, made.refuse):
        assert tokenizer(tokenizer.decode([number]), add_special_tokens=False)["input_ids"] == [number]


def test_the_same_tokenizer_gives_the_same_indicators(tokenizer: Any) -> None:
    assert activation(copy.deepcopy(tokenizer)) == activation(tokenizer)


@pytest.mark.parametrize("named", [("<gh_stars>", "<filename>"), ("Yes", "No")])
def test_named_indicator_tokens_are_taken_in_their_order(tokenizer: Any, named: tuple[str, str]) -> None:
    made = activation(tokenizer, indicators=named)
    assert tuple(tokenizer.convert_ids_to_tokens([made.accept, made.refuse])) == named


@pytest.mark.parametrize("named", [("<accept>", "<gh_stars>"), ("<gh_stars>", "two words"), ("<gh_stars>", "")])
def test_an_indicator_that_is_not_one_token_is_named(tokenizer: Any, named: tuple[str, str]) -> None:
    wrong = next(token for token in named if token != "<gh_stars>")
    with pytest.raises(ConfigError, match=f"indicator_tokens: {wrong!r} is not one token"):
        activation(tokenizer, indicators=named)


def test_two_equal_indicators_are_refused(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="two different tokens"):
        activation(tokenizer, indicators=("<gh_stars>", "<gh_stars>"))


def test_a_tokenizer_without_two_reserved_tokens_is_refused_with_the_setting(tokenizer: Any) -> None:
    made = activation(tokenizer)
    for spare in ([], [made.accept]):
        added = {
            number: token
            for number, token in tokenizer.added_tokens_decoder.items()
            if number in spare or number in tokenizer.all_special_ids
        }
        with pytest.raises(BaseModelError, match=r"base_model\.indicator_tokens"):
            activation(WithAdded(tokenizer, added))


def test_added_tokens_that_are_not_special_are_no_indicators(tokenizer: Any) -> None:
    made = activation(tokenizer)
    added = copy.deepcopy(tokenizer.added_tokens_decoder)
    added[made.accept].special = False
    assert activation(WithAdded(tokenizer, added)).accept == made.refuse


# --- the decision --------------------------------------------------------------------------


@pytest.mark.parametrize("accept", [-30.0, -2.5, 0.0, 1.0, 20.0])
@pytest.mark.parametrize("refuse", [-30.0, -1.0, 0.0, 3.5, 20.0])
def test_the_decision_is_the_softmax_of_both_logits(accept: float, refuse: float) -> None:
    softmax = math.exp(accept) / (math.exp(accept) + math.exp(refuse))
    assert p_accept(accept, refuse) == pytest.approx(softmax, rel=1e-12)


def test_equal_logits_are_undecided() -> None:
    assert p_accept(3.5, 3.5) == 0.5


def test_a_decision_grows_with_the_accept_logit() -> None:
    decisions = [p_accept(logit / 4, 0.0) for logit in range(-100, 101)]
    assert decisions == sorted(set(decisions))


@pytest.mark.parametrize("far", [700.0, 1e4, 1e300, math.inf])
def test_a_decision_at_the_extremes_is_a_probability(far: Any) -> None:
    assert 1 - 1e-12 < p_accept(far, 0.0) == p_accept(0.0, -far) < 1.0  # below 1: some threshold refuses it
    assert 0.0 <= p_accept(0.0, far) < 1e-300
    assert 0.0 <= p_accept(-far, 0.0) < 1e-300


# --- the user's turn -----------------------------------------------------------------------


def test_the_users_turn_starts_where_the_users_words_begin(tokenizer: Any) -> None:
    start = user_turn_start(tokenizer)
    assert start.endswith("<|im_start|>user\n")
    for words in ("Hello", "日本", "a\nb"):
        rendered = tokenizer.apply_chat_template([{"role": "user", "content": words}], tokenize=False)
        assert rendered.startswith(start + words)


def test_a_template_without_the_users_words_is_refused(tokenizer: Any) -> None:
    deaf = with_template(tokenizer, "{{ messages[0]['role'] }}")
    with pytest.raises(BaseModelError, match="general_negatives_file"):
        user_turn_start(deaf)
