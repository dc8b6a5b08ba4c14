"""A program: a registry that takes Bearer tokens of its own token service, as most hosted registries do.

`python token_registry.py PORT ADDRESS LAYOUT LOG USERS`; USERS is JSON, `user:password` to the repositories that the user
may pull. As Docker Hub does, the token service gives everybody who has no wrong password a token, for what that user may;
the registry then answers 401 for the rest.
"""

from __future__ import annotations

import base64
import json
import re
import secrets
import sys
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from ecr_server import Handler

TOKEN_LIFE_S = 300


class State:
    def __init__(self, arguments: list[str]) -> None:
        self.port, self.address, layout = int(arguments[0]), arguments[1], Path(arguments[2])
        self.log = open(arguments[3], "a", buffering=1)
        self.users: dict[str, list[str]] = json.loads(arguments[4])
        self.blobs = layout / "blobs" / "sha256"
        self.top = json.loads((layout / "index.json").read_text())["manifests"][0]["digest"]
        self.tokens: dict[str, set[str]] = {}
        self.lock = threading.Lock()

    def note(self, record: dict) -> None:
        with self.lock:
            self.log.write(json.dumps(record) + "\n")


class TokenRegistry(Handler):
    service = "registry"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        if url.path == "/token":
            return self.token(parse_qs(url.query).get("scope", []))
        asked = re.fullmatch(r"/v2/(?P<repository>.+)/(?P<kind>manifests|blobs)/(?P<reference>.+)", url.path)
        repository = asked["repository"] if asked else ""
        granted = self.state.tokens.get(self.headers.get("Authorization", "").removeprefix("Bearer "), set())
        if not asked or repository not in granted:
            realm = f"http://{self.state.address}:{self.state.port}/token"
            challenge = f'Bearer realm="{realm}",service="rig",scope="repository:{repository}:pull"'
            return self.refuse(401, "UNAUTHORIZED", "authentication required", {"WWW-Authenticate": challenge})
        return self.content(asked["kind"], asked["reference"])

    def token(self, scopes: list[str]) -> None:
        given = self.headers.get("Authorization", "")
        user = base64.b64decode(given.removeprefix("Basic ")).decode() if given else ""
        if given and user not in self.state.users:
            return self.refuse(401, "UNAUTHORIZED", "incorrect username or password")
        wanted = {match[1] for scope in scopes if (match := re.fullmatch(r"repository:(.+):pull", scope))}
        token = secrets.token_hex(16)
        with self.state.lock:
            self.state.tokens[token] = wanted & set(self.state.users.get(user, []))
        return self.answer(200, json.dumps({"token": token, "expires_in": TOKEN_LIFE_S}).encode())

    def content(self, kind: str, reference: str) -> None:
        digest = reference if reference.startswith("sha256:") else self.state.top
        file = self.state.blobs / digest.removeprefix("sha256:")
        if not file.exists():
            return self.refuse(404, "MANIFEST_UNKNOWN", "not found")
        body = file.read_bytes()
        headers = {"Docker-Content-Digest": digest, "Content-Type": "application/octet-stream"}
        if kind == "manifests":
            headers["Content-Type"] = json.loads(body)["mediaType"]
        elif match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(match[1]), min(len(body), int(match[2] or len(body) - 1) + 1)
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(body)}"
            return self.answer(206, body[start:end], headers)
        return self.answer(200, body, headers)


def main() -> None:
    TokenRegistry.state = State(sys.argv[1:])
    ThreadingHTTPServer(("0.0.0.0", TokenRegistry.state.port), TokenRegistry).serve_forever()


if __name__ == "__main__":
    main()
