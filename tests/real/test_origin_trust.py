"""An object store whose certificate is of a private authority: trusted where `s3.ca_file` names it, and nowhere else."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rig.cluster import Cluster
from rig.images import MIB
from rig.object_store import call_s3
from rig.private_authority import PrivateAuthority
from rig.processes import wait_until
from rig.windlass import OBJECTS, Daemon

WITHOUT_OBJECTS = True

RIG = Path(__file__).parent / "rig"
PORT = 9443
SIZES = {"m/weights.bin": 9 * MIB + 1, "m/config.json": 300}


@pytest.fixture(scope="module")
def authority(cluster: Cluster) -> PrivateAuthority:
    return PrivateAuthority(cluster.directory / "private")


@pytest.fixture(scope="module")
def endpoint(cluster: Cluster, authority: PrivateAuthority) -> str:
    """moto behind TLS."""
    machine = cluster.origin
    certificate, key = authority.issue(machine.address)
    arguments = [PORT, cluster.directory / "s3.jsonl", certificate, key]
    argv = [sys.executable, str(RIG / "counting_s3.py"), *map(str, arguments)]
    process = machine.start(argv, cluster.logs / "s3.log")
    cluster.on_close(process.terminate)
    url = f"https://{machine.address}:{PORT}"
    ask = ["curl", "-s", "-o", "/dev/null", "--cacert", str(authority.certificate), url]
    wait_until(lambda: machine.run(ask, check=False).returncode == 0, "moto answers over TLS", 60, process)
    return url


@pytest.fixture(scope="module")
def sums(cluster: Cluster, authority: PrivateAuthority, endpoint: str) -> dict[str, str]:
    argv = [sys.executable, str(RIG / "s3_client.py"), endpoint, "upload", "models", json.dumps(SIZES)]
    trusting = {**os.environ, "AWS_CA_BUNDLE": str(authority.certificate)}
    return json.loads(cluster.origin.run(argv, env=trusting).stdout)


def started(cluster: Cluster, name: str, endpoint: str, s3_extra: str = "") -> Daemon:
    machine = cluster.machine(name)
    settings = cluster.settings(machine, [machine.address])
    return cluster.daemon(machine, replace(settings, objects=endpoint, s3_extra=s3_extra)).start()


def test_a_private_authority_is_trusted_where_it_is_named(
    cluster: Cluster, authority: PrivateAuthority, endpoint: str, sums: dict[str, str]
) -> None:
    daemon = started(cluster, "trusting", endpoint, f'ca_file = "{authority.certificate}"')
    there = cluster.directory / "there"
    status, output = daemon.fetch("s3://models/m/", str(there))
    assert status == 0, output
    assert {key: hashlib.sha256((there / Path(key).name).read_bytes()).hexdigest() for key in SIZES} == sums
    whole = f"bytes=0-{SIZES['m/config.json'] - 1}"
    read = call_s3(daemon.machine, OBJECTS, "get", "models", "m/config.json", whole)
    assert read == {"length": SIZES["m/config.json"], "sha256": sums["m/config.json"]}


@pytest.mark.parametrize("trusted", ["nobody", "another authority"])
def test_without_it_the_failure_names_the_key(
    cluster: Cluster, endpoint: str, sums: dict[str, str], trusted: str, figure: Callable[[str, object], None]
) -> None:
    other = PrivateAuthority(cluster.directory / "other") if trusted != "nobody" else None
    name = trusted.split()[0]
    daemon = started(cluster, name, endpoint, f'ca_file = "{other.certificate}"' if other else "")
    there = cluster.directory / f"nothing-{name}"
    status, output = daemon.fetch("s3://models/m/weights.bin", str(there), timeout_s=120)
    figure(f"S3 over TLS, {trusted} trusted", output.strip()[-400:])
    assert status == 1, output
    assert "certificate" in output and "`s3.ca_file`" in output
    assert not there.exists()


def test_a_file_without_certificates_is_refused_at_the_start(cluster: Cluster, endpoint: str) -> None:
    file = cluster.directory / "empty.pem"
    file.write_text("")
    machine = cluster.machine("mistaken")
    settings = replace(cluster.settings(machine, [machine.address]), objects=endpoint, s3_extra=f'ca_file = "{file}"')
    status, output = cluster.daemon(machine, settings).run_to_its_end()
    assert status == 64, output
    assert "s3.ca_file" in output and "no certificate" in output
