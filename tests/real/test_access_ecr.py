"""`access = "caller"` in front of ECR: each pull is judged by the token that the kubelet's credential provider got."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from rig.cluster import Cluster
from rig.containerd import Containerd, PullError
from rig.containerd2 import PLAIN_FORMS, containerd_of
from rig.ecr import Ecr
from rig.images import Image, ImageBuilder, Layer
from rig.windlass import MIRROR, Daemon

WITHOUT_OBJECTS = True

NAME = "123456789012.dkr.ecr.us-east-1.amazonaws.com"
PERMIT_TTL_MS = 1_500
TOKEN_LIFE_S = 3_600.0
URL_LIFE_S = 3_600

SIGNATURE = "AWS4-HMAC-SHA256 Credential=AKIDPOD/20260101/us-east-1/ecr/aws4_request, SignedHeaders=host, Signature=x"


@pytest.fixture(scope="module")
def image(images: ImageBuilder) -> Image:
    return images.build("ecr-caller", [Layer(9_300, 5, True)])


@pytest.fixture(scope="module")
def ecr(cluster: Cluster, image: Image) -> Iterator[Ecr]:
    stub = Ecr(cluster, image, TOKEN_LIFE_S, URL_LIFE_S)
    yield stub
    stub.close()


@pytest.fixture(scope="module")
def daemon(cluster: Cluster, ecr: Ecr) -> Daemon:
    machine = cluster.machine("node")
    registry = f'[[registry.origins]]\nname = "{NAME}"\nendpoint = "{ecr.url}"\naccess = "caller"\n'
    access = f"[access]\npermit_ttl_ms = {PERMIT_TTL_MS}\nrefusal_ttl_ms = 100\n"
    settings = replace(
        cluster.settings(machine, [machine.address]), extra=registry + access, environment={"AWS_ENDPOINT_URL_ECR": ecr.url}
    )
    return cluster.daemon(machine, settings).start()


@pytest.fixture(scope="module", params=PLAIN_FORMS)
def containerd(cluster: Cluster, daemon: Daemon, request: pytest.FixtureRequest) -> Iterator[Containerd]:
    directory = cluster.directory / f"containerd-{request.param_index}"
    started = containerd_of(request.param, daemon.machine, directory, cluster.logs)
    started.ask(NAME, MIRROR)
    yield started
    started.close()


def token_of_a_pod(ecr: Ecr, daemon: Daemon) -> str:
    """What the kubelet's credential provider gets: ECR's password for the user `AWS`."""
    headers = {"X-Amz-Target": "AmazonEC2ContainerRegistry_V20150921.GetAuthorizationToken", "X-Amz-Date": "x",
               "Authorization": SIGNATURE}
    options = [part for name, value in headers.items() for part in ("-H", f"{name}: {value}")]
    answer = json.loads(daemon.machine.run(["curl", "-sf", "-d", "{}", *options, f"{ecr.url}/"]).stdout)
    token = answer["authorizationData"][0]["authorizationToken"]
    return base64.b64decode(token).decode().removeprefix("AWS:")


def test_a_pod_pulls_with_its_own_token_and_nobody_else_does(
    ecr: Ecr, daemon: Daemon, containerd: Containerd, image: Image, figure: Callable[[str, object], None]
) -> None:
    reference = f"{NAME}/team/app:v1"
    token = token_of_a_pod(ecr, daemon)
    before = daemon.metric("windlass_served_bytes_total", face="Registry")
    containerd.pull(reference, "AWS", token)
    assert containerd.is_unpacked(reference)
    assert daemon.metric("windlass_served_bytes_total", face="Registry") - before >= image.size()
    # A byte is how the size of a blob, and a caller's right to it, are learnt where HEAD is refused.
    sent = sum(size for record in ecr.records("store", "GET") if (size := record["bytes"]) > 1)
    assert sent <= image.size(), "once for all"
    for who in (("AWS", "guessed"), ("", "")):
        containerd.forget(reference)
        before = daemon.metric("windlass_served_bytes_total", face="Registry")
        with pytest.raises(PullError):
            containerd.pull(reference, *who)
        assert daemon.metric("windlass_served_bytes_total", face="Registry") == before
    path = f"/v2/team/app/blobs/{image.layers[0].digest}?ns={NAME}"
    callers = {"pod": f"AWS:{token}", "stranger": "AWS:guessed", "nobody": ""}
    answers = {name: daemon.status(path, *(["-u", who] if who else []))[0] for name, who in callers.items()}
    figure(f"ECR, caller mode, {type(containerd).__name__}: answers", answers)
    assert answers == {"pod": 200, "stranger": 404, "nobody": 401}
    # Its time is over: ECR answers 403, and the mirror 404, which sends the pull there.
    daemon.machine.get(f"{ecr.url}/revoke")
    time.sleep(2 * PERMIT_TTL_MS / 1000)
    assert daemon.status(path, "-u", f"AWS:{token}")[0] == 404
    again = token_of_a_pod(ecr, daemon)
    assert daemon.status(path, "-u", f"AWS:{again}")[0] == 200
