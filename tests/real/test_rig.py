"""The rig itself, without windlass: unless it counts what left the origin, no other figure is worth anything."""

from __future__ import annotations

from rig.cluster import Cluster, at_once
from rig.images import MIB, ImageBuilder, Layer, push
from rig.object_store import call_s3
from rig.registry import bytes_by_blob

NODES = 4


def test_direct_pulls_are_counted_once_per_node(cluster: Cluster, images: ImageBuilder) -> None:
    image = images.build("direct", [Layer(1, 12, True), Layer(2, 4, False)])
    reference = cluster.registry.reference("rig/direct")
    push(image, cluster.origin, reference)
    nodes = [cluster.containerd(cluster.machine(f"node{number}")) for number in range(NODES)]
    for node in nodes:
        node.ask(cluster.registry.host, mirror=None)

    at_once(*[lambda node=node: node.pull(reference) for node in nodes])

    assert all(node.is_unpacked(reference) for node in nodes)
    sent = bytes_by_blob(cluster.registry.settled_responses())
    assert sent == {digest: NODES * size for digest, size in image.blobs().items()}


def test_direct_downloads_are_counted_to_the_byte(cluster: Cluster) -> None:
    hashes = cluster.objects.upload("models", {"small": 12_345, "large": 20 * MIB + 1})
    reader = cluster.machine("reader")
    for key, expected in hashes.items():
        destination = str(cluster.directory / key)
        assert call_s3(reader, cluster.objects.endpoint, "download", "models", key, destination) == expected
    assert cluster.objects.object_bytes() == 12_345 + 20 * MIB + 1
