"""Mixtures: a foreign instruction with one of the task's own inputs.

An expert that only ever had to tell its task from chat goes by the looks of a query, and takes whatever is
shaped like its own. In a mixture everything is its own but what is asked for, so it must read that. Mixtures are
made of strings at hand, a general query and a row of the task, and cost nothing but their place in the fit.

Rows are plain chats, so what in them is the instruction has to be found: the words, up to the end of a line or a
sentence, with which several of the task's queries begin alike (or end alike). What no other query shares is input.
A task without such words has inputs only, and a foreign instruction before them is foreign still.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

LEAST_SHARED = 3
"""So many queries must begin alike for their first words to be an instruction."""

LEAST_SHARE = 0.04
"""And so large a share of the task's queries."""

LONGEST_INSTRUCTION = 4000
"""Characters in which the end of an instruction is looked for."""

NEAR = 0.6
"""Share of words in common from which a query may well ask for what the task asks for."""

_BREAK = re.compile(r"\s*\n\s*|(?<=[.!?:])\s+")
_WORD = re.compile(r"\w{4,}")


@dataclass(frozen=True)
class Query:
    """A query of the task in its parts; instruction + joint + input, or the other way round, is its text.

    Attributes:
        instruction: what several of the task's queries share; empty if nothing is.
        joint: white space between the two.
        input: the rest.
        instruction_first: whether the instruction comes first.
    """

    instruction: str
    joint: str
    input: str
    instruction_first: bool = True

    def mixed(self, instruction: str) -> str:
        """The own input under another instruction."""
        joint = self.joint or "\n\n"
        return instruction + joint + self.input if self.instruction_first else self.input + joint + instruction


def parts(texts: Sequence[str]) -> list[Query]:
    """Tell instruction from input in each of a task's queries."""
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
    """What stands for the instruction in any query: its first paragraph."""
    return text.strip().split("\n")[0].strip()


def is_near(text: str, instructions: Sequence[str]) -> bool:
    """Whether a text may ask for what one of the instructions asks for, in other words."""
    words = set(_WORD.findall(text.lower()))
    for instruction in instructions:
        others = set(_WORD.findall(instruction.lower()))
        least = min(len(words), len(others))
        if least and len(words & others) >= NEAR * least:
            return True
    return False


def _breaks(text: str, first: bool) -> list[re.Match[str]]:
    """Ends of lines and sentences inside a text, near its begin or its end."""
    found = [cut for cut in _BREAK.finditer(text) if cut.start() > 0 and cut.end() < len(text)]
    if first:
        return [cut for cut in found if cut.start() <= LONGEST_INSTRUCTION]
    return [cut for cut in found if len(text) - cut.end() <= LONGEST_INSTRUCTION]
