"""What may happen to a cluster that pulls one content, and what each of it may cost.

Faults come when two fifths of the least time have passed, so that everything is in the air. A scenario names the nodes
whose pulls count and the most that the origin may send, both by an argument, not by a measurement.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from rig.blob_origin import Fault, Pace
from rig.links import Links, burst_bound_s, staggered_bounds_s
from rig.swarm import Run, Swarm

FAULT_AT = 0.4
LEASES_OF_A_NODE = 16
"""What a node may be fetching from the origin at a time (`swarm.origin_flows`)."""

STOP_S = 8.0
"""Longer than it takes to find a node silent, to suspect it and to take its claims (`swarm.lease_stall_ms`)."""

THROTTLE_S = 3.0
STALL_S = 30.0
"""A body that stands still for longer than anybody waits."""

SLOW_BY = 5
USUAL_CAPACITY = 10


@dataclass(frozen=True)
class Played:
    """How a scenario went."""

    name: str
    run: Run
    bound_s: float
    """Seconds that the last of `timed` needs at least, had nothing gone wrong."""
    judged: list[str]
    """The nodes whose pulls must succeed."""
    timed: list[str]
    """Those of them whose end is compared with the bound."""
    most: float
    """The most that the origin may send, in contents."""

    def failures(self) -> list[str]:
        return self.run.failures(but=[pull.node for pull in self.run.pulls if pull.node not in self.judged])

    def over_bound(self) -> float:
        return self.run.last_s(self.timed) / self.bound_s


Scenario = Callable[[Swarm, Links], Played]
"""Plays on a swarm whose links carry what the second argument says."""


def cold_burst(swarm: Swarm, links: Links) -> Played:
    """All at once, nobody has anything."""
    return _played("cold burst", swarm, swarm.run(), links)


def staggered(swarm: Swarm, links: Links, seed: int = 1) -> Played:
    """Poisson joins, on the average all within the time that one node needs at least."""
    count, numbers = len(swarm.machines), random.Random(seed)
    span_s = swarm.size * 8 / 1e6 / links.down
    joins = [0.0]
    for _ in range(count - 1):
        joins.append(joins[-1] + numbers.expovariate(count / span_s))
    bounds = staggered_bounds_s(swarm.size, joins, links)
    last = max(join + bound for join, bound in zip(joins, bounds, strict=True))
    return Played("staggered", swarm.run(joins_s=joins), last, swarm.names, swarm.names, 1.0)


def warm_seed(swarm: Swarm, links: Links) -> Played:
    """One node has everything, the others want it."""
    seed, *others = swarm.names
    run = swarm.run(image=swarm.warm(seed), pulling=others)
    return Played("one warm node", run, burst_bound_s(swarm.size, len(others), links, warm=1), others, others, 0.0)


def fetcher_killed(swarm: Swarm, links: Links) -> Played:
    """SIGKILL of the node with the fewest homes."""
    return _killed("a fetcher is killed", swarm, links, min)


def home_killed(swarm: Swarm, links: Links) -> Played:
    """SIGKILL of the node with the most homes."""
    return _killed("a home is killed", swarm, links, max)


def holder_stopped(swarm: Swarm, links: Links) -> Played:
    """SIGSTOP, and SIGCONT after its claims were given to others; its own pull must end well too.

    Lost is what it was fetching, and what it alone had. Whoever wakes must not believe what it knew: nothing more is lost.
    """
    stopped = swarm.daemons[0].process

    def happen() -> None:
        _wait(swarm, links)
        os.kill(stopped.pid, signal.SIGSTOP)
        time.sleep(STOP_S)
        os.kill(stopped.pid, signal.SIGCONT)

    run = swarm.run(during=happen)
    swarm.wait_until_settled()
    played = _played("a holder stands still", swarm, run, links, lost=LEASES_OF_A_NODE)
    return replace(played, timed=swarm.names[1:])


def partitioned(swarm: Swarm, links: Links) -> Played:
    """The nodes fall into two halves that hear nothing of each other, both with the origin, for `STOP_S`."""
    half = len(swarm.machines) // 2
    parts = swarm.machines[:half], swarm.machines[half:]

    def happen() -> None:
        _wait(swarm, links)
        sides = [(machine, [other.address for other in there]) for here, there in (parts, parts[::-1]) for machine in here]
        for machine, others in sides:
            machine.lose_the_way_to(others)
        time.sleep(STOP_S)
        for machine, others in sides:
            machine.find_the_way_to(others)

    run = swarm.run(during=happen)
    swarm.wait_until_settled()
    return replace(_played("a partition, and its healing", swarm, run, links), most=2.0)


def quarter_slow(swarm: Swarm, links: Links) -> Played:
    """A quarter of the nodes have a fifth of the rate, and say so (`node.capacity`). The others must not wait for them."""
    slow = _slow(swarm)
    swarm.tell_capacity(slow, USUAL_CAPACITY // SLOW_BY)
    played = _quarter_slow("a quarter is slow", swarm, links)
    swarm.tell_capacity(slow, USUAL_CAPACITY)
    return played


def quarter_secretly_slow(swarm: Swarm, links: Links) -> Played:
    """The same, and nobody was told."""
    return _quarter_slow("a quarter is slow, untold", swarm, links)


def capped_origin(swarm: Swarm, links: Links) -> Played:
    """The origin sends in all what it usually sends to two nodes."""
    set_to = swarm.links
    swarm.shape(replace(set_to, origin_total=2 * set_to.origin_node))
    run = swarm.run()
    swarm.shape(set_to)
    # 64 streams share a queue of first in, first out, and a few of them starve: such a one is asked for once more by its
    # own node (`origin::care`), or its claim goes to another. None of it is needed where the streams share fairly.
    again = int(run.counters["leases_stolen"] + run.counters["second_requests"])
    return _played("the origin is capped", swarm, run, replace(links, origin_total=2 * links.origin_node), lost=again)


def throttled_origin(swarm: Swarm, links: Links) -> Played:
    """503 to everything for a while, then all is well."""
    return _sick("the origin throttles", swarm, links, Fault("status", status=503, retry_after_s=1), for_s=THROTTLE_S)


def failing_origin(swarm: Swarm, links: Links) -> Played:
    """Every tenth answer is 500, every fifteenth 429."""
    faults = [Fault("status", every=10, status=500), Fault("status", every=15, status=429)]
    return _sick("the origin fails now and then", swarm, links, *faults)


def short_bodies(swarm: Swarm, links: Links) -> Played:
    """Every tenth body ends half way, as if it were whole."""
    return _sick("bodies end early", swarm, links, Fault("short", every=10))


def reset_bodies(swarm: Swarm, links: Links) -> Played:
    """Every tenth connection is reset half way through a body."""
    return _sick("bodies are reset", swarm, links, Fault("reset", every=10))


def stalled_bodies(swarm: Swarm, links: Links) -> Played:
    """For a moment, bodies stand still half way for longer than anybody waits."""
    return _sick("bodies stand still", swarm, links, Fault("stall", every=5, seconds=STALL_S), for_s=0.5)


def late_headers(swarm: Swarm, links: Links) -> Played:
    """For a moment, answers do not begin for longer than anybody waits."""
    return _sick("answers do not begin", swarm, links, Fault("late", every=5, seconds=STALL_S), for_s=0.5)


def capped_streams(swarm: Swarm, links: Links) -> Played:
    """One stream gets a quarter of what the origin sends to a node, as S3's do."""
    swarm.pace(Pace(first_byte_s=0.02, stream_mbit=links.origin_node / 4))
    run = swarm.run()
    swarm.pace(Pace())
    return _played("streams are capped", swarm, run, links)


HEALTHY: tuple[Scenario, ...] = (cold_burst, staggered, warm_seed)
FAULTS: tuple[Scenario, ...] = (
    fetcher_killed,
    home_killed,
    holder_stopped,
    partitioned,
    quarter_slow,
    quarter_secretly_slow,
    capped_origin,
    capped_streams,
    throttled_origin,
    failing_origin,
    short_bodies,
    reset_bodies,
    stalled_bodies,
    late_headers,
)


def _played(name: str, swarm: Swarm, run: Run, links: Links, lost: float = 0) -> Played:
    """For a burst in which so many chunks may have to be fetched again."""
    bound = burst_bound_s(swarm.size, len(swarm.machines), links)
    return Played(name, run, bound, swarm.names, swarm.names, 1.0 + lost / swarm.chunks)


def _slow(swarm: Swarm) -> list[str]:
    return swarm.names[-max(len(swarm.names) // 4, 1) :]


def _quarter_slow(name: str, swarm: Swarm, links: Links) -> Played:
    slow, set_to = _slow(swarm), swarm.links
    swarm.shape(set_to, slow, SLOW_BY)
    run = swarm.run()
    swarm.shape(set_to)
    fast = [node for node in swarm.names if node not in slow]
    # What the fast ones need of each other; that the slow ones send as well only helps.
    return replace(_played(name, swarm, run, links), timed=fast, bound_s=burst_bound_s(swarm.size, len(fast), links))


def _killed(name: str, swarm: Swarm, links: Links, of: Callable) -> Played:
    victims: list[str] = []

    def happen() -> None:
        _wait(swarm, links)
        homes = swarm.homes()
        victims.append(of(homes, key=homes.get))
        swarm.daemon(victims[0]).process.kill()

    run = swarm.run(during=happen)
    swarm.restart(*victims)
    others = [node for node in swarm.names if node not in victims]
    return replace(_played(name, swarm, run, links, lost=LEASES_OF_A_NODE), judged=others, timed=others)


def _sick(name: str, swarm: Swarm, links: Links, *faults: Fault, for_s: float | None = None) -> Played:
    """With a duration the faults come in mid-pull and go; without, they are there all the time.

    A refusal sends nothing in vain. A body breaks in its middle: at most half of a chunk is, what a reset loses of it, or
    what two send at once when a claim is taken from a stalled node that is then faster after all.
    """
    dealt: list[int] = []

    def happen() -> None:
        _wait(swarm, links)
        swarm.origin.misbehave(*faults)
        time.sleep(for_s or 0.0)
        dealt.append(swarm.origin.misbehave())

    if for_s is None:
        swarm.origin.misbehave(*faults)
    run = swarm.run(during=happen if for_s else None)
    dealt.append(swarm.origin.misbehave())
    in_vain = 0.0 if all(fault.kind == "status" for fault in faults) else sum(dealt) / 2
    return _played(name, swarm, run, links, lost=in_vain)


def _wait(swarm: Swarm, links: Links) -> None:
    time.sleep(FAULT_AT * burst_bound_s(swarm.size, len(swarm.machines), links))
