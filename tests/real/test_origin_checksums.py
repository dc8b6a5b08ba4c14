"""What S3 keeps of an object is what a fetch compares with, and says so; so is a list of the caller's."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import pytest
from rig.cluster import Cluster, Node
from rig.images import MIB

UPLOAD = """
import base64, hashlib, json, random, sys
sys.path.insert(0, {rig!r})
from s3_client import client
s3 = client({endpoint!r})
s3.create_bucket(Bucket="sums")
sums = {{}}
for key, algorithm in {objects!r}.items():
    data = random.Random(key).randbytes({size})
    more = {{"ChecksumAlgorithm": algorithm}} if algorithm else {{}}
    s3.put_object(Bucket="sums", Key="m/" + key, Body=data, **more)
    sums[key] = hashlib.sha256(data).hexdigest()
print(json.dumps(sums))
"""

OBJECTS = {"crc32": "CRC32", "sha256": "SHA256", "nothing": ""}
SIZE = 20 * MIB + 3
"""Three chunks, the last one short."""


@pytest.fixture(scope="module")
def node(cluster: Cluster) -> Node:
    return cluster.nodes(1, containerd=False)[0]


@pytest.fixture(scope="module")
def sums(cluster: Cluster, node: Node) -> dict[str, str]:
    rig = sys.modules["rig.cluster"].__file__.rsplit("/", 1)[0]
    script = UPLOAD.format(rig=rig, endpoint=cluster.objects.endpoint, objects=OBJECTS, size=SIZE)
    return json.loads(cluster.origin.run([sys.executable, "-c", script]).stdout)


def test_each_file_says_what_it_was_compared_with(
    cluster: Cluster, node: Node, sums: dict[str, str], figure: Callable[[str, object], None]
) -> None:
    status, output = node.daemon.fetch("s3://sums/m/", str(cluster.directory / "json"), "--json")
    assert status == 0, output
    events = [json.loads(line) for line in output.splitlines()]
    verified = {e["path"]: (e["verified_by"], e.get("not_verified_by_s3")) for e in events if e["event"] == "file"}
    assert verified == {
        "crc32": (["crc32"], None),
        "sha256": (["sha256"], None),
        "nothing": ([], "S3 keeps no checksum of it"),
    }
    assert events[-1]["verified"] == {"now_files": 2, "kept_files": 0, "by_nothing_files": 1}

    status, output = node.daemon.fetch("s3://sums/m/", str(cluster.directory / "text"))
    assert status == 0, output
    said = next(line for line in output.splitlines() if "placed" in line)
    figure("what a fetch says", said)
    assert said.endswith(
        "2 verified as a whole by crc32, sha256, 1 not verified as a whole (S3 keeps no checksum of it)"
    ), said


def test_a_list_of_sums_is_held_to(cluster: Cluster, node: Node, sums: dict[str, str]) -> None:
    listed = cluster.directory / "SHA256SUMS"
    listed.write_text("".join(f"{digest}  ./{path}\n" for path, digest in sums.items()))
    target = str(cluster.directory / "listed")
    status, output = node.daemon.fetch("s3://sums/m/", target, "--sha256-file", str(listed))
    assert status == 0 and "3 verified as a whole by --sha256-file, crc32, sha256" in output, output

    listed.write_text(f"{'0' * 64}  nothing\n")
    status, output = node.daemon.fetch("s3://sums/m/", str(cluster.directory / "wrong"), "--sha256-file", str(listed))
    assert status == 1, output
    assert "s3://sums/m/nothing" in output and "--sha256-file says sha256" in output, output
    assert not (cluster.directory / "wrong" / "nothing").exists()
    assert (cluster.directory / "wrong" / "crc32").exists()
