"""An unchanged S3 client: boto3 with its endpoint set to the node's daemon reads right bytes and can write none."""

from __future__ import annotations

import pytest
from rig.cluster import Cluster, Node
from rig.images import MIB
from rig.object_store import call_s3
from rig.windlass import OBJECTS

LARGE = 100 * MIB + 3
"""boto3 uses ranges in ten threads above 8 MiB."""


@pytest.fixture(scope="module")
def nodes(cluster: Cluster) -> list[Node]:
    return cluster.nodes(2, containerd=False)


@pytest.fixture(scope="module")
def hashes(cluster: Cluster) -> dict[str, str]:
    return cluster.objects.upload("models", {"m/large.bin": LARGE, "m/small.json": 999, "m/empty": 0})


def test_downloads_are_right_and_leave_s3_once(cluster: Cluster, nodes: list[Node], hashes: dict[str, str]) -> None:
    before = cluster.objects.object_bytes()
    for node in nodes:
        for key, expected in hashes.items():
            destination = str(cluster.directory / f"{node.machine.name}-{key.replace('/', '-')}")
            assert call_s3(node.machine, OBJECTS, "download", "models", key, destination) == expected
    assert cluster.objects.object_bytes() - before == LARGE + 999


def test_metadata_is_the_origins(cluster: Cluster, nodes: list[Node], hashes: dict[str, str]) -> None:
    for key in hashes:
        direct = call_s3(cluster.origin, cluster.objects.endpoint, "head", "models", key)
        assert call_s3(nodes[0].machine, OBJECTS, "head", "models", key) == direct
    direct = call_s3(cluster.origin, cluster.objects.endpoint, "keys", "models", "m/")
    assert call_s3(nodes[0].machine, OBJECTS, "keys", "models", "m/") == direct


def test_ranges(nodes: list[Node], hashes: dict[str, str]) -> None:
    machine = nodes[0].machine
    assert call_s3(machine, OBJECTS, "get", "models", "m/large.bin", "bytes=5-1000004")["length"] == 1_000_000
    assert call_s3(machine, OBJECTS, "get", "models", "m/large.bin", "bytes=-17")["length"] == 17
    beyond = call_s3(machine, OBJECTS, "get", "models", "m/small.json", "bytes=5000-")
    assert (beyond["code"], beyond["status"]) == ("InvalidRange", 416)


def test_writing_is_refused(cluster: Cluster, nodes: list[Node], hashes: dict[str, str]) -> None:
    before = len(cluster.objects.requests())
    for command in ("put", "delete"):
        answer = call_s3(nodes[0].machine, OBJECTS, command, "models", "m/small.json")
        assert (answer["code"], answer["status"]) == ("AccessDenied", 403)
    assert len(cluster.objects.requests()) == before, "a write must not reach S3"
    assert call_s3(nodes[0].machine, OBJECTS, "head", "models", "m/small.json")["size"] == 999


def test_errors_are_those_of_s3(nodes: list[Node], hashes: dict[str, str]) -> None:
    missing = call_s3(nodes[0].machine, OBJECTS, "get", "models", "m/none", "bytes=0-1")
    assert (missing["code"], missing["status"]) == ("NoSuchKey", 404)
    forbidden = call_s3(nodes[0].machine, OBJECTS, "get", "forbidden", "m/none", "bytes=0-1")
    assert (forbidden["code"], forbidden["status"]) == ("AccessDenied", 403)
