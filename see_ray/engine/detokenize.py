"""From an engine's tokens to text: pieces of an answer as they become readable.

A token may end in the middle of a character, and a stop string may begin at the end of one
piece and end in the next; such text is held back until it is clear.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from see_ray.engine.interface import Token, TokenText


@dataclass(frozen=True)
class Piece:
    """A part of an answer.

    Attributes:
        text: new text; may be empty.
        tokens: tokens of the answer so far.
        finish_reason: set on the last piece: `stop` (the model ended, or a stop string came) or
            `length` (max_tokens were written).
        chosen: the tokens read since the last piece; their text may come with a later one.
    """

    text: str
    tokens: int
    finish_reason: Literal["stop", "length"] | None = None
    chosen: tuple[Token, ...] = field(default=(), compare=False)


async def pieces(
    answer: AsyncIterator[Token], tokenizer: Any, max_tokens: int, stop: Sequence[str] = ()
) -> AsyncIterator[Piece]:
    """ScheduledBatch tokens into pieces; the last one carries the finish reason.

    Args:
        answer: the engine's tokens; closed as soon as a stop string ends the answer.
        tokenizer: of the base model.
        max_tokens: how many tokens the engine was asked for.
        stop: strings that end the answer and do not appear in it.
    """
    from tokenizers.decoders import DecodeStream

    stream = DecodeStream(skip_special_tokens=True)
    backend = tokenizer.backend_tokenizer
    held, tokens = "", 0
    chosen: list[Token] = []
    try:
        async for token in answer:
            tokens += 1
            chosen.append(token)
            held += stream.step(backend, token.id) or ""
            found = min((at for word in stop if (at := held.find(word)) >= 0), default=-1)
            if found >= 0:
                yield Piece(held[:found], tokens, "stop", tuple(chosen))
                return
            ready = len(held) - _may_begin(held, stop)
            if ready:
                yield Piece(held[:ready], tokens, chosen=tuple(chosen))
                held, chosen = held[ready:], []
    finally:
        await answer.aclose()  # type: ignore[attr-defined]
    yield Piece(held, tokens, "length" if tokens >= max_tokens else "stop", tuple(chosen))


async def first_and_rest(answer: AsyncIterator[Piece]) -> AsyncIterator[Piece]:
    """The first piece as it comes, and all others as one: for those who wait for the whole answer, who then cost
    two messages between processes instead of one a token."""
    try:
        yield await anext(answer)
        rest = [piece async for piece in answer]
    finally:
        await answer.aclose()  # type: ignore[attr-defined]
    if rest:
        chosen = tuple(token for piece in rest for token in piece.chosen)
        yield Piece("".join(piece.text for piece in rest), rest[-1].tokens, rest[-1].finish_reason, chosen)


def token_texts(tokens: Iterable[Token], tokenizer: Any) -> list[tuple[TokenText, list[TokenText]]]:
    """Tokens with their log-probabilities as text, each with the likeliest ones in its place."""

    def one(number: int, logprob: float) -> TokenText:
        text = tokenizer.decode([number])
        return TokenText(text, _bytes_of(number, text, tokenizer), logprob)

    return [(one(token.id, token.logprob or 0.0), [one(*other) for other in token.top]) for token in tokens]


def _bytes_of(number: int, text: str, tokenizer: Any) -> bytes:
    """A token's bytes; one of a byte-level vocabulary may be a part of a character."""
    if "\N{REPLACEMENT CHARACTER}" not in text:
        return bytes(text, "utf-8")
    letters = tokenizer.convert_ids_to_tokens(number)
    known = _byte_alphabet()
    return bytes(known[letter] for letter in letters) if all(letter in known for letter in letters) else text.encode()


@cache
def _byte_alphabet() -> dict[str, int]:
    """The letters that stand for bytes in byte-level vocabularies."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {letter: number for number, letter in bytes_to_unicode().items()}


def _may_begin(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of `text` with which one of the stop strings begins."""
    longest = max((len(word) for word in stop), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(word.startswith(text[-length:]) for word in stop):
            return length
    return 0
