"""docker-registry as the origin, and its access log as the witness of what left it.

The log's `http.response.written` counts the bytes of each response's body as the registry wrote them.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path

from rig.network import Machine
from rig.processes import wait_until

PORT = 5000
SETTLE_S = 0.5
"""How long the log must stand still before it is believed; a line follows its response within milliseconds."""

BLOB = re.compile(r"^/v2/.+/blobs/(?P<digest>sha256:[0-9a-f]{64})")


@dataclass(frozen=True)
class Response:
    """One line of the access log. `written` is the body in bytes; `client` the address it went to."""

    method: str
    uri: str
    status: int
    written: int
    client: str
    user_agent: str

    def blob(self) -> str | None:
        """The digest when this response carried a blob or a part of one."""
        match = BLOB.match(self.uri)
        return match["digest"] if match and self.method == "GET" and self.status in (200, 206) else None

    def went_to_windlass(self) -> bool:
        """True for content that a daemon was sent: what tags, manifests and blobs came to, errors not."""
        return self.method == "GET" and self.status in (200, 206) and self.user_agent.startswith("windlass")


class Registry:
    """One docker-registry on `machine`."""

    def __init__(self, machine: Machine, directory: Path, logs: Path, htpasswd: str | None = None) -> None:
        self.machine = machine
        self.host = f"{machine.address}:{PORT}"
        directory.mkdir(parents=True)
        config = directory / "config.json"
        config.write_text(json.dumps(_config(directory, htpasswd)))  # YAML is a superset of JSON
        self._process = machine.start(["docker-registry", "serve", str(config)], logs / f"{machine.name}-registry.log")
        expected = "401" if htpasswd else "200"
        wait_until(lambda: self._ping() == expected, "the registry answers", 30, self._process)

    def reference(self, repository: str, tag: str = "v1") -> str:
        return f"{self.host}/{repository}:{tag}"

    def responses(self) -> list[Response]:
        return [found for line in self._process.log.read_text().splitlines() if (found := _response(line))]

    def settled_responses(self) -> list[Response]:
        """The log once nothing has been added to it for a moment: a line is written after its last byte."""
        seen = self.responses()
        while True:
            time.sleep(SETTLE_S)
            again = self.responses()
            if len(again) == len(seen):
                return again
            seen = again

    def close(self) -> None:
        self._process.terminate()

    def _ping(self) -> str:
        curl = ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", f"http://{self.host}/v2/"]
        return self.machine.run(curl, check=False).stdout.decode()


def bytes_by_blob(responses: list[Response]) -> dict[str, int]:
    """Digest to the sum of all the bytes of that blob that left the registry."""
    sums: dict[str, int] = {}
    for response in responses:
        if digest := response.blob():
            sums[digest] = sums.get(digest, 0) + response.written
    return sums


def _config(directory: Path, htpasswd: str | None) -> dict:
    config: dict = {
        "version": 0.1,
        "log": {"level": "info", "formatter": "json", "accesslog": {"disabled": True}},
        "storage": {"filesystem": {"rootdirectory": str(directory / "data")}, "cache": {"blobdescriptor": "inmemory"}},
        "http": {"addr": f":{PORT}"},
    }
    if htpasswd:
        users = directory / "htpasswd"
        users.write_text(htpasswd)
        config["auth"] = {"htpasswd": {"realm": "rig", "path": str(users)}}
    return config


def _response(line: str) -> Response | None:
    if not line.startswith("{"):
        return None
    record = json.loads(line)
    if not str(record.get("msg", "")).startswith("response completed"):
        return None
    return Response(
        method=record["http.request.method"],
        uri=record["http.request.uri"],
        status=record["http.response.status"],
        written=record["http.response.written"],
        client=record["http.request.remoteaddr"].rsplit(":", 1)[0],
        user_agent=record.get("http.request.useragent", ""),
    )
