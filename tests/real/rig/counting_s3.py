"""A program: moto's S3 behind a layer that writes one JSON line for each request, with the bytes its body sent.

Run inside a machine's namespace: `python counting_s3.py PORT LOG [CERTIFICATE KEY]`, the last two for TLS. moto does not
check signatures, so permission is played by name: every request for a bucket named `forbidden`, and every presigned one
whose access key is listed in the file LOG.refused, is answered as S3 answers a caller without rights.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import parse_qs

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, run_simple

SLICE_BYTES = 64 << 10
"""A body is counted in slices, each after the socket took it, so that a broken transfer counts what it sent."""

FORBIDDEN = b'<?xml version="1.0"?><Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>'


class CountingS3:
    """WSGI middleware: passes everything to moto and logs what went back."""

    def __init__(self, application, log_path: str) -> None:
        self._application = application
        self._refused = Path(f"{log_path}.refused")
        self._log = open(log_path, "a", buffering=1)
        self._lock = threading.Lock()

    def __call__(self, environ: dict, start_response) -> Iterable[bytes]:
        record = {
            "method": environ["REQUEST_METHOD"],
            "path": environ["PATH_INFO"],
            "query": environ["QUERY_STRING"],
            "range": environ.get("HTTP_RANGE"),
            "if_match": environ.get("HTTP_IF_MATCH"),
            "client": environ["REMOTE_ADDR"],
        }

        def remember_status(status: str, headers: list, exc_info=None):
            record["status"] = int(status.split()[0])
            return start_response(status, headers, exc_info)

        if environ["PATH_INFO"].split("/")[1] == "forbidden" or self._is_refused(environ["QUERY_STRING"]):
            headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(FORBIDDEN)))]
            remember_status("403 Forbidden", headers)
            body: Iterable[bytes] = [b"" if record["method"] == "HEAD" else FORBIDDEN]
        else:
            body = self._application(environ, remember_status)
        return self._counted(body, record)

    def _is_refused(self, query: str) -> bool:
        credential = parse_qs(query).get("X-Amz-Credential", [""])[0]
        names = self._refused.read_text().split() if self._refused.exists() else []
        return credential.split("/")[0] in names

    def _counted(self, body: Iterable[bytes], record: dict) -> Iterator[bytes]:
        sent = 0
        try:
            for block in body:
                for start in range(0, len(block), SLICE_BYTES):
                    piece = block[start : start + SLICE_BYTES]
                    yield piece
                    sent += len(piece)
        finally:
            record["bytes"] = sent
            with self._lock:
                self._log.write(json.dumps(record) + "\n")
            if hasattr(body, "close"):
                body.close()


class KeepAlive(WSGIRequestHandler):
    """S3 keeps connections open; werkzeug does so only for HTTP/1.1."""

    protocol_version = "HTTP/1.1"

    def log_request(self, *_) -> None:
        """Nothing: the JSON log is the record."""


def main() -> None:
    port, log_path, tls = int(sys.argv[1]), sys.argv[2], tuple(sys.argv[3:]) or None
    application = CountingS3(DomainDispatcherApplication(create_backend_app), log_path)
    run_simple("0.0.0.0", port, application, threaded=True, request_handler=KeepAlive, ssl_context=tls)


if __name__ == "__main__":
    main()
