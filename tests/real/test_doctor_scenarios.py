"""`windlass doctor` against real containerds and daemons: each fault is named with its cure, and the cure cures it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from rig.cluster import Cluster, Node
from rig.processes import run
from rig.windlass import Authority, Daemon, binary, environment

Figure = Callable[[str, object], None]

CONTAINERD_MAJOR = int(run(["containerd", "--version"]).stdout.decode().split()[2].lstrip("v").split(".")[0])
"""Which of the faults below can be: each major version of containerd has its own."""


@dataclass
class Report:
    """What one run of doctor found."""

    status: int
    findings: list[dict]

    def of(self, check: str) -> list[dict]:
        return [finding for finding in self.findings if finding["check"] == check]

    def verdict(self, check: str) -> str:
        """The worst of a check's verdicts."""
        order = ["pass", "skip", "warn", "fail"]
        return max((finding["verdict"] for finding in self.of(check)), key=order.index)

    def cure(self, check: str) -> str:
        return next(finding["cure"] for finding in self.of(check) if finding.get("cure"))


class Patient:
    """A node with its containerd, and ways to make it ill."""

    def __init__(self, cluster: Cluster, node: Node) -> None:
        self.cluster = cluster
        self.node = node
        self.machine = node.machine
        self.home = cluster.directory / node.machine.name
        self.config = self.home / "config.toml"
        self.certs = node.containerd.certs

    def examine(self, daemon: Daemon | None = None, config: Path | None = None, **variables: str) -> Report:
        argv = [binary(), "doctor", "--json", "--config", str((daemon or self.node.daemon).config)]
        argv += ["--containerd-config", str(config or self.config)]
        argv += ["--containerd-socket", str(self.home / "containerd.sock")]
        done = self.machine.run(argv, check=False, env=environment(variables))
        return Report(done.returncode, json.loads(done.stdout))

    def windlass(self, command: str, *arguments: str) -> None:
        self.machine.run([binary(), command, "--certs-d", str(self.certs), *arguments], env=environment())

    def wire(self) -> None:
        self.windlass("wire", "--config", str(self.node.daemon.config))

    def hosts(self) -> Path:
        return self.certs / self.cluster.registry.host / "hosts.toml"

    @contextmanager
    def configured(self, text: str) -> Iterator[None]:
        """containerd runs with `text` as its configuration, and afterwards as before."""
        before = self.config.read_text()
        try:
            self.restart(text)
            yield
        finally:
            self.restart(before)

    def restart(self, text: str) -> None:
        self.node.containerd.process.terminate()
        self.config.write_text(text)
        self.node.containerd.start()


@pytest.fixture(scope="module")
def cluster(cluster: Cluster) -> Cluster:
    """The cluster without an object store, which nothing here reads and which takes long to start."""
    cluster._objects = SimpleNamespace(endpoint="http://127.0.0.1:9")
    return cluster


@pytest.fixture(scope="module")
def patient(cluster: Cluster) -> Patient:
    first, _ = cluster.nodes(2, containerd=False)
    first.containerd = cluster.containerd(first.machine)
    patient = Patient(cluster, first)
    patient.wire()
    return patient


@pytest.fixture(autouse=True)
def healthy_at_the_end(patient: Patient) -> Iterator[None]:
    yield
    report = patient.examine()
    assert report.status == 0, [finding for finding in report.findings if finding["verdict"] == "fail"]


def note(figure: Figure, scenario: str, report: Report, check: str) -> None:
    found = next(finding for finding in report.of(check) if finding["verdict"] == report.verdict(check))
    cure = found.get("cure", "").splitlines()
    figure(f"doctor: {scenario}", f"{found['verdict'].upper()} {check}: {found['what']} -> {cure[0] if cure else '-'}")


def test_a_healthy_node_passes(patient: Patient, figure: Figure) -> None:
    report = patient.examine()
    assert report.status == 0, report.findings
    for check in ("daemon", "mirror", "containerd", "containerd-config", "hosts.toml", "canary", "registry"):
        assert report.verdict(check) == "pass", report.of(check)
    for check in ("certificate", "peers", "mtu", "clock", "disk"):
        assert report.verdict(check) == "pass", report.of(check)
    note(figure, "wired", report, "canary")


def test_not_wired(patient: Patient, figure: Figure) -> None:
    patient.windlass("unwire")
    report = patient.examine()
    note(figure, "not wired", report, "hosts.toml")
    assert (report.status, report.verdict("hosts.toml"), report.verdict("canary")) == (1, "fail", "fail")
    assert report.cure("hosts.toml") == f"windlass wire {patient.cluster.registry.host}"
    patient.windlass("wire", "--config", str(patient.node.daemon.config), patient.cluster.registry.host)
    assert patient.examine().verdict("canary") == "pass"


def test_broken_hosts_file(patient: Patient, figure: Figure) -> None:
    patient.hosts().write_text(patient.hosts().read_text().replace('"pull", ', '"pull, '))
    report = patient.examine()
    note(figure, "broken TOML", report, "hosts.toml")
    assert (report.verdict("hosts.toml"), report.verdict("canary")) == ("fail", "fail")
    assert "remove the file" in report.cure("hosts.toml") and "windlass wire" in report.cure("hosts.toml")
    patient.hosts().unlink()
    patient.wire()
    assert patient.examine().verdict("hosts.toml") == "pass"


def test_colon_path(patient: Patient, figure: Figure) -> None:
    """containerd before 2.1 splits it; from 2.1 on the transfer service does not, and asks no mirror."""
    colon = patient.config.read_text().replace(f'"{patient.certs}"', f'"{patient.certs}:/etc/docker/certs.d"')
    with patient.configured(colon):
        report = patient.examine()
        note(figure, "colon path", report, "containerd-config")
        expected = "fail" if CONTAINERD_MAJOR >= 2 else "pass"
        assert (report.verdict("containerd-config"), report.verdict("canary")) == (expected, expected)


if CONTAINERD_MAJOR < 2:

    def test_config_path_is_not_set(patient: Patient, figure: Figure) -> None:
        text = patient.config.read_text()
        without = "\n".join(line for line in text.splitlines() if "config_path" not in line)
        with patient.configured(without):
            report = patient.examine()
            note(figure, "config_path not set", report, "containerd-config")
            assert (report.verdict("containerd-config"), report.verdict("canary")) == ("fail", "fail")
            assert 'config_path = "/etc/containerd/certs.d"' in report.cure("containerd-config")


    def test_legacy_mirrors(patient: Patient, figure: Figure) -> None:
        table = f"""
      [plugins."io.containerd.grpc.v1.cri".registry.mirrors."{patient.cluster.registry.host}"]
        endpoint = ["http://{patient.cluster.registry.host}"]
    """
        without = "\n".join(line for line in patient.config.read_text().splitlines() if "config_path" not in line)
        with patient.configured(without + table):
            report = patient.examine()
            note(figure, "legacy mirrors", report, "containerd-config")
            assert (report.verdict("containerd-config"), report.verdict("canary")) == ("fail", "fail")
            assert "remove the registry.mirrors" in report.cure("containerd-config")

else:

    def test_colon_path_with_local_pull(patient: Patient, figure: Figure) -> None:
        before, _ = patient.config.read_text().split('  [plugins."io.containerd.grpc.v1.cri".registry]')
        images = f"""
    [plugins."io.containerd.cri.v1.images"]
      use_local_image_pull = true
      [plugins."io.containerd.cri.v1.images".registry]
        config_path = "{patient.certs}:/etc/docker/certs.d"
    """
        with patient.configured(before.replace("version = 2", "version = 3") + images):
            report = patient.examine()
            note(figure, "colon path, local pull", report, "containerd-config")
            assert (report.verdict("containerd-config"), report.verdict("canary")) == ("pass", "pass")


def test_soci(patient: Patient, figure: Figure) -> None:
    with_soci = patient.home / "soci.toml"
    with_soci.write_text(
        patient.config.read_text() + '\n[plugins."io.containerd.grpc.v1.cri".containerd]\n  snapshotter = "soci"\n'
    )
    report = patient.examine(config=with_soci)
    note(figure, "SOCI", report, "snapshotter")
    assert report.verdict("snapshotter") == "fail" and "FastImagePull" in report.cure("snapshotter")


def test_daemon_is_down(patient: Patient, figure: Figure) -> None:
    patient.node.daemon.close()
    report = patient.examine()
    note(figure, "daemon down", report, "daemon")
    assert (report.status, report.verdict("daemon"), report.verdict("mirror")) == (1, "fail", "fail")
    assert report.verdict("canary") == "skip"
    patient.node.daemon.start()
    patient.cluster.wait_until_joined()


def test_wrong_authority(patient: Patient, figure: Figure) -> None:
    cluster = patient.cluster
    machine = cluster.machine("stranger")
    other = Authority(cluster.directory / "other-ca").issue("stranger")
    settings = replace(cluster.settings(machine, [patient.machine.address]), certificates=other)
    stranger = cluster.daemon(machine, settings)
    stranger.start()
    argv = [binary(), "doctor", "--json", "--config", str(stranger.config)]
    report = Report(1, json.loads(machine.run(argv, check=False, env=environment()).stdout))
    note(figure, "wrong CA", report, "peers")
    assert report.verdict("peers") == "fail" and "same CA" in report.cure("peers")
    stranger.close()
    cured = replace(settings, certificates=cluster.authority.issue("stranger"))
    stranger = Daemon(machine, cluster.directory / "stranger", cluster.logs, cured)
    stranger.start()
    try:
        report = Report(1, json.loads(machine.run(argv, check=False, env=environment()).stdout))
        assert report.verdict("peers") == "pass", report.of("peers")
    finally:
        stranger.close()


def test_udp_is_blocked(patient: Patient, figure: Figure) -> None:
    rule = ["INPUT", "-p", "udp", "--sport", "5103", "-j", "DROP"]
    patient.machine.run(["iptables", "-A", *rule])
    try:
        report = patient.examine()
        note(figure, "UDP blocked", report, "peers")
        assert report.verdict("peers") == "fail"
        assert "security groups" in report.cure("peers") and "NetworkPolicy" in report.cure("peers")
    finally:
        patient.machine.run(["iptables", "-D", *rule])
    patient.cluster.wait_until_joined()


def test_small_mtu(patient: Patient, figure: Figure) -> None:
    link = ["ip", "-n", patient.machine.namespace, "link", "set", "eth0", "mtu"]
    run([*link, "1500"])
    try:
        report = patient.examine()
        note(figure, "MTU 1500", report, "mtu")
        assert report.verdict("mtu") == "warn" and "AWS_VPC_ENI_MTU" in report.cure("mtu")
    finally:
        run([*link, "9001"])
    assert patient.examine().verdict("mtu") == "pass"


def test_no_space(patient: Patient, figure: Figure) -> None:
    report = patient.examine(WINDLASS_STORE__FREE_FLOOR="900 TiB")
    note(figure, "no space", report, "disk")
    assert report.verdict("disk") == "fail" and "larger" in report.cure("disk")


def test_registry_is_out_of_reach(patient: Patient, figure: Figure) -> None:
    table = '[{name = "127.0.0.9:1", endpoint = "http://127.0.0.9:1"}]'
    report = patient.examine(WINDLASS_REGISTRY__ORIGINS=table)
    note(figure, "registry unreachable", report, "registry")
    assert report.verdict("registry") == "fail" and "route" in report.cure("registry")
