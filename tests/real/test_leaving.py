"""Leaving well: what only one node holds is elsewhere before it is gone, and the origin is not asked again."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
from rig.cluster import Cluster, at_once
from rig.containerd import Containerd
from rig.images import MIB, Image, ImageBuilder, Layer, push
from rig.registry import bytes_by_blob
from rig.windlass import MIRROR, Daemon, wait_until_joined

LAYERS_MIB = [512, 384, 128] if os.environ.get("WINDLASS_RIG_FULL") else [96, 64, 32]
"""1 GiB at a release's size."""

GRACE_S = 60
"""The chart's `terminationGracePeriodSeconds`; its drain deadline is five seconds less."""

Figure = Callable[[str, object], None]


@pytest.fixture(scope="module")
def cluster(cluster: Cluster) -> Cluster:
    """The cluster without an object store, which nothing here reads and which takes long to start."""
    cluster._objects = SimpleNamespace(endpoint="http://127.0.0.1:9")
    return cluster


@pytest.fixture(scope="module")
def image(images: ImageBuilder) -> Image:
    return images.build("leaving", [Layer(1500 + n, mib, n % 2 == 0) for n, mib in enumerate(LAYERS_MIB)])


class Nodes:
    """Daemons that know each other and none of another test's."""

    def __init__(self, cluster: Cluster, image: Image, repository: str) -> None:
        self.cluster = cluster
        self.image = image
        self.reference = cluster.registry.reference(repository)
        push(image, cluster.origin, self.reference)
        self.started: list[Daemon] = []
        self._at_first = self.sent()

    def start(self, *names: str, seed: bool = False, budget: str = "20 GiB") -> list[Daemon]:
        machines = [self.cluster.machine(name) for name in names]
        known = [daemon.machine.address for daemon in self.started if daemon.process.running()]
        addresses = [*known, *[machine.address for machine in machines]]
        environment = {
            "WINDLASS_NODE__SEED": str(seed).lower(),
            "WINDLASS_SHUTDOWN__DRAIN_DEADLINE_MS": str((GRACE_S - 5) * 1000),
        }
        made = []
        for machine in machines:
            settings = replace(self.cluster.settings(machine, addresses), environment=environment, budget=budget)
            made.append(self.cluster.daemon(machine, settings))
        at_once(*[daemon.start for daemon in made])
        self.started += made
        wait_until_joined([daemon for daemon in self.started if daemon.process.running()])
        return made

    def pull(self, *daemons: Daemon) -> None:
        """All pull at the same moment, as containerd does."""
        containerds = [self.containerd(daemon) for daemon in daemons]
        at_once(*[lambda one=one: one.pull(self.reference) for one in containerds])
        assert all(one.is_unpacked(self.reference) for one in containerds)

    def containerd(self, daemon: Daemon) -> Containerd:
        containerd = self.cluster.containerd(daemon.machine)
        containerd.ask(self.cluster.registry.host, MIRROR)
        return containerd

    def sent(self) -> int:
        """Bytes of blobs that left the registry."""
        return sum(bytes_by_blob(self.cluster.registry.settled_responses()).values())

    def sent_since(self) -> int:
        return self.sent() - self._at_first


def leave(*daemons: Daemon) -> float:
    """SIGTERM to all at once. Returns the seconds until each had ended by itself, in the grace period."""
    began = time.monotonic()
    for daemon in daemons:
        daemon.process.ask_to_end()
    for daemon in daemons:
        assert daemon.process.wait(GRACE_S) == 0, daemon.output()[-2000:]
    return time.monotonic() - began


def test_what_only_the_leaver_holds_is_elsewhere_before_it_is_gone(
    cluster: Cluster, image: Image, figure: Figure
) -> None:
    nodes = Nodes(cluster, image, "leaving/sole")
    small = nodes.start("sole1", budget="16 MiB")[0]
    leaver, taker = nodes.start("sole2", "sole3")
    nodes.pull(leaver)
    assert taker.held_bytes() + small.held_bytes() == 0
    figure("leaving: seconds from SIGTERM on the only holder to its end", leave(leaver))
    assert "all that is held here is held elsewhere too" in leaver.output(), leaver.output()[-2000:]
    assert taker.held_bytes() + small.held_bytes() >= image.size()
    assert small.held_bytes() <= 16 * MIB, "it goes where there is room"
    at_first = nodes.sent_since()
    newcomer = nodes.start("sole4")[0]
    nodes.pull(newcomer)
    assert nodes.sent_since() == at_first, "the origin is not asked again"


def test_a_pull_through_a_node_that_leaves_ends_right(cluster: Cluster, image: Image, figure: Figure) -> None:
    nodes = Nodes(cluster, image, "leaving/pull")
    leaver, puller, _ = nodes.start("pull1", "pull2", "pull3")
    nodes.pull(leaver)
    at_first = nodes.sent_since()
    containerd = nodes.containerd(puller)
    # Slow enough that the pull is under way when the node is told to leave.
    leaver.machine.limit_egress(800)

    def leave_in_the_middle() -> float:
        while puller.metric("windlass_peer_received_bytes_total") < 16 * MIB:
            time.sleep(0.05)
        assert puller.held_bytes() < image.size()
        return leave(leaver)

    _, took_s = at_once(lambda: containerd.pull(nodes.reference), leave_in_the_middle)
    assert containerd.is_unpacked(nodes.reference)
    figure("leaving: seconds from SIGTERM in the middle of a pull to the end", took_s)
    assert nodes.sent_since() == at_first, "the origin is not asked again"


def test_scale_to_zero_and_back(cluster: Cluster, image: Image, figure: Figure) -> None:
    """All GPU nodes are gone at once, the seed remains, and what new nodes pull does not leave the origin again."""
    nodes = Nodes(cluster, image, "leaving/zero")
    seed = nodes.start("seed", seed=True)[0]
    gpu = nodes.start("gpu1", "gpu2", "gpu3")
    nodes.pull(*gpu)
    at_first = nodes.sent_since()
    assert seed.held_bytes() == 0, "only nodes that are interested carry a content"
    figure("scale to zero: seconds until three nodes had ended", leave(*gpu))
    assert seed.held_bytes() >= image.size()
    new = nodes.start("gpu4", "gpu5")
    nodes.pull(*new)
    figure("scale to zero and back: bytes from the origin", nodes.sent_since() - at_first)
    assert nodes.sent_since() == at_first
    assert seed.metric("windlass_peer_sent_bytes_total") >= image.size()
