"""`access = "caller"`: an image that is cached for one who may pull it stays shut to everybody else."""

from __future__ import annotations

import base64
import dataclasses
import time
from collections.abc import Callable, Iterator

import pytest
from rig.cluster import Cluster
from rig.containerd import Containerd, PullError
from rig.containerd2 import PLAIN_FORMS, containerd_of
from rig.images import NATIVE, Image, ImageBuilder, Layer, push
from rig.registry import Registry
from rig.windlass import MIRROR, Daemon

ANN, ANNS_PASSWORD = "ann", "anns-own-secret"
NODE, NODES_PASSWORD = "node", "nodes-own-secret"
HTPASSWD = {
    ANN: "$2b$04$b4mM/NU5ImGnUvIJkkAH3OWYPS8QdJ3KcWDeMhn2UHeaZYJhffh8y",
    NODE: "$2b$04$5e3jM.0kCbVztwNjMneViuul9P/YAV0X5SZSDFr1LNzl7nmar55la",
}
STRANGER = ("ann", "a-wrong-guess")
NOBODY = ("", "")

PERMIT_TTL_MS = 2_000
CALLER_MODE = f"""
[access]
permit_ttl_ms = {PERMIT_TTL_MS}
refusal_ttl_ms = 500

[log]
level = "trace"
"""


def basic(username: str, password: str) -> str:
    return base64.b64encode(f"{username}:{password}".encode()).decode()


def htpasswd(*users: str) -> str:
    return "".join(f"{user}:{HTPASSWD[user]}\n" for user in users)


@pytest.fixture(scope="module")
def registry(cluster: Cluster) -> Iterator[Registry]:
    """A registry that nobody may read without a password."""
    started = Registry(cluster.machine("locked"), cluster.directory / "locked", cluster.logs, htpasswd(ANN, NODE))
    yield started
    started.close()


@pytest.fixture(scope="module")
def daemon(cluster: Cluster, registry: Registry) -> Daemon:
    """One node's daemon, which has a credential of its own."""
    machine = cluster.machine("node")
    password = cluster.directory / "password"
    password.write_text(NODES_PASSWORD)
    keys = f'access = "caller"\nusername = "{NODE}"\npassword_file = "{password}"'
    settings = dataclasses.replace(
        cluster.settings(machine, [machine.address]), registry=registry.host, registry_extra=keys, extra=CALLER_MODE
    )
    return cluster.daemon(machine, settings).start()


@pytest.fixture(scope="module", params=PLAIN_FORMS)
def containerd(
    cluster: Cluster, registry: Registry, daemon: Daemon, request: pytest.FixtureRequest
) -> Iterator[Containerd]:
    directory = cluster.directory / f"containerd-{request.param_index}"
    started = containerd_of(request.param, daemon.machine, directory, cluster.logs)
    started.ask(registry.host, MIRROR)
    yield started
    started.close()


@pytest.fixture(scope="module")
def image(cluster: Cluster, registry: Registry, images: ImageBuilder) -> tuple[Image, str]:
    made = images.build("locked", [Layer(3_000, 12, True), Layer(3_001, 1, False)])
    reference = registry.reference("team/locked")
    push(made, cluster.origin, reference, f"{ANN}:{ANNS_PASSWORD}")
    return made, reference


def served(daemon: Daemon) -> float:
    return daemon.metric("windlass_served_bytes_total", face="Registry")


def status_of(daemon: Daemon, path: str, who: tuple[str, str]) -> int:
    return daemon.status(path, *(["-u", ":".join(who)] if who[0] else []))[0]


def test_who_may_pull_pulls_through_the_mirror(
    registry: Registry, daemon: Daemon, containerd: Containerd, image: tuple[Image, str]
) -> None:
    made, reference = image
    containerd.pull(reference, ANN, ANNS_PASSWORD)
    assert containerd.is_unpacked(reference)
    blobs = [response for response in registry.settled_responses() if response.blob()]
    # A daemon asks for one byte where HEAD does not say enough; all else came once, and to it alone.
    assert all(response.went_to_windlass() for response in blobs)
    assert served(daemon) >= made.size()


@pytest.mark.parametrize("who", [STRANGER, NOBODY], ids=["another password", "none"])
def test_nobody_else_pulls_what_is_cached(
    daemon: Daemon, containerd: Containerd, image: tuple[Image, str], who: tuple[str, str]
) -> None:
    reference = image[1]
    containerd.forget(reference)
    before = served(daemon)
    with pytest.raises(PullError):
        containerd.pull(reference, *who)
    user = ["--user", ":".join(who)] if who[0] else []
    status, output = containerd.ctr_pull(reference, "--platform", f"linux/{NATIVE}", *user)
    assert status != 0, output
    assert served(daemon) == before


def test_ctr_pulls_with_a_user(daemon: Daemon, containerd: Containerd, image: tuple[Image, str]) -> None:
    made, reference = image
    containerd.forget(reference)
    before = served(daemon)
    status, output = containerd.ctr_pull(
        reference, "--platform", f"linux/{NATIVE}", "--user", f"{ANN}:{ANNS_PASSWORD}"
    )
    assert status == 0, output
    assert served(daemon) - before >= made.size()


def test_answers_by_whose_credential_it_is(
    registry: Registry, daemon: Daemon, image: tuple[Image, str], figure: Callable[[str, object], None]
) -> None:
    made = image[0]
    ann = (ANN, ANNS_PASSWORD)
    for kind, reference in [("manifests", "v1"), ("manifests", made.index.digest), ("blobs", made.layers[0].digest)]:
        path = f"/v2/team/locked/{kind}/{reference}?ns={registry.host}"
        asking = {"ann": ann, "stranger": STRANGER, "nobody": NOBODY}
        answers = {name: status_of(daemon, path, who) for name, who in asking.items()}
        figure(f"caller mode, {kind} by {'tag' if reference == 'v1' else 'digest'}", answers)
        assert answers == {"ann": 200, "stranger": 404, "nobody": 401}


def test_a_revocation_takes_effect_within_twice_the_permissions_life(
    cluster: Cluster, registry: Registry, daemon: Daemon, image: tuple[Image, str]
) -> None:
    path = f"/v2/team/locked/blobs/{image[0].layers[0].digest}?ns={registry.host}"
    ann = (ANN, ANNS_PASSWORD)
    assert status_of(daemon, path, ann) == 200
    users = cluster.directory / "locked" / "htpasswd"
    try:
        users.write_text(htpasswd(NODE))
        time.sleep(2 * PERMIT_TTL_MS / 1000)
        assert status_of(daemon, path, ann) == 404
    finally:
        users.write_text(htpasswd(ANN, NODE))


@pytest.mark.parametrize(("outage", "known"), [("deny", 404), ("allow-known", 200)])
def test_an_outage_lets_in_who_is_known_if_so_configured(
    cluster: Cluster, images: ImageBuilder, figure: Callable[[str, object], None], outage: str, known: int
) -> None:
    name = f"passing-{outage}"
    registry = Registry(cluster.machine(name), cluster.directory / name, cluster.logs, htpasswd(ANN, NODE))
    made = images.build(name, [Layer(3_010, 2, True)])
    push(made, cluster.origin, registry.reference("team/passing"), f"{ANN}:{ANNS_PASSWORD}")
    machine = cluster.machine(f"node-{outage}")
    password = cluster.directory / f"password-{outage}"
    password.write_text(NODES_PASSWORD)
    keys = f'access = "caller"\nusername = "{NODE}"\npassword_file = "{password}"'
    settings = dataclasses.replace(
        cluster.settings(machine, [machine.address]),
        registry=registry.host,
        registry_extra=keys,
        extra=f'[access]\npermit_ttl_ms = 500\nrefusal_ttl_ms = 100\noutage = "{outage}"\n',
    )
    daemon = cluster.daemon(machine, settings).start()
    path = f"/v2/team/passing/blobs/{made.layers[0].digest}?ns={registry.host}"
    asking = {"ann": (ANN, ANNS_PASSWORD), "stranger": STRANGER, "nobody": NOBODY}
    assert {who: status_of(daemon, path, asking[who]) for who in asking} == {"ann": 200, "stranger": 404, "nobody": 401}
    registry.close()
    time.sleep(1)
    answers = {who: status_of(daemon, path, asking[who]) for who in asking}
    figure(f"caller mode, the registry is down, outage = {outage}", answers)
    assert answers["ann"] == known
    assert answers["stranger"] in (404, 502, 503) and answers["nobody"] == 401
    daemon.close()


def test_no_log_shows_a_credential_at_any_level(
    daemon: Daemon, containerd: Containerd, image: tuple[Image, str]
) -> None:
    """The last of this module: the daemon has been logging at its most talkative all the while."""
    output = daemon.output()
    assert "TRACE" in output and "DEBUG" in output
    secrets = [ANNS_PASSWORD, STRANGER[1], NODES_PASSWORD]
    secrets += [basic(ANN, ANNS_PASSWORD), basic(*STRANGER), basic(NODE, NODES_PASSWORD)]
    assert [secret for secret in secrets if secret in output] == []
