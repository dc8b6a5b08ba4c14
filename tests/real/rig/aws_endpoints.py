"""A program: the places that give AWS credentials out, and an S3 that takes only theirs.

`python aws_endpoints.py LOG FAULT`, inside a node's namespace where the addresses 169.254.169.254 (instance metadata) and
169.254.170.23 (EKS Pod Identity) are this machine's: port 80 plays both and STS, port 9100 S3. FAULT names the one that
refuses: `sts`, `pod`, `imds` or `none`. Every credential has an access key that tells where it comes from.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

ROLE = "rig-role"
POD_TOKEN = "pod-identity-token"
METADATA_TOKEN = "metadata-token"
EXPIRES = "2099-01-01T00:00:00Z"
OBJECT = bytes(range(256)) * 40
ETAG = f'"{hashlib.md5(OBJECT).hexdigest()}"'
KEY_ID = re.compile(r"Credential=([A-Z0-9]+)/")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    fault = "none"
    log = None
    lock = threading.Lock()

    def log_message(self, *_) -> None:
        """Nothing: the JSON log is the record."""

    def answer(self, status: int, body: bytes = b"", kind: str = "application/json", **headers: str) -> None:
        key = KEY_ID.search(self.headers.get("Authorization", ""))
        record = {"method": self.command, "path": self.path, "status": status, "key": key and key[1]}
        with self.lock:
            self.log.write(json.dumps(record) + "\n")
        self.send_response(status)
        self.send_header("Content-Type", kind)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class Metadata(Handler):
    """Port 80."""

    def do_PUT(self) -> None:
        if self.path != "/latest/api/token" or not self.headers.get("X-aws-ec2-metadata-token-ttl-seconds"):
            return self.answer(400)
        ttl = self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
        return self.answer(200, METADATA_TOKEN.encode(), "text/plain", X_aws_ec2_metadata_token_ttl_seconds=ttl)

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if path == "/v1/credentials":
            return self.pod_identity()
        if self.headers.get("X-aws-ec2-metadata-token") != METADATA_TOKEN:
            return self.answer(401)
        roles = "/latest/meta-data/iam/security-credentials/"
        if self.fault == "imds" or not path.startswith(roles):
            return self.answer(404, b"not found", "text/plain")
        if path == roles:
            return self.answer(200, ROLE.encode(), "text/plain")
        return self.answer(200, credentials("ASIAIMDS", Code="Success", Type="AWS-HMAC", LastUpdated=EXPIRES))

    def pod_identity(self) -> None:
        if self.fault == "pod":
            return self.answer(403, json.dumps({"code": "AccessDeniedException", "message": "no association"}).encode())
        if self.headers.get("Authorization") != POD_TOKEN:
            return self.answer(401, json.dumps({"code": "Unauthorized", "message": "wrong token"}).encode())
        return self.answer(200, credentials("ASIAPOD", AccountId="123456789012"))

    def do_POST(self) -> None:
        form = parse_qs(self.rfile.read(int(self.headers.get("Content-Length", 0))).decode())
        action = form["Action"][0]
        if self.fault == "sts":
            body = (
                "<ErrorResponse><Error><Type>Sender</Type><Code>AccessDenied</Code>"
                f"<Message>Not authorized to perform sts:{action}</Message></Error></ErrorResponse>"
            )
            return self.answer(403, body.encode(), "text/xml")
        key = {"AssumeRoleWithWebIdentity": "ASIAIRSA", "AssumeRole": "ASIAASSUMED"}[action]
        body = (
            f"<{action}Response><{action}Result><Credentials><AccessKeyId>{key}</AccessKeyId>"
            f"<SecretAccessKey>secret</SecretAccessKey><SessionToken>session</SessionToken>"
            f"<Expiration>{EXPIRES}</Expiration></Credentials><AssumedRoleUser><AssumedRoleId>A:b</AssumedRoleId>"
            f"<Arn>arn:aws:sts::123456789012:assumed-role/{ROLE}/b</Arn></AssumedRoleUser>"
            f"</{action}Result></{action}Response>"
        )
        return self.answer(200, body.encode(), "text/xml")


class Store(Handler):
    """Port 9100: one object, for whoever signs."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if not KEY_ID.search(self.headers.get("Authorization", "")):
            return self.answer(403, b"<Error><Code>AccessDenied</Code></Error>", "text/xml")
        if self.command == "HEAD":
            return self.answer(200, b"", Content_Length=str(len(OBJECT)), ETag=ETAG)
        start, end = 0, len(OBJECT)
        if match := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            start, end = int(match[1]), int(match[2]) + 1
        content_range = f"bytes {start}-{end - 1}/{len(OBJECT)}"
        return self.answer(206, OBJECT[start:end], ETag=ETAG, Content_Range=content_range)


def credentials(key: str, **more: str) -> bytes:
    secret = {"SecretAccessKey": "secret", "Token": "session", "Expiration": EXPIRES}
    return json.dumps({"AccessKeyId": key, **secret, **more}).encode()


def main() -> None:
    Handler.log, Handler.fault = open(sys.argv[1], "a", buffering=1), sys.argv[2]
    store = ThreadingHTTPServer(("0.0.0.0", 9100), Store)
    threading.Thread(target=store.serve_forever, daemon=True).start()
    ThreadingHTTPServer(("0.0.0.0", 80), Metadata).serve_forever()


if __name__ == "__main__":
    main()
