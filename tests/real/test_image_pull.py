"""Four nodes pull one image at the same moment: each blob byte leaves the registry once, whoever asked for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from rig.cluster import Cluster, Node, at_once
from rig.images import Image, ImageBuilder, Layer, push
from rig.registry import bytes_by_blob

NODES = 4

# Six layers, gzip and plain tar; the third is two thirds of the image, as CUDA's layer is in a GPU image.
SHARED = [Layer(10, 8, True), Layer(11, 4, False), Layer(12, 120, True), Layer(13, 24, False)]
FIRST = [*SHARED, Layer(14, 16, True), Layer(15, 12, False)]
SECOND = [*SHARED, Layer(16, 16, False), Layer(17, 6, True)]


@pytest.fixture(scope="module")
def nodes(cluster: Cluster) -> list[Node]:
    return cluster.nodes(NODES)


@pytest.fixture(scope="module")
def first(cluster: Cluster, images: ImageBuilder) -> Image:
    image = images.build("first", FIRST)
    assert max(layer.size for layer in image.layers) >= 0.6 * image.size()
    push(image, cluster.origin, cluster.registry.reference("team/first"))
    return image


def test_a_simultaneous_cold_pull_sends_each_blob_byte_once(
    cluster: Cluster, nodes: list[Node], first: Image, figure: Callable[[str, object], None]
) -> None:
    reference = cluster.registry.reference("team/first")
    at_once(*[lambda node=node: node.containerd.pull(reference) for node in nodes])

    assert all(node.containerd.is_unpacked(reference) for node in nodes)
    responses = cluster.registry.settled_responses()
    sent = bytes_by_blob(responses)
    figure("image of six layers, 4 nodes: registry bytes ÷ unique bytes", sum(sent.values()) / first.size())
    figure("image of six layers, 4 nodes: blob requests", sum(1 for response in responses if response.blob()))
    assert sent == first.blobs()


def test_a_second_image_fetches_only_what_is_new(
    cluster: Cluster, nodes: list[Node], first: Image, images: ImageBuilder, figure: Callable[[str, object], None]
) -> None:
    second = images.build("second", SECOND)
    reference = cluster.registry.reference("team/second")
    push(second, cluster.origin, reference)
    before = len(cluster.registry.settled_responses())

    at_once(*[lambda node=node: node.containerd.pull(reference) for node in nodes])

    assert all(node.containerd.is_unpacked(reference) for node in nodes)
    sent = bytes_by_blob(cluster.registry.settled_responses()[before:])
    new = {digest: size for digest, size in second.blobs().items() if digest not in first.blobs()}
    figure("second image: registry bytes ÷ new bytes", sum(sent.values()) / sum(new.values()))
    assert sent == new
