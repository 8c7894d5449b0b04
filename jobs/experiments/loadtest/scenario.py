"""What the experiments vary: how the endpoint may scale, and which load it gets."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from loadtest.generator import DrawQuery, load_profile
from see_ray.errors import ConfigError
from see_ray.store.expert_files import kept_chats
from see_ray.store.expert_store import ExpertStore

GENERAL_SHARE = 0.1
"""Share of the queries that belong to no expert."""

HOT_SHARE = 0.9
"""Share of the other queries that belong to the hot expert, where a scenario names one."""


@dataclass(frozen=True)
class Policy:
    """How the endpoint may scale: a name, and settings as `section.field=value`."""

    name: str
    settings: tuple[str, ...]


def _policy(name: str, replicas: tuple[int, int], *, ongoing: int, up: int, down: int, look_back: int) -> Policy:
    return Policy(
        name,
        (
            f"serve.min_replicas={replicas[0]}",
            f"serve.max_replicas={replicas[1]}",
            f"serve.target_ongoing_requests={ongoing}",
            f"serve.upscale_delay_s={up}",
            f"serve.downscale_delay_s={down}",
            f"serve.look_back_period_s={look_back}",
        ),
    )


POLICIES = {
    policy.name: policy
    for policy in (
        Policy("fixed", ("serve.min_replicas=1", "serve.max_replicas=1")),
        _policy("quick", (1, 2), ongoing=2, up=2, down=10, look_back=3),
        _policy("steady", (1, 2), ongoing=6, up=10, down=30, look_back=10),
        _policy("zero", (0, 2), ongoing=2, up=2, down=10, look_back=3),
    )
}


def policies(names: str) -> list[Policy]:
    """The policies that a comma-separated list names.

    Raises:
        ConfigError: there is no such policy.
    """
    if unknown := [name for name in names.split(",") if name not in POLICIES]:
        raise ConfigError(f"no scaling policy {unknown[0]!r}; there are {', '.join(POLICIES)}")
    return [POLICIES[name] for name in names.split(",")]


@dataclass(frozen=True)
class Scenario:
    """The load of one run.

    Attributes:
        text: as it was given on the command line.
        profile: name of a profile of `loadtest.generator.load_profile`.
        peak: requests a second; None for the experiment's peak.
        mix: whose queries are asked, see `query_mix`.
        learns: whether a task arrives and is fitted during the load.
    """

    text: str
    profile: str
    peak: float | None
    mix: str | None
    learns: bool

    @staticmethod
    def parse(text: str) -> Scenario:
        """Read `NAME[:PEAK][@skewed|@EXPERT][+learn]`.

        Raises:
            ConfigError: it is not of that form, or there is no such profile.
        """
        match = re.fullmatch(r"(?P<name>\w+)(:(?P<peak>[0-9.]+))?(@(?P<mix>[\w-]+))?(?P<learns>\+learn)?", text)
        if not match:
            raise ConfigError(f"cannot read the profile {text!r}; write NAME[:PEAK][@skewed or @EXPERT][+learn]")
        load_profile(match["name"], 0, 1, 1)  # raises if there is none
        peak = float(match["peak"]) if match["peak"] else None
        return Scenario(text, match["name"], peak, match["mix"], bool(match["learns"]))

    @property
    def file_name(self) -> str:
        """`text` with only letters, digits, `_` and `-`."""
        return re.sub(r"\W", "-", self.text)


def query_mix(store: ExpertStore, mix: str | None = None) -> DrawQuery:
    """Draw queries of the live experts, and a tenth of general queries.

    Each query contains a number of its own, so that no replica has it in its prefix cache.

    Args:
        store: the queries are the rehearsal samples of its live experts.
        mix: None for all experts equally often; `skewed` for the k-th newest 1/k times as often as the newest
            (Zipf's law); or the name of a hot expert, which gets nine in ten.

    Raises:
        ConfigError: no expert of that name is live.
    """
    texts = {
        ref.name: [chat[-1]["content"] for chats in kept_chats(store, ref) for chat in chats]
        for ref in store.head().experts
    }
    texts = {name: of_expert for name, of_expert in texts.items() if of_expert}
    names = [ref.name for ref in store.head().newest_first() if ref.name in texts]
    weights = [1 / (rank + 1) if mix == "skewed" else 1.0 for rank in range(len(names))]
    if mix not in (None, "skewed", *names):
        raise ConfigError(f"no expert {mix} with queries of its own is live; there are {', '.join(names)}")

    def draw(t: float, rng: random.Random) -> tuple[str, str]:
        number = rng.randrange(10**6)
        if not names or rng.random() < GENERAL_SHARE:
            return "general", f"Tell me something about the number {number}."
        is_hot = mix in names and rng.random() < HOT_SHARE
        name = str(mix) if is_hot else rng.choices(names, weights)[0]
        return name, f"{rng.choice(texts[name])} ({number})"

    return draw
