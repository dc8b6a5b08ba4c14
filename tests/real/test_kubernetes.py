"""What is under daemonset/ in front of a real API server: it takes it, Pod Security lets the pods in as labelled, the chart's
RBAC is enough for what the pods do and for nothing else, and the events are there.

kube-apiserver takes seven minutes of CPU to build; `conftest.py` leaves this file out unless it is built or the run is a
full one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from rig import kubernetes
from rig.cluster import Cluster, Node
from rig.images import ImageBuilder, Layer, push
from rig.kubernetes import Kubernetes, mounted
from rig.processes import run, wait_until
from rig.windlass import binary, environment
from test_daemonset import DAEMONSET, EVERYTHING, VARIANTS, definitions, go, helm, render

__all__ = ["go", "helm"]

Figure = Callable[[str, object], None]

TAINT = "windlass.dev/not-ready"
GPU_TAINT = {"key": "nvidia.com/gpu", "value": "true", "effect": "NoSchedule"}
NODES = ["gpu-1", "gpu-2"]
PRIVILEGED = {"pod-security.kubernetes.io/enforce": "privileged", "pod-security.kubernetes.io/warn": "restricted"}


@pytest.fixture(scope="module")
def cluster(cluster: Cluster) -> Cluster:
    """The cluster without an object store, which nothing here reads and which takes long to start."""
    cluster._objects = SimpleNamespace(endpoint="http://127.0.0.1:9")
    return cluster


@pytest.fixture(scope="module")
def api(cluster: Cluster, go: str) -> Iterator[Kubernetes]:
    kubernetes.build(go)
    server = Kubernetes(cluster.machine("control"), cluster.directory / "kubernetes", cluster.logs)
    try:
        server.apply(list(definitions(go, cluster.directory)))
        established = ["wait", "--for=condition=Established", "crd", "--all", "--timeout=60s"]
        server.kubectl(*established)
        server.apply([_node(name) for name in NODES])
        yield server
    finally:
        server.close()


def _node(name: str) -> dict:
    taints = [GPU_TAINT, {"key": TAINT, "effect": "NoSchedule"}]
    return {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}, "spec": {"taints": taints}}


def namespace(api: Kubernetes, name: str, labels: dict[str, str]) -> None:
    metadata = {"name": name, "labels": labels}
    api.apply([{"apiVersion": "v1", "kind": "Namespace", "metadata": metadata}])


def pod(document: dict, name: str, space: str, node: str | None = None) -> dict:
    """The pod that a controller would make of a DaemonSet or StatefulSet."""
    template = document["spec"]["template"]
    spec = json.loads(json.dumps(template["spec"]))
    if node:
        spec["nodeName"] = node
    for claim in document["spec"].get("volumeClaimTemplates", []):
        name_of = claim["metadata"]["name"]
        source = {"claimName": f"{name_of}-{name}"}
        spec["volumes"].append({"name": name_of, "persistentVolumeClaim": source})
    metadata = {"name": name, "namespace": space, "labels": template["metadata"]["labels"]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_chart_is_taken(api: Kubernetes, helm: str, tmp_path: Path, variant: str) -> None:
    namespace(api, "windlass", PRIVILEGED)
    documents = render(helm, VARIANTS[variant], tmp_path, "1.34")
    api.apply(documents, "--dry-run=server")


@pytest.mark.parametrize("overlay", ["eks-karpenter", "eks-poolside"])
def test_overlays_are_taken(api: Kubernetes, overlay: str, figure: Figure) -> None:
    built = run(["kubectl", "kustomize", str(DAEMONSET / "kustomize" / "overlays" / overlay)]).stdout
    documents = list(yaml.safe_load_all(built))
    api.apply([one for one in documents if one["kind"] == "Namespace"])
    done = api.apply(documents, "--dry-run=server")
    figure(f"overlay {overlay}: objects a real API server took", len(done.stdout.splitlines()))


def test_examples_are_taken(api: Kubernetes) -> None:
    folders = ["argocd", "examples", "karpenter", "kyverno"]
    paths = [path for folder in folders for path in (DAEMONSET / folder).glob("*.yaml")]
    for path in [*paths, DAEMONSET / "watching" / "keda.yaml"]:
        for document in yaml.safe_load_all(path.read_text()):
            space = document["metadata"].get("namespace", "default")
            namespace(api, space, {})
            api.apply([document], "--dry-run=server")


def test_pod_security_lets_them_in_as_labelled_and_nowhere_else(api: Kubernetes, helm: str, tmp_path: Path) -> None:
    """The namespace's labels are needed for the DaemonSet; the seeds would be let in under the strictest level."""
    documents = render(helm, EVERYTHING, tmp_path, "1.34")
    by_kind = {document["kind"]: document for document in documents}
    account = by_kind["ServiceAccount"]
    levels = {"labelled": "privileged", "lower": "baseline", "strict": "restricted"}
    for space, level in levels.items():
        namespace(api, space, {"pod-security.kubernetes.io/enforce": level})
        api.apply([{**account, "metadata": {"name": "windlass", "namespace": space}}])
    daemonset, seed = by_kind["DaemonSet"], by_kind["StatefulSet"]
    api.apply([pod(daemonset, "node", "labelled"), pod(seed, "seed-0", "labelled"), pod(seed, "seed-0", "strict")])
    for space in ("lower", "strict"):
        refused = api.apply([pod(daemonset, "node", space)], check=False)
        said = refused.stderr.decode()
        assert refused.returncode != 0 and "violates PodSecurity" in said, said
        assert "host namespaces" in said and "hostPath" in said, said


# What the pods ask of it.


@pytest.fixture(scope="module")
def installed(api: Kubernetes, helm: str, cluster: Cluster) -> dict[str, str]:
    """The chart with taint and events, and a pod on each node. Returns the pods' tokens by node."""
    namespace(api, "windlass", PRIVILEGED)
    scratch = cluster.directory / "installed"
    scratch.mkdir()
    values = "startupTaint: { enabled: true }\nevents: { enabled: true }\n"
    documents = render(helm, values, scratch, "1.34")
    api.apply(documents)
    daemonset = next(document for document in documents if document["kind"] == "DaemonSet")
    tokens = {}
    for node in NODES:
        api.apply([pod(daemonset, f"windlass-{node}", "windlass", node)])
        bound = ["--bound-object-kind", "Pod", "--bound-object-name", f"windlass-{node}"]
        done = api.kubectl("create", "token", "windlass", "-n", "windlass", *bound)
        tokens[node] = done.stdout.decode().strip()
    policy = ["/api/v1/nodes/gpu-2?dryRun=All", {"metadata": {"labels": {"rig": "x"}}}]
    # An admission policy counts from a moment after it is made.
    wait_until(
        lambda: api.request(cluster.origin, tokens["gpu-2"], "PATCH", *policy)[0] != 200, "the policy counts", 60
    )
    return tokens


def taints(api: Kubernetes, node: str) -> set[str]:
    """The keys. The API server adds one of its own to nodes that no kubelet has reported ready."""
    return {taint["key"] for taint in api.get("node", node)["spec"].get("taints", [])} - {"node.kubernetes.io/not-ready"}


def events(api: Kubernetes, reason: str) -> list[dict]:
    return [event for event in api.get("events", "-n", "windlass")["items"] if event["reason"] == reason]


@pytest.fixture(scope="module")
def nodes(cluster: Cluster, installed: dict[str, str]) -> list[Node]:
    return cluster.nodes(2)


@pytest.fixture(scope="module")
def hold(cluster: Cluster, api: Kubernetes, installed: dict[str, str], nodes: list[Node]) -> Iterator[Callable]:
    """Starts `windlass wire --hold` as the chart does, in the place of a pod on `node`."""
    running = []

    def start(node: Node, name: str, *arguments: str) -> SimpleNamespace:
        home = cluster.directory / node.machine.name
        uid = api.get("pod", f"windlass-{name}", "-n", "windlass")["metadata"]["uid"]
        argv = [binary(), "wire", "--hold", "--config", str(node.daemon.config)]
        argv += ["--containerd-socket", str(home / "containerd.sock")]
        argv += [f"--events=windlass/windlass-{name}/{uid}", *arguments]
        log = cluster.logs / f"wire-{name}-{len(running)}.log"
        account = api.account(name, installed[name])
        process = node.machine.start(mounted(account, argv), log, environment(api.environment()))
        running.append(process)
        return SimpleNamespace(process=process, output=process.output)

    yield start
    for process in running:
        process.terminate()


def test_the_taint_goes_when_a_canary_arrived(
    api: Kubernetes, nodes: list[Node], hold: Callable, cluster: Cluster
) -> None:
    first = nodes[0]
    wire = hold(first, "gpu-1", "--untaint=gpu-1", "--untaint-deadline=1h", "--certs-d", str(first.containerd.certs))
    wait_until(lambda: taints(api, "gpu-1") == {GPU_TAINT["key"]}, "the taint is gone", 60, wire.process)
    assert "a canary arrived" in wire.output()
    # Karpenter puts it back when it registers the node.
    api.apply([_node("gpu-1")], "--force-conflicts")
    assert taints(api, "gpu-1") == {GPU_TAINT["key"], TAINT}
    wait_until(lambda: taints(api, "gpu-1") == {GPU_TAINT["key"]}, "it is gone again", 60, wire.process)


def test_the_mirror_is_not_used(api: Kubernetes, nodes: list[Node], hold: Callable, cluster: Cluster) -> None:
    """Wired in a directory that this containerd does not read: the event says so, and the taint goes at the deadline."""
    second = nodes[1]
    elsewhere = cluster.directory / "elsewhere"
    elsewhere.mkdir()
    second.containerd.ask(cluster.registry.host, None)
    arguments = ["--untaint=gpu-2", "--untaint-deadline=5s", "--certs-d", str(elsewhere)]
    wire = hold(second, "gpu-2", *arguments)
    wait_until(lambda: events(api, "MirrorNotUsed"), "the event is there", 90, wire.process)
    event = events(api, "MirrorNotUsed")[0]
    assert event["type"] == "Warning" and event["involvedObject"]["name"] == "windlass-gpu-2"
    assert "windlass doctor" in event["message"]
    wait_until(lambda: taints(api, "gpu-2") == {GPU_TAINT["key"]}, "the node opens all the same", 60, wire.process)
    assert "the deadline has passed" in wire.output()
    wire.process.terminate()


def test_pulls_served_by_peers(
    api: Kubernetes, nodes: list[Node], hold: Callable, images: ImageBuilder, cluster: Cluster, figure: Figure
) -> None:
    first, second = nodes
    wire = hold(second, "gpu-2", "--certs-d", str(second.containerd.certs))
    reference = cluster.registry.reference("events/image")
    push(images.build("events", [Layer(1700, 24, False), Layer(1701, 8, True)]), cluster.origin, reference)
    first.containerd.pull(reference)
    wait_until(lambda: b"5100" in (second.containerd.certs / cluster.registry.host / "hosts.toml").read_bytes(),
               "the second is wired", 60, wire.process)
    second.containerd.pull(reference)
    wait_until(lambda: events(api, "PulledFromPeers"), "the event is there", 60, wire.process)
    found = events(api, "PulledFromPeers")
    assert [event["involvedObject"]["name"] for event in found] == ["windlass-gpu-2"]
    figure("event", found[0]["message"])
    assert "0 B from origins" in found[0]["message"]
    assert found[0]["type"] == "Normal" and found[0]["source"]["component"] == "windlass"


def test_nothing_else_is_allowed(api: Kubernetes, installed: dict[str, str], cluster: Cluster) -> None:
    """The token of the pod on gpu-1, with everything that it should not do."""
    ask = lambda *arguments: api.request(cluster.origin, installed["gpu-1"], *arguments)  # noqa: E731
    patch = {"spec": {"taints": [GPU_TAINT]}}
    status, said = ask("PATCH", "/api/v1/nodes/gpu-2", patch | {"metadata": {"labels": {"a": "b"}}})
    assert status == 422 and "its own node only" in said, said
    status, said = ask("PATCH", "/api/v1/nodes/gpu-1", {"metadata": {"labels": {"a": "b"}}})
    assert status == 422 and "change nothing else" in said, said
    status, said = ask("PATCH", "/api/v1/nodes/gpu-1", {"spec": {"taints": []}})
    assert status == 422 and "change nothing else" in said, said
    status, said = ask("PATCH", "/api/v1/nodes/gpu-1", {"spec": {"unschedulable": True}})
    assert status == 422, said
    event = {"apiVersion": "v1", "kind": "Event", "metadata": {"generateName": "x-"}, "involvedObject": {}}
    for method, path, body in [
        ("GET", "/api/v1/nodes", None),
        ("DELETE", "/api/v1/nodes/gpu-1", None),
        ("GET", "/api/v1/namespaces/windlass/pods", None),
        ("GET", "/api/v1/namespaces/windlass/secrets", None),
        ("GET", "/api/v1/namespaces/windlass/events", None),
        ("POST", "/api/v1/namespaces/default/events", event),
        ("POST", "/api/v1/namespaces/windlass/pods", {"apiVersion": "v1", "kind": "Pod"}),
    ]:
        status, said = ask(method, path, body)
        assert status == 403, f"{method} {path}: {status} {said}"


def test_the_authority_by_a_job(api: Kubernetes, helm: str, cluster: Cluster, tmp_path: Path) -> None:
    """What the Job runs, with its own account: the Secret is made once, and nothing can be read."""
    namespace(api, "authority", {"pod-security.kubernetes.io/enforce": "restricted"})
    documents = render(helm, "tls: { mode: job }", tmp_path, "1.34")
    hooks = [one for one in documents if "helm.sh/hook" in one["metadata"].get("annotations", {})]
    assert {one["kind"] for one in hooks} == {"ServiceAccount", "Role", "RoleBinding", "Job"}
    for one in hooks:
        one["metadata"]["namespace"] = "authority"
        for subject in one.get("subjects", []):
            subject["namespace"] = "authority"
    api.apply(hooks)
    job = next(one for one in hooks if one["kind"] == "Job")
    api.apply([pod(job, "job", "authority")])
    token = api.kubectl("create", "token", "windlass-authority", "-n", "authority").stdout.decode().strip()
    account = api.account("authority", token)
    arguments = job["spec"]["template"]["spec"]["containers"][0]["args"]
    argv = [binary(), *[one.replace("=windlass/", "=authority/") for one in arguments]]
    made = [
        cluster.origin.run(mounted(account, argv), env=environment(api.environment())).stderr.decode()
        for _ in range(2)
    ]
    assert "made the Secret" in made[0] and "is there already" in made[1], made
    secret = api.get("secret", "windlass-ca", "-n", "authority")
    assert set(secret["data"]) == {"tls.crt", "tls.key"}
    status, _ = api.request(cluster.origin, token, "GET", "/api/v1/namespaces/authority/secrets/windlass-ca")
    assert status == 403
