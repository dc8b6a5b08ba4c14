"""What is under daemonset/: it renders, the real schemas take it, and no query names a metric that does not exist.

helm comes through Go's module proxy into target/tools, as do the custom resources' schemas; Kubernetes' own are in
kubernetes-validate. Without Go these tests are skipped.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rig.cluster import Cluster, Node, at_once
from rig.images import ImageBuilder, Layer, push
from rig.network import Machine
from rig.processes import run, wait_until

WITHOUT_OBJECTS = True

yaml = pytest.importorskip("yaml")
jsonschema = pytest.importorskip("jsonschema")
kubernetes_validate = pytest.importorskip("kubernetes_validate")

DAEMONSET = Path(__file__).parents[2] / "daemonset"
CHART = DAEMONSET / "helm" / "windlass"
TOOLS = Path(os.environ.get("CARGO_TARGET_DIR", "target")).absolute() / "tools"
HELM = "helm.sh/helm/v3/cmd/helm@v3.19.0"
KUBERNETES = ["1.29", "1.30", "1.31", "1.32", "1.33", "1.34", "1.35"]

CUSTOM_RESOURCES = {
    "github.com/aws/karpenter-provider-aws@v1.6.3": ["pkg/apis/crds/*nodepools.yaml", "pkg/apis/crds/*ec2nodeclasses.yaml"],
    "github.com/cert-manager/cert-manager@v1.18.2": ["deploy/crds/crd-certificates.yaml", "deploy/crds/crd-issuers.yaml"],
    "github.com/prometheus-operator/prometheus-operator@v0.85.0": [
        "example/prometheus-operator-crd/*_podmonitors.yaml",
        "example/prometheus-operator-crd/*_prometheusrules.yaml",
    ],
    "github.com/kedacore/keda/v2@v2.17.2": ["config/crd/bases/*_scaledobjects.yaml"],
    "github.com/argoproj/argo-cd/v3@v3.1.0": ["manifests/crds/application-crd.yaml"],
    "github.com/kyverno/kyverno@v1.15.2": ["config/crds/kyverno/kyverno.io_policyexceptions.yaml"],
}

EVERYTHING = """
image: { repository: registry.example/windlass }
startupTaint: { enabled: true }
events: { enabled: true }
wire: { default: true }
node: { nodeSelector: { a: b }, capabilities: [NET_ADMIN], env: [{ name: A, value: b }], podLabels: { team: ml } }
seed: { storageClassName: gp3, nodeSelector: { a: b }, tolerations: [{ operator: Exists }], env: [{ name: A, value: b }] }
serviceAccount: { annotations: { eks.amazonaws.com/role-arn: "arn:aws:iam::123456789012:role/windlass" } }
imagePullSecrets: [{ name: pull }]
monitoring: { podMonitor: true, rules: true, dashboard: true, labels: { release: prometheus } }
"""
VARIANTS = {
    "defaults": "",
    "everything": EVERYTHING,
    "csi": "tls: { mode: csi }",
    "authority by a job": "tls: { mode: job }",
    "events": "events: { enabled: true }",
    "existing secret": "tls: { mode: existingSecret }",
    "without seeds": "seed: { replicas: 0 }",
    "without wire": "wire: { enabled: false }",
}


@pytest.fixture(scope="session")
def go() -> str:
    found = shutil.which("go") or shutil.which("go", path="/usr/local/go/bin")
    if found is None:
        pytest.skip("Go is not installed")
    return found


@pytest.fixture(scope="session")
def helm(go: str) -> str:
    if not (TOOLS / "helm").exists():
        environment = {**os.environ, "GOBIN": str(TOOLS), "CGO_ENABLED": "0", "GOFLAGS": "-buildvcs=false"}
        run([go, "install", HELM], timeout_s=3000, env=environment)
    return str(TOOLS / "helm")


def render(helm: str, values: str, scratch: Path, version: str = "1.33") -> list[dict]:
    (scratch / "values.yaml").write_text(values)
    argv = [helm, "template", "windlass", str(CHART), "--namespace", "windlass", "--kube-version", version]
    argv += ["--api-versions", "admissionregistration.k8s.io/v1/ValidatingAdmissionPolicy"] if version > "1.29" else []
    done = run([*argv, "-f", str(scratch / "values.yaml")])
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def definitions(go: str, directory: Path) -> Iterator[dict]:
    """The custom resources' definitions, of the modules' own releases."""
    scratch = directory / "crds"
    scratch.mkdir()
    run([go, "mod", "init", "crds"], cwd=scratch)
    for module, patterns in CUSTOM_RESOURCES.items():
        found = json.loads(run([go, "mod", "download", "-json", module], timeout_s=600, cwd=scratch).stdout)
        for path in [path for pattern in patterns for path in Path(found["Dir"]).glob(pattern)]:
            # cert-manager's are templates of its chart.
            text = "\n".join(line for line in path.read_text().splitlines() if "{{" not in line)
            yield from yaml.load_all(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


@pytest.fixture(scope="session")
def custom_resources(go: str, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict]:
    """The schema of each custom resource by (apiVersion, kind)."""
    schemas = {}
    for definition in definitions(go, tmp_path_factory.mktemp("go")):
        spec = definition["spec"]
        for version in spec["versions"]:
            schema = strict(version["schema"]["openAPIV3Schema"])
            schemas[f"{spec['group']}/{version['name']}", spec["names"]["kind"]] = schema
    return schemas


def strict(schema: dict) -> dict:
    """An API server drops fields that it does not know; here they are mistakes."""
    made = copy.copy(schema)
    if "properties" in made:
        made["properties"] = {name: strict(one) for name, one in made["properties"].items()}
        if not made.get("x-kubernetes-preserve-unknown-fields") and "additionalProperties" not in made:
            made["additionalProperties"] = False
    if isinstance(made.get("items"), dict):
        made["items"] = strict(made["items"])
    if made.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
    return made


def check(documents: list[dict], custom_resources: dict, versions: list[str]) -> None:
    for document in documents:
        kind = document["apiVersion"], document["kind"]
        if kind in custom_resources:
            schema = copy.deepcopy(custom_resources[kind])
            schema["properties"]["metadata"] = {"type": "object"}
            jsonschema.Draft7Validator(schema).validate(document)
            continue
        for version in versions:
            kubernetes_validate.validate(document, version, strict=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_chart_is_valid(helm: str, custom_resources: dict, tmp_path: Path, variant: str) -> None:
    for version in KUBERNETES:
        check(render(helm, VARIANTS[variant], tmp_path, version), custom_resources, [version])


def test_helm_finds_nothing_to_say(helm: str, tmp_path: Path) -> None:
    (tmp_path / "values.yaml").write_text(EVERYTHING)
    done = run([helm, "lint", "--strict", str(CHART), "-f", str(tmp_path / "values.yaml")], check=False)
    assert done.returncode == 0, (done.stdout + done.stderr).decode()
    assert b"[WARNING]" not in done.stdout


def test_every_value_is_used_and_said() -> None:
    """Each value stands in a template; each key of the first two levels has a comment above it or above its group."""
    templates = "".join(path.read_text() for path in (CHART / "templates").iterdir())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    for group, below in values.items():
        for key in below if isinstance(below, dict) and below else [None]:
            name = f".Values.{group}" + (f".{key}" if key else "")
            assert name in templates, f"{name} changes nothing"
    blocks = re.split(r"\n\n", (CHART / "values.yaml").read_text())
    assert all(block.lstrip().startswith("#") for block in blocks), "a group of values without a comment"


def test_the_base_is_the_chart(helm: str, tmp_path: Path) -> None:
    run([str(DAEMONSET / "render"), str(tmp_path / "windlass.yaml")], env={**os.environ, "HELM": helm})
    committed = DAEMONSET / "kustomize" / "base" / "windlass.yaml"
    assert (tmp_path / "windlass.yaml").read_text() == committed.read_text(), "run daemonset/render"


@pytest.mark.parametrize("overlay", ["eks-karpenter", "eks-poolside"])
def test_overlays_are_valid(custom_resources: dict, overlay: str) -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    built = run(["kubectl", "kustomize", str(DAEMONSET / "kustomize" / "overlays" / overlay)]).stdout
    documents = list(yaml.safe_load_all(built))
    check(documents, custom_resources, KUBERNETES)
    daemonset = next(document for document in documents if document["kind"] == "DaemonSet")
    pod = daemonset["spec"]["template"]["spec"]
    assert [container["name"] for container in pod["containers"]] == ["windlass", "wire"]
    assert "--untaint=$(KUBERNETES_NODE)" in pod["containers"][1]["args"]
    assert "--events=$(POD_NAMESPACE)/$(POD_NAME)/$(POD_UID)" in pod["containers"][1]["args"]
    assert all(container["image"].endswith("/windlass:0.1.0") for container in pod["containers"])


def test_examples_are_valid(custom_resources: dict) -> None:
    folders = ["argocd", "examples", "karpenter", "kyverno"]
    paths = [path for folder in folders for path in (DAEMONSET / folder).glob("*.yaml")]
    for path in [*paths, DAEMONSET / "watching" / "keda.yaml"]:
        check(list(yaml.safe_load_all(path.read_text())), custom_resources, KUBERNETES)


def test_pods_can_do_no_more_than_they_must(helm: str, tmp_path: Path) -> None:
    documents = {document["kind"]: document for document in render(helm, "", tmp_path)}
    node = documents["DaemonSet"]["spec"]["template"]["spec"]
    seed = documents["StatefulSet"]["spec"]["template"]["spec"]
    for pod in (node, seed):
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"] and not context["allowPrivilegeEscalation"]
            assert context["capabilities"] == {"drop": ["ALL"]}
    assert seed["securityContext"]["runAsNonRoot"]
    socket = [c["name"] for c in node["containers"] for m in c["volumeMounts"] if m["name"] == "containerd-socket"]
    assert socket == ["wire"], "only what does not face the network has containerd's socket"
    assert not {"ClusterRole", "Role"} & documents.keys(), "nothing is asked of the API server unless taint or events are"


# Watching.


def test_the_alerts_hold_what_they_promise() -> None:
    run(["promtool", "check", "rules", str(CHART / "files" / "rules.yaml")])
    done = run(["promtool", "test", "rules", str(DAEMONSET / "watching" / "rules_test.yaml")], check=False)
    assert done.returncode == 0, (done.stdout + done.stderr).decode()
    rules = yaml.safe_load((CHART / "files" / "rules.yaml").read_text())["groups"][0]["rules"]
    tested = (DAEMONSET / "watching" / "rules_test.yaml").read_text()
    runbook = (DAEMONSET / "README.md").read_text()
    for rule in rules:
        assert rule["annotations"]["runbook"] == rule["alert"]
        assert f"alertname: {rule['alert']}" in tested and f"### {rule['alert']}" in runbook, rule["alert"]


def queries() -> list[str]:
    """Every expression of the dashboard, the alerts and the autoscaler, with Grafana's variables filled in."""
    dashboard = json.loads((CHART / "files" / "dashboard.json").read_text())
    found = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    rules = yaml.safe_load((CHART / "files" / "rules.yaml").read_text())
    found += [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    scaled = yaml.safe_load((DAEMONSET / "watching" / "keda.yaml").read_text())
    found += [trigger["metadata"]["query"] for trigger in scaled["spec"]["triggers"]]
    filled = {"$__rate_interval": "20s", "$__range": "1m", "$node": ".*"}
    for variable, value in filled.items():
        found = [expression.replace(variable, value) for expression in found]
    return found


@pytest.fixture(scope="module")
def nodes(cluster: Cluster, images: ImageBuilder) -> list[Node]:
    """Two nodes that have pulled an image."""
    nodes = cluster.nodes(2)
    reference = cluster.registry.reference("watch/image")
    push(images.build("watch", [Layer(1100, 20, False), Layer(1101, 4, True)]), cluster.origin, reference)
    at_once(*[lambda node=node: node.containerd.pull(reference) for node in nodes])
    return nodes


def test_no_query_names_a_metric_that_does_not_exist(nodes: list[Node]) -> None:
    shown = set()
    for node in nodes:
        for line in node.daemon.metrics_text().decode().splitlines():
            shown.add(re.match(r"(?:# (?:TYPE|HELP) )?([a-z_]+)", line)[1])
    for expression in queries():
        for name in re.findall(r"\b(?:windlass|process)_[a-z_]+", expression):
            assert name in shown, f"{name} is not at /metrics, but in: {expression}"


@pytest.fixture(scope="module")
def prometheus(cluster: Cluster, nodes: list[Node]) -> Iterator[Machine]:
    """A Prometheus that scrapes both nodes, with the labels that the PodMonitor gives."""
    machine = cluster.machine("watch")
    directory = cluster.directory / "prometheus"
    directory.mkdir()
    targets = [
        {"targets": [f"{node.machine.address}:5102"], "labels": {"node": node.machine.name, "container": "windlass"}}
        for node in nodes
    ]
    scrape = {"job_name": "windlass", "scrape_interval": "2s", "static_configs": targets}
    rules = [str(CHART / "files" / "rules.yaml")]
    config = directory / "prometheus.yml"
    config.write_text(json.dumps({"rule_files": rules, "scrape_configs": [scrape]}))
    argv = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={directory}", "--web.listen-address=:9090"]
    process = machine.start(argv, cluster.logs / "prometheus.log")

    def ask(query: str) -> bytes:
        curl = ["curl", "-s", "--data-urlencode", f"query={query}", "http://127.0.0.1:9090/api/v1/query"]
        return machine.run(curl, check=False).stdout

    try:
        scraped = "count(count_over_time(windlass_build_info[1m]) > 3)"
        wait_until(lambda: b'"2"]' in ask(scraped), "both nodes are scraped", 90, process)
        yield machine
    finally:
        process.terminate()


def test_a_real_prometheus_answers_every_query(prometheus: Machine, figure: Callable[[str, object], None]) -> None:
    machine = prometheus
    with_data = 0
    for expression in queries():
        curl = ["curl", "-s", "--data-urlencode", f"query={expression}", "http://127.0.0.1:9090/api/v1/query"]
        answer = json.loads(machine.run(curl).stdout)
        assert answer["status"] == "success", f"{expression}: {answer}"
        with_data += bool(answer["data"]["result"])
    figure("queries that a real Prometheus answered, of them with data", f"{len(queries())}, {with_data}")
    rules = json.loads(machine.get("http://127.0.0.1:9090/api/v1/rules"))["data"]["groups"]
    assert all(rule["health"] in ("ok", "unknown") for group in rules for rule in group["rules"]), rules
    assert not [rule for group in rules for rule in group["rules"] if rule["state"] == "firing"]
