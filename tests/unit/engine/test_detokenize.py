"""From tokens to text, with the tokenizer of the embedded base model."""

import itertools
import random
from typing import Any

import pytest

from see_ray.config import BaseModelConfig
from see_ray.engine.detokenize import TextChunk, coalesce_after_first, detokenize
from see_ray.engine.interface import Token
from see_ray.models.base_model import find, load_tokenizer

MULTIBYTE = "Grüße 日本語のテスト 👩‍👩‍👧‍👦 🎉🏳️‍🌈 naïve Ελλάδα नमस्ते 𝔘𝔫𝔦"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(find(BaseModelConfig()))


class Ids:
    """Token ids as an engine gives them; knows how many were taken and whether it was closed."""

    def __init__(self, ids: Any, fail: Any = False) -> None:
        self.ids = ids
        self.fail = fail
        self.taken = 0
        self.closed = False

    async def stream(self) -> Any:
        try:
            for token in self.ids:
                self.taken += 1
                yield Token(token)
            if self.fail:
                raise RuntimeError("the engine broke")
        finally:
            self.closed = True


def encoded(tokenizer: Any, text: Any) -> Any:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def letters(tokenizer: Any, text: Any) -> Any:
    """Token ids of a text with each character encoded by itself."""
    return [token for character in text for token in encoded(tokenizer, character)]


def split_at_random(tokenizer: Any, text: Any, draw: Any) -> Any:
    """Token ids of a text, encoded in random parts, so that tokens end where they like."""
    ids, at = [], 0
    while at < len(text):
        size = draw.randrange(1, 5)
        ids += encoded(tokenizer, text[at : at + size])
        at += size
    return ids


async def collect(tokenizer: Any, ids: Any, max_tokens: Any = 1000, stop: Any = ()) -> Any:
    return [chunk async for chunk in detokenize(Ids(ids).stream(), tokenizer, max_tokens, stop)]


def text_of(found: Any) -> Any:
    return "".join(chunk.text for chunk in found)


# --- characters ----------------------------------------------------------------------------


@pytest.mark.parametrize("text", [MULTIBYTE, "plain words, don't  stop .", " leading", "\n\n\tx\n", "🎉"])
async def test_the_pieces_make_up_the_text(tokenizer: Any, text: Any) -> None:
    assert text_of(await collect(tokenizer, encoded(tokenizer, text))) == text


async def test_no_piece_holds_half_a_character(tokenizer: Any) -> None:
    ids = letters(tokenizer, MULTIBYTE)
    assert len(ids) > len(MULTIBYTE) + 20  # many characters are of several tokens
    found = await collect(tokenizer, ids)
    assert not [chunk for chunk in found if "\N{REPLACEMENT CHARACTER}" in chunk.text]
    assert text_of(found) == MULTIBYTE


async def test_a_character_is_given_as_soon_as_it_is_whole(tokenizer: Any) -> None:
    ids = encoded(tokenizer, "日")
    assert len(ids) > 1
    found = await collect(tokenizer, [*ids, *encoded(tokenizer, "x")])
    assert (found[0].text, found[0].num_tokens) == ("日", len(ids))


async def test_an_answer_cut_within_a_character_ends_before_it(tokenizer: Any) -> None:
    ids = encoded(tokenizer, "so 🎉")
    found = await collect(tokenizer, ids[:-1], max_tokens=len(ids) - 1)
    assert text_of(found).rstrip() == "so"
    assert found[-1].finish_reason == "length"


async def test_plain_text_comes_token_by_token(tokenizer: Any) -> None:
    ids = encoded(tokenizer, "The capital of France is Paris")
    *words, last = await collect(tokenizer, ids)
    assert [chunk.text for chunk in words] == [tokenizer.decode([token]) for token in ids]
    assert last.text == ""


async def test_special_tokens_are_no_text(tokenizer: Any) -> None:
    a, b = encoded(tokenizer, "a"), encoded(tokenizer, "b")
    special = tokenizer.convert_tokens_to_ids(["<repo_name>", "<|im_start|>"])
    found = await collect(tokenizer, [special[0], *a, special[1], *b])
    assert text_of(found) == "ab"
    assert found[-1].num_tokens == 4


# --- stop strings --------------------------------------------------------------------------


@pytest.mark.parametrize("stop", ["END", " the", ".\n\n", "日本", "🎉", "</answer>", "x"])
async def test_a_stop_string_over_several_tokens_is_cut_with_all_behind_it(tokenizer: Any, stop: str) -> None:
    for ids in (encoded(tokenizer, f"some words{stop} and more{stop}"), letters(tokenizer, f"some words{stop} more")):
        found = await collect(tokenizer, ids, stop=[stop])
        assert text_of(found) == "some words"
        assert found[-1].finish_reason == "stop"


async def test_an_answer_that_begins_with_a_stop_string_is_empty(tokenizer: Any) -> None:
    assert text_of(await collect(tokenizer, encoded(tokenizer, "Stop it"), stop=["Stop"])) == ""


async def test_a_stop_string_within_one_token_is_cut(tokenizer: Any) -> None:
    ids = encoded(tokenizer, "an understanding")
    assert len(ids) == 2
    assert text_of(await collect(tokenizer, ids, stop=["stand"])) == "an under"


async def test_the_first_of_several_stop_strings_ends_the_answer(tokenizer: Any) -> None:
    ids = letters(tokenizer, "one, two; three.")
    assert text_of(await collect(tokenizer, ids, stop=[".", ";", "three"])) == "one, two"


async def test_the_first_stop_string_within_a_token_is_the_one_in_the_text(tokenizer: Any) -> None:
    ids = encoded(tokenizer, " understanding")
    assert len(ids) == 1
    assert text_of(await collect(tokenizer, ids, stop=["standing", "der"])) == " un"


async def test_nothing_of_a_stop_string_is_given_before_it_is_complete(tokenizer: Any) -> None:
    draw = random.Random(0)
    for _ in range(300):
        text = "".join(draw.choice("ab ") for _ in range(24))
        stop = "".join(draw.choice("ab ") for _ in range(draw.randrange(1, 6)))
        expected, given = text.partition(stop)[0], ""
        for chunk in await collect(tokenizer, split_at_random(tokenizer, text, draw), stop=[stop]):
            given += chunk.text
            assert expected.startswith(given), (text, stop, given)
        assert given == expected, (text, stop)


async def test_only_what_may_begin_a_stop_string_is_held_back(tokenizer: Any) -> None:
    draw = random.Random(1)
    for _ in range(100):
        text = "".join(draw.choice("ab") for _ in range(16))
        stops = ["bbab", "aaaa", "bbbbb"][: draw.randrange(4)]
        ids = split_at_random(tokenizer, text, draw)
        given = {chunk.num_tokens: chunk.text for chunk in await collect(tokenizer, ids, stop=stops)}
        so_far = ""
        for number in range(1, len(ids)):
            so_far += given.get(number, "")
            read = tokenizer.decode(ids[:number])
            if any(stop in read for stop in stops):
                break
            ends = [size for stop in stops for size in range(1, len(stop)) if read.endswith(stop[:size])]
            assert so_far == read[: len(read) - max(ends, default=0)], (text, stops, number)


@pytest.mark.parametrize("stop", ["END OF ANSWER", "ENDING", "ND?"])
async def test_the_mere_beginning_of_a_stop_string_is_given_later(tokenizer: Any, stop: str) -> None:
    ids = letters(tokenizer, "no END yet")
    assert text_of(await collect(tokenizer, ids, stop=[stop])) == "no END yet"


async def test_the_beginning_of_a_stop_string_at_the_end_is_given_at_the_end(tokenizer: Any) -> None:
    ids = letters(tokenizer, "so we EN")
    found = await collect(tokenizer, ids, stop=["END"])
    assert text_of(found[:-1]) == "so we "
    assert (found[-1].text, found[-1].finish_reason) == ("EN", "stop")


async def test_an_overlapping_second_try_of_a_stop_string_is_found(tokenizer: Any) -> None:
    assert text_of(await collect(tokenizer, letters(tokenizer, "aabaabaac!"), stop=["aabaac"])) == "aab"


# --- how it ends ---------------------------------------------------------------------------


async def test_an_answer_that_ends_by_itself_has_the_reason_stop(tokenizer: Any) -> None:
    ids = encoded(tokenizer, "one two three")
    assert (await collect(tokenizer, ids, max_tokens=len(ids) + 1))[-1].finish_reason == "stop"


async def test_an_answer_of_max_tokens_has_the_reason_length(tokenizer: Any) -> None:
    ids = encoded(tokenizer, "one two three")
    assert (await collect(tokenizer, ids, max_tokens=len(ids)))[-1].finish_reason == "length"


async def test_a_stop_string_in_the_last_token_allowed_has_the_reason_stop(tokenizer: Any) -> None:
    ids = encoded(tokenizer, "one two three")
    found = await collect(tokenizer, ids, max_tokens=len(ids), stop=["three"])
    assert (text_of(found), found[-1].finish_reason) == ("one two ", "stop")


@pytest.mark.parametrize("stop", [(), ("three",), ("zzz",)])
async def test_only_the_last_piece_has_a_reason(tokenizer: Any, stop: Any) -> None:
    found = await collect(tokenizer, encoded(tokenizer, "one two three four"), stop=stop)
    assert [chunk.finish_reason is not None for chunk in found] == [False] * (len(found) - 1) + [True]


async def test_an_empty_answer_is_one_empty_piece(tokenizer: Any) -> None:
    assert await collect(tokenizer, [], stop=["x"]) == [TextChunk("", 0, "stop")]


# --- tokens --------------------------------------------------------------------------------


async def test_the_last_piece_counts_all_tokens(tokenizer: Any) -> None:
    ids = letters(tokenizer, MULTIBYTE)
    assert (await collect(tokenizer, ids))[-1].num_tokens == len(ids)


async def test_the_count_of_tokens_only_grows(tokenizer: Any) -> None:
    counts = [chunk.num_tokens for chunk in await collect(tokenizer, letters(tokenizer, MULTIBYTE), stop=["日本の"])]
    assert all(earlier <= later for earlier, later in itertools.pairwise(counts))


async def test_tokens_behind_a_stop_string_are_not_counted(tokenizer: Any) -> None:
    ids = letters(tokenizer, "abcdef")
    assert (await collect(tokenizer, ids, stop=["cd"]))[-1].num_tokens == 4


# --- the engine's iterator -----------------------------------------------------------------


async def test_a_stop_string_closes_the_ids(tokenizer: Any) -> None:
    ids = Ids(letters(tokenizer, "abcdef"))
    assert text_of([chunk async for chunk in detokenize(ids.stream(), tokenizer, 10, ["cd"])]) == "ab"
    assert (ids.closed, ids.taken) == (True, 4)


async def test_the_end_closes_the_ids(tokenizer: Any) -> None:
    ids = Ids(letters(tokenizer, "abc"))
    assert [chunk async for chunk in detokenize(ids.stream(), tokenizer, 10)]
    assert ids.closed


async def test_a_reader_that_goes_away_closes_the_ids(tokenizer: Any) -> None:
    ids = Ids(letters(tokenizer, "abcdef"))
    reading = detokenize(ids.stream(), tokenizer, 10)
    assert (await anext(reading)).text == "a"
    await reading.aclose()
    assert (ids.closed, ids.taken) == (True, 1)


async def test_an_engine_that_breaks_breaks_the_answer_behind_what_it_gave(tokenizer: Any) -> None:
    reading = detokenize(Ids(letters(tokenizer, "ab"), fail=True).stream(), tokenizer, 10)
    assert [await anext(reading), await anext(reading)] == [TextChunk("a", 1), TextChunk("b", 2)]
    with pytest.raises(RuntimeError, match="the engine broke"):
        await anext(reading)


async def test_every_token_is_handed_on_once_with_the_pieces(tokenizer: Any) -> None:
    ids = letters(tokenizer, MULTIBYTE)
    assert [token.id for chunk in await collect(tokenizer, ids) for token in chunk.tokens] == ids


async def test_an_answer_in_two_pieces_is_the_whole_answer(tokenizer: Any) -> None:
    ids = letters(tokenizer, MULTIBYTE)
    source = Ids(ids)
    two = [chunk async for chunk in coalesce_after_first(detokenize(source.stream(), tokenizer, 1000))]
    every = await collect(tokenizer, ids)
    assert len(two) == 2 < len(every)
    assert two[0] == every[0]
    assert two[1] == TextChunk("".join(chunk.text for chunk in every[1:]), len(ids), "stop")
    assert [token.id for chunk in two for token in chunk.tokens] == ids
    assert source.closed
