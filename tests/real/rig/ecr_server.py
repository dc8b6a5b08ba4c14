"""A program: an ECR that behaves, written from the API reference and what registries of ECR are seen to do.

`python ecr_server.py PORT STORE_PORT ADDRESS LAYOUT LOG TOKEN_LIFE_S URL_LIFE_S [public]`. On PORT:
`GetAuthorizationToken`, whose caller must sign, and the registry, which takes its tokens as Basic until they end and then
answers 403 as ECR does; blobs are redirects to presigned URLs. `GET /revoke` ends all tokens before their time. With
`public` it is ECR Public: the registry takes Bearer tokens, which `/token/` gives to anybody, and to whoever shows a token
of the API for the account that it is of. On STORE_PORT: the object store behind it, which serves ranges to whoever has a
URL that has not ended, GET only, and refuses every request that carries `Authorization`, as S3 does.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
import secrets
import sys
import threading
import time
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlencode, urlsplit

PIECE_BYTES = 256 << 10
KEY = secrets.token_bytes(32)
SIGNED = r"^AWS4-HMAC-SHA256 Credential=[^/]+/\d{8}/[a-z0-9-]+/%s/aws4_request, SignedHeaders=[^,]+, "
TARGETS = {"ecr": "AmazonEC2ContainerRegistry_V20150921", "ecr-public": "SpencerFrontendService"}
EXPIRED = "Your authorization token has expired. Reauthenticate and try again."


class State:
    def __init__(self, arguments: list[str]) -> None:
        self.port, self.store_port = int(arguments[0]), int(arguments[1])
        self.address, layout = arguments[2], Path(arguments[3])
        self.log = open(arguments[4], "a", buffering=1)
        self.token_life_s, self.url_life_s = float(arguments[5]), int(arguments[6])
        self.blobs = layout / "blobs" / "sha256"
        self.top = json.loads((layout / "index.json").read_text())["manifests"][0]["digest"]
        self.api = "ecr-public" if arguments[7:] == ["public"] else "ecr"
        self.tokens: dict[str, float] = {}
        self.bearers: dict[str, float] = {}
        self.lock = threading.Lock()

    def note(self, record: dict) -> None:
        with self.lock:
            self.log.write(json.dumps(record) + "\n")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: State
    service = ""

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def log_message(self, *_) -> None:
        """Nothing: the JSON log is the record."""

    def answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None, size: int = -1) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if size < 0 else size))
        self.end_headers()
        sent = 0
        try:
            for start in range(0, 0 if self.command == "HEAD" else len(body), PIECE_BYTES):
                piece = body[start : start + PIECE_BYTES]
                self.wfile.write(piece)
                sent += len(piece)
        finally:
            self.note(status, sent)

    def note(self, status: int, sent: int) -> None:
        """What went out, written when it is out: a transfer that was cut off counts what it sent."""
        self.state.note(
            {
                "service": self.service,
                "at": time.time(),
                "client": self.client_address[0],
                "method": self.command,
                "path": urlsplit(self.path).path,
                "query": urlsplit(self.path).query,
                "headers": {name.lower(): value for name, value in self.headers.items()},
                "status": status,
                "bytes": sent,
            }
        )

    def refuse(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        body = json.dumps({"errors": [{"code": code, "message": message}]}).encode()
        self.answer(status, body, {"Content-Type": "application/json", **(headers or {})})


class Ecr(Handler):
    service = "ecr"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        target = self.headers.get("X-Amz-Target")
        api = self.state.api
        if not re.match(SIGNED % api, self.headers.get("Authorization", "")) or not self.headers.get("X-Amz-Date"):
            body = {"__type": "MissingAuthenticationTokenException", "message": "Missing Authentication Token"}
            return self.answer(400, json.dumps(body).encode())
        if target != f"{TARGETS[api]}.GetAuthorizationToken":
            return self.answer(400, json.dumps({"__type": "UnknownOperationException"}).encode())
        token = base64.b64encode(f"AWS:password-{secrets.token_hex(16)}".encode()).decode()
        ends = time.time() + self.state.token_life_s
        with self.state.lock:
            self.state.tokens[token] = ends
        data = {"authorizationToken": token, "expiresAt": ends, "proxyEndpoint": f"https://{self.headers['Host']}"}
        return self.answer(200, json.dumps({"authorizationData": data if api == "ecr-public" else [data]}).encode())

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if self.path == "/revoke":
            with self.state.lock:
                self.state.tokens = dict.fromkeys(self.state.tokens, 0.0)
            return self.answer(200)
        given = self.headers.get("Authorization", "")
        if self.state.api == "ecr-public":
            return self.public(given)
        ends = self.state.tokens.get(given.removeprefix("Basic "))
        if ends is None:
            challenge = 'Basic realm="https://ecr.example/",service="ecr.amazonaws.com"'
            return self.refuse(401, "UNAUTHORIZED", "Not Authorized", {"WWW-Authenticate": challenge})
        if ends <= time.time():
            return self.refuse(403, "DENIED", EXPIRED)
        return self.content()

    def public(self, given: str) -> None:
        if urlsplit(self.path).path == "/token/":
            if given and self.state.tokens.get(given.removeprefix("Basic "), 0.0) <= time.time():
                return self.refuse(400, "DENIED", EXPIRED)
            bearer = f"{'account' if given else 'anybody'}-{secrets.token_hex(16)}"
            with self.state.lock:
                self.state.bearers[bearer] = time.time() + self.state.token_life_s
            return self.answer(200, json.dumps({"token": bearer, "expires_in": int(self.state.token_life_s)}).encode())
        if self.state.bearers.get(given.removeprefix("Bearer "), 0.0) <= time.time():
            realm = f"http://{self.state.address}:{self.state.port}/token/"
            challenge = f'Bearer realm="{realm}",service="public.ecr.aws",scope="aws"'
            return self.refuse(401, "UNAUTHORIZED", "Not Authorized", {"WWW-Authenticate": challenge})
        return self.content()

    def content(self) -> None:
        path = urlsplit(self.path).path
        if match := re.fullmatch(r"/v2/.+/manifests/(.+)", path):
            return self.manifest(match[1])
        if match := re.fullmatch(r"/v2/.+/blobs/(sha256:[0-9a-f]{64})", path):
            return self.answer(307, headers={"Location": presigned(self.state, match[1])})
        return self.refuse(404, "NAME_UNKNOWN", "no such repository")

    def manifest(self, reference: str) -> None:
        digest = reference if reference.startswith("sha256:") else self.state.top
        file = self.state.blobs / digest.removeprefix("sha256:")
        if not file.exists():
            return self.refuse(404, "MANIFEST_UNKNOWN", "Requested image not found")
        body = file.read_bytes()
        headers = {"Content-Type": json.loads(body)["mediaType"], "Docker-Content-Digest": digest}
        return self.answer(200, body, headers)


class Store(Handler):
    service = "store"

    def do_HEAD(self) -> None:
        # A presigned URL is for one method.
        self.answer(403)

    def do_GET(self) -> None:
        if self.headers.get("Authorization"):
            return self.answer(400, b"<Error><Code>InvalidArgument</Code>"
                               b"<Message>Only one auth mechanism allowed</Message></Error>")
        url = urlsplit(self.path)
        digest, query = url.path.removeprefix("/"), {name: value[0] for name, value in parse_qs(url.query).items()}
        signed = query.pop("X-Amz-Signature", "")
        if not hmac.compare_digest(signed, signature(digest, query)):
            return self.answer(403, b"<Error><Code>SignatureDoesNotMatch</Code></Error>")
        at = datetime.strptime(query["X-Amz-Date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC).timestamp()
        if time.time() > at + int(query["X-Amz-Expires"]):
            return self.answer(403, b"<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>")
        file = self.state.blobs / digest.removeprefix("sha256:")
        size = file.stat().st_size
        start, end = 0, size
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(match[1]), min(size, int(match[2] or size - 1) + 1)
        with file.open("rb") as data:
            data.seek(start)
            body = data.read(end - start)
        if "Range" not in self.headers:
            return self.answer(200, body)
        return self.answer(206, body, {"Content-Range": f"bytes {start}-{end - 1}/{size}"})


def signature(digest: str, query: dict[str, str]) -> str:
    return hmac.new(KEY, (digest + urlencode(sorted(query.items()))).encode(), hashlib.sha256).hexdigest()


def presigned(state: State, digest: str) -> str:
    query = {
        "X-Amz-Algorithm": "AWS4-HMAC-SHA256",
        "X-Amz-Credential": "AKIDSTORE/20260101/us-east-1/s3/aws4_request",
        "X-Amz-Date": datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ"),
        "X-Amz-Expires": str(state.url_life_s),
        "X-Amz-SignedHeaders": "host",
    }
    query["X-Amz-Signature"] = signature(digest, query)
    return f"http://{state.address}:{state.store_port}/{digest}?{urlencode(query)}"


def main() -> None:
    state = State(sys.argv[1:])
    Handler.state = state
    store = ThreadingHTTPServer(("0.0.0.0", state.store_port), Store)
    threading.Thread(target=store.serve_forever, daemon=True).start()
    ThreadingHTTPServer(("0.0.0.0", state.port), Ecr).serve_forever()


if __name__ == "__main__":
    main()
