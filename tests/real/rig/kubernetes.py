"""A real API server with its etcd on a machine: no controllers, no kubelet, so objects are validated and nothing runs.

kube-apiserver comes through Go's module proxy (`tools/apiserver`), etcd and kubectl from Debian or wherever they are.
"""

from __future__ import annotations

import datetime
import ipaddress
import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from rig.network import Machine
from rig.processes import run, wait_until

TOOLS = Path(os.environ.get("CARGO_TARGET_DIR", "target")).absolute() / "tools"
BINARY = TOOLS / "kube-apiserver"
VERSION = "v1.34.4"
"""As `tools/apiserver/go.mod` has it."""

PORT = 6443
ADMIN_TOKEN = "rig-admin"
ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
PEM = serialization.Encoding.PEM
START_TIMEOUT_S = 120.0


def build(go: str) -> Path:
    """Builds kube-apiserver once: seven minutes of CPU."""
    if not BINARY.exists():
        source = Path(__file__).parents[1] / "tools" / "apiserver"
        version = "k8s.io/component-base/version"
        flags = f"-s -w -X {version}.gitVersion={VERSION} -X {version}.gitMajor=1 -X {version}.gitMinor=34"
        argv = [go, "install", "-trimpath", "-ldflags", flags, "k8s.io/kubernetes/cmd/kube-apiserver"]
        run(argv, timeout_s=3000, cwd=source, env={**os.environ, "GOBIN": str(TOOLS), "GOFLAGS": "-buildvcs=false"})
    return BINARY


class Kubernetes:
    """One API server, and kubectl as its administrator."""

    def __init__(self, machine: Machine, directory: Path, logs: Path) -> None:
        self.machine = machine
        self.directory = directory
        directory.mkdir(parents=True)
        _certificates(directory, machine.address)
        (directory / "tokens.csv").write_text(f'{ADMIN_TOKEN},admin,admin,"system:masters"\n')
        etcd = ["etcd", "--data-dir", str(directory / "etcd"), "--listen-client-urls", "http://127.0.0.1:2379"]
        etcd += ["--advertise-client-urls", "http://127.0.0.1:2379", "--listen-peer-urls", "http://127.0.0.1:2380"]
        self._etcd = machine.start([*etcd, "--unsafe-no-fsync"], logs / "etcd.log")
        options = {
            "etcd-servers": "http://127.0.0.1:2379",
            "secure-port": PORT,
            "advertise-address": machine.address,
            "tls-cert-file": directory / "server.crt",
            "tls-private-key-file": directory / "server.key",
            "cert-dir": directory / "made",
            "token-auth-file": directory / "tokens.csv",
            "service-account-issuer": "https://kubernetes.default.svc",
            "service-account-key-file": directory / "account.pub",
            "service-account-signing-key-file": directory / "account.key",
            "service-cluster-ip-range": "10.96.0.0/16",
            "authorization-mode": "RBAC",
            "endpoint-reconciler-type": "none",
        }
        argv = [str(BINARY), *[f"--{name}={value}" for name, value in options.items()]]
        self._server = machine.start(argv, logs / "kube-apiserver.log")
        self._config = directory / "kubeconfig"
        self._config.write_text(json.dumps(_kubeconfig(f"https://{machine.address}:{PORT}", directory / "ca.crt")))
        ready = lambda: self.kubectl("get", "--raw", "/readyz", check=False).returncode == 0  # noqa: E731
        wait_until(ready, "the API server is ready", START_TIMEOUT_S, self._server)

    def kubectl(self, *arguments: str, check: bool = True, given: str = "") -> subprocess.CompletedProcess:
        argv = ["kubectl", "--kubeconfig", str(self._config), *arguments]
        return self.machine.run(argv, check=check, input=given.encode(), env={**os.environ, "HOME": str(self.directory)})

    def apply(self, documents: Sequence[dict], *options: str, check: bool = True) -> subprocess.CompletedProcess:
        """Has the server validate them strictly and keep them."""
        given = json.dumps({"apiVersion": "v1", "kind": "List", "items": list(documents)})
        return self.kubectl("apply", "--server-side", "--validate=strict", *options, "-f", "-", check=check, given=given)

    def get(self, *arguments: str) -> dict:
        return json.loads(self.kubectl("get", *arguments, "-o", "json").stdout)

    def request(self, machine: Machine, token: str, method: str, path: str, body: dict | None = None) -> tuple[int, str]:
        """Status and body of a request with `token`, from `machine`."""
        curl = ["curl", "-s", "--cacert", str(self.directory / "ca.crt"), "-X", method, "-w", "\n%{http_code}"]
        curl += ["-H", f"Authorization: Bearer {token}"]
        if body is not None:
            kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
            curl += ["-H", f"Content-Type: {kind}", "-d", json.dumps(body)]
        answer = machine.run([*curl, f"https://{self.machine.address}:{PORT}{path}"]).stdout.decode()
        text, _, status = answer.rpartition("\n")
        return int(status), text

    def account(self, name: str, token: str) -> Path:
        """A directory as the kubelet mounts it into a pod."""
        directory = self.directory / f"account-{name}"
        directory.mkdir(exist_ok=True)
        (directory / "token").write_text(token)
        shutil.copy(self.directory / "ca.crt", directory / "ca.crt")
        return directory

    def environment(self) -> dict[str, str]:
        """What a pod is told of the API server."""
        return {"KUBERNETES_SERVICE_HOST": self.machine.address, "KUBERNETES_SERVICE_PORT": str(PORT)}

    def close(self) -> None:
        self._server.terminate()
        self._etcd.terminate()


def mounted(account: Path, argv: Sequence[str]) -> list[str]:
    """`argv` with `account` where a pod has it. A machine's command has a mount namespace of its own."""
    script = f'mkdir -p {ACCOUNT} && mount --bind "$0" {ACCOUNT} && exec "$@"'
    return ["sh", "-c", script, str(account), *map(str, argv)]


def _kubeconfig(server: str, authority: Path) -> dict:
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "rig", "cluster": {"server": server, "certificate-authority": str(authority)}}],
        "users": [{"name": "admin", "user": {"token": ADMIN_TOKEN}}],
        "contexts": [{"name": "rig", "context": {"cluster": "rig", "user": "admin"}}],
        "current-context": "rig",
    }


def _certificates(directory: Path, address: str) -> None:
    """An authority, a server's certificate by it, and the key that signs service accounts' tokens."""
    now = datetime.datetime.now(datetime.UTC)
    day = datetime.timedelta(days=1)
    authority_key, server_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "rig")])

    def certificate(name: str, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        built = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
        built = built.serial_number(x509.random_serial_number())
        return built.not_valid_before(now - day).not_valid_after(now + day)

    root = certificate("rig", authority_key.public_key())
    root = root.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(one)) for one in (address, "127.0.0.1")])
    server = certificate("kube-apiserver", server_key.public_key()).add_extension(names, critical=False)
    account_key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    public = account_key.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    files = {
        "ca.crt": root.sign(authority_key, hashes.SHA256()).public_bytes(PEM),
        "server.crt": server.sign(authority_key, hashes.SHA256()).public_bytes(PEM),
        "server.key": _private(server_key),
        "account.key": _private(account_key),
        "account.pub": public,
    }
    for name, data in files.items():
        (directory / name).write_bytes(data)


def _private(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> bytes:
    return key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
