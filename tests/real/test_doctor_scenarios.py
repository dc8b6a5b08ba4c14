"""`windlass doctor` against real containerds and daemons: each fault is named with its cure, and the cure cures it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from rig.cluster import Cluster, Node
from rig.containerd2 import Containerd2, Way, needed
from rig.processes import run
from rig.windlass import Authority, Daemon, binary, environment

WITHOUT_OBJECTS = True

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

    def __init__(self, cluster: Cluster, node: Node, home: Path | None = None) -> None:
        self.cluster = cluster
        self.node = node
        self.machine = node.machine
        self.home = home or cluster.directory / node.machine.name
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

    def turned(self, *checks: str) -> bool:
        """Whether all of these pass now."""
        report = self.examine()
        return all(report.verdict(check) == "pass" for check in checks)

    def as_the_cure_says(self, report: Report) -> str:
        """The lines of TOML that the cure prints, with this containerd's certs.d for the usual one."""
        lines = report.cure("containerd-config").splitlines()
        start = next(number for number, line in enumerate(lines) if line.startswith("["))
        return "\n" + "\n".join(lines[start : start + 2]).replace("/etc/containerd/certs.d", str(self.certs)) + "\n"

    def restart(self, text: str) -> None:
        self.node.containerd.process.terminate()
        self.config.write_text(text)
        self.node.containerd.start()


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


def without_registry(text: str) -> str:
    """containerd's configuration without its registry table."""
    return "\n".join(line for line in text.splitlines() if not re.search(r'config_path|cri"\.registry]', line))


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
        without = without_registry(patient.config.read_text())
        with patient.configured(without):
            report = patient.examine()
            note(figure, "config_path not set", report, "containerd-config")
            assert (report.verdict("containerd-config"), report.verdict("canary")) == ("fail", "fail")
            assert 'config_path = "/etc/containerd/certs.d"' in report.cure("containerd-config")
            patient.restart(without + patient.as_the_cure_says(report))
            assert patient.turned("containerd-config", "canary")


    def test_legacy_mirrors(patient: Patient, figure: Figure) -> None:
        table = f"""
      [plugins."io.containerd.grpc.v1.cri".registry.mirrors."{patient.cluster.registry.host}"]
        endpoint = ["http://{patient.cluster.registry.host}"]
    """
        without = without_registry(patient.config.read_text())
        with patient.configured(without + table):
            report = patient.examine()
            note(figure, "legacy mirrors", report, "containerd-config")
            assert (report.verdict("containerd-config"), report.verdict("canary")) == ("fail", "fail")
            assert "remove the registry.mirrors" in report.cure("containerd-config")
            patient.restart(without + patient.as_the_cure_says(report))
            assert patient.turned("containerd-config", "canary")


@pytest.fixture(scope="module")
def patients2(cluster: Cluster, patient: Patient) -> Iterator[Callable[[Way, str], Patient]]:
    """Nodes like the patient with a containerd 2.x, beside the patient's own containerd."""
    started = []

    def make(way: Way, name: str) -> Patient:
        home = cluster.directory / name
        containerd = Containerd2(patient.machine, home, cluster.logs / name, way)
        started.append(containerd)
        made = Patient(cluster, replace(patient.node, containerd=containerd), home)
        made.wire()
        return made

    yield make
    for containerd in started:
        containerd.close()


@needed
def test_colon_path_with_the_transfer_service(patients2: Callable, figure: Figure) -> None:
    """What EKS writes, where nothing makes containerd fall back to its local pull: no mirror is asked, nothing is logged."""
    patient = patients2(Way(local=False, extra_certs=":/etc/docker/certs.d"), "colon2")
    report = patient.examine()
    note(figure, "2.x, colon path, transfer service", report, "containerd-config")
    assert (report.status, report.verdict("containerd-config"), report.verdict("canary")) == (1, "fail", "fail")
    cure = patient.as_the_cure_says(report)
    text = patient.config.read_text()
    section, setting = cure.strip().splitlines()
    assert section in text, "the cure names the section that this version reads"
    before = next(line for line in text.splitlines() if "config_path" in line)
    patient.restart(text.replace(before, setting))
    assert patient.turned("containerd-config", "canary")


@needed
def test_colon_path_with_local_pull(patients2: Callable, figure: Figure) -> None:
    report = patients2(Way(local=True, extra_certs=":/etc/docker/certs.d"), "local2").examine()
    note(figure, "2.x, colon path, local pull", report, "containerd-config")
    assert (report.verdict("containerd-config"), report.verdict("canary")) == ("pass", "pass")


@needed
def test_containerd_2_wired(patients2: Callable, figure: Figure) -> None:
    report = patients2(Way(local=False), "wired2").examine()
    note(figure, "2.x, wired", report, "canary")
    assert (report.verdict("containerd-config"), report.verdict("canary")) == ("pass", "pass")


def test_soci(patient: Patient, figure: Figure) -> None:
    with_soci = patient.home / "soci.toml"
    with_soci.write_text(
        patient.config.read_text() + '\n[plugins."io.containerd.grpc.v1.cri".containerd]\n  snapshotter = "soci"\n'
    )
    report = patient.examine(config=with_soci)
    note(figure, "SOCI", report, "snapshotter")
    assert report.verdict("snapshotter") == "fail" and "FastImagePull" in report.cure("snapshotter")
    with_soci.write_text(with_soci.read_text().replace('snapshotter = "soci"', 'snapshotter = "overlayfs"'))
    assert patient.examine(config=with_soci).verdict("snapshotter") == "pass"


def test_daemon_is_down(patient: Patient, figure: Figure) -> None:
    patient.node.daemon.close()
    report = patient.examine()
    note(figure, "daemon down", report, "daemon")
    assert (report.status, report.verdict("daemon"), report.verdict("mirror")) == (1, "fail", "fail")
    assert report.verdict("canary") == "skip"
    patient.node.daemon.start()
    patient.cluster.wait_until_joined()
    assert patient.turned("daemon", "mirror", "canary")


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
    assert patient.turned("peers")


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
    assert patient.examine(WINDLASS_STORE__FREE_FLOOR="0 B", WINDLASS_STORE__BUDGET="1 GiB").verdict("disk") == "pass"


def test_registry_is_out_of_reach(patient: Patient, figure: Figure) -> None:
    table = '[{name = "127.0.0.9:1", endpoint = "http://127.0.0.9:1"}]'
    report = patient.examine(WINDLASS_REGISTRY__ORIGINS=table)
    note(figure, "registry unreachable", report, "registry")
    assert report.verdict("registry") == "fail" and "route" in report.cure("registry")
    assert patient.turned("registry")
