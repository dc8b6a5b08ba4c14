"""A program: asks for every cell of the fault matrix at once, as containerd and as an S3 client do.

`python fault_client.py MIRROR NAMESPACE UPSTREAM OBJECTS FAULT...`; prints one JSON object, `KIND/MODE/FAULT` to what the
client saw. The registry half follows what containerd 1.6 was seen to do: next host on any refusal, a body that ends with
FIN is gone on with at the byte from the first host again, a reset kills the pull.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from faulty_origin import MODES, blobs, digest_of, manifest, stored

TIMEOUT_S = 60
RESUMES = 8


class Broken(Exception):
    """What ends a pull."""


def get(host: str, path: str, start: int) -> tuple[int, bytes, bool]:
    """Status, the bytes that came, and whether the body broke off."""
    connection = http.client.HTTPConnection(host, timeout=TIMEOUT_S)
    headers = {"User-Agent": "containerd/1.6", "Accept": "*/*"}
    if start:
        headers["Range"] = f"bytes={start}-"
    try:
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        try:
            body = response.read()
        except http.client.IncompleteRead as broken:
            return response.status, broken.partial, True
        if start and response.status == 200:
            body = body[start:]
        return response.status, body, False
    finally:
        connection.close()


def pull(hosts: dict[str, str], path: str, digest: str) -> str:
    """Which hosts the right bytes came from."""
    got, served, resumes = b"", [], 0
    while True:
        for name, base in hosts.items():
            url = urlsplit(base)
            query = f"?{url.query}" if url.query else ""
            try:
                status, body, broke = get(url.netloc, path + query, len(got))
            except ConnectionRefusedError:
                continue
            except (ConnectionResetError, TimeoutError, http.client.HTTPException) as error:
                raise Broken(f"{name}: {type(error).__name__}") from error
            if status not in (200, 206):
                continue
            served.append(f"{name} from {len(got)}" if got else name)
            if broke and not body:
                raise Broken(f"{name}: headers without a byte")
            got += body
            break
        else:
            raise Broken("no host served it")
        if not broke:
            break
        resumes += 1
        if resumes > RESUMES:
            raise Broken("cut again and again")
    if digest_of(got) != digest:
        raise Broken(f"WRONG BYTES from {', then '.join(served)}")
    return ", then ".join(served)


def pull_cell(hosts: dict[str, str], kind: str, mode: str, fault: str) -> str:
    repository = f"{kind}/{mode}/{fault}"
    if kind == "manifest":
        data = manifest(repository)
        # By digest: a tag's answer would have no name to be held against.
        path = f"/v2/{repository}/manifests/{digest_of(data)}"
    else:
        data = next(iter(blobs(repository).values()))
        path = f"/v2/{repository}/blobs/{digest_of(data)}"
    try:
        return pull(hosts, path, digest_of(data))
    except Broken as broken:
        return f"FAILED: {broken}"


def object_cell(s3, mode: str, fault: str) -> str:
    key = f"{mode}/{fault}"
    try:
        body = s3.get_object(Bucket="faults", Key=key)["Body"].read()
    except ClientError as error:
        said = error.response
        return f"error {said['ResponseMetadata']['HTTPStatusCode']} {said['Error']['Code']}"
    except BotoCoreError as error:
        return f"error {type(error).__name__}"
    right = hashlib.sha256(stored(key)).digest() == hashlib.sha256(body).digest()
    return "right" if right else "WRONG BYTES"


def main() -> None:
    mirror, namespace, upstream, objects, *faults = sys.argv[1:]
    hosts = {"mirror": f"{mirror}?ns={namespace}", "upstream": upstream}
    s3 = boto3.client(
        "s3",
        endpoint_url=objects,
        region_name="us-east-1",
        aws_access_key_id="rig",
        aws_secret_access_key="rig",
        config=Config(
            s3={"addressing_style": "path"},
            retries={"total_max_attempts": 3, "mode": "standard"},
            read_timeout=TIMEOUT_S,
            max_pool_connections=64,
            proxies={},
        ),
    )
    with ThreadPoolExecutor(96) as pool:
        cells = {
            f"{kind}/{mode}/{fault}": pool.submit(pull_cell, hosts, kind, mode, fault)
            for kind in ("manifest", "blob")
            for mode in MODES
            for fault in faults
        }
        cells |= {f"object/{m}/{f}": pool.submit(object_cell, s3, m, f) for m in MODES for f in faults}
        print(json.dumps({name: cell.result() for name, cell in cells.items()}))


if __name__ == "__main__":
    main()
