"""What the daemons count is what the origins' logs say, to the byte, and Prometheus's own linter accepts it."""

from __future__ import annotations

import pytest
from rig.cluster import Cluster, Node, at_once
from rig.images import MIB, ImageBuilder, Layer, push
from rig.processes import run

NODES = 2


@pytest.fixture(scope="module")
def nodes(cluster: Cluster, images: ImageBuilder) -> list[Node]:
    """Two nodes that have pulled an image and fetched a checkpoint."""
    nodes = cluster.nodes(NODES)
    reference = cluster.registry.reference("metrics/image")
    push(images.build("metrics", [Layer(400, 20, False), Layer(401, 4, True)]), cluster.origin, reference)
    cluster.objects.upload("models", {"metrics/a": 18 * MIB + 1, "metrics/b": 4_097})
    at_once(*[lambda node=node: node.containerd.pull(reference) for node in nodes])
    for node in nodes:
        status, output = node.daemon.fetch("s3://models/metrics/", str(cluster.directory / f"{node.machine.name}-m"))
        assert status == 0, output
    return nodes


def test_promtool_accepts_the_metrics(nodes: list[Node]) -> None:
    for node in nodes:
        checked = run(["promtool", "check", "metrics"], check=False, input=node.daemon.metrics_text())
        assert checked.returncode == 0, (checked.stdout + checked.stderr).decode()


def test_registry_bytes_agree_with_the_registrys_log(cluster: Cluster, nodes: list[Node]) -> None:
    counted = sum(node.daemon.metric("windlass_origin_bytes_total", origin=cluster.registry.host) for node in nodes)
    logged = sum(response.written for response in cluster.registry.settled_responses() if response.went_to_windlass())
    assert counted == logged


def test_s3_bytes_agree_with_s3s_log(cluster: Cluster, nodes: list[Node]) -> None:
    counted = sum(node.daemon.metric("windlass_origin_bytes_total", origin="s3") for node in nodes)
    assert counted == cluster.objects.object_bytes()


def test_what_one_peer_sent_the_other_received(nodes: list[Node]) -> None:
    sent = sum(node.daemon.metric("windlass_peer_sent_bytes_total") for node in nodes)
    received = sum(node.daemon.metric("windlass_peer_received_bytes_total") for node in nodes)
    assert sent == received > 0
