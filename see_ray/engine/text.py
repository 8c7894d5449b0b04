"""From an engine's tokens to text: pieces of an answer as they become readable.

A token may end in the middle of a character, and a stop string may begin at the end of one
piece and end in the next; such text is held back until it is clear.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Piece:
    """A part of an answer.

    Attributes:
        text: new text; may be empty.
        tokens: tokens of the answer so far.
        finish_reason: set on the last piece: `stop` (the model ended, or a stop string came) or
            `length` (max_tokens were written).
    """

    text: str
    tokens: int
    finish_reason: Literal["stop", "length"] | None = None


async def pieces(
    ids: AsyncIterator[int], tokenizer: Any, max_tokens: int, stop: Sequence[str] = ()
) -> AsyncIterator[Piece]:
    """Turn token ids into pieces; the last one carries the finish reason.

    Args:
        ids: the engine's tokens; closed as soon as a stop string ends the answer.
        tokenizer: of the base model.
        max_tokens: how many tokens the engine was asked for.
        stop: strings that end the answer and do not appear in it.
    """
    from tokenizers.decoders import DecodeStream

    stream = DecodeStream(skip_special_tokens=True)
    backend = tokenizer.backend_tokenizer
    held, tokens = "", 0
    try:
        async for token in ids:
            tokens += 1
            held += stream.step(backend, token) or ""
            found = min((at for word in stop if (at := held.find(word)) >= 0), default=-1)
            if found >= 0:
                yield Piece(held[:found], tokens, "stop")
                return
            ready = len(held) - _may_begin(held, stop)
            if ready:
                yield Piece(held[:ready], tokens)
                held = held[ready:]
    finally:
        await ids.aclose()  # type: ignore[attr-defined]
    yield Piece(held, tokens, "length" if tokens >= max_tokens else "stop")


def _may_begin(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of `text` with which one of the stop strings begins."""
    longest = max((len(word) for word in stop), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(word.startswith(text[-length:]) for word in stop):
            return length
    return 0
