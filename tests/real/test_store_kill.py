"""kill -9 at random instants, with real files and clients: no wrong byte, and no content lost that was whole."""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
from rig.cluster import Cluster
from rig.images import MIB
from rig.processes import Process
from rig.windlass import OBJECTS, Daemon, environment

KILLS = 100
OBJECTS_PER_ROUND = 2
OBJECT_BYTES = 6 * MIB + 777
LONGEST_LIFE_S = 0.8
ORIGIN_MBIT_PER_S = 400
"""A round's objects take a quarter of a second then: a kill finds them absent, half there, whole, or being sealed."""

SMALL_CHUNKS = "[cache]\nchunk_bytes = 1048576\n"
"""Eight times the events of the usual size."""

ALONE_AT_ONCE = {"WINDLASS_GOSSIP__ALONE_AFTER_MS": "100"}
"""There are no others to wait for, a hundred times."""


@pytest.fixture(scope="module")
def daemon(cluster: Cluster) -> Daemon:
    machine = cluster.machine("node1")
    settings = cluster.settings(machine, [machine.address])
    return cluster.daemon(machine, replace(settings, extra=SMALL_CHUNKS, environment=ALONE_AT_ONCE))


def whole(daemon: Daemon) -> set[str]:
    return {content["name"] for content in daemon.contents() if content["sealed"]}


def test_killed_a_hundred_times_under_load(
    cluster: Cluster, daemon: Daemon, figure: Callable[[str, object], None]
) -> None:
    seed = random.randrange(1 << 32)
    chance = random.Random(seed)
    keys = [f"load/{number}" for number in range(KILLS * OBJECTS_PER_ROUND)]
    expected = cluster.objects.upload("models", dict.fromkeys(keys, OBJECT_BYTES))
    cluster.origin.limit_egress(ORIGIN_MBIT_PER_S)
    sealed: set[str] = set()
    halves = 0
    for kill in range(KILLS):
        daemon.start()
        now = whole(daemon)
        assert sealed <= now, f"seed {seed}, kill {kill}: lost {sealed - now}"
        for name in chance.sample(sorted(now), min(2, len(now))):
            check(daemon, name.removeprefix("s3://models/"), expected)
        wanted = keys[kill * OBJECTS_PER_ROUND : (kill + 1) * OBJECTS_PER_ROUND]
        halves += sum(0 < content["have_bytes"] < content["size"] for content in daemon.contents())
        loads = [load(cluster, daemon, f"{kill}-{number}", key) for number, key in enumerate(wanted)]
        time.sleep(chance.uniform(0.02, LONGEST_LIFE_S))
        sealed = whole(daemon)
        daemon.process.kill()
        for each in loads:
            each.kill()
    cluster.origin.unlimit_egress()
    daemon.start()
    now = whole(daemon)
    assert sealed <= now, f"seed {seed}: lost {sealed - now}"
    for key in keys:
        check(daemon, key, expected)
    figure(f"killed {KILLS} times (seed {seed}): contents whole, found half there", (len(now), halves))
    figure("killed: chunks that lost their digest", int(daemon.metric("windlass_store_corrupt_chunks_total")))
    daemon.close()


def load(cluster: Cluster, daemon: Daemon, name: str, key: str) -> Process:
    """A fetch for every other, else a plain read."""
    target = str(cluster.directory / f"placed-{name}")
    read = ["curl", "-s", "-o", "/dev/null", f"{OBJECTS}/models/{key}"]
    argv = read if name.endswith("1") else daemon.fetch_argv(f"s3://models/{key}", target)
    return Process(daemon.machine.argv(argv), cluster.logs / "loads.log", environment())


def check(daemon: Daemon, key: str, expected: dict[str, str]) -> None:
    # curl, not an SDK, which takes a second to start: this is asked four hundred times.
    body = daemon.machine.get(f"{OBJECTS}/models/{key}")
    assert (len(body), hashlib.sha256(body).hexdigest()) == (OBJECT_BYTES, expected[key])
