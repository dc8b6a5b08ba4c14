"""AWS credentials: every link of the chain works, and a link that fails is named with what to do about it."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from rig.aws_endpoints import OBJECT, POD_TOKEN
from rig.cluster import Cluster
from rig.network import Machine
from rig.processes import run, wait_until
from rig.windlass import Daemon

ENDPOINTS = Path(__file__).parent / "rig" / "aws_endpoints.py"
STS = "http://169.254.170.23"
ROLE = "arn:aws:iam::123456789012:role/rig-role"
NO_STATIC_KEYS = ["env", "-u", "AWS_ACCESS_KEY_ID", "-u", "AWS_SECRET_ACCESS_KEY"]

NUMBERS = itertools.count(1)


def chain(name: str, directory: Path) -> dict[str, str]:
    """The environment in which the chain's link `name` has credentials."""
    (directory / "web-identity").write_text("a.projected.token")
    (directory / "pod-identity").write_text(POD_TOKEN)
    (directory / "credentials").write_text(
        "[static]\naws_access_key_id = AKIAPROFILE\naws_secret_access_key = secret\n"
        "[base]\naws_access_key_id = AKIABASE\naws_secret_access_key = secret\n"
    )
    (directory / "config").write_text(
        "[profile static]\nregion = us-east-1\n"
        f"[profile assumed]\nregion = us-east-1\nrole_arn = {ROLE}\nsource_profile = base\n"
    )
    files = {
        "AWS_SHARED_CREDENTIALS_FILE": str(directory / "credentials"),
        "AWS_CONFIG_FILE": str(directory / "config"),
        "AWS_ENDPOINT_URL_STS": STS,
    }
    no_metadata = {"AWS_EC2_METADATA_DISABLED": "true"}
    return {
        "static": {"AWS_ACCESS_KEY_ID": "AKIASTATIC", "AWS_SECRET_ACCESS_KEY": "secret"},
        "profile": {**files, **no_metadata, "AWS_PROFILE": "static"},
        "assume-role": {**files, **no_metadata, "AWS_PROFILE": "assumed"},
        "web-identity": {
            **no_metadata,
            "AWS_ENDPOINT_URL_STS": STS,
            "AWS_WEB_IDENTITY_TOKEN_FILE": str(directory / "web-identity"),
            "AWS_ROLE_ARN": ROLE,
            "AWS_ROLE_SESSION_NAME": "rig",
        },
        "pod-identity": {
            **no_metadata,
            "AWS_CONTAINER_CREDENTIALS_FULL_URI": "http://169.254.170.23/v1/credentials",
            "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE": str(directory / "pod-identity"),
        },
        "instance": {},
    }[name]


class Node:
    """A machine with the endpoints on it, a daemon of one chain, and the endpoints' log."""

    def __init__(self, machine: Machine, daemon: Daemon, directory: Path) -> None:
        self.machine, self.daemon, self._directory = machine, daemon, directory

    def fetch(self) -> tuple[int, str]:
        return self.daemon.fetch("s3://models/a", str(self._directory / "a"), timeout_s=60)

    def fetched(self) -> bytes:
        return (self._directory / "a").read_bytes()

    def keys(self) -> set[str]:
        """The access keys that S3 was asked with."""
        records = [json.loads(line) for line in (self._directory / "log.jsonl").read_text().splitlines()]
        return {record["key"] for record in records if record["key"] and "/models/a" in record["path"]}


@contextmanager
def node(cluster: Cluster, name: str, fault: str = "none", **more: str) -> Iterator[Node]:
    machine = cluster.machine(f"n{next(NUMBERS)}")
    directory = cluster.directory / machine.name
    directory.mkdir(parents=True)
    for address in ("169.254.169.254", "169.254.170.23"):
        run(["ip", "-n", machine.namespace, "address", "add", f"{address}/32", "dev", "lo"])
    log = directory / "log.jsonl"
    endpoints = machine.start([sys.executable, str(ENDPOINTS), str(log), fault], cluster.logs / f"{machine.name}.log")
    settings = replace(
        cluster.settings(machine, [machine.address]),
        objects="http://127.0.0.1:9100",
        environment={**chain(name, directory), **more},
    )
    daemon = cluster.daemon(machine, settings)
    try:
        wait_until(lambda: bool(machine.get(f"{STS}/v1/credentials", check=False)), "endpoints answer", 30, endpoints)
        daemon.start(NO_STATIC_KEYS if name != "static" else ())
        yield Node(machine, daemon, directory)
    finally:
        daemon.close()
        endpoints.terminate()


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("static", "AKIASTATIC"),
        ("profile", "AKIAPROFILE"),
        ("assume-role", "ASIAASSUMED"),
        ("web-identity", "ASIAIRSA"),
        ("pod-identity", "ASIAPOD"),
        ("instance", "ASIAIMDS"),
    ],
)
def test_each_link_gives_credentials(cluster: Cluster, name: str, key: str) -> None:
    with node(cluster, name) as one:
        status, output = one.fetch()
        assert status == 0, output
        assert one.fetched() == OBJECT
        assert one.keys() == {key}


@pytest.mark.parametrize(
    ("name", "fault", "more", "link", "cure"),
    [
        ("web-identity", "sts", {}, "AccessDenied", "trust policy"),
        ("web-identity", "none", {"AWS_WEB_IDENTITY_TOKEN_FILE": "/no/such/token"}, "/no/such/token", "is mounted"),
        ("assume-role", "sts", {}, "AccessDenied", "role may be assumed"),
        ("pod-identity", "pod", {}, "403", "has an association"),
        (
            "pod-identity",
            "none",
            {"AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE": "/no/such/token"},
            "/no/such/token",
            "Pod Identity",
        ),
        ("instance", "imds", {}, "", "hop limit"),
        ("instance", "none", {"AWS_EC2_METADATA_DISABLED": "true"}, "", "Pod Identity or IRSA"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_link_that_fails_is_named_with_its_cure(
    cluster: Cluster,
    name: str,
    fault: str,
    more: dict[str, str],
    link: str,
    cure: str,
    figure: Callable[[str, object], None],
) -> None:
    with node(cluster, name, fault, **more) as one:
        status, output = one.fetch()
        figure(f"credentials, {name} with {fault if fault != 'none' else next(iter(more), '')} broken", output[-420:])
        assert status == 1, output
        assert link in output and cure in output, output
