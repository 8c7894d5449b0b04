"""Detokenization: from an engine's tokens to chunks of text, as they become readable.

A token may end in the middle of a character, and a stop string may begin in one token and end in a later one; such text
is held back until it is decided.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from see_ray.engine.interface import Token, TokenText


@dataclass(frozen=True)
class TextChunk:
    """A part of an answer.

    Attributes:
        text: new text; may be empty.
        num_tokens: tokens of the answer so far.
        finish_reason: set on the last chunk: `stop` (an end-of-turn token or a stop string) or `length` (max_tokens
            was reached).
        tokens: the tokens since the last chunk; their text may come with a later one.
    """

    text: str
    num_tokens: int
    finish_reason: Literal["stop", "length"] | None = None
    tokens: tuple[Token, ...] = field(default=(), compare=False)


async def detokenize(
    tokens: AsyncGenerator[Token, None], tokenizer: Any, max_tokens: int, stop: Sequence[str] = ()
) -> AsyncGenerator[TextChunk, None]:
    """Tokens as chunks of text; the last one carries the finish reason.

    Args:
        tokens: of an engine; closed as soon as a stop string ends the answer.
        tokenizer: of the base model.
        max_tokens: most tokens that the engine was asked for.
        stop: strings that end the answer and are not part of it.
    """
    from tokenizers.decoders import DecodeStream

    stream = DecodeStream(skip_special_tokens=True)
    backend = tokenizer.backend_tokenizer
    held, num_tokens = "", 0
    new_tokens: list[Token] = []
    try:
        async for token in tokens:
            num_tokens += 1
            new_tokens.append(token)
            held += stream.step(backend, token.id) or ""
            end = min((at for string in stop if (at := held.find(string)) >= 0), default=-1)
            if end >= 0:
                yield TextChunk(held[:end], num_tokens, "stop", tuple(new_tokens))
                return
            ready = len(held) - _possible_stop_length(held, stop)
            if ready:
                yield TextChunk(held[:ready], num_tokens, tokens=tuple(new_tokens))
                held, new_tokens = held[ready:], []
    finally:
        await tokens.aclose()
    yield TextChunk(held, num_tokens, "length" if num_tokens >= max_tokens else "stop", tuple(new_tokens))


async def coalesce_after_first(chunks: AsyncGenerator[TextChunk, None]) -> AsyncGenerator[TextChunk, None]:
    """The first chunk as it comes, and all others as one.

    For answers that are not streamed: two messages between processes instead of one per token.
    """
    try:
        yield await anext(chunks)
        rest = [chunk async for chunk in chunks]
    finally:
        await chunks.aclose()
    if rest:
        tokens = tuple(token for chunk in rest for token in chunk.tokens)
        yield TextChunk("".join(chunk.text for chunk in rest), rest[-1].num_tokens, rest[-1].finish_reason, tokens)


def token_texts(tokens: Iterable[Token], tokenizer: Any) -> list[tuple[TokenText, list[TokenText]]]:
    """Tokens and their log-probabilities as text; beside each the likeliest tokens at its position."""

    def decode(token_id: int, logprob: float) -> TokenText:
        text = tokenizer.decode([token_id])
        return TokenText(text, _bytes_of(token_id, text, tokenizer), logprob)

    return [(decode(token.id, token.logprob or 0.0), [decode(*top) for top in token.top]) for token in tokens]


def _bytes_of(token_id: int, text: str, tokenizer: Any) -> bytes:
    """The bytes of a token; in a byte-level vocabulary these may be a part of a character."""
    if "\N{REPLACEMENT CHARACTER}" not in text:
        return text.encode()
    symbols = tokenizer.convert_ids_to_tokens(token_id)
    alphabet = _byte_alphabet()
    return bytes(alphabet[s] for s in symbols) if all(s in alphabet for s in symbols) else text.encode()


@cache
def _byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in byte-level vocabularies, and that byte."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {symbol: byte for byte, symbol in bytes_to_unicode().items()}


def _possible_stop_length(text: str, stop: Sequence[str]) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of a stop string."""
    longest = max((len(string) for string in stop), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(string.startswith(text[-length:]) for string in stop):
            return length
    return 0
