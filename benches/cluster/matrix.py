"""Which scenarios are played how often, and what is kept of each: every run.

What the origin sent, and whether every pull succeeded, must be right in each of them, however busy the machine was. How
long it took says more about the machine than about the links where less than a fifth of it was idle: such a run is kept,
does not count as a measurement of time, and another is played in its place, up to a limit.
"""

from __future__ import annotations

import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rig import scenarios
from rig.blob_origin import Pace
from rig.cluster import Cluster
from rig.links import Links
from rig.scenarios import Played, Scenario
from rig.swarm import Goodput, Pull, Run, Swarm
from table import is_timed

ORIGIN_SHARE = 5
"""A link carries this many times what the origin gives one node: 25 Gbit/s against S3's 5."""

ORIGIN_FIRST_BYTE_S = 0.03
"""What the simulation's origin takes on average."""

EXTRA_RUNS = 1.0
"""How many more may be played, for each that was wanted, while the machine is too busy."""

FAULTS_AT = 8
"""Nodes that the faults are played with, if that many are measured, else with the largest cluster below."""

FIRST_BYTE_NODES = 4
FIRST_BYTE_LAYERS = 40
FIRST_BYTE_LAYER_BYTES = 512 << 10
CABLE_S = 0.02
ADMIN_PORT = 5102


def title(scenario: Scenario) -> str:
    """By what name it is asked for and shown."""
    return scenario.__name__.replace("_", " ")


@dataclass(frozen=True)
class Plan:
    nodes: list[int]
    size: int
    chunk_bytes: int
    mbit: float
    total_mbit: float
    repetitions: int
    fault_repetitions: int
    only: str
    directory: Path

    def links(self, nodes: int) -> Links:
        mbit = min(self.mbit, self.total_mbit / nodes)
        return Links(up=mbit, down=mbit, origin_node=mbit / ORIGIN_SHARE)

    def wants(self, name: str) -> bool:
        return self.only in name

    def wants_one_of(self, several: Sequence[Scenario]) -> bool:
        return any(self.wants(title(scenario)) for scenario in several)


def measure(plan: Plan, keep: Callable[[dict], None]) -> dict:
    """Everything that the plan wants. What there is so far goes to `keep` now and then: the whole takes long."""
    result: dict = {
        "machine": f"{platform.processor() or platform.machine()}, Linux {platform.release()}",
        "size": plan.size,
        "chunk_bytes": plan.chunk_bytes,
        "links": [],
        "rows": [],
        "first_bytes": None,
        "progress": [],
    }
    for nodes in plan.nodes if plan.wants_one_of(scenarios.HEALTHY) else []:
        with swarm(plan, nodes) as made:
            links = _calibrated(result, nodes, made)
            for scenario in scenarios.HEALTHY:
                _repeat(plan, result, nodes, scenario, made, links, plan.repetitions)
        keep(result)
    if plan.wants("first byte"):
        with swarm(plan, FIRST_BYTE_NODES) as made:
            result["first_bytes"] = first_bytes(made)
        keep(result)
    if plan.wants_one_of(scenarios.FAULTS):
        faulty = max((nodes for nodes in plan.nodes if nodes <= FAULTS_AT), default=plan.nodes[0])
        with swarm(plan, faulty) as made:
            links = _calibrated(result, faulty, made)
            for scenario in scenarios.FAULTS:
                _repeat(plan, result, faulty, scenario, made, links, plan.fault_repetitions)
                keep(result)
    return result


def merged(results: list[dict]) -> dict:
    """What was measured apart, as if it had been at once; of the same content on the same kind of machine."""
    first, *others = results
    for other in others:
        if (other["size"], other["chunk_bytes"]) != (first["size"], first["chunk_bytes"]):
            raise ValueError("results of different sizes or chunks say nothing together")
    whole = dict(first)
    for lists in ("links", "rows", "progress"):
        whole[lists] = [item for result in results for item in result[lists]]
    whole["first_bytes"] = next((found for result in results if (found := result["first_bytes"])), None)
    return whole


def _calibrated(result: dict, nodes: int, made: Swarm) -> Links:
    """What the links carry, noted too."""
    goodput = made.goodput()
    result["links"].append(_links(nodes, made, goodput))
    note(f"N={nodes}: a link carries {goodput.tcp:.1f} Mbit/s of TCP, {goodput.quic:.1f} of QUIC")
    return goodput.links(made.links)


@contextmanager
def swarm(plan: Plan, nodes: int):
    directory = Path(tempfile.mkdtemp(prefix="wl-", dir=plan.directory))
    cluster = Cluster(tag=f"n{nodes}", directory=directory, logs=directory / "logs")
    try:
        made = Swarm(cluster, nodes, plan.links(nodes), plan.size, plan.chunk_bytes)
        made.pace(Pace(first_byte_s=ORIGIN_FIRST_BYTE_S))
        yield made
    finally:
        cluster.close()
        shutil.rmtree(directory, ignore_errors=True)


def first_bytes(made: Swarm) -> dict:
    """Medians: straight from the origin, cold through the mirror, from a peer; the last in round trips too.

    Round trips are counted with a content of one piece over a cable so long that nothing else takes time.
    """
    first, second, *_ = made.machines
    image = made.make([FIRST_BYTE_LAYER_BYTES] * FIRST_BYTE_LAYERS)
    origin = f"http://{made.origin.host}"
    direct, mirrored = [], []
    for layer in range(FIRST_BYTE_LAYERS):
        direct += made.first_bytes_s(image, [layer], first, origin)
        mirrored += made.first_bytes_s(image, [layer], first)
    peer = made.first_bytes_s(image, range(FIRST_BYTE_LAYERS), second)
    more = [through - straight for through, straight in zip(mirrored, direct, strict=True)]
    note(f"first byte: direct {statistics.median(direct)}, mirror {statistics.median(mirrored)}, peer {statistics.median(peer)}")
    far = _round_trips(made)
    return {
        "direct_ms": 1e3 * statistics.median(direct),
        "mirror_ms": 1e3 * statistics.median(mirrored),
        "more_ms": 1e3 * statistics.median(more),
        "more_worst_ms": 1e3 * max(more),
        "peer_ms": 1e3 * statistics.median(peer),
        "peer_round_trips": statistics.median(far),
        "peer_round_trips_least": min(far),
    }


def _round_trips(made: Swarm) -> list[float]:
    first, second, *_ = made.machines
    image = made.make([1 << 10] * FIRST_BYTE_LAYERS)
    made.first_bytes_s(image, range(FIRST_BYTE_LAYERS), second)
    cable = made.lengthen_cable(first.name, CABLE_S)
    try:
        round_trip_s = first.round_trip_s(f"http://{second.address}:{ADMIN_PORT}/healthz")
        taken = made.first_bytes_s(image, range(FIRST_BYTE_LAYERS), first)
    finally:
        cable.terminate()
    return [seconds / round_trip_s for seconds in taken]


def _repeat(
    plan: Plan, result: dict, nodes: int, scenario: Scenario, made: Swarm, links: Links, repetitions: int
) -> None:
    name = title(scenario)
    if not plan.wants(name):
        return
    most, timed = repetitions + round(EXTRA_RUNS * repetitions), 0
    for repetition in range(most):
        # Other joins each time.
        play = partial(scenario, seed=repetition) if scenario is scenarios.staggered else scenario
        played = play(made, links)
        row = _row(name, nodes, repetition, played)
        result["rows"].append(row)
        if repetition == 0:
            result["progress"].append(_progress(name, nodes, played))
        timed += is_timed(row)
        marks = "" if row["explained"] and not row["failures"] else "  <-- not explained"
        marks += "" if is_timed(row) else "  (too busy to be timed)"
        note(
            f"N={nodes} {name} {repetition + 1}: {row['last_s']:.2f} s, ÷ bound {row['over_bound']:.3f}, "
            f"origin {row['origin_ratio']:.4f}, idle {row['idle']:.0%}, {timed} of {repetitions} timed{marks}"
        )
        if timed == repetitions:
            break


def _row(name: str, nodes: int, repetition: int, played: Played) -> dict:
    run = played.run
    judged = [pull for pull in run.pulls if pull.node in played.timed and pull.seconds]
    return {
        "scenario": name,
        "nodes": nodes,
        "repetition": repetition,
        "last_s": run.last_s(played.timed),
        "bound_s": played.bound_s,
        "over_bound": played.over_bound(),
        "median_node_s": statistics.median([pull.seconds for pull in judged]) if judged else None,
        "origin_ratio": run.origin_ratio(),
        "most": played.most,
        "explained": run.origin_ratio() <= played.most,
        "asked_twice": sorted(run.asked_twice()),
        "requests": len(run.requests),
        "failures": played.failures(),
        "idle": run.idle,
        "first_byte_ms": 1e3 * statistics.median([pull.first_byte_s for pull in judged]) if judged else None,
        "longest_stall_ms": 1e3 * max((pull.longest_stall_s for pull in judged), default=0.0),
        "in_order_later": _in_order_later(run, judged),
        "counters": {kind: value for kind, value in run.counters.items() if value},
    }


def _in_order_later(run: Run, pulls: list[Pull]) -> float | None:
    """By how much of its time the reader ended after its daemon had everything in whatever order; the median node."""
    later = [pull.seconds / held - 1 for pull in pulls if (held := pull.held_all_s(run.size))]
    return statistics.median(later) if later else None


def _progress(name: str, nodes: int, played: Played) -> dict:
    lines = {
        pull.node: [(round(pull.joined_s, 3), 0, 0)]
        + [(round(pull.joined_s + at, 3), read, held) for at, read, held in pull.samples]
        + ([(round(pull.joined_s + pull.seconds, 3), pull.read, played.run.size)] if pull.seconds else [])
        for pull in played.run.pulls
    }
    return {"scenario": name, "nodes": nodes, "bound_s": played.bound_s, "lines": lines}


def _links(nodes: int, made: Swarm, goodput: Goodput) -> dict:
    return {
        "nodes": nodes,
        "set_mbit": made.links.up,
        "tcp_mbit": goodput.tcp,
        "quic_mbit": goodput.quic,
        "origin_set_mbit": made.links.origin_node,
        "origin_mbit": goodput.origin,
    }


def note(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)
