"""windlass on a machine: its certificates, its configuration, its process, and what it says of itself.

Every name that windlass gives to the outside (keys, flags, paths, metrics) that the rig relies on is in this file.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rig.network import Machine
from rig.processes import Process, run, wait_until

MIRROR = "http://127.0.0.1:5100"
OBJECTS = "http://127.0.0.1:5101"
ADMIN = "http://127.0.0.1:5102"
PEER_PORT = 5103
CLUSTER = "rig"

START_TIMEOUT_S = 30.0
JOIN_TIMEOUT_S = 60.0
SAMPLE = re.compile(r"^(?P<name>[a-z_]+)(?:\{(?P<labels>.*)\})? (?P<value>\S+)$")


def binary() -> str:
    return os.path.realpath(os.environ.get("WINDLASS_BIN", "target/tests/windlass"))


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """What windlass is run with: nothing of the rig's own settings, and the credentials moto takes."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WINDLASS_", "AWS_"))}
    credentials = {"AWS_ACCESS_KEY_ID": "rig", "AWS_SECRET_ACCESS_KEY": "rig", "AWS_REGION": "us-east-1"}
    return {**kept, **credentials, **(extra or {})}


@dataclass
class Authority:
    """A cluster's certificate authority, made by `windlass certs`."""

    directory: Path
    cluster: str = CLUSTER

    def __post_init__(self) -> None:
        self._certs("init", "--cluster", self.cluster, "--dir", str(self.directory))

    def issue(self, node: str, cluster: str | None = None) -> Path:
        """A node's certificate and key. Returns the directory they are in, with the authority's certificate."""
        cluster = cluster or self.cluster
        out = self.directory / cluster / node
        names = ["--node", node, "--cluster", cluster]
        self._certs("issue", "--ca", str(self.directory), "--out", str(out), *names)
        return out

    def _certs(self, *arguments: str) -> None:
        run([binary(), "certs", *arguments], env=environment())


@dataclass
class Settings:
    """What a test may want to be different on one daemon."""

    peers: Sequence[str]
    registry: str
    objects: str
    data_dir: Path
    certificates: Path
    cluster: str = CLUSTER
    budget: str = "20 GiB"
    free_floor: str = "0 B"
    extra: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    registry_extra: str = ""
    """More keys of the registry's table."""

    s3_extra: str = ""
    """More keys of `[s3]`."""


class Daemon:
    """One `windlass serve`."""

    def __init__(self, machine: Machine, directory: Path, logs: Path, settings: Settings) -> None:
        self.machine = machine
        self.log = logs / f"{machine.name}-windlass.log"
        self.settings = settings
        directory.mkdir(parents=True, exist_ok=True)
        self.config = directory / "windlass.toml"
        self.socket = directory / "windlass.sock"
        self.config.write_text(_toml(machine, self.socket, settings))
        self._process: Process | None = None

    def start(self, wrapper: Sequence[str] = ()) -> Daemon:
        """Starts it and waits until it is ready. `wrapper` is a command that runs the rest of its arguments."""
        argv = [*wrapper, binary(), "serve", "--config", str(self.config)]
        self._process = self.machine.start(argv, self.log, environment(self.settings.environment))
        wait_until(self.is_ready, f"windlass of {self.machine.name} is ready", START_TIMEOUT_S, self._process)
        return self

    def run_to_its_end(self, wrapper: Sequence[str] = ()) -> tuple[int, str]:
        """For a daemon that must not start: its exit status and what it wrote."""
        argv = [*wrapper, binary(), "serve", "--config", str(self.config)]
        done = self.machine.run(
            argv, timeout_s=START_TIMEOUT_S, check=False, env=environment(self.settings.environment)
        )
        return done.returncode, (done.stdout + done.stderr).decode()

    @property
    def process(self) -> Process:
        assert self._process is not None, "not started"
        return self._process

    def is_ready(self) -> bool:
        return self.machine.answers(f"{ADMIN}/readyz")

    def close(self) -> None:
        if self._process is not None:
            self._process.terminate()

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def metrics_text(self) -> bytes:
        return self.machine.get(f"{ADMIN}/metrics")

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that carry `labels`; 0 when there is none."""
        wanted = {f'{key}="{value}"' for key, value in labels.items()}
        total = 0.0
        for line in self.metrics_text().decode().splitlines():
            sample = SAMPLE.match(line)
            if sample and sample["name"] == name and wanted <= set((sample["labels"] or "").split(",")):
                total += float(sample["value"])
        return total

    def held_bytes(self) -> int:
        """Bytes of whole chunks that it has, of all contents."""
        return sum(content["have_bytes"] for content in self.contents())

    def peers(self) -> int:
        """How many other daemons it knows, settled or not."""
        return int(self.metric("windlass_peers"))

    def fetch_argv(self, *arguments: str) -> list[str]:
        return [binary(), "fetch", "--socket", str(self.socket), *arguments]

    def fetch(
        self, *arguments: str, timeout_s: float = 300.0, extra: Mapping[str, str] | None = None
    ) -> tuple[int, str]:
        """`windlass fetch`: its exit status and what it wrote. `extra` is added to the command's environment."""
        done = self.machine.run(self.fetch_argv(*arguments), timeout_s, check=False, env=environment(extra))
        return done.returncode, (done.stdout + done.stderr).decode()

    def command(self, name: str, *arguments: str) -> tuple[int, str]:
        """Any command that asks the daemon: its exit status and what it wrote."""
        argv = [binary(), name, "--socket", str(self.socket), *arguments]
        done = self.machine.run(argv, check=False, env=environment())
        return done.returncode, (done.stdout + done.stderr).decode()

    def status(self, path: str, *curl_options: str) -> tuple[int, str]:
        """HTTP status and body of a GET from the registry face."""
        curl = ["curl", "-s", "-w", "\n%{http_code}", *curl_options, f"{MIRROR}{path}"]
        body, _, status = self.machine.run(curl, check=False).stdout.decode(errors="replace").rpartition("\n")
        return int(status), body

    def contents(self) -> list[dict]:
        return json.loads(self.machine.get(f"{ADMIN}/v1/contents"))


def wait_until_joined(daemons: Sequence[Daemon]) -> None:
    """Until every daemon knows every other one."""
    for daemon in daemons:
        wait_until(
            lambda daemon=daemon: daemon.peers() >= len(daemons) - 1,
            f"{daemon.machine.name} knows {len(daemons) - 1} peers",
            JOIN_TIMEOUT_S,
            daemon.process,
        )


def _toml(machine: Machine, socket: Path, settings: Settings) -> str:
    peers = [f"{peer}:{PEER_PORT}" for peer in settings.peers]
    return f"""
[node]
name = "{machine.name}"
cluster = "{settings.cluster}"

[tls]
ca = "{settings.certificates}/ca.crt"
certificate = "{settings.certificates}/tls.crt"
key = "{settings.certificates}/tls.key"

[transport]
listen = "0.0.0.0:{PEER_PORT}"

[gossip]
peers = {json.dumps(peers)}

[store]
data_dir = "{settings.data_dir}"
budget = "{settings.budget}"
free_floor = "{settings.free_floor}"

[[registry.origins]]
name = "{settings.registry}"
endpoint = "http://{settings.registry}"
{settings.registry_extra}

[s3]
buckets = ["*"]
endpoint = "{settings.objects}"
path_style = true
{settings.s3_extra}

[control]
socket = "{socket}"

{settings.extra}
"""
