"""A program: pulls one layer through a node's mirror in order, as containerd does, and tells how it went.

Run inside a machine's namespace: `python puller.py WHAT`, where WHAT is JSON: `mirror` (URL), `registry` (its name
there), `repository`, `layer` (its number), `at` (when to start, on the monotonic clock), `admin` (URL, or null to
leave the daemon in peace) and `sample_s`. Prints one JSON object. There is no second attempt: a pull that the mirror
fails is a failure here, although containerd would go on at the registry.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import sys
import threading
import time
from urllib.parse import urlsplit

READ_BYTES = 256 << 10
TIMEOUT_S = 120.0
NEARLY_ALL = 0.9
END_SAMPLE_S = 0.02
"""From then on it is looked closely: the moment at which the daemon has all is to be seen."""


class Pull:
    """One pull and what was seen of it. Times are seconds after the layer was asked for."""

    def __init__(self, wanted: dict) -> None:
        self._wanted = wanted
        self.read = 0
        self.digest = ""
        self.outcome: dict = {"first_byte_s": None, "longest_stall_s": 0.0, "seconds": None, "error": None}
        self.started = 0.0

    def run(self) -> None:
        mirror = http.client.HTTPConnection(urlsplit(self._wanted["mirror"]).netloc, timeout=TIMEOUT_S)
        try:
            self.digest = self._layer(mirror)
            self._read_layer(mirror, self.digest)
        except (OSError, http.client.HTTPException, Refused) as error:
            self.outcome["error"] = f"{type(error).__name__}: {error}"

    def _layer(self, mirror: http.client.HTTPConnection) -> str:
        """The layer's digest, from the manifest; the time of that is not counted."""
        answer = self._get(mirror, "manifests/v1")
        return json.loads(answer.read())["layers"][self._wanted["layer"]]["digest"]

    def _read_layer(self, mirror: http.client.HTTPConnection, digest: str) -> None:
        wait_until(self._wanted["at"])
        self.started = time.monotonic()
        answer = self._get(mirror, f"blobs/{digest}")
        hashed, last = hashlib.sha256(), None
        while piece := answer.read1(READ_BYTES):
            now = time.monotonic() - self.started
            if last is None:
                self.outcome["first_byte_s"] = now
            else:
                self.outcome["longest_stall_s"] = max(self.outcome["longest_stall_s"], now - last)
            last = now
            self.read += len(piece)
            hashed.update(piece)
        seconds = time.monotonic() - self.started
        if f"sha256:{hashed.hexdigest()}" != digest:
            raise Refused(f"{self.read} bytes that are not {digest}")
        self.outcome["seconds"] = seconds

    def _get(self, mirror: http.client.HTTPConnection, path: str) -> http.client.HTTPResponse:
        registry = self._wanted["registry"]
        mirror.request("GET", f"/v2/{self._wanted['repository']}/{path}" + (f"?ns={registry}" if registry else ""))
        answer = mirror.getresponse()
        if answer.status != 200:
            raise Refused(f"{path}: {answer.status} {answer.read(400)!r}")
        return answer


class Refused(Exception):
    """The mirror answered something else than the right bytes."""


class Samples(threading.Thread):
    """Looks now and then at how much was read, and how much of the layer the daemon has in any order."""

    def __init__(self, pull: Pull, wanted: dict) -> None:
        super().__init__(daemon=True)
        self._pull, self._wanted = pull, wanted
        self._over = threading.Event()
        self.seen: list[tuple[float, int, int]] = []
        """Seconds, bytes read, bytes held."""

    def run(self) -> None:
        admin = http.client.HTTPConnection(urlsplit(self._wanted["admin"]).netloc, timeout=TIMEOUT_S)
        wait_until(self._wanted["at"])
        pause_s = self._wanted["sample_s"]
        while not self._over.wait(pause_s):
            try:
                admin.request("GET", "/v1/contents")
                contents = json.loads(admin.getresponse().read())
            except (OSError, http.client.HTTPException):
                return  # the daemon was killed
            ours = next((content for content in contents if content["name"] == self._pull.digest), None)
            held = ours["have_bytes"] if ours else 0
            if ours and held >= ours["size"] * NEARLY_ALL:
                pause_s = min(pause_s, END_SAMPLE_S)
            if self._pull.started:
                self.seen.append((round(time.monotonic() - self._pull.started, 3), self._pull.read, held))

    def end(self) -> None:
        self._over.set()
        self.join(TIMEOUT_S)


def wait_until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.monotonic()))


def main() -> None:
    wanted = json.loads(sys.argv[1])
    pull = Pull(wanted)
    samples = Samples(pull, wanted) if wanted["admin"] else None
    if samples:
        samples.start()
    pull.run()
    if samples:
        samples.end()
    print(json.dumps({**pull.outcome, "read": pull.read, "samples": samples.seen if samples else []}))


if __name__ == "__main__":
    main()
