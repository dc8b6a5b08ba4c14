"""`access = "caller"` in front of a registry with a token service, for containerd in all its forms."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rig.cluster import Cluster
from rig.containerd import Containerd, PullError
from rig.containerd2 import PLAIN_FORMS, containerd_of
from rig.images import Image, ImageBuilder, Layer
from rig.processes import wait_until
from rig.windlass import MIRROR, Daemon

WITHOUT_OBJECTS = True

PORT = 5701
SERVER = Path(__file__).parent / "rig" / "token_registry.py"
REPOSITORY = "team/app"
ANN, BOB, NODE = ("ann", "anns-own-secret"), ("bob", "bobs-own-secret"), ("node", "nodes-own-secret")
USERS = {":".join(ANN): [REPOSITORY], ":".join(BOB): ["team/other"], ":".join(NODE): [REPOSITORY, "team/other"]}

CALLER_MODE = """
[access]
refusal_ttl_ms = 500

[log]
level = "trace"
"""


@pytest.fixture(scope="module")
def image(images: ImageBuilder) -> Image:
    return images.build("bearer", [Layer(9_200, 3, True), Layer(9_201, 1, False)])


@pytest.fixture(scope="module")
def registry(cluster: Cluster, image: Image) -> str:
    """`host:port` of the registry."""
    cluster.directory.mkdir(parents=True, exist_ok=True)
    machine = cluster.origin
    host = f"{machine.address}:{PORT}"
    log = cluster.directory / "token-registry.jsonl"
    arguments = [PORT, machine.address, image.layout, log, json.dumps(USERS)]
    process = machine.start([sys.executable, str(SERVER), *map(str, arguments)], cluster.logs / "token-registry.log")
    cluster.on_close(process.terminate)
    wait_until(lambda: bool(machine.get(f"http://{host}/v2/", check=False)), "the registry answers", 30, process)
    return host


@pytest.fixture(scope="module")
def daemon(cluster: Cluster, registry: str) -> Daemon:
    machine = cluster.machine("node")
    password = cluster.directory / "password"
    password.write_text(NODE[1])
    keys = f'access = "caller"\nusername = "{NODE[0]}"\npassword_file = "{password}"'
    settings = cluster.settings(machine, [machine.address])
    return cluster.daemon(machine, replace(settings, registry=registry, registry_extra=keys, extra=CALLER_MODE)).start()


@pytest.fixture(scope="module", params=PLAIN_FORMS)
def containerd(
    cluster: Cluster, registry: str, daemon: Daemon, request: pytest.FixtureRequest
) -> Iterator[Containerd]:
    directory = cluster.directory / f"containerd-{request.param_index}"
    started = containerd_of(request.param, daemon.machine, directory, cluster.logs)
    started.ask(registry, MIRROR)
    yield started
    started.close()


def served(daemon: Daemon) -> float:
    return daemon.metric("windlass_served_bytes_total", face="Registry")


def test_each_caller_gets_what_the_token_service_grants(
    registry: str, daemon: Daemon, containerd: Containerd, image: Image, figure: Callable[[str, object], None]
) -> None:
    reference = f"{registry}/{REPOSITORY}:v1"
    before = served(daemon)
    containerd.pull(reference, *ANN)
    assert containerd.is_unpacked(reference)
    assert served(daemon) - before >= image.size(), "it came through the mirror"
    containerd.forget(reference)
    before, refusals = served(daemon), {}
    for name, who in {"another's": BOB, "a wrong password": (ANN[0], "guessed"), "none": ("", "")}.items():
        with pytest.raises(PullError) as refused:
            containerd.pull(reference, *who)
        refusals[name] = str(refused.value).split("grpc-message:")[-1].strip()[:120]
    figure(f"{type(containerd).__name__}, Bearer, caller mode: refusals", refusals)
    assert served(daemon) == before


def test_no_log_shows_a_credential(daemon: Daemon, containerd: Containerd) -> None:
    output = daemon.output()
    assert "TRACE" in output
    assert [secret for _, secret in (ANN, BOB, NODE) if secret in output] == []
