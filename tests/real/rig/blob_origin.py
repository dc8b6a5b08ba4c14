"""A program: a registry that misbehaves on request and writes one JSON line for each response, as `counting_s3.py` does.

Run inside a machine's namespace: `python blob_origin.py PORT LOG`. It serves the pull half of the distribution
specification for images of random bytes. POST /rig with one JSON object tells it what to do:
`{"make": NAME, "sizes": [...]}` makes an image, `{"forget": NAME}` frees it, `{"pace": {...}}` sets a `Pace`,
`{"faults": [...]}` replaces the `Fault`s and tells how often those before befell somebody. Faults befall GETs of blobs only.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import socket
import struct
import sys
import threading
import time
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SLICE_BYTES = 16 << 10
"""A body is counted in slices, each after the socket took it, so that a broken transfer counts what it sent."""

SEND_BUFFER_BYTES = 128 << 10
"""What the kernel may hold of a body: bytes in it count as sent although a reset loses them."""

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
ROUTE = re.compile(r"^/v2/(?P<name>.+)/(?P<kind>manifests|blobs)/(?P<reference>[^/]+)$")
RANGE = re.compile(r"^bytes=(?P<first>\d+)-(?P<last>\d*)$")


@dataclass(frozen=True)
class Pace:
    """How a healthy answer is sent. `stream_mbit` 0 is as fast as the link."""

    first_byte_s: float = 0.0
    stream_mbit: float = 0.0


@dataclass(frozen=True)
class Fault:
    """What befalls every `every`-th GET of a blob, counted over all clients.

    `kind` is `status` (with `status`, and Retry-After when `retry_after_s` is set), `late` (stands still for `seconds`
    before the headers), `stall` (the same in mid-body), `short` (ends with FIN in mid-body) or `reset` (with RST).
    With a `client`, only that address is served so.
    """

    kind: str
    every: int = 1
    status: int = 503
    retry_after_s: int = 0
    seconds: float = 0.0
    client: str = ""


class Origin:
    """What the origin has, and how it is told to behave."""

    def __init__(self, log_path: str) -> None:
        self._log = open(log_path, "a", buffering=1)
        self._lock = threading.Lock()
        self._asked = self._dealt = 0
        self._images: dict[str, dict[str, tuple[bytes, str]]] = {}
        self._faults: list[Fault] = []
        self.pace = Pace()

    def command(self, wanted: dict) -> dict:
        if "make" in wanted:
            return self._make(wanted["make"], wanted["sizes"])
        if "forget" in wanted:
            self._images.pop(wanted["forget"], None)
        if "pace" in wanted:
            self.pace = Pace(**wanted["pace"])
        if "faults" in wanted:
            with self._lock:
                self._faults = [Fault(**fault) for fault in wanted["faults"]]
                self._asked, dealt, self._dealt = 0, self._dealt, 0
            return {"dealt": dealt}
        return {}

    def find(self, name: str, reference: str) -> tuple[bytes, str] | None:
        """Bytes and media type."""
        return self._images.get(name, {}).get(reference)

    def next_fault(self, client: str) -> Fault | None:
        with self._lock:
            self._asked += 1
            due = (fault for fault in self._faults if self._asked % fault.every == 0)
            found = next((fault for fault in due if fault.client in ("", client)), None)
            self._dealt += found is not None
            return found

    def log(self, record: dict) -> None:
        with self._lock:
            self._log.write(json.dumps(record) + "\n")

    def _make(self, name: str, sizes: list[int]) -> dict:
        numbers = random.Random(name)
        content: dict[str, tuple[bytes, str]] = {}

        def put(data: bytes, media_type: str) -> dict:
            digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
            content[digest] = (data, media_type)
            return {"mediaType": media_type, "digest": digest, "size": len(data)}

        config = put(json.dumps({"name": name}).encode(), "application/vnd.oci.image.config.v1+json")
        layers = [put(numbers.randbytes(size), "application/vnd.oci.image.layer.v1.tar") for size in sizes]
        manifest = {"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers}
        digest = put(json.dumps(manifest).encode(), MANIFEST)["digest"]
        content["v1"] = content[digest]
        self._images[name] = content
        return {"layers": [layer["digest"] for layer in layers]}


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    origin: Origin

    def setup(self) -> None:
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        super().setup()

    def do_POST(self) -> None:
        wanted = json.loads(self.rfile.read(int(self.headers["content-length"])))
        answer = json.dumps(self.origin.command(wanted)).encode()
        self._headers(HTTPStatus.OK, {"content-length": str(len(answer))})
        self.wfile.write(answer)

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        record = {"method": self.command, "path": self.path, "query": "", "range": self.headers.get("range")}
        record |= {"if_match": None, "client": self.client_address[0], "status": 0, "bytes": 0, "at": time.monotonic()}
        try:
            self._serve(record)
        except OSError:
            self.close_connection = True
        finally:
            self.origin.log(record)

    def _serve(self, record: dict) -> None:
        path = self.path.partition("?")[0]
        route = ROUTE.match(path)
        found = self.origin.find(route["name"], route["reference"]) if route else None
        if not found:
            return self._plain(record, HTTPStatus.OK if path == "/v2/" else HTTPStatus.NOT_FOUND)
        data, media_type = found
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}" if route["kind"] == "manifests" else route["reference"]
        headers = {"content-type": media_type, "docker-content-digest": digest, "accept-ranges": "bytes"}
        is_blob = route["kind"] == "blobs" and self.command == "GET"
        fault = self.origin.next_fault(record["client"]) if is_blob else None
        time.sleep(self.origin.pace.first_byte_s)
        if fault and fault.kind == "status":
            return self._plain(record, fault.status, fault.retry_after_s)
        if fault and fault.kind == "late":
            time.sleep(fault.seconds)
        asked = RANGE.match(self.headers.get("range") or "")
        first, last = 0, len(data) - 1
        if asked:
            first, last = int(asked["first"]), min(int(asked["last"] or last), last)
            headers["content-range"] = f"bytes {first}-{last}/{len(data)}"
        headers["content-length"] = str(last + 1 - first)
        record["status"] = HTTPStatus.PARTIAL_CONTENT if asked else HTTPStatus.OK
        self._headers(record["status"], headers)
        if self.command == "GET":
            self._body(memoryview(data)[first : last + 1], record, fault)

    def _body(self, data: memoryview, record: dict, fault: Fault | None) -> None:
        middle = len(data) // 2
        stream_mbit, started = self.origin.pace.stream_mbit, time.monotonic()
        for at in range(0, len(data), SLICE_BYTES):
            if fault and at + SLICE_BYTES > middle and fault.kind in ("stall", "short", "reset"):
                kind, seconds, fault = fault.kind, fault.seconds, None
                time.sleep(seconds)
                if kind != "stall":
                    return self._break(reset=kind == "reset")
            piece = data[at : at + SLICE_BYTES]
            self.connection.sendall(piece)
            record["bytes"] += len(piece)
            if stream_mbit:
                due = started + record["bytes"] * 8 / (stream_mbit * 1e6)
                time.sleep(max(0.0, due - time.monotonic()))

    def _break(self, reset: bool) -> None:
        self.close_connection = True
        if reset:
            # A close with the lingering time zero sends RST instead of FIN.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def _plain(self, record: dict, status: int, retry_after_s: int = 0) -> None:
        record["status"] = status
        headers = {"content-length": "0"}
        if retry_after_s:
            headers["retry-after"] = str(retry_after_s)
        self._headers(status, headers)

    def _headers(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_) -> None:
        """Nothing: the JSON log is the record."""


class Server(ThreadingHTTPServer):
    """A cluster's burst of connections arrives before the first is accepted."""

    request_queue_size = 512
    daemon_threads = True

    def shutdown_request(self, request) -> None:
        # The inherited one shuts the stream down first, which sends FIN where RST is wanted.
        self.close_request(request)

    def handle_error(self, *_) -> None:
        """A client that goes away is nothing to report: the log has what it got."""


def main() -> None:
    port, log_path = int(sys.argv[1]), sys.argv[2]
    Handler.origin = Origin(log_path)
    Server(("0.0.0.0", port), Handler).serve_forever()


if __name__ == "__main__":
    main()
