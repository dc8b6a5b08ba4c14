"""Unchanged S3 clients read through the node's endpoint and from the origin: the same bytes, the same errors."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rig.cluster import Cluster, Node
from rig.images import MIB
from rig.network import Machine
from rig.object_store import call_s3
from rig.windlass import OBJECTS

LARGE = 70 * MIB + 17
SIZES = {"c/large.bin": LARGE, "c/sub/small.json": 1_001, "c/empty": 0}
BIN = Path(sys.executable).parent
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith("AWS_")},
    "AWS_ACCESS_KEY_ID": "rig",
    "AWS_SECRET_ACCESS_KEY": "rig",
    "AWS_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_MAX_ATTEMPTS": "1",
}


@pytest.fixture(scope="module")
def nodes(cluster: Cluster) -> list[Node]:
    return cluster.nodes(2, containerd=False)


@pytest.fixture(scope="module")
def hashes(cluster: Cluster) -> dict[str, str]:
    return cluster.objects.upload("clients", SIZES)


def aws(endpoint: str, *arguments: str) -> list[str]:
    return [str(BIN / "aws"), "--endpoint-url", endpoint, *arguments]


def s5cmd(endpoint: str, *arguments: str) -> list[str]:
    return [str(BIN / "s5cmd"), "--endpoint-url", endpoint, "--retry-count", "0", *arguments]


def run(machine: Machine, argv: list[str]) -> subprocess.CompletedProcess:
    return machine.run(argv, check=False, env=ENVIRONMENT)


def hashes_below(directory: Path) -> dict[str, str]:
    return {
        f"c/{path.relative_to(directory)}": hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(
    ("client", "arguments"),
    [
        pytest.param(aws, ["s3", "cp", "--recursive", "s3://clients/c/"], id="aws-cli"),
        pytest.param(s5cmd, ["cp", "s3://clients/c/*"], id="s5cmd"),
    ],
)
def test_a_prefix_is_copied_as_from_the_origin(
    cluster: Cluster, nodes: list[Node], hashes: dict[str, str], client: Callable[..., list[str]], arguments: list[str]
) -> None:
    copies = {}
    for where, machine, endpoint in [
        ("origin", cluster.origin, cluster.objects.endpoint),
        ("node", nodes[0].machine, OBJECTS),
    ]:
        to = cluster.directory / f"{client.__name__}-{where}"
        to.mkdir()
        done = run(machine, client(endpoint, *arguments, f"{to}/"))
        assert done.returncode == 0, done.stderr.decode()
        copies[where] = hashes_below(to)
    assert copies["node"] == copies["origin"] == hashes


def test_listings_are_the_origins(cluster: Cluster, nodes: list[Node], hashes: dict[str, str]) -> None:
    for client, arguments in [(aws, ["s3", "ls", "--recursive", "s3://clients/"]), (s5cmd, ["ls", "s3://clients/*"])]:
        direct = run(cluster.origin, client(cluster.objects.endpoint, *arguments))
        through = run(nodes[0].machine, client(OBJECTS, *arguments))
        assert through.stdout == direct.stdout and direct.stdout.count(b"\n") == len(hashes), through.stderr


def test_ranges_in_many_threads_are_the_origins(
    cluster: Cluster, nodes: list[Node], hashes: dict[str, str], figure: Callable[[str, object], None]
) -> None:
    """As model loaders read: ranges of every size at every offset, 16 at a time, from both nodes."""
    seen = cluster.objects.object_bytes()
    for node in nodes:
        answer = call_s3(node.machine, OBJECTS, "read_in_threads", "clients", "c/large.bin", str(LARGE))
        figure(f"ranges of one object in 16 threads on {node.machine.name}", answer["ranges"])
        assert answer["sha256"] == hashes["c/large.bin"]
    assert cluster.objects.object_bytes() == seen, "the copies of the other tests have brought it here already"


ETAG_OF_NOTHING = '"d41d8cd98f00b204e9800998ecf8427e"'
ASKED = {
    "a missing key": {"Key": "c/none"},
    "a missing bucket": {"Bucket": "nobody", "Key": "c/none"},
    "no permission": {"Bucket": "forbidden", "Key": "c/none"},
    "a range beyond the end": {"Range": f"bytes={LARGE}-"},
    "the last bytes": {"Range": "bytes=-100"},
    "a range that ends beyond the end": {"Range": f"bytes={LARGE - 5}-{LARGE + 5}"},
    "if it is another one": {"IfMatch": '"0123456789abcdef0123456789abcdef"'},
    "if it is this one": {"IfMatch": "ETAG"},
    "unless it is this one": {"IfNoneMatch": "ETAG"},
    "unless it is another one": {"IfNoneMatch": ETAG_OF_NOTHING, "Range": "bytes=0-9"},
    "if it changed since last year": {"IfModifiedSince": "2020-01-01T00:00:00Z", "Range": "bytes=0-9"},
    "if it changed since next century": {"IfModifiedSince": "2100-01-01T00:00:00Z"},
    "if it is unchanged since last year": {"IfUnmodifiedSince": "2020-01-01T00:00:00Z"},
    "if it is unchanged since next century": {"IfUnmodifiedSince": "2100-01-01T00:00:00Z", "Range": "bytes=0-9"},
}


@pytest.fixture(scope="module")
def answers(cluster: Cluster, nodes: list[Node], hashes: dict[str, str]) -> dict[str, dict]:
    """What boto3 makes of each question, at the origin and through a node."""
    questions = json.dumps({name: {"Bucket": "clients", "Key": "c/large.bin", **more} for name, more in ASKED.items()})
    return {
        "origin": call_s3(cluster.origin, cluster.objects.endpoint, "ask", questions),
        "node": call_s3(nodes[1].machine, OBJECTS, "ask", questions),
    }


@pytest.mark.parametrize("method", ["get_object", "head_object"])
@pytest.mark.parametrize("asked", ASKED)
def test_answers_and_errors_are_the_origins(answers: dict[str, dict], asked: str, method: str) -> None:
    assert answers["node"][method][asked] == answers["origin"][method][asked]


def test_the_errors_are_those_that_were_meant(answers: dict[str, dict]) -> None:
    seen = {name: answer["status"] for name, answer in answers["node"]["get_object"].items()}
    assert {404, 403, 416, 304, 412, 200, 206} == set(seen.values()), seen
