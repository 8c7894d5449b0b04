"""What an endpoint serves at the moment: the experts of one sequence version, and errors that keep others out."""

from __future__ import annotations

from dataclasses import dataclass, field

LINGER_S = 10.0
"""Seconds for which an expert stays loaded after the last sequence version that lists it. Longer than the ingress
takes to notice a new version, so that no query in progress still needs the expert when it goes."""


@dataclass(frozen=True)
class LiveExpert:
    """An expert that can be queried.

    Attributes:
        created: Unix time of its manifest, in seconds.
        app: Serve application that holds it.
        activated: whether its form is `activated`, so that it continues from the base model's prefix.
    """

    name: str
    version: int
    threshold: float
    created: int
    app: str
    activated: bool = True


@dataclass(frozen=True)
class Live:
    """The experts of one sequence version that can be queried.

    Attributes:
        version: sequence version; -1 before the store was read for the first time.
        experts: newest first.
        failed: reason by expert id, for the experts of this version that could not be started.
        pending: a newer version that is being started, or None.
        spare: whether a spare is ready for the next expert.
        store_error: why the last attempt to read the store failed, or None.
    """

    version: int = -1
    experts: tuple[LiveExpert, ...] = ()
    failed: dict[str, str] = field(default_factory=dict)
    pending: int | None = None
    spare: bool = False
    store_error: str | None = None

    @property
    def shares_prefix(self) -> bool:
        """Whether any expert continues from the base model's prefix."""
        return any(expert.activated for expert in self.experts)

    def or_earlier(self, earlier: Live) -> Live:
        """This state; but `earlier` if this one is from a process that has not read the store yet."""
        return earlier if self.version < 0 <= earlier.version else self
