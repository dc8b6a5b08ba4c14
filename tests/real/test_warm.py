"""`windlass warm` on one node: what another node pulls or fetches afterwards does not leave the origin again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from rig.cluster import Cluster, Node
from rig.images import MIB, ImageBuilder, Layer, push
from rig.registry import bytes_by_blob
from rig.windlass import binary, environment


@pytest.fixture(scope="module")
def nodes(cluster: Cluster) -> list[Node]:
    return cluster.nodes(2)


def warm(node: Node, *sources: str) -> tuple[int, str]:
    argv = [binary(), "warm", "--config", str(node.daemon.config), *sources]
    done = node.machine.run(argv, check=False, env=environment())
    return done.returncode, (done.stdout + done.stderr).decode()


def test_a_warmed_image_is_pulled_from_peers(
    cluster: Cluster, nodes: list[Node], images: ImageBuilder, figure: Callable[[str, object], None]
) -> None:
    image = images.build("warm", [Layer(1200, 24, True), Layer(1201, 9, False)])
    reference = cluster.registry.reference("warm/image")
    push(image, cluster.origin, reference)

    status, output = warm(nodes[0], reference)
    assert status == 0, output
    figure("warm", output.strip())
    assert bytes_by_blob(cluster.registry.settled_responses()) == image.blobs()

    nodes[1].containerd.pull(reference)
    assert nodes[1].containerd.is_unpacked(reference)
    assert bytes_by_blob(cluster.registry.settled_responses()) == image.blobs(), "nothing was sent again"


def test_warmed_objects_are_fetched_from_peers(cluster: Cluster, nodes: list[Node]) -> None:
    cluster.objects.upload("models", {"warm/a b": 20 * MIB + 1, "warm/c/d": 4_097, "warm/empty": 0})
    status, output = warm(nodes[0], "s3://models/warm/")
    assert status == 0, output
    sent = cluster.objects.object_bytes()
    assert sent == 20 * MIB + 1 + 4_097

    status, output = nodes[1].daemon.fetch("s3://models/warm/", str(cluster.directory / "warmed"))
    assert status == 0, output
    assert cluster.objects.object_bytes() == sent, "nothing was sent again"


def test_replicas_are_on_other_nodes_before_anybody_asks(
    cluster: Cluster, nodes: list[Node], images: ImageBuilder, figure: Callable[[str, object], None]
) -> None:
    image = images.build("spread", [Layer(1210, 24, True), Layer(1211, 9, False)])
    reference = cluster.registry.reference("warm/spread")
    push(image, cluster.origin, reference)
    before = nodes[1].daemon.held_bytes()
    argv = [binary(), "warm", "--config", str(nodes[0].daemon.config), "--replicas", "2", reference]
    done = nodes[0].machine.run(argv, check=False, env=environment())
    output = (done.stdout + done.stderr).decode()
    assert done.returncode == 0 and "on one more node" in output, output
    figure("warm --replicas 2", output.strip())
    assert nodes[1].daemon.held_bytes() - before >= image.size()
    sent = bytes_by_blob(cluster.registry.settled_responses())
    assert {digest: sent[digest] for digest in image.blobs()} == image.blobs(), "each blob left the registry once"

    argv = [*argv[:-3], "--replicas", "3", reference]
    done = nodes[0].machine.run(argv, check=False, env=environment())
    assert done.returncode == 1 and b"2 other nodes are wanted and 1 fit" in done.stderr, done.stderr
    argv = [*argv[:-3], "--nodes", "zone=nowhere", reference]
    assert nodes[0].machine.run(argv, env=environment()).returncode == 0


def test_what_is_not_there_fails_with_the_daemons_words(cluster: Cluster, nodes: list[Node]) -> None:
    status, output = warm(nodes[0], cluster.registry.reference("warm/none"))
    assert status == 1 and "404" in output, output
    status, output = warm(nodes[0], "reg.example/warm/none:v1")
    assert status == 1 and "is not mirrored here" in output, output
    status, output = warm(nodes[0], "s3://models/none/")
    assert status == 1 and "nothing below" in output, output
