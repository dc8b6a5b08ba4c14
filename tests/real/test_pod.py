"""The image, and the DaemonSet's pod as the chart renders it, under real containerds on three nodes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from rig.cluster import Cluster, at_once
from rig.images import ImageBuilder, Layer, push
from rig.pods import IMAGE, NodeContainerd, Pod, as_user
from rig.processes import run, wait_until
from rig.registry import bytes_by_blob
from rig.windlass import ADMIN, binary
from test_daemonset import DAEMONSET, go, helm, render

__all__ = ["go", "helm"]

Figure = Callable[[str, object], None]

IMAGE_BYTES_MAX = 40_000_000
VALUES = """
tls: {{ mode: existingSecret }}
config: |
  [[registry.origins]]
  name = "{registry}"
  endpoint = "http://{registry}"
"""


@pytest.fixture(scope="module")
def cluster(cluster: Cluster) -> Cluster:
    """The cluster without an object store, which nothing here reads and which takes long to start."""
    cluster._objects = SimpleNamespace(endpoint="http://127.0.0.1:9")
    return cluster


@pytest.fixture(scope="module")
def archive(cluster: Cluster, figure: Figure) -> Path:
    path = cluster.directory / "windlass.tar"
    done = run([str(DAEMONSET / "image"), binary(), str(path), IMAGE], timeout_s=300)
    figure("image", done.stdout.decode().strip())
    return path


def test_the_image_is_small_and_holds_no_shell(archive: Path, tmp_path: Path) -> None:
    assert archive.stat().st_size <= IMAGE_BYTES_MAX
    layout = tmp_path / "layout"
    layout.mkdir()
    run(["tar", "-C", str(layout), "-xf", str(archive)])
    files = set()
    for blob in (layout / "blobs" / "sha256").iterdir():
        listed = run(["tar", "-tzf", str(blob)], check=False)
        files |= set(listed.stdout.decode().split()) if listed.returncode == 0 else set()
    programs = {name for name in files if "bin/" in name and not name.endswith("/")}
    assert programs == {"usr/local/bin/windlass"}, programs
    assert "etc/ssl/certs/ca-certificates.crt" in files


@pytest.fixture(scope="module")
def pods(cluster: Cluster, archive: Path, helm: str) -> Iterator[list[Pod]]:
    scratch = cluster.directory / "chart"
    scratch.mkdir()
    documents = {one["kind"]: one for one in render(helm, VALUES.format(registry=cluster.registry.host), scratch)}
    config = scratch / "config"
    config.mkdir()
    (config / "windlass.toml").write_text(documents["ConfigMap"]["data"]["windlass.toml"])
    tls = scratch / "tls"
    run([binary(), "certs", "init", "--dir", str(scratch / "ca"), "--cluster", "windlass"])
    tls.mkdir()
    shutil.copy(scratch / "ca" / "ca.crt", tls / "tls.crt")
    shutil.copy(scratch / "ca" / "ca.key", tls / "tls.key")
    machines = [cluster.machine(f"pod{number}") for number in (1, 2, 3)]
    peers = ", ".join(f'"{machine.address}:5103"' for machine in machines)
    spec = documents["DaemonSet"]["spec"]["template"]["spec"]
    assert {one["securityContext"]["runAsUser"] for one in spec["containers"]} == {0}
    as_root = as_user(archive, 0, scratch)
    made = []
    try:
        for machine in machines:
            containerd = NodeContainerd(machine, cluster.directory / machine.name, cluster.logs)
            cluster.on_close(containerd.close)
            containerd.inside("images", "import", str(as_root))
            environment = {
                "NODE_NAME": machine.name,
                "KUBERNETES_NODE": machine.name,
                "POD_IP": machine.address,
                "WINDLASS_GOSSIP__PEERS": f"[{peers}]",
                "WINDLASS_STORE__FREE_FLOOR": "0 B",
            }
            made.append(Pod(containerd, spec, {"config": config, "tls": tls}, environment))
            made[-1].start()
        for pod in made:
            joined = lambda pod=pod: b'"alive":2' in pod.containerd.machine.get(f"{ADMIN}/v1/stats", check=False)  # noqa: E731
            wait_until(joined, f"{pod.containerd.machine.name} knows the others", 60)
        yield made
    finally:
        for pod in made:
            pod.close()


def test_pods_run_with_nothing_they_do_not_need(pods: list[Pod]) -> None:
    for name in ("windlass", "wire"):
        status = pods[0].status(name)
        assert {status[kind] for kind in ("CapEff", "CapPrm", "CapBnd")} == {"0000000000000000"}, status
        assert status["NoNewPrivs"] == "1" and status["Seccomp"] == "2"
        mounts = Path(f"/proc/{pods[0].pid(name)}/mounts").read_text().splitlines()
        root = next(line.split() for line in mounts if line.split()[1] == "/")
        assert "ro" in root[3].split(","), root


def test_three_nodes_pull_through_it(
    pods: list[Pod], cluster: Cluster, images: ImageBuilder, figure: Figure
) -> None:
    image = images.build("pod", [Layer(1600, 48, False), Layer(1601, 24, True)])
    reference = cluster.registry.reference("pod/image")
    push(image, cluster.origin, reference)
    for pod in pods:
        hosts = pod.containerd.certs / cluster.registry.host / "hosts.toml"
        wait_until(lambda hosts=hosts: hosts.exists(), "the node is wired by its pod", 60)
    at_once(*[lambda pod=pod: pod.containerd.pull(reference) for pod in pods])
    assert all(pod.containerd.is_unpacked(reference) for pod in pods)
    sent = bytes_by_blob(cluster.registry.settled_responses())
    assert sent == image.blobs(), "each blob left the registry once"
    figure("pods on three nodes: bytes from the registry, of bytes pulled", f"{sum(sent.values())}, {3 * image.size()}")


def test_the_doctor_in_the_pod_is_content(pods: list[Pod]) -> None:
    done = pods[0].containerd.inside("tasks", "exec", "--exec-id", "doctor", "wire", "windlass", "doctor", check=False)
    said = (done.stdout + done.stderr).decode()
    assert done.returncode == 0, said


KUBECTL = """#!/bin/sh
# Stands in for kubectl: what `daemonset/validate` asks of it, done by ctr in the nodes' namespaces.
case "$*" in
    *"get pods"*) printf '{names}' ;;
    *exec*) shift 3; pid=$(cat "{directory}/${{1#pod/}}.pid"); shift 4
        exec nsenter --target "$pid" --mount --net ctr -n k8s.io tasks exec --exec-id "v$$" wire "$@" ;;
esac
"""


def test_validate_proves_it(
    pods: list[Pod], cluster: Cluster, images: ImageBuilder, tmp_path: Path, figure: Figure
) -> None:
    reference = cluster.registry.reference("pod/validate")
    push(images.build("validate", [Layer(1610, 16, False)]), cluster.origin, reference)
    names = [pod.containerd.machine.name for pod in pods]
    for pod, name in zip(pods, names, strict=True):
        (tmp_path / f"{name}.pid").write_text(str(pod.containerd.process.pid))
    kubectl = tmp_path / "kubectl"
    listed = "".join(f"pod/{name}\\n" for name in names)
    kubectl.write_text(KUBECTL.format(names=listed, directory=tmp_path))
    kubectl.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = run([str(DAEMONSET / "validate"), reference], check=False, env=environment)
    said = done.stdout.decode()
    figure("validate", "\n" + said)
    assert done.returncode == 0 and "FAIL" not in said, said + done.stderr.decode()
    assert "warm pull served entirely by peers: PASS, origin bytes 0" in said
    done = run([str(DAEMONSET / "validate"), cluster.registry.reference("pod/none")], check=False, env=environment)
    assert done.returncode == 1 and b"cold pull: FAIL" in done.stdout, done.stdout


def test_a_pod_that_ends_leaves_the_node_as_it_was(pods: list[Pod], cluster: Cluster) -> None:
    pod = pods[2]
    hosts = pod.containerd.certs / cluster.registry.host / "hosts.toml"
    assert hosts.exists()
    pod.end("wire")
    assert not hosts.exists(), hosts.read_text()
    pod.end("windlass")
