"""The shipped alerts and dashboard on real daemons: a real Prometheus fires each alert whose fault can be made here, and
every query of the dashboard has data under load.

What waits for minutes or days in `rules.yaml` waits for seconds here: the file is rewritten on the way, not changed.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from rig.cluster import Cluster, at_once
from rig.images import MIB, ImageBuilder, Layer, push
from rig.network import Machine
from rig.processes import wait_until
from rig.windlass import ADMIN, Daemon, binary, environment, wait_until_joined
from test_daemonset import CHART, queries

Figure = Callable[[str, object], None]

SHORTER = {"86400": "15", "[1d]": "[20s]", "[1h]": "[30s]", "[10m]": "[20s]", "50 * 1024 * 1024 * 1024": "1024 * 1024"}
"""What is waited for, and what instead. `for` becomes two scrapes."""

NOT_MADE_HERE = {"WindlassFirstByteSlow", "WindlassNetworkLossy", "WindlassWrongBytes"}
"""Their faults take a slow disk, a lossy network or a lying peer; `promtool` tests their rules."""

FIRES_WITHIN_S = 120


def shortened(text: str) -> str:
    for long, short in SHORTER.items():
        assert long in text, f"{long} is no longer in rules.yaml"
        text = text.replace(long, short)
    return re.sub(r"for: \d+[mh]", "for: 4s", text)


class Watched:
    """Daemons, and a Prometheus that scrapes them with the labels that the PodMonitor gives."""

    def __init__(self, cluster: Cluster, images: ImageBuilder) -> None:
        self.cluster = cluster
        self.images = images
        machines = [cluster.machine(name) for name in ("watch1", "watch2", "watch3")]
        addresses = [machine.address for machine in machines]
        self.daemons = [self._daemon(machine, addresses) for machine in machines]
        at_once(*[daemon.start for daemon in self.daemons])
        wait_until_joined(self.daemons)
        self.machine = cluster.machine("prometheus")
        directory = cluster.directory / "prometheus"
        directory.mkdir()
        rules = directory / "rules.yaml"
        rules.write_text(shortened((CHART / "files" / "rules.yaml").read_text()))
        targets = [
            {
                "targets": [f"{machine.address}:5102"],
                "labels": {"node": machine.name, "container": "windlass", "pod": f"windlass-{machine.name}"},
            }
            for machine in machines
        ]
        scrape = {"job_name": "windlass", "scrape_interval": "2s", "static_configs": targets}
        config = directory / "prometheus.yml"
        timing = {"evaluation_interval": "2s"}
        config.write_text(json.dumps({"global": timing, "rule_files": [str(rules)], "scrape_configs": [scrape]}))
        argv = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={directory}"]
        self.process = self.machine.start([*argv, "--web.listen-address=:9090"], cluster.logs / "prometheus.log")
        wait_until(lambda: len(self.ask("windlass_build_info")) == 3, "all are scraped", 90, self.process)

    def _daemon(self, machine: Machine, addresses: list[str]) -> Daemon:
        settings = self.cluster.settings(machine, addresses)
        settings = replace(settings, environment={"WINDLASS_STORE__SCRUB_RATE": "1 GiB"})
        if machine.name == "watch3":
            # The one with a small cache, a certificate that ends soon, and a registry that is not there.
            certificates = self._ending_certificate(machine.name)
            settings = replace(settings, certificates=certificates, budget="64 MiB")
            settings = replace(settings, extra='[[registry.origins]]\nname = "gone:1"\nendpoint = "http://127.0.0.1:9"\n')
        return self.cluster.daemon(machine, settings)

    def _ending_certificate(self, node: str) -> Path:
        out = self.cluster.directory / "ending"
        names = ["--node", node, "--cluster", "rig", "--days", "1"]
        argv = [binary(), "certs", "issue", "--ca", str(self.cluster.authority.directory), "--out", str(out), *names]
        self.cluster.origin.run(argv, env=environment())
        return out

    def api(self, path: str, **parameters: str) -> dict:
        fields = [part for name, value in parameters.items() for part in ("--data-urlencode", f"{name}={value}")]
        curl = ["curl", "-s", *fields, f"http://127.0.0.1:9090/api/v1/{path}"]
        said = self.machine.run(curl, check=False).stdout
        # While it starts it answers in words.
        answer = json.loads(said) if said.startswith(b"{") else {}
        return answer.get("data") or {}

    def ask(self, query: str) -> list:
        return self.api("query", query=query).get("result", [])

    def firing(self) -> set[str]:
        alerts = self.api("alerts").get("alerts", [])
        return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}

    def pull(self, daemon: Daemon, repository: str, *sizes_mib: int) -> None:
        """As a client of the mirror would: the image's layers by digest."""
        layers = [Layer(hash(repository) % 10_000 + 50_000 + n, mib, False) for n, mib in enumerate(sizes_mib)]
        image = self.images.build(repository.replace("/", "-"), layers)
        push(image, self.cluster.origin, self.cluster.registry.reference(repository))
        self.pull_again(daemon, repository, list(image.blobs()))

    def pull_again(self, daemon: Daemon, repository: str, digests: list[str]) -> None:
        for digest in digests:
            path = f"/v2/{repository}/blobs/{digest}?ns={self.cluster.registry.host}"
            daemon.machine.run(["curl", "-sf", "-o", "/dev/null", f"http://127.0.0.1:5100{path}"], check=False)

    def fires(self, alert: str, provoke: Callable[[], object] = lambda: None) -> float:
        """Seconds until `alert` fires; `provoke` is called again and again."""
        began = time.monotonic()
        while alert not in self.firing():
            provoke()
            assert time.monotonic() - began < FIRES_WITHIN_S, f"{alert}: {self.firing()}"
            time.sleep(1)
        return time.monotonic() - began

    def close(self) -> None:
        self.process.terminate()


@pytest.fixture(scope="module")
def watched(cluster: Cluster, images: ImageBuilder) -> Iterator[Watched]:
    cluster._objects = SimpleNamespace(endpoint="http://127.0.0.1:9")
    made = Watched(cluster, images)
    try:
        yield made
    finally:
        made.close()


def test_every_query_of_the_dashboard_has_data_under_load(watched: Watched, figure: Figure) -> None:
    first, second, third = watched.daemons
    dashboard = json.loads((CHART / "files" / "dashboard.json").read_text())
    shown = {target["expr"] for panel in dashboard["panels"] for target in panel["targets"]}
    # Two rounds, seconds apart: a rate needs both.
    for round_ in range(3):
        repository = f"load/round{round_}"
        image = watched.images.build(f"load-{round_}", [Layer(60_000 + round_, 40, False)])
        push(image, watched.cluster.origin, watched.cluster.registry.reference(repository))
        at_once(*[
            lambda one=one: watched.pull_again(one, repository, list(image.blobs())) for one in (first, second, third)
        ])  # fmt: skip
        time.sleep(4)
    silent = []
    filled = queries()[: len(shown)]
    for expression in filled:
        if not watched.ask(expression):
            silent.append(expression)
    figure("dashboard: queries under load, of them without data", f"{len(filled)}, {len(silent)}")
    assert not silent, silent
    picture = watched.cluster.logs / "dashboard.json"
    now = time.time()
    series = {one: watched.api("query_range", query=one, start=str(now - 40), end=str(now), step="2") for one in filled}
    picture.write_text(json.dumps(series))


def test_alerts_fire_in_the_faults_they_are_for(watched: Watched, figure: Figure) -> None:
    first, second, third = watched.daemons
    rules = yaml.safe_load((CHART / "files" / "rules.yaml").read_text())["groups"][0]["rules"]
    fired: dict[str, float] = {}

    fired["WindlassCertificateEnding"] = watched.fires("WindlassCertificateEnding")

    number = iter(range(1000))
    from_origin = lambda: watched.pull(first, f"fresh/{next(number)}", 8)  # noqa: E731
    fired["WindlassOriginShareHigh"] = watched.fires("WindlassOriginShareHigh", from_origin)

    evict = lambda: watched.pull(third, f"evict/{next(number)}", 30, 30)  # noqa: E731
    fired["WindlassStoreTooSmall"] = watched.fires("WindlassStoreTooSmall", evict)

    def ask_what_is_gone() -> None:
        third.machine.run(["curl", "-s", "http://127.0.0.1:5100/v2/x/manifests/v1?ns=gone:1"], check=False)

    fired["WindlassOriginFailing"] = watched.fires("WindlassOriginFailing", ask_what_is_gone)

    # Nobody asks the mirror any more.
    fired["WindlassMirrorNotUsed"] = watched.fires("WindlassMirrorNotUsed")

    others = [one.machine.address for one in (first, third)]
    second.machine.lose_the_way_to(others)
    fired["WindlassAlone"] = watched.fires("WindlassAlone")
    second.machine.find_the_way_to(others)

    fired["WindlassDiskFailing"] = watched.fires("WindlassDiskFailing", lambda: corrupt(second))

    first.process.kill()
    fired["WindlassDown"] = watched.fires("WindlassDown")

    assert fired.keys() == {rule["alert"] for rule in rules} - NOT_MADE_HERE
    for alert, seconds in fired.items():
        figure(f"alert {alert} fired after, seconds", round(seconds))


def corrupt(daemon: Daemon) -> None:
    """Flips bytes of what it has stored, behind its back; its scrubber reads everything again and again."""
    for path in Path(daemon.settings.data_dir).glob("contents/*/*/data"):
        if path.stat().st_size > MIB:
            with path.open("r+b") as file:
                file.seek(4096)
                file.write(b"\xff" * 64)
