"""Amazon ECR Public: with an account's token where there are credentials, as anybody where there are none."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from rig.cluster import Cluster, Node
from rig.ecr import Ecr
from rig.images import Image, ImageBuilder, Layer
from rig.windlass import MIRROR

WITHOUT_OBJECTS = True

NAME = "public.ecr.aws"
TOKEN_LIFE_S = 3_600.0
URL_LIFE_S = 3_600

SETTINGS = {"with an account": {}, "as anybody": {"AWS_ACCESS_KEY_ID": "", "AWS_EC2_METADATA_DISABLED": "true"}}


@pytest.fixture(scope="module")
def image(images: ImageBuilder) -> Image:
    return images.build("ecr-public", [Layer(9_100, 24, False), Layer(9_101, 1, True)])


@pytest.fixture(scope="module")
def ecr(cluster: Cluster, image: Image) -> Iterator[Ecr]:
    stub = Ecr(cluster, image, TOKEN_LIFE_S, URL_LIFE_S, public=True)
    yield stub
    stub.close()


@pytest.fixture(scope="module")
def nodes(cluster: Cluster, ecr: Ecr) -> dict[str, Node]:
    """One node with AWS credentials and one without; they do not know each other."""
    made = {}
    for number, (name, environment) in enumerate(SETTINGS.items()):
        machine = cluster.machine(f"node{number}")
        settings = replace(
            cluster.settings(machine, [machine.address]),
            extra=f'[[registry.origins]]\nname = "{NAME}"\nendpoint = "{ecr.url}"\n',
            environment={"AWS_ENDPOINT_URL_ECR_PUBLIC": ecr.url, **environment},
        )
        daemon = cluster.daemon(machine, settings).start()
        containerd = cluster.containerd(machine)
        containerd.ask(NAME, MIRROR)
        made[name] = Node(machine, daemon, containerd)
    return made


@pytest.mark.parametrize("who", SETTINGS)
def test_a_node_pulls(
    ecr: Ecr, nodes: dict[str, Node], image: Image, figure: Callable[[str, object], None], who: str
) -> None:
    node, before = nodes[who], ecr.object_bytes()
    node.containerd.pull(f"{NAME}/team/app:v1")
    assert node.containerd.is_unpacked(f"{NAME}/team/app:v1")
    sent = ecr.object_bytes() - before
    asked = [record for record in ecr.records("ecr") if record["client"] == node.machine.address]
    tokens = sum(record["method"] == "POST" for record in asked)
    figure(f"ECR Public {who}: object store ÷ image, API tokens", (sent / image.size(), tokens))
    assert sent == image.size()
    assert tokens == (1 if who == "with an account" else 0)
    bearers = {record["headers"].get("authorization", "") for record in asked if record["status"] == 307}
    kind = "account" if who == "with an account" else "anybody"
    assert bearers and all(bearer.startswith(f"Bearer {kind}-") for bearer in bearers), bearers


def test_the_object_store_never_sees_a_credential(ecr: Ecr, nodes: dict[str, Node]) -> None:
    records = ecr.records("store")
    shown = {record["headers"].get("authorization", "").partition(" ")[2] for record in ecr.records("ecr", "GET")} - {""}
    assert records and shown
    assert not any("authorization" in record["headers"] for record in records)
    assert not any(secret in json.dumps(records) for secret in shown)
