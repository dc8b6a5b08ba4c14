"""`s3.access = "caller"`: a cached object is read by those whose presigned HEAD S3 accepts, and by no others."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import pytest
from rig.cluster import Cluster
from rig.images import MIB
from rig.object_store import call_s3
from rig.windlass import OBJECTS, Daemon

SIZE = 20 * MIB + 11
PERMIT_TTL_MS = 2_000
CALLER_MODE = f"""
[access]
permit_ttl_ms = {PERMIT_TTL_MS}
refusal_ttl_ms = 0

[log]
level = "trace"
"""
NODES_TOKEN = "the-session-token-of-the-node"
DENIED = ("AccessDenied", 403)


@pytest.fixture(scope="module")
def hashes(cluster: Cluster) -> dict[str, str]:
    return cluster.objects.upload("models", {"m/one.bin": SIZE, "m/two.bin": MIB, "m/three.json": 99})


@pytest.fixture(scope="module")
def daemon(cluster: Cluster, hashes: dict[str, str]) -> Daemon:
    machine = cluster.machine("node")
    settings = dataclasses.replace(
        cluster.settings(machine, [machine.address]),
        s3_extra='access = "caller"',
        extra=CALLER_MODE,
        environment={"AWS_SESSION_TOKEN": NODES_TOKEN},
    )
    return cluster.daemon(machine, settings).start()


def proof(cluster: Cluster, signer: str, key: str) -> str:
    return call_s3(cluster.origin, cluster.objects.endpoint, "presign_head", "models", key, signer)


def read(daemon: Daemon, key: str, shown: str) -> dict:
    """boto3's GetObject at the node's endpoint, with the proof as one more header."""
    return call_s3(daemon.machine, OBJECTS, "get_with_proof", "models", key, shown)


def refusal(answer: dict) -> tuple[str, int]:
    return answer["code"], answer["status"]


def test_a_read_needs_a_proof_that_s3_accepts(
    cluster: Cluster, daemon: Daemon, hashes: dict[str, str], figure: Callable[[str, object], None]
) -> None:
    anns = proof(cluster, "ann", "m/one.bin")
    assert read(daemon, "m/one.bin", anns) == {"length": SIZE, "sha256": hashes["m/one.bin"]}

    cluster.objects.refuse("bob")
    bobs = read(daemon, "m/one.bin", proof(cluster, "bob", "m/one.bin"))
    figure("S3 caller mode, another's proof", bobs)
    assert refusal(bobs) == DENIED
    none = call_s3(daemon.machine, OBJECTS, "get", "models", "m/one.bin", "bytes=0-")
    figure("S3 caller mode, no proof", none)
    assert refusal(none) == DENIED
    assert refusal(read(daemon, "m/two.bin", anns)) == DENIED, "a proof is for one object"
    elsewhere = anns.replace(cluster.objects.endpoint, "http://169.254.169.254")
    assert refusal(read(daemon, "m/one.bin", elsewhere)) == DENIED
    listing = call_s3(daemon.machine, OBJECTS, "listing", "models")
    assert refusal(listing) == DENIED


def test_a_managed_transfer_brings_proofs_by_a_hook(
    cluster: Cluster, daemon: Daemon, hashes: dict[str, str]
) -> None:
    destination = str(cluster.directory / "downloaded")
    arguments = ["models", "m/one.bin", destination, cluster.objects.endpoint, "ann"]
    assert call_s3(daemon.machine, OBJECTS, "download_with_proofs", *arguments) == hashes["m/one.bin"]


def test_a_revocation_takes_effect_when_the_permission_ends(
    cluster: Cluster, daemon: Daemon, hashes: dict[str, str]
) -> None:
    carls = proof(cluster, "carl", "m/two.bin")
    assert read(daemon, "m/two.bin", carls)["sha256"] == hashes["m/two.bin"]
    cluster.objects.refuse("carl")
    time.sleep(PERMIT_TTL_MS / 1000)
    assert refusal(read(daemon, "m/two.bin", carls)) == DENIED
    cluster.objects.refuse()


def test_a_fetch_shows_whose_it_is(
    cluster: Cluster, daemon: Daemon, hashes: dict[str, str], figure: Callable[[str, object], None]
) -> None:
    destination = cluster.directory / "fetched"
    status, output = daemon.fetch("s3://models/m/", str(destination))
    figure("fetch without --as-caller", output.strip().splitlines()[-1])
    assert status == 1 and "--as-caller" in output and not destination.exists()

    def as_caller(name: str) -> tuple[int, str]:
        own = {"AWS_ACCESS_KEY_ID": name, "AWS_ENDPOINT_URL_S3": cluster.objects.endpoint}
        return daemon.fetch("--as-caller", "s3://models/m/", str(destination), extra=own)

    cluster.objects.refuse("bob")
    status, output = as_caller("bob")
    figure("fetch as one who may not", output.strip().splitlines()[-1])
    assert status == 1 and not destination.exists()
    status, output = as_caller("ann")
    assert status == 0, output
    assert sorted(path.name for path in destination.glob("*.*") if path.name[0] != ".") == [
        "one.bin",
        "three.json",
        "two.bin",
    ]


def test_no_log_shows_a_credential_at_any_level(cluster: Cluster, daemon: Daemon, hashes: dict[str, str]) -> None:
    """The last of this module: the daemon has been logging at its most talkative all the while."""
    shown = proof(cluster, "dora", "m/two.bin")
    assert read(daemon, "m/two.bin", shown)["sha256"] == hashes["m/two.bin"]
    signature = shown.partition("X-Amz-Signature=")[2].partition("&")[0]
    output = daemon.output()
    assert "TRACE" in output and len(signature) == 64
    assert [secret for secret in (signature, NODES_TOKEN) if secret in output] == []
