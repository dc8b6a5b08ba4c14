"""What shaped links carry, and the least time that a content needs over them.

Bounds are for goodput as it was measured on the links, never for what they were set to. Rates are in Mbit/s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Links:
    """Every node's `up` and `down`, and what the origin sends to each node and in all (0: as much as they take)."""

    up: float
    down: float
    origin_node: float
    origin_total: float = 0.0

    def origin(self, nodes: int) -> float:
        """What the origin sends to so many at once."""
        each = nodes * min(self.origin_node, self.down)
        return min(each, self.origin_total) if self.origin_total else each


def burst_bound_s(size: int, nodes: int, links: Links, warm: int = 0) -> float:
    """Seconds that the last of `nodes` needs at least when all start at once and `warm` others hold everything.

    Kumar and Ross: what the sources can send, what one node can take, what all have to send to each other. The same
    formula as the simulation's (`tests/swarm_simulation`), where the warm nodes are among the nodes.
    """
    mbit = size * 8 / 1e6
    sources = warm * links.up + (links.origin(nodes) if not warm else 0.0)
    to_relay = (nodes - (0 if warm else 1)) * mbit
    return max(mbit / links.down, mbit / sources, to_relay / ((nodes + warm) * links.up))


def staggered_bounds_s(size: int, joins_s: Sequence[float], links: Links) -> list[float]:
    """For each node that joins at its time: seconds from there to its end, at least.

    It cannot take the content faster than its link, nor end before the origin has sent the whole once, to those who
    were there.
    """
    mbit = size * 8 / 1e6
    joins, sent, out = sorted(joins_s), 0.0, None
    for number, at in enumerate(joins, start=1):
        until = joins[number] if number < len(joins) else float("inf")
        rate = links.origin(number)
        if sent + rate * (until - at) >= mbit:
            out = at + (mbit - sent) / rate
            break
        sent += rate * (until - at)
    assert out is not None, "the last interval has no end"
    return [max(mbit / links.down, out - at) for at in joins_s]
