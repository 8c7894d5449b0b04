"""What an endpoint serves at the moment."""

from __future__ import annotations

from typing import Any

import pytest

from see_ray.serving.live import Live, LiveExpert


def test_a_process_that_has_not_read_the_store_changes_nothing() -> None:
    earlier = Live(3)
    assert Live().or_earlier(earlier) is earlier
    assert Live(4).or_earlier(earlier).version == 4
    assert Live().or_earlier(Live()).version == -1


@pytest.mark.parametrize(("activated", "shares"), [((), False), ((False,), False), ((False, True), True)])
def test_a_prefix_is_shared_once_one_expert_is_activated(activated: Any, shares: bool) -> None:
    experts = tuple(LiveExpert(f"e{i}", 1, 0.5, 0, f"app{i}", value) for i, value in enumerate(activated))
    assert Live(1, experts).shares_prefix is shares
