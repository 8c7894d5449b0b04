"""The experts that an engine holds, by name, and those that were removed but still have answers in progress."""

from __future__ import annotations

import itertools
from collections.abc import Collection

from see_ray.engine.interface import Expert
from see_ray.errors import ServingError

_numbers = itertools.count(1)


class LoadedExpert:
    """An expert in the engine. Loading the same expert again makes another one.

    Attributes:
        expert: name, PEFT folder and activation.
        key: name of its adapter in the adapter bank, never used before.
        adapter: adapter index in the bank.
        full_form: its adapter applies to the whole prompt, so it cannot use the base model's prefix.
        num_adapted: tokens at the end of a prompt that its decision row runs. In the full form the others are
            prefilled with the adapter.
        released: its adapter index may belong to another expert by now.
    """

    def __init__(self, expert: Expert):
        self.expert = expert
        self.key = f"{expert.name} {next(_numbers)}"
        self.adapter = 0
        self.full_form = expert.activation.tokens is None
        self.num_adapted = expert.activation.tokens or 1
        self.released = False

    @property
    def name(self) -> str:
        return self.expert.name


class ExpertRegistry:
    """Current experts by name. One that is removed keeps its adapter until its last answer has ended."""

    def __init__(self) -> None:
        self._current: dict[str, LoadedExpert] = {}
        self._removed: list[LoadedExpert] = []

    @property
    def names(self) -> list[str]:
        """Names of the current experts."""
        return list(self._current)

    @property
    def removed(self) -> list[LoadedExpert]:
        """Removed experts whose adapters are still there."""
        return list(self._removed)

    def __getitem__(self, name: str) -> LoadedExpert:
        try:
            return self._current[name]
        except KeyError:
            raise ServingError(f"this engine holds no expert {name}; it holds {sorted(self._current)}") from None

    def is_current(self, expert: LoadedExpert) -> bool:
        """Whether the expert was neither removed nor replaced."""
        return self._current.get(expert.name) is expert

    def find(self, name: str | None) -> LoadedExpert | None:
        """The current expert of that name, if there is one."""
        return None if name is None else self._current.get(name)

    def add(self, expert: LoadedExpert) -> None:
        """Make an expert current. One of the same name is removed."""
        if expert.name in self._current:
            self.remove(expert.name)
        self._current[expert.name] = expert

    def remove(self, name: str) -> None:
        """Remove an expert.

        Raises:
            ServingError: there is none of that name.
        """
        self._removed.append(self[name])
        del self._current[name]

    def release(self, in_use: Collection[LoadedExpert | None]) -> list[LoadedExpert]:
        """Mark removed experts that are not in use as released, and return them: their adapters can be deleted."""
        released = [expert for expert in self._removed if expert not in in_use]
        for expert in released:
            expert.released = True
            self._removed.remove(expert)
        return released
