"""Wrong input and broken surroundings: each is said clearly, and no content is lost by it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable

import pytest
from rig.cluster import Cluster, Node
from rig.images import MIB, Image, ImageBuilder, Layer, push
from rig.processes import wait_until
from rig.registry import bytes_by_blob
from rig.windlass import Authority, Daemon

EXIT_FAILED = 1
EXIT_CONFIGURATION = 64
SMALL_DISK_MIB = 48
NOBODY = 65534


@pytest.fixture(scope="module")
def nodes(cluster: Cluster) -> list[Node]:
    return cluster.nodes(2)


@pytest.fixture(scope="module")
def image(cluster: Cluster, images: ImageBuilder) -> tuple[Image, str]:
    made = images.build("bad-input", [Layer(500, 80, False), Layer(501, 6, True)])
    reference = cluster.registry.reference("bad/input")
    push(made, cluster.origin, reference)
    return made, reference


def spare(cluster: Cluster, name: str, /, **changes) -> Daemon:
    """A daemon on a machine of its own with changed settings, not started."""
    machine = cluster.machine(name)
    settings = cluster.settings(machine, [machine.address])
    return cluster.daemon(machine, dataclasses.replace(settings, **changes))


# What a daemon refuses to start with.


def test_unknown_key(cluster: Cluster, figure: Callable[[str, object], None]) -> None:
    daemon = spare(cluster, "key")
    daemon.config.write_text(daemon.config.read_text().replace("[store]", "[store]\nbudgit = 1"))
    status, output = daemon.run_to_its_end()
    figure("unknown key", output.strip())
    assert status == EXIT_CONFIGURATION
    assert "store.budgit" in output and "store.budget" in output


def test_port_in_use(cluster: Cluster, nodes: list[Node], figure: Callable[[str, object], None]) -> None:
    settings = dataclasses.replace(nodes[0].daemon.settings, data_dir=cluster.directory / "second" / "store")
    second = Daemon(nodes[0].machine, cluster.directory / "second", cluster.logs / "second", settings)
    status, output = second.run_to_its_end()
    figure("port in use", output.strip().splitlines()[-1])
    assert status == EXIT_FAILED
    assert "listens there already" in output and ":510" in output


def test_unwritable_data_directory(cluster: Cluster, figure: Callable[[str, object], None]) -> None:
    directory = cluster.directory / "owned-by-root"
    directory.mkdir(mode=0o755)
    daemon = spare(cluster, "data", data_dir=directory)
    for its_own in (daemon.settings.certificates / "tls.key", daemon.socket.parent):
        shutil.chown(its_own, NOBODY)
    status, output = daemon.run_to_its_end(["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"])
    figure("unwritable data directory", output.strip().splitlines()[-1])
    assert status == EXIT_FAILED
    assert str(directory) in output and "ermission denied" in output


# Strangers.


def strangers_are_refused(cluster: Cluster, nodes: list[Node], stranger: Daemon, image: tuple[Image, str]) -> str:
    """Starts `stranger`; nobody must count it a peer, it must count none, and its pulls must work all the same."""
    before = [node.daemon.peers() for node in nodes]
    stranger.start()
    wait_until(lambda: "refus" in stranger.output() or "certificate" in stranger.output(), "it says why", 30)
    assert [node.daemon.peers() for node in nodes] == before
    assert stranger.peers() == 0
    containerd = cluster.containerd(stranger.machine)
    containerd.ask(cluster.registry.host, "http://127.0.0.1:5100")
    containerd.pull(image[1])
    assert containerd.is_unpacked(image[1])
    said = [line for line in stranger.output().splitlines() if "refus" in line or "certificate" in line]
    stranger.process.terminate()
    return said[0]


def test_wrong_ca(
    cluster: Cluster, nodes: list[Node], image: tuple[Image, str], figure: Callable[[str, object], None]
) -> None:
    other = Authority(cluster.directory / "other-ca")
    peers = [node.machine.address for node in nodes]
    stranger = spare(cluster, "ca", peers=peers, certificates=other.issue("ca"))
    figure("wrong CA", strangers_are_refused(cluster, nodes, stranger, image))


def test_peer_of_another_cluster(
    cluster: Cluster, nodes: list[Node], image: tuple[Image, str], figure: Callable[[str, object], None]
) -> None:
    peers = [node.machine.address for node in nodes]
    certificates = cluster.authority.issue("alien", cluster="elsewhere")
    stranger = spare(cluster, "alien", peers=peers, certificates=certificates, cluster="elsewhere")
    figure("peer of another cluster", strangers_are_refused(cluster, nodes, stranger, image))


# Requests that cannot be served.


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        pytest.param("/v2/bad/input/blobs/sha256:zz?ns={registry}", 400, "DIGEST_INVALID", id="malformed digest"),
        pytest.param("/v2/bad/input/manifests/v1?ns=registry.example", 404, None, id="unknown ns"),
        pytest.param("/v2/bad/input/manifests/none?ns={registry}", 404, "MANIFEST_UNKNOWN", id="missing tag"),
        pytest.param(f"/v2/bad/input/blobs/sha256:{'0' * 64}?ns={{registry}}", 404, "BLOB_UNKNOWN", id="missing blob"),
        pytest.param("/v2/no/such/manifests/v1?ns={registry}", 404, None, id="missing repository"),
    ],
)
def test_registry_requests(
    cluster: Cluster,
    nodes: list[Node],
    image: tuple[Image, str],
    figure: Callable[[str, object], None],
    request: pytest.FixtureRequest,
    path: str,
    status: int,
    code: str | None,
) -> None:
    answered, body = nodes[0].daemon.status(path.format(registry=cluster.registry.host))
    figure(request.node.callspec.id, f"{answered} {body.strip()}")
    assert answered == status
    errors = json.loads(body)["errors"]
    assert errors[0]["message"]
    assert code is None or errors[0]["code"] == code


def test_range_beyond_the_end(
    cluster: Cluster, nodes: list[Node], image: tuple[Image, str], figure: Callable[[str, object], None]
) -> None:
    layer = image[0].layers[1]
    path = f"/v2/bad/input/blobs/{layer.digest}?ns={cluster.registry.host}"
    answered, body = nodes[0].daemon.status(path, "-H", f"Range: bytes={layer.size}-")
    figure("range beyond the end", f"{answered} {body.strip()}")
    assert answered == 416


@pytest.mark.parametrize(
    ("source", "words"),
    [
        pytest.param("s3://models/none.bin", ["models/none.bin"], id="missing object"),
        pytest.param("s3://models/none/", ["models/none/"], id="missing prefix"),
        pytest.param("s3://nobody/model/", ["nobody"], id="missing bucket"),
        pytest.param("s3://forbidden/model/", ["forbidden"], id="no permission"),
        pytest.param("http://models/none", ["s3://"], id="not an S3 address"),
    ],
)
def test_fetches(
    cluster: Cluster,
    nodes: list[Node],
    figure: Callable[[str, object], None],
    request: pytest.FixtureRequest,
    source: str,
    words: list[str],
) -> None:
    cluster.objects.upload("models", {"present": 10})
    status, output = nodes[0].daemon.fetch(source, str(cluster.directory / "nothing"))
    figure(request.node.callspec.id, f"exit {status}: {output.strip()}")
    assert status in (1, 2)
    assert all(word in output for word in words)


# A disk that is full.


def test_a_full_disk_fails_no_pull(
    cluster: Cluster, nodes: list[Node], image: tuple[Image, str], figure: Callable[[str, object], None]
) -> None:
    made, reference = image
    daemon = spare(cluster, "full")
    daemon.settings.data_dir.mkdir(parents=True)
    # The file system is mounted where only the daemon sees it, so it ends with the daemon.
    mount = f'mount -t tmpfs -o size={SMALL_DISK_MIB}m none {daemon.settings.data_dir} && exec "$@"'
    daemon.start(["sh", "-c", mount, "sh"])
    containerd = cluster.containerd(daemon.machine)
    containerd.ask(cluster.registry.host, "http://127.0.0.1:5100")
    before = len(cluster.registry.settled_responses())

    containerd.pull(reference)

    assert containerd.is_unpacked(reference)
    responses = cluster.registry.settled_responses()[before:]
    sent = sum(bytes_by_blob(responses).values())
    figure(
        f"disk of {SMALL_DISK_MIB} MiB, image of {made.size() // MIB} MiB: registry bytes ÷ image", sent / made.size()
    )
    said = [line for line in daemon.output().splitlines() if "space" in line.lower()]
    figure("full disk", said[0] if said else "(silent)")
    assert said, "a full disk must be said"
    assert daemon.is_ready()


def test_a_full_destination_is_an_error_and_costs_s3_nothing(
    cluster: Cluster, figure: Callable[[str, object], None]
) -> None:
    sizes = {f"full/{number}": 24 * MIB for number in range(4)}
    cluster.objects.upload("models", sizes)
    before = cluster.objects.object_bytes()
    destination = cluster.directory / "full-destination"
    destination.mkdir()
    daemon = spare(cluster, "place")
    mount = f'mount -t tmpfs -o size={SMALL_DISK_MIB}m none {destination} && exec "$@"'
    daemon.start(["sh", "-c", mount, "sh"])
    status, output = daemon.fetch("s3://models/full/", str(destination))
    figure("full destination", f"exit {status}: {output.strip().splitlines()[-1]}")
    assert status == EXIT_FAILED
    assert "space" in output.lower()

    status, output = daemon.fetch("s3://models/full/", str(cluster.directory / "not-full"))
    assert status == 0, output
    assert cluster.objects.object_bytes() - before == sum(sizes.values()), "what was fetched is not lost"
