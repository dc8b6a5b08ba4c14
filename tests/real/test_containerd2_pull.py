"""containerd 2.x pulls through the mirror in each of its ways: the bytes are right, and leave the registry once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from rig.cluster import Cluster, Node, at_once
from rig.containerd import PullError
from rig.containerd2 import Containerd2, Way, needed
from rig.images import MIB, NATIVE, Image, ImageBuilder, Layer, push
from rig.registry import Response, bytes_by_blob
from rig.windlass import MIRROR

pytestmark = needed

NODES = 2
WAYS = [Way(local=False), Way(local=True), Way(local=False, buffer=MIB), Way(local=True, buffer=MIB)]
SECOND_CERTS = ":/etc/docker/certs.d"
"""What EKS's config_path has behind the colon."""


@pytest.fixture(scope="module")
def nodes(cluster: Cluster) -> list[Node]:
    return cluster.nodes(NODES, containerd=False)


@contextmanager
def containerds(cluster: Cluster, nodes: list[Node], way: Way, name: str) -> Iterator[list[Containerd2]]:
    """A fresh containerd on each node, whose first host is the node's mirror."""
    started: list[Containerd2] = []
    try:
        for node in nodes:
            directory = cluster.directory / f"{node.machine.name}-{name}"
            made = Containerd2(node.machine, directory, cluster.logs / name, way)
            started.append(made)
            made.ask(cluster.registry.host, MIRROR)
        yield started
    finally:
        for one in started:
            one.close()


def image_of(cluster: Cluster, images: ImageBuilder, name: str, seed: int) -> tuple[Image, str]:
    """An image of its own, so that what an earlier test has left in the caches is of no use."""
    made = images.build(name, [Layer(seed, 24, True), Layer(seed + 1, 10, False), Layer(seed + 2, 1, True)])
    reference = cluster.registry.reference(f"two/{name}")
    push(made, cluster.origin, reference)
    return made, reference


def check_each_byte_once(image: Image, responses: list[Response]) -> None:
    assert bytes_by_blob(responses) == image.blobs()
    assert all(response.went_to_windlass() for response in responses if response.blob())


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_cri_pulls(
    cluster: Cluster, nodes: list[Node], images: ImageBuilder, figure: Callable[[str, object], None], way: Way
) -> None:
    image, reference = image_of(cluster, images, str(way), 2_000 + 10 * WAYS.index(way))
    before = len(cluster.registry.settled_responses())
    with containerds(cluster, nodes, way, str(way)) as started:
        at_once(*[lambda one=one: one.pull(reference) for one in started])
        assert all(one.is_unpacked(reference) for one in started)
    responses = cluster.registry.settled_responses()[before:]
    sent = sum(bytes_by_blob(responses).values())
    figure(f"containerd {Containerd2.version()} {way}, {NODES} nodes: registry bytes ÷ image", sent / image.size())
    check_each_byte_once(image, responses)


@pytest.mark.parametrize("options", [(), ("--local",)], ids=["transfer", "local"])
def test_ctr_pulls(cluster: Cluster, nodes: list[Node], images: ImageBuilder, options: tuple[str, ...]) -> None:
    """`ctr` reads the manifests and configs of all platforms, and the layers of one."""
    name = f"ctr{len(options)}"
    image, reference = image_of(cluster, images, name, 2_100 + 10 * len(options))
    before = len(cluster.registry.settled_responses())
    with containerds(cluster, nodes[:1], Way(local=False), name) as started:
        status, output = started[0].ctr_pull(reference, "--platform", f"linux/{NATIVE}", *options)
        assert status == 0, output
        assert started[0].is_unpacked(reference)
    responses = cluster.registry.settled_responses()[before:]
    other_config = image.foreign[1]
    assert bytes_by_blob(responses) == {**image.blobs(), other_config.digest: other_config.size}
    assert all(response.went_to_windlass() for response in responses if response.blob())


def test_a_colon_in_config_path_hides_the_mirror_from_the_transfer_service(
    cluster: Cluster, nodes: list[Node], images: ImageBuilder
) -> None:
    """The trap of EKS's default: the mirror is never asked, and the pull goes to https, which this registry lacks."""
    _, reference = image_of(cluster, images, "colon", 2_200)
    daemon = nodes[0].daemon
    asked = daemon.metric("windlass_requests_total", face="Registry")
    with (
        containerds(cluster, nodes[:1], Way(local=False, extra_certs=SECOND_CERTS), "colon") as started,
        pytest.raises(PullError),
    ):
        started[0].pull(reference)
    assert daemon.metric("windlass_requests_total", face="Registry") == asked

    with containerds(cluster, nodes[:1], Way(local=True, extra_certs=SECOND_CERTS), "colon-local") as started:
        started[0].pull(reference)
        assert started[0].is_unpacked(reference)
    assert daemon.metric("windlass_requests_total", face="Registry") > asked
