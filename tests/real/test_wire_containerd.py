"""`windlass wire` and `unwire` with a real containerd: what is written is what it reads, and nothing of it stays."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rig.cluster import Cluster, Node
from rig.images import ImageBuilder, Layer, push
from rig.processes import wait_until
from rig.registry import bytes_by_blob
from rig.windlass import binary, environment

WITHOUT_OBJECTS = True


@pytest.fixture(scope="module")
def node(cluster: Cluster) -> Node:
    """A node whose containerd was never told of the mirror."""
    node = cluster.nodes(1, containerd=False)[0]
    node.containerd = cluster.containerd(node.machine)
    return node


def windlass(node: Node, command: str, *arguments: str) -> tuple[int, str]:
    argv = [binary(), command, "--certs-d", str(node.containerd.certs), *arguments]
    done = node.machine.run(argv, check=False, env=environment())
    return done.returncode, (done.stdout + done.stderr).decode()


def picture(directory: Path) -> dict[str, tuple[int, bytes | None]]:
    """Every path below `directory` with its mode and, for a file, its bytes."""
    return {
        str(path): (path.lstat().st_mode, path.read_bytes() if path.is_file() else None)
        for path in sorted(directory.rglob("*"))
    }


def test_wire_and_unwire_leave_foreign_entries_as_they_were(cluster: Cluster, node: Node) -> None:
    certs, registry = node.containerd.certs, cluster.registry.host
    for name, text in {
        "quay.io": 'server = "https://quay.io"\n[host."https://mirror.example"]\n  capabilities = ["pull"]',
        registry: f'server = "http://{registry}"\n\n# by the platform team\n[host."http://{registry}"]\n',
    }.items():
        (certs / name).mkdir()
        (certs / name / "hosts.toml").write_text(text)
    (certs / "certificates.example").mkdir()
    (certs / "certificates.example" / "ca.crt").write_text("a certificate")
    before = picture(certs)

    status, output = windlass(node, "wire", "--config", str(node.daemon.config))
    assert status == 0, output
    after = picture(certs)
    assert {path for path in after if after[path] != before.get(path)} == {str(certs / registry / "hosts.toml")}
    status, output = windlass(node, "wire", "--config", str(node.daemon.config), "--json")
    assert [change["outcome"] for change in json.loads(output)["changes"]] == ["unchanged"]

    assert windlass(node, "unwire")[0] == 0
    assert picture(certs) == before
    for name in ("quay.io", registry):
        (certs / name / "hosts.toml").unlink()
        (certs / name).rmdir()


def test_a_pull_goes_through_what_wire_wrote(cluster: Cluster, node: Node, images: ImageBuilder) -> None:
    image = images.build("wired", [Layer(900, 6, True), Layer(901, 3, False)])
    reference = cluster.registry.reference("wire/image")
    push(image, cluster.origin, reference)
    assert windlass(node, "wire", "--config", str(node.daemon.config))[0] == 0

    node.containerd.pull(reference)

    assert node.containerd.is_unpacked(reference)
    responses = cluster.registry.settled_responses()
    assert bytes_by_blob(responses) == image.blobs()
    blobs = [response for response in responses if response.blob()]
    assert all(response.user_agent.startswith("windlass") for response in blobs)


def test_nothing_is_written_before_the_mirror_answers(cluster: Cluster, node: Node) -> None:
    assert windlass(node, "unwire")[0] == 0
    before = picture(node.containerd.certs)
    node.daemon.close()
    status, output = windlass(node, "wire", "--config", str(node.daemon.config), "--wait", "1s")
    assert status == 1 and "nothing was written" in output
    assert picture(node.containerd.certs) == before
    node.daemon.start()


def test_held_wiring_follows_the_mirror_and_ends_with_the_command(cluster: Cluster, node: Node) -> None:
    hosts = node.containerd.certs / cluster.registry.host / "hosts.toml"
    before = picture(node.containerd.certs)
    argv = [binary(), "wire", "--hold", "--config", str(node.daemon.config), "--certs-d", str(node.containerd.certs)]
    held = node.machine.start(argv, cluster.logs / "hold.log", environment())
    try:
        wait_until(hosts.exists, "it is wired", 30, held)
        node.daemon.process.kill()
        wait_until(lambda: not hosts.exists(), "a mirror that is gone is taken out", 60, held)
        node.daemon.start()
        wait_until(hosts.exists, "it is wired again", 30, held)
    finally:
        assert held.terminate() == 0
    assert picture(node.containerd.certs) == before
