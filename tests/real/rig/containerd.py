"""A containerd of its own on each machine, pulled through as kubelet does it: CRI's PullImage over gRPC.

Its root, state, socket and certs.d are all under one directory; the machine's own containerd is not involved.
"""

from __future__ import annotations

import struct
import tempfile
from pathlib import Path

from rig.network import Machine
from rig.processes import Process, run, wait_until

PULL_TIMEOUT_S = 300.0

# No CNI plugin and no pod is ever started here; the snapshotter is the one EKS uses.
CONFIG = """
version = 2
root = "{root}"
state = "{state}"
disabled_plugins = ["io.containerd.internal.v1.opt", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.aufs"]
[grpc]
  address = "{socket}"
[ttrpc]
  address = "{socket}.ttrpc"
[plugins."io.containerd.grpc.v1.cri"]
  stream_server_address = "127.0.0.1"
  stream_server_port = "0"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{root}/cni-bin"
    conf_dir = "{root}/cni-conf"
  [plugins."io.containerd.grpc.v1.cri".registry]
    config_path = "{certs}"
"""


class PullError(Exception):
    """CRI refused or failed the pull; carries gRPC's message."""


class Containerd:
    """One containerd on `machine`: Debian's."""

    COMMAND = "containerd"
    CTR = "ctr"

    def __init__(self, machine: Machine, directory: Path, logs: Path) -> None:
        self.machine = machine
        self.certs = directory / "certs.d"
        self.certs.mkdir(parents=True)
        self._socket = directory / "containerd.sock"
        self._config = directory / "config.toml"
        self._log = logs / f"{machine.name}-containerd.log"
        self._config.write_text(self._toml(directory))
        self._process: Process | None = None
        self.start()

    def _toml(self, directory: Path) -> str:
        return CONFIG.format(root=directory / "root", state=directory / "state", socket=self._socket, certs=self.certs)

    def start(self) -> None:
        self._process = self.machine.start([self.COMMAND, "--config", str(self._config)], self._log)
        wait_until(self._answers, f"containerd of {self.machine.name} answers", 30, self._process)

    def ask(self, registry: str, mirror: str | None) -> None:
        """Writes hosts.toml for a plain-HTTP registry: `mirror` is asked first, the registry when it cannot serve."""
        directory = self.certs / registry
        directory.mkdir(exist_ok=True)
        # containerd 1.6 ignores a hosts.toml without a [host] table, its `server` included.
        first = mirror or f"http://{registry}"
        (directory / "hosts.toml").write_text(
            f'server = "http://{registry}"\n[host."{first}"]\n  capabilities = ["pull", "resolve"]\n'
        )

    def pull(self, reference: str, username: str = "", password: str = "") -> None:
        """Pulls and unpacks. Raises PullError with containerd's words."""
        image = _message(1, reference.encode())
        auth = _message(1, username.encode()) + _message(2, password.encode()) if username else b""
        request = _message(1, image) + (_message(2, auth) if auth else b"")
        self._call("runtime.v1.ImageService/PullImage", request, PULL_TIMEOUT_S)

    def ctr_pull(self, reference: str, *options: str) -> tuple[int, str]:
        """`ctr images pull`, which reads certs.d only when told so: its exit status and what it wrote."""
        # ctr itself reaches out, so it runs where this containerd does.
        ctr = [self.CTR, "--address", str(self._socket), "--namespace", "k8s.io"]
        pull = ["images", "pull", "--hosts-dir", str(self.certs), *options, reference]
        done = self.machine.run([*ctr, *pull], check=False)
        return done.returncode, (done.stdout + done.stderr).decode()

    def is_unpacked(self, reference: str) -> bool:
        """True when every blob is there and the layers are unpacked."""
        check = self._ctr("images", "check", f"name=={reference}").stdout.decode()
        rows = [line.split() for line in check.splitlines() if line.startswith(reference)]
        return bool(rows) and all("complete" in row and row[-1] == "true" for row in rows)

    def forget(self, reference: str) -> None:
        """Removes the image and its content, so that the next pull is cold."""
        self._ctr("images", "remove", "--sync", reference)
        names = self._ctr("images", "list", "--quiet").stdout.decode().split()
        if names:
            self._ctr("images", "remove", "--sync", *names)
        wait_until(lambda: not self.content(), "containerd's content is collected", 30)

    def content(self) -> list[str]:
        """Digests in the content store."""
        return self._ctr("content", "list", "--quiet").stdout.decode().split()

    @property
    def process(self) -> Process:
        assert self._process is not None, "not started"
        return self._process

    def close(self) -> None:
        if self._process:
            self._process.terminate()

    def _answers(self) -> bool:
        return self._ctr("version", check=False).returncode == 0

    def _ctr(self, *arguments: str, check: bool = True):
        return run([self.CTR, "--address", str(self._socket), "--namespace", "k8s.io", *arguments], check=check)

    def _call(self, method: str, message: bytes, timeout_s: float) -> None:
        """One unary gRPC call. curl speaks HTTP/2 over a Unix socket, so no gRPC library is needed."""
        frame = struct.pack(">BI", 0, len(message)) + message
        with tempfile.NamedTemporaryFile() as headers:
            curl = ["curl", "-sS", "--http2-prior-knowledge", "--unix-socket", str(self._socket)]
            curl += ["--max-time", str(timeout_s), "-H", "content-type: application/grpc", "-H", "te: trailers"]
            curl += ["-D", headers.name, "-o", "/dev/null", "--data-binary", "@-", f"http://localhost/{method}"]
            done = run(curl, timeout_s + 5, check=False, input=frame)
            fields = Path(headers.name).read_text(errors="replace").lower()
        if done.returncode != 0 or "grpc-status: 0" not in fields:
            raise PullError(f"{self.machine.name}: {method}: curl {done.returncode} {done.stderr!r}\n{fields}")


def _message(field: int, value: bytes) -> bytes:
    """A length-delimited protobuf field."""
    length, encoded = len(value), bytearray()
    while length > 0x7F:
        encoded.append(length & 0x7F | 0x80)
        length >>= 7
    encoded.append(length)
    return bytes([field << 3 | 2]) + bytes(encoded) + value
