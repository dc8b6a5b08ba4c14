"""Origins are reached through the proxy that the environment names, registries and S3 alike, and not where it says no."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rig.cluster import Cluster
from rig.images import ImageBuilder, Layer, push
from rig.processes import wait_until

PORT = 3128
PROXY = Path(__file__).parent / "rig" / "forward_proxy.py"


@pytest.mark.parametrize("exempt", [False, True], ids=["proxied", "no_proxy"])
def test_the_environment_names_the_way(cluster: Cluster, images: ImageBuilder, exempt: bool) -> None:
    name = "exempt" if exempt else "proxied"
    image = images.build(name, [Layer(7_000 + exempt, 1, False)])
    push(image, cluster.origin, cluster.registry.reference(f"team/{name}"))
    cluster.objects.upload("models", {f"{name}/a": 100_000})
    log = cluster.directory / f"{name}.txt"
    port = PORT + exempt
    proxy = cluster.origin.start([sys.executable, str(PROXY), str(port), str(log)], cluster.logs / f"{name}.log")
    address = f"http://{cluster.origin.address}:{port}"
    wait_until(lambda: cluster.origin.run(["curl", "-s", address], check=False).returncode in (0, 52), "it runs", 30, proxy)
    machine = cluster.machine(name)
    environment = {"HTTP_PROXY": address, "http_proxy": address}
    if exempt:
        environment["NO_PROXY"] = cluster.origin.address
    settings = replace(cluster.settings(machine, [machine.address]), environment=environment)
    daemon = cluster.daemon(machine, settings).start()
    log.write_text("")
    try:
        digest = image.layers[0].digest
        status, _ = daemon.status(f"/v2/team/{name}/blobs/{digest}?ns={cluster.registry.host}", "-o", "/dev/null")
        assert status == 200
        fetched, output = daemon.fetch(f"s3://models/{name}/a", str(cluster.directory / f"{name}-a"))
        assert fetched == 0, output
        seen = log.read_text()
        assert (digest in seen) == (f"/models/{name}/a" in seen) == (not exempt), seen
    finally:
        daemon.close()
        proxy.terminate()
