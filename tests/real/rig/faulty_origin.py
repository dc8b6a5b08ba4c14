"""A program: a registry and an S3 that misbehave towards windlass and nobody else.

`python faulty_origin.py PORT TLS_PORT CERTIFICATE KEY LOG`. What goes wrong is in the name: repository `KIND/MODE/FAULT`
is an image whose KIND of content (`manifest` or `blob`) meets FAULT, and object `MODE/FAULT` of bucket `faults` likewise.
MODE `once` is the first such request, `always` each, `later` each that does not begin at the first byte. One more
component before them makes it an image of its own. Who does not call itself windlass is served well: that is what the
origin would have sent. On TLS_PORT the same with a certificate that nobody trusts.

Contents follow from the name, so that each image and each object has bytes of its own and both sides can compute them.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import platform
import random
import re
import socket
import ssl
import struct
import sys
import tarfile
import threading
import time
import zlib
from functools import cache, lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LAYER_BYTES = 3 << 20
OBJECT_BYTES = (1 << 20) + 17
STALL_S = 120.0
CUT_AT = 300_000
"""Where a body stalls, breaks or ends: past the first pieces, before the end."""

FAULTS = [
    "403", "404", "408", "416", "429", "500", "503", "refused", "tls", "stall-headers", "stall-body", "reset", "short",
    "ignores-range", "wrong-range", "changed-etag", "corrupt", "redirect-loop", "redirect-metadata",
]  # fmt: skip
MODES = ["once", "always"]
LATER = "later"
"""The mode of blobs whose first chunk is well: what is wrong shows when a client has read a part."""

IMAGE = r"/v2/((?:[a-z0-9-]+/)?(manifest|blob)/(once|always|later)/([a-z0-9-]+))/(manifests|blobs)/(.+)"
REMEMBERED = 128
"""Images whose layers are kept in memory, of the hundreds that a full run makes."""

ARCHITECTURE = {"x86_64": "amd64", "aarch64": "arm64"}[platform.machine()]
MANIFEST = "application/vnd.oci.image.manifest.v1+json"


def layer(repository: str) -> bytes:
    """A tar of one file."""
    data = random.Random(f"layer {repository}").randbytes(LAYER_BYTES)
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w", format=tarfile.PAX_FORMAT) as tar:
        entry = tarfile.TarInfo(f"data/{repository.replace('/', '-')}.bin")
        entry.size = len(data)
        tar.addfile(entry, io.BytesIO(data))
    return archive.getvalue()


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


@lru_cache(REMEMBERED)
def blobs(repository: str) -> dict[str, bytes]:
    """Digest to bytes of the layer and the config."""
    made = layer(repository)
    rootfs = {"type": "layers", "diff_ids": [digest_of(made)]}
    config = {"architecture": ARCHITECTURE, "os": "linux", "config": {"Cmd": [f"/{repository}"]}, "rootfs": rootfs}
    encoded = json.dumps(config).encode()
    return {digest_of(made): made, digest_of(encoded): encoded}


@cache
def manifest(repository: str) -> bytes:
    (layer_digest, layer_bytes), (config_digest, config_bytes) = blobs(repository).items()
    kinds = "application/vnd.oci.image.layer.v1.tar", "application/vnd.oci.image.config.v1+json"
    described = [
        {"mediaType": kind, "digest": digest, "size": len(data)}
        for kind, digest, data in zip(kinds, (layer_digest, config_digest), (layer_bytes, config_bytes), strict=True)
    ]
    whole = {"schemaVersion": 2, "mediaType": MANIFEST, "config": described[1], "layers": described[:1]}
    return json.dumps(whole).encode()


@cache
def stored(key: str) -> bytes:
    return random.Random(f"object {key}").randbytes(OBJECT_BYTES)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    met: dict[str, int] = {}
    lock = threading.Lock()
    log = None

    def log_message(self, *_) -> None:
        """Nothing: the JSON log is the record."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        with self.lock:
            agent, asked = self.headers.get("User-Agent", ""), self.headers.get("Range", "")
            self.log.write(json.dumps({"method": self.command, "path": path, "agent": agent, "range": asked}) + "\n")
        try:
            if match := re.fullmatch(IMAGE, path):
                return self.registry(*match.groups())
            if match := re.fullmatch(r"/faults/(once|always)/([a-z0-9-]+)", path):
                return self.object(*match.groups())
            return self.send(200 if path == "/v2/" else 404, b"{}", "application/json")
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def registry(self, repository: str, kind: str, mode: str, fault: str, what: str, reference: str) -> None:
        if what == "manifests":
            data, content_type = manifest(repository), MANIFEST
        else:
            found = blobs(repository).get(reference)
            if found is None:
                return self.send(404, b"{}", "application/json")
            data, content_type = found, "application/octet-stream"
        # The layer is what is faulty, not the small config beside it.
        is_faulty = what == f"{kind}s" and (kind == "manifest" or len(data) >= LAYER_BYTES)
        headers = {"Docker-Content-Digest": digest_of(data)} if what == "manifests" else {}
        self.serve(data, content_type, headers, self.strikes(repository, mode, is_faulty) and fault)

    def object(self, mode: str, fault: str) -> None:
        key = f"{mode}/{fault}"
        headers = {"ETag": f'"{hashlib.md5(stored(key)).hexdigest()}"'}
        is_content = self.command == "GET"
        if not is_content:
            # As S3 does on request: how a client of the read endpoint finds a wrong byte out.
            sum_of_all = zlib.crc32(stored(key)).to_bytes(4, "big")
            headers["x-amz-checksum-crc32"] = base64.b64encode(sum_of_all).decode()
            headers["x-amz-checksum-type"] = "FULL_OBJECT"
        strikes = self.strikes(f"object {key}", mode, is_content)
        self.serve(stored(key), "binary/octet-stream", headers, strikes and fault, is_s3=True)

    def strikes(self, name: str, mode: str, is_faulty: bool) -> bool:
        if not is_faulty or "windlass" not in self.headers.get("User-Agent", ""):
            return False
        with self.lock:
            self.met[name] = self.met.get(name, 0) + 1
            if mode == LATER:
                return not self.headers.get("Range", "bytes=0-").startswith("bytes=0-")
            return mode == "always" or self.met[name] == 1

    def serve(self, data: bytes, kind: str, headers: dict[str, str], fault: str | bool, is_s3: bool = False) -> None:
        start, end, status = 0, len(data), 200
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked and fault != "ignores-range":
            start, end, status = int(asked[1]), min(end, int(asked[2] or end - 1) + 1), 206
            headers = {**headers, "Content-Range": f"bytes {start}-{end - 1}/{len(data)}"}
        match fault:
            case "403" | "404" | "408" | "416" | "429" | "500" | "503":
                code = "SlowDown" if fault == "503" else "Told"
                body = f"<Error><Code>{code}</Code></Error>" if is_s3 else '{"errors":[{"code":"TOLD","message":"told so"}]}'
                return self.send(int(fault), body.encode(), "application/xml" if is_s3 else "application/json")
            case "stall-headers":
                time.sleep(STALL_S)
                return self.cut(reset=True)
            case "redirect-loop":
                return self.send(307, b"", kind, {"Location": self.path})
            case "redirect-metadata":
                return self.send(307, b"", kind, {"Location": "http://169.254.169.254/latest/meta-data/"})
            case "changed-etag":
                headers = {**headers, "ETag": '"another"'}
            case "wrong-range" if status == 206:
                headers = {**headers, "Content-Range": f"bytes {start + 1}-{end}/{len(data)}"}
            case "corrupt":
                wrong = bytearray(data)
                wrong[(start + end) // 2] ^= 1
                data = bytes(wrong)
        self.send(status, data[start:end], kind, headers, fault if fault in ("stall-body", "reset", "short") else "")

    def send(
        self, status: int, body: bytes, kind: str, headers: dict[str, str] | None = None, break_how: str | bool = ""
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if not break_how:
            self.wfile.write(body)
            return
        self.wfile.write(body[: min(CUT_AT, len(body) // 2)])
        if break_how == "stall-body":
            time.sleep(STALL_S)
        self.cut(reset=break_how != "short")

    def cut(self, reset: bool) -> None:
        self.close_connection = True
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, *_) -> None:
        """A client that hangs up is no news."""


def main() -> None:
    port, tls_port, certificate, key, log = sys.argv[1:]
    Handler.log = open(log, "a", buffering=1)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    encrypted = Server(("0.0.0.0", int(tls_port)), Handler)
    encrypted.socket = context.wrap_socket(encrypted.socket, server_side=True, do_handshake_on_connect=False)
    threading.Thread(target=encrypted.serve_forever, daemon=True).start()
    Server(("0.0.0.0", int(port)), Handler).serve_forever()


if __name__ == "__main__":
    main()
