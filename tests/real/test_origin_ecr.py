"""Amazon ECR: four nodes pull an image while its tokens and presigned URLs end; nobody hears a credential it is not for."""

from __future__ import annotations

import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace

import pytest
from rig.cluster import Cluster, Node, at_once
from rig.ecr import Ecr
from rig.images import MIB, Image, ImageBuilder, Layer
from rig.processes import wait_until
from rig.windlass import MIRROR, wait_until_joined

NODES = 4
NAME = "123456789012.dkr.ecr.us-east-1.amazonaws.com"

LAYERS = [512] * 4 if os.environ.get("WINDLASS_RIG_FULL") else [64] * 4
TOKEN_LIFE_S = 8.0
URL_LIFE_S = 5
SECONDS = 20.0
"""How long the origin's link makes the pull last at least: past the end of two tokens and of several URLs."""

SECRET_KEY = "windlass-rig-secret-key-never-to-be-seen"


@pytest.fixture(scope="module")
def image(images: ImageBuilder) -> Image:
    return images.build("ecr", [Layer(9_000 + number, size, False) for number, size in enumerate(LAYERS)])


@pytest.fixture(scope="module")
def ecr(cluster: Cluster, image: Image):
    stub = Ecr(cluster, image, TOKEN_LIFE_S, URL_LIFE_S)
    yield stub
    stub.close()


@pytest.fixture(scope="module")
def nodes(cluster: Cluster, ecr: Ecr) -> list[Node]:
    machines = [cluster.machine(f"node{number}") for number in range(1, NODES + 1)]
    addresses = [machine.address for machine in machines]
    extra = f'[[registry.origins]]\nname = "{NAME}"\nendpoint = "{ecr.url}"\n'
    environment = {
        "AWS_ENDPOINT_URL_ECR": ecr.url,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        # The link is slow on purpose, and there is no upstream to go to.
        "WINDLASS_REGISTRY__FIRST_BYTE_DEADLINE_MS": "120000",
        # The most talkative there is: the logs are searched for secrets.
        "RUST_LOG": "trace,quinn=info,quinn_proto=info,foca=info,rustls=info",
    }
    settings = [replace(cluster.settings(m, addresses), extra=extra, environment=environment) for m in machines]
    daemons = [cluster.daemon(machine, chosen) for machine, chosen in zip(machines, settings, strict=True)]
    at_once(*[daemon.start for daemon in daemons])
    wait_until_joined(daemons)
    made = []
    for machine, daemon in zip(machines, daemons, strict=True):
        containerd = cluster.containerd(machine)
        containerd.ask(NAME, MIRROR)
        made.append(Node(machine, daemon, containerd))
    return made


def apart(times: list[float]) -> float:
    """The shortest time between two."""
    times = sorted(times)
    return min((later - earlier for earlier, later in zip(times, times[1:], strict=False)), default=math.inf)


def test_four_nodes_pull_across_the_end_of_tokens_and_urls(
    cluster: Cluster, ecr: Ecr, nodes: list[Node], image: Image, figure: Callable[[str, object], None]
) -> None:
    cluster.origin.limit_egress(max(8, int(image.size() * 8 / SECONDS / 1e6)))
    started = time.monotonic()
    at_once(*[lambda node=node: node.containerd.pull(f"{NAME}/team/app:v1") for node in nodes])
    seconds = time.monotonic() - started
    cluster.origin.unlimit_egress()

    assert all(node.containerd.is_unpacked(f"{NAME}/team/app:v1") for node in nodes)
    figure(f"ECR: {image.size() // MIB} MiB to {NODES} nodes: seconds, token life, URL life",
           (round(seconds, 1), TOKEN_LIFE_S, URL_LIFE_S))
    assert seconds > TOKEN_LIFE_S, "the pull was over before a token ended: slow the origin"
    sent = sum(record["bytes"] for record in ecr.records("store") if record["status"] in (200, 206))
    figure("ECR: object store's bytes ÷ image", sent / image.size())
    names = ("hedges", "resumed_bodies", "retries")
    extra = {n: sum(node.daemon.metric(f"windlass_origin_{n}_total", origin=NAME) for node in nodes) for n in names}
    figure("ECR: second requests, resumed bodies, retries", tuple(extra.values()))
    assert image.size() <= sent <= 1.1 * image.size()


def test_one_token_per_node_and_half_life(ecr: Ecr, nodes: list[Node], figure: Callable[[str, object], None]) -> None:
    by_node = defaultdict(list)
    for record in ecr.records("ecr", "POST"):
        assert record["status"] == 200
        by_node[record["client"]].append(record["at"])
    figure("ECR: token requests by node", sorted(len(times) for times in by_node.values()))
    # One in the air at a time, and none while the last one has half of its life left.
    assert all(apart(times) >= 0.45 * TOKEN_LIFE_S for times in by_node.values()), by_node
    asked = [r for r in ecr.records("ecr") if r["method"] != "POST"]
    figure("ECR: registry answers by status",
           {s: sum(r["status"] == s for r in asked) for s in sorted({r["status"] for r in asked})})


def test_one_redirect_per_layer_and_fetcher_while_it_lasts(
    ecr: Ecr, nodes: list[Node], image: Image, figure: Callable[[str, object], None]
) -> None:
    redirects = defaultdict(list)
    for record in ecr.records("ecr", "GET"):
        if record["status"] == 307:
            redirects[record["client"], record["path"]].append(record["at"])
    figure("ECR: redirects, reads at the store",
           (sum(map(len, redirects.values())), len(ecr.records("store", "GET"))))
    # A URL is not used in the last tenth of its life.
    assert all(apart(times) >= 0.8 * URL_LIFE_S - 1 for times in redirects.values()), redirects


def test_a_token_that_ends_before_its_time_is_replaced_once(ecr: Ecr, nodes: list[Node]) -> None:
    node = nodes[0]
    tag = f"/v2/team/app/manifests/v1?ns={NAME}"

    def asks() -> list[tuple[str, int]]:
        """What the registry and its token service are asked for one more manifest."""
        before = len(ecr.records("ecr"))
        assert node.daemon.status(tag)[0] == 200
        time.sleep(1.1)  # what the tag stands for is remembered for one second
        return [(r["method"], r["status"]) for r in ecr.records("ecr")[before:]]

    wait_until(lambda: ("POST", 200) in asks(), "the token is new", 30)
    node.machine.get(f"{ecr.url}/revoke")
    # A refusal is believed to be the token's fault once a quarter of its life is over; it is renewed at half of it.
    time.sleep(TOKEN_LIFE_S * 3 / 8 - 1.1)
    asked = asks()
    assert asked[-2:] == [("POST", 200), ("HEAD", 200)], asked
    assert asked[:-2] in ([], [("HEAD", 403)]), "on a busy machine half of its life may be over"


def test_the_object_store_never_sees_a_credential(ecr: Ecr, nodes: list[Node]) -> None:
    records = ecr.records("store")
    assert records
    passwords = {r["headers"]["authorization"] for r in ecr.records("ecr", "GET") if "authorization" in r["headers"]}
    assert passwords
    for record in records:
        assert "authorization" not in record["headers"]
        assert not any(password.removeprefix("Basic ") in json.dumps(record) for password in passwords)


def test_no_log_at_any_level_shows_a_secret(ecr: Ecr, nodes: list[Node]) -> None:
    tokens = {r["headers"]["authorization"].removeprefix("Basic ") for r in ecr.records("ecr", "GET")
              if "authorization" in r["headers"]}
    urls = {part for r in ecr.records("store") for part in r["query"].split("&") if "Signature=" in part}
    assert tokens and urls
    for node in nodes:
        log = node.daemon.output()
        assert "TRACE" in log, "the log is not at its most talkative"
        for secret in [*tokens, *urls, SECRET_KEY]:
            lines = [line for line in log.splitlines() if secret in line]
            assert not lines, lines[0][:600]
