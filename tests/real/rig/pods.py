"""A node that runs the chart's pod under its own containerd, as the kubelet would: host network, the rendered security
context and mounts, `/etc/containerd` and `/run` of its own.

What differs from a kubelet: containers are started by `ctr`, and environment that the cluster's DNS or API would give is
given by hand.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

from rig.containerd import Containerd
from rig.network import Machine
from rig.processes import run, wait_until

IMAGE = "windlass:rig"
CAPABILITIES = [
    "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FSETID", "CAP_FOWNER", "CAP_MKNOD", "CAP_NET_RAW", "CAP_SETGID", "CAP_SETUID",
    "CAP_SETFCAP", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT", "CAP_KILL", "CAP_AUDIT_WRITE",
]  # fmt: skip
"""What a container has unless it is dropped."""


def as_user(archive: Path, user: int, scratch: Path) -> Path:
    """The same image with `user` as its own, in the place of runAsUser: ctr 1.6 cannot be told one."""
    layout = scratch / f"as-{user}"
    layout.mkdir()
    run(["tar", "-C", str(layout), "-xf", str(archive)])
    run(["umoci", "config", "--image", f"{layout}:{IMAGE}", "--config.user", str(user)])
    index = layout / "index.json"
    named = json.loads(index.read_text())
    for manifest in named["manifests"]:
        manifest["annotations"]["io.containerd.image.name"] = IMAGE
    index.write_text(json.dumps(named))
    made = scratch / f"as-{user}.tar"
    run(["tar", "-C", str(layout), "-cf", str(made), "oci-layout", "index.json", "blobs"])
    return made


class NodeContainerd(Containerd):
    """A containerd in a mount namespace where its own directories are at the paths of a real node."""

    def _toml(self, directory: Path) -> str:
        """Written to the directory that becomes /etc/containerd."""
        for name in ("etc/certs.d", "run", "windlass-run", "windlass-data"):
            (directory / name).mkdir(parents=True, exist_ok=True)
        self.directory = directory
        text = super()._toml(directory).replace(str(self.certs), "/etc/containerd/certs.d")
        text = text.replace(f'"{self._socket}', '"/run/containerd/containerd.sock')
        (directory / "etc" / "config.toml").write_text(text)
        self.certs = directory / "etc" / "certs.d"
        self._socket = directory / "run" / "containerd.sock"
        return text

    def start(self) -> None:
        # Not `ip netns exec`: it hides the cgroups, without which no container starts.
        binds = {"etc": "/etc/containerd", "run": "/run/containerd"}
        binds |= {"windlass-run": "/run/windlass", "windlass-data": "/var/lib/windlass"}
        script = "".join(
            f"mkdir -p {at} && mount --bind {self.directory / name} {at} && " for name, at in binds.items()
        )
        argv = ["unshare", "--mount", "sh", "-c", f"{script}exec containerd --config /etc/containerd/config.toml"]
        self._process = _Inside(self.machine).start(argv, self._log)
        wait_until(self._answers, f"containerd of {self.machine.name} answers", 30, self._process)

    def inside(self, *arguments: str, check: bool = True):
        """`ctr` in this containerd's namespaces, where the paths are a node's."""
        here = ["nsenter", "--target", str(self.process.pid), "--mount", "--net"]
        return run([*here, "ctr", "--namespace", "k8s.io", *map(str, arguments)], check=check)


class _Inside(Machine):
    """The same machine, entered without `ip netns exec`."""

    def __init__(self, machine: Machine) -> None:
        self.namespace = machine.namespace

    def argv(self, argv) -> list[str]:
        return ["nsenter", f"--net=/run/netns/{self.namespace}", *map(str, argv)]


class Pod:
    """The containers of a rendered pod on one node."""

    def __init__(self, containerd: NodeContainerd, spec: dict, volumes: dict[str, Path], environment: dict[str, str]):
        self.containerd = containerd
        self._spec = spec
        self._volumes = {**{one["name"]: one["hostPath"]["path"] for one in spec["volumes"] if "hostPath" in one}}
        self._volumes |= {name: str(path) for name, path in volumes.items()}
        self._environment = environment
        self.logs: dict[str, Path] = {}

    def start(self) -> None:
        for container in self._spec["containers"]:
            self._start(container)

    def _start(self, container: dict) -> None:
        name = container["name"]
        log = self.containerd.directory / "run" / f"{name}.log"
        self.logs[name] = log
        context = container["securityContext"]
        assert context["capabilities"]["drop"] == ["ALL"] and context["readOnlyRootFilesystem"]
        argv = ["run", "--detach", "--net-host", "--read-only", "--seccomp"]
        argv += ["--log-uri", f"file:///run/containerd/{name}.log"]
        kept = [f"CAP_{one}" for one in context["capabilities"].get("add", [])]
        argv += [part for one in CAPABILITIES if one not in kept for part in ("--cap-drop", one)]
        for variable in container["env"]:
            value = self._environment.get(variable["name"], variable.get("value"))
            argv += ["--env", f"{variable['name']}={'' if value is None else value}"]
        for mount in container["volumeMounts"]:
            options = "rbind:ro" if mount.get("readOnly") else "rbind:rw"
            source = self._volumes[mount["name"]]
            argv += ["--mount", f"type=bind,src={source},dst={mount['mountPath']},options={options}"]
        self.containerd.inside(*argv, IMAGE, name, "/usr/local/bin/windlass", *container["args"])

    def pid(self, name: str) -> int:
        rows = [line.split() for line in self.containerd.inside("tasks", "list").stdout.decode().splitlines()]
        return int(next(row[1] for row in rows if row[0] == name))

    def status(self, name: str) -> dict[str, str]:
        """The process's lines in /proc."""
        lines = Path(f"/proc/{self.pid(name)}/status").read_text().splitlines()
        return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}

    def output(self, name: str) -> str:
        return self.logs[name].read_text(errors="replace")

    def end(self, name: str, grace_s: float = 60) -> None:
        """SIGTERM, and waits."""
        pid = self.pid(name)
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not Path(f"/proc/{pid}/exe").exists(), f"{name} ended", grace_s)

    def close(self) -> None:
        for name in reversed(list(self.logs)):
            self.containerd.inside("tasks", "kill", "--signal", "SIGKILL", name, check=False)
            self.containerd.inside("tasks", "delete", "--force", name, check=False)
            self.containerd.inside("containers", "delete", name, check=False)
