"""Daemons die and stop while images are pulled: no pull fails that the registry would have served, little is sent twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from rig.cluster import Cluster, Node
from rig.images import MIB, Image, ImageBuilder, Layer, push
from rig.processes import wait_until

NODES = 4
ORIGIN_MBIT_PER_S = 240
"""An image of 100 MiB takes some 3.5 s at that rate: long enough to be interrupted half way."""

CHUNK_BYTES = 8 * MIB
LEASES_OF_A_NODE = 8
"""What a node may be fetching from the origin when it dies, per content: half of its window (`swarm.inflight_bytes`)."""


@pytest.fixture(scope="module")
def nodes(cluster: Cluster) -> list[Node]:
    return cluster.nodes(NODES)


@pytest.fixture
def slow_origin(cluster: Cluster) -> Iterator[None]:
    cluster.origin.limit_egress(ORIGIN_MBIT_PER_S)
    yield
    cluster.origin.unlimit_egress()


def put(cluster: Cluster, images: ImageBuilder, name: str, seed: int) -> tuple[Image, str]:
    """Three layers nobody has yet, one of them most of the image."""
    image = images.build(name, [Layer(seed, 8, True), Layer(seed + 1, 80, False), Layer(seed + 2, 12, True)])
    reference = cluster.registry.reference(f"team/{name}")
    push(image, cluster.origin, reference)
    return image, reference


def sent_to_daemons(cluster: Cluster) -> int:
    """Bytes of blobs that left the registry for any daemon."""
    responses = [r for r in cluster.registry.settled_responses() if r.blob() and r.went_to_windlass()]
    return sum(response.written for response in responses)


def sent_to_containerd(cluster: Cluster, node: Node) -> int:
    """Bytes of blobs that left the registry for a containerd that did without its daemon."""
    responses = [r for r in cluster.registry.settled_responses() if r.blob() and not r.went_to_windlass()]
    return sum(response.written for response in responses if response.client == node.machine.address)


def test_a_daemon_is_killed_in_mid_pull(
    cluster: Cluster,
    nodes: list[Node],
    images: ImageBuilder,
    figure: Callable[[str, object], None],
) -> None:
    image, reference = put(cluster, images, "killed", 100)
    victim, others = nodes[0], nodes[1:]
    before = sent_to_daemons(cluster)
    cluster.origin.limit_egress(ORIGIN_MBIT_PER_S)
    with ThreadPoolExecutor(NODES) as pool:
        pulls = [pool.submit(node.containerd.pull, reference) for node in nodes]
        wait_until(
            lambda: victim.daemon.held_bytes() >= image.size() // 3, "a third is there", 60, victim.daemon.process
        )
        held = victim.daemon.held_bytes()
        victim.daemon.process.kill()
        interrupted = not all(pull.done() for pull in pulls)
        for pull in pulls[1:]:
            pull.result()
        # Its containerd goes on at the registry, which is neither forbidden nor what is tested here.
        fell_through = pulls[0].exception()
    cluster.origin.unlimit_egress()

    assert interrupted, "the pulls were over before the kill: slow the origin"
    assert all(node.containerd.is_unpacked(reference) for node in others)
    figure("a daemon killed in mid-pull: its own containerd", str(fell_through or "finished at the registry"))

    victim.daemon.start()
    cluster.wait_until_joined()
    kept = victim.daemon.held_bytes()
    figure("a daemon killed in mid-pull: MiB it had, MiB it has after its restart", (held // MIB, kept // MIB))
    # More may have come between the look and the kill.
    assert kept >= held
    if victim.containerd.content():
        victim.containerd.forget(reference)
    at_restart = sent_to_daemons(cluster)
    victim.containerd.pull(reference)
    assert victim.containerd.is_unpacked(reference)
    assert sent_to_daemons(cluster) == at_restart, "three peers have every byte"

    sent = sent_to_daemons(cluster) - before
    figure("a daemon killed in mid-pull: registry bytes to daemons ÷ unique", sent / image.size())
    # What the victim was fetching when it died is fetched again by somebody else.
    assert image.size() <= sent <= image.size() + LEASES_OF_A_NODE * CHUNK_BYTES


def test_a_daemon_is_stopped_before_a_pull(
    cluster: Cluster, nodes: list[Node], images: ImageBuilder, figure: Callable[[str, object], None]
) -> None:
    image, reference = put(cluster, images, "stopped", 200)
    node = nodes[1]
    assert node.daemon.process.terminate() == 0
    before = sent_to_containerd(cluster, node)

    node.containerd.pull(reference)

    assert node.containerd.is_unpacked(reference)
    sent = sent_to_containerd(cluster, node) - before
    figure("a stopped daemon: registry bytes to its containerd ÷ unique", sent / image.size())
    assert sent >= image.size()
    node.daemon.start()
    cluster.wait_until_joined()


def test_a_daemon_is_stopped_in_mid_pull(
    cluster: Cluster,
    nodes: list[Node],
    images: ImageBuilder,
    slow_origin: None,
    figure: Callable[[str, object], None],
) -> None:
    image, reference = put(cluster, images, "stopping", 300)
    node = nodes[2]
    with ThreadPoolExecutor(NODES) as pool:
        pulls = [pool.submit(each.containerd.pull, reference) for each in nodes]
        wait_until(lambda: node.daemon.held_bytes() > 0 and started(node, image), "it has begun", 60)
        interrupted = not all(pull.done() for pull in pulls)
        status = node.daemon.process.terminate()
        for pull in pulls:
            pull.result()
    assert interrupted, "the pulls were over before the stop: slow the origin"
    assert status == 0
    assert all(each.containerd.is_unpacked(reference) for each in nodes)
    figure(
        "a daemon stopped in mid-pull: MiB its containerd took from the registry itself",
        sent_to_containerd(cluster, node) // MIB,
    )


def started(node: Node, image: Image) -> bool:
    """A quarter of the largest layer is here."""
    largest = max(image.layers, key=lambda layer: layer.size)
    held = {content["name"]: content["have_bytes"] for content in node.daemon.contents()}
    return held.get(largest.digest, 0) >= largest.size // 4
