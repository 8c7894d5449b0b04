"""Mixed queries: a foreign instruction with an input of the task itself.

An expert that is fitted on its task and on chat alone learns the form of its task's queries, and accepts any query of
that form. In a mixed query everything but the instruction comes from the task, so the expert has to decide by the
instruction. Mixed queries need no data: they combine a general query and a row of the task.

Rows are plain chats, so the instruction in them has to be identified: it is the text, up to the end of a line or a
sentence, with which several of the task's queries begin (or end). What no other query shares is input. A task without
such text has inputs only; an input with a foreign instruction is a foreign query in that case, too.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

LEAST_SHARED = 3
"""Fewest queries that must share a beginning for it to be an instruction."""

LEAST_SHARE = 0.04
"""Smallest share of the task's queries that must have that beginning."""

LONGEST_INSTRUCTION = 4000
"""Most characters of an instruction."""

NEAR = 0.6
"""Share of common words from which two instructions may ask for the same."""

_BREAK = re.compile(r"\s*\n\s*|(?<=[.!?:])\s+")
_WORD = re.compile(r"\w{4,}")


@dataclass(frozen=True)
class Query:
    """A query of the task in its parts: its text is instruction + joint + input, or input + joint + instruction.

    Attributes:
        instruction: the text that several of the task's queries share; empty if there is none.
        joint: white space between the two.
        input: the rest.
        instruction_first: whether the instruction comes first.
    """

    instruction: str
    joint: str
    input: str
    instruction_first: bool = True

    def mixed(self, instruction: str) -> str:
        """The text of this query's input with another instruction."""
        joint = self.joint or "\n\n"
        return instruction + joint + self.input if self.instruction_first else self.input + joint + instruction


def parts(texts: Sequence[str]) -> list[Query]:
    """Split each of a task's queries into instruction and input."""
    least = max(LEAST_SHARED, LEAST_SHARE * len(texts))
    begins = Counter(text[: cut.start()] for text in texts for cut in _breaks(text, first=True))
    ends = Counter(text[cut.end() :] for text in texts for cut in _breaks(text, first=False))

    def query(text: str) -> Query:
        for cut in reversed(_breaks(text, first=True)):  # the longest first
            if begins[text[: cut.start()]] >= least:
                return Query(text[: cut.start()], cut[0], text[cut.end() :])
        for cut in _breaks(text, first=False):
            if ends[text[cut.end() :]] >= least:
                return Query(text[cut.end() :], cut[0], text[: cut.start()], instruction_first=False)
        return Query("", "", text)

    return [query(text) for text in texts]


def instruction_of(text: str) -> str:
    """The instruction of a query of no task: its first line."""
    return text.strip().split("\n")[0].strip()


def is_near(text: str, instructions: Sequence[str]) -> bool:
    """Whether a text may ask for the same as one of the instructions, in other words.

    It may if the two have at least the share `NEAR` of the words of the shorter one in common; only words of four
    letters and more count.
    """
    words = set(_WORD.findall(text.lower()))
    for instruction in instructions:
        others = set(_WORD.findall(instruction.lower()))
        least = min(len(words), len(others))
        if least and len(words & others) >= NEAR * least:
            return True
    return False


def _breaks(text: str, first: bool) -> list[re.Match[str]]:
    """Ends of lines and sentences inside a text, near its beginning (`first`) or its end."""
    cuts = [cut for cut in _BREAK.finditer(text) if cut.start() > 0 and cut.end() < len(text)]
    if first:
        return [cut for cut in cuts if cut.start() <= LONGEST_INSTRUCTION]
    return [cut for cut in cuts if len(text) - cut.end() <= LONGEST_INSTRUCTION]
