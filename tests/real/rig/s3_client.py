"""A program: what the tests ask of S3 through boto3, run inside a machine's namespace.

`python s3_client.py ENDPOINT COMMAND ...`; prints one JSON value. `upload` makes seeded objects, so nothing is read
from disk; `download` is boto3's default, multi-threaded transfer.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import unquote, urlsplit

import boto3
from botocore.config import Config
from botocore.exceptions import ClientError

BUCKETS_NEED_A_REGION = "us-east-1"
BLOCK_BYTES = 128 << 20
"""The most of Python's random bytes that can be had at once is twice that."""


def client(endpoint: str, access_key: str = "rig"):
    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name=BUCKETS_NEED_A_REGION,
        aws_access_key_id=access_key,
        aws_secret_access_key="rig",
        config=Config(
            s3={"addressing_style": "path"},
            signature_version="s3v4",
            retries={"max_attempts": 1},
            request_checksum_calculation="when_required",
            proxies={},
        ),
    )


def upload(s3, bucket: str, sizes_by_key: str) -> dict[str, str]:
    """Creates the bucket and one object of seeded data for each key. Returns key to sha256."""
    try:
        s3.create_bucket(Bucket=bucket)
    except ClientError as error:
        if "BucketAlready" not in error.response["Error"]["Code"]:
            raise
    hashes = {}
    for key, size in json.loads(sizes_by_key).items():
        chance = random.Random(f"{bucket}/{key}")
        data = b"".join(chance.randbytes(min(BLOCK_BYTES, size - start)) for start in range(0, size, BLOCK_BYTES))
        s3.put_object(Bucket=bucket, Key=key, Body=data)
        hashes[key] = hashlib.sha256(data).hexdigest()
    return hashes


def upload_versions(s3, bucket: str, key: str, size: str) -> list[list[str]]:
    """Two versions of an object, in a bucket that keeps versions. Returns id and sha256 of each, the older one first."""
    s3.create_bucket(Bucket=bucket)
    s3.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    made = []
    for number in range(2):
        data = random.Random(f"{bucket}/{key}/{number}").randbytes(int(size))
        version = s3.put_object(Bucket=bucket, Key=key, Body=data)["VersionId"]
        made.append([version, hashlib.sha256(data).hexdigest()])
    return made


def download(s3, bucket: str, key: str, destination: str) -> str:
    """boto3's managed transfer, with its defaults: ranges in several threads. Returns the file's sha256."""
    s3.download_file(bucket, key, destination)
    with Path(destination).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def put(s3, bucket: str, key: str) -> dict:
    """Tries to write. Returns the error's code and status, or an empty object when the write was taken."""
    return refused(lambda: s3.put_object(Bucket=bucket, Key=key, Body=b"written"))


def delete(s3, bucket: str, key: str) -> dict:
    return refused(lambda: s3.delete_object(Bucket=bucket, Key=key))


def get(s3, bucket: str, key: str, range_header: str) -> dict:
    """One ranged GET. Returns its length and sha256, or the error's code and status."""
    found = {}

    def read() -> None:
        data = s3.get_object(Bucket=bucket, Key=key, Range=range_header)["Body"].read()
        found.update(length=len(data), sha256=hashlib.sha256(data).hexdigest())

    return refused(read) or found


def get_with_proof(s3, bucket: str, key: str, proof: str) -> dict:
    """One whole GET with `proof` as a header more, as a client does where callers' rights count."""
    show = lambda params, **_: params["headers"].update({"x-windlass-proof": proof})  # noqa: E731
    s3.meta.events.register("before-call.s3.GetObject", show)
    return get(s3, bucket, key, "bytes=0-")


def download_with_proofs(s3, bucket: str, key: str, destination: str, origin: str, signer: str) -> str:
    """boto3's managed transfer as the README shows it where callers' rights count. Returns the file's sha256."""
    at_s3 = client(origin, signer)

    def prove(params, **_) -> None:
        bucket, key = unquote(urlsplit(params["url"]).path)[1:].split("/", 1)
        names = {"Bucket": bucket, "Key": key}
        params["headers"]["x-windlass-proof"] = at_s3.generate_presigned_url("head_object", names, ExpiresIn=900)

    s3.meta.events.register("before-call.s3.GetObject", prove)
    s3.meta.events.register("before-call.s3.HeadObject", prove)
    return download(s3, bucket, key, destination)


def presign_head(s3, bucket: str, key: str, signer: str) -> str:
    """The URL of a HEAD that the access key `signer` may send for some minutes."""
    signing = client(s3.meta.endpoint_url, signer)
    return signing.generate_presigned_url("head_object", {"Bucket": bucket, "Key": key}, ExpiresIn=300)


def ask(s3, questions: str) -> dict[str, dict]:
    """GetObject and HeadObject with each question's parameters; an ETag in them may be written `ETAG`.

    Returns what an application sees, by method and question.
    """
    asked = json.loads(questions)
    ranged = {name: {key: value for key, value in each.items() if key != "Range"} for name, each in asked.items()}
    return {
        "get_object": {name: _seen(s3, s3.get_object, parameters) for name, parameters in asked.items()},
        "head_object": {name: _seen(s3, s3.head_object, parameters) for name, parameters in ranged.items()},
    }


def _seen(s3, method, parameters: dict) -> dict:
    """Status, headers and the sha256 of the body, or status and code."""
    names = [name for name, value in parameters.items() if value == "ETAG"]
    etag = {name: s3.head_object(Bucket=parameters["Bucket"], Key=parameters["Key"])["ETag"] for name in names}
    seen = {}

    def read() -> None:
        answer = method(**{**parameters, **etag})
        seen.update({name: answer.get(name) for name in ("ContentLength", "ETag", "ContentRange", "ContentType")})
        seen["status"] = answer["ResponseMetadata"]["HTTPStatusCode"]
        if "Body" in answer:
            seen["sha256"] = hashlib.sha256(answer["Body"].read()).hexdigest()

    error = refused(read)
    return {name: error[name] for name in ("code", "status")} if error else seen


def read_in_threads(s3, bucket: str, key: str, size: str) -> dict:
    """The object in ranges of unequal length, 16 at a time in no order. Returns their number and the whole's sha256."""
    numbers, ranges, start = random.Random(key), [], 0
    while start < int(size):
        length = min(numbers.randint(1, 3 << 20), int(size) - start)
        ranges.append((start, length))
        start += length

    def read(place: tuple[int, int]) -> tuple[int, bytes]:
        start, length = place
        asked = f"bytes={start}-{start + length - 1}"
        return start, s3.get_object(Bucket=bucket, Key=key, Range=asked)["Body"].read()

    with ThreadPoolExecutor(16) as pool:
        pieces = sorted(pool.map(read, numbers.sample(ranges, len(ranges))))
    whole = b"".join(data for _, data in pieces)
    return {"ranges": len(ranges), "sha256": hashlib.sha256(whole).hexdigest()}


def listing(s3, bucket: str) -> dict:
    return refused(lambda: s3.list_objects_v2(Bucket=bucket))


def head(s3, bucket: str, key: str) -> dict:
    answer = s3.head_object(Bucket=bucket, Key=key)
    return {"size": answer["ContentLength"], "etag": answer["ETag"]}


def keys(s3, bucket: str, prefix: str) -> dict[str, int]:
    """ListObjectsV2, every page."""
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    return {entry["Key"]: entry["Size"] for page in pages for entry in page.get("Contents", [])}


def refused(call) -> dict:
    try:
        call()
    except ClientError as error:
        said = error.response["Error"]
        status = error.response["ResponseMetadata"]["HTTPStatusCode"]
        return {"code": said["Code"], "status": status, "message": said["Message"]}
    return {}


COMMANDS = {
    f.__name__: f
    for f in (
        upload,
        upload_versions,
        download,
        put,
        delete,
        get,
        get_with_proof,
        download_with_proofs,
        presign_head,
        ask,
        read_in_threads,
        listing,
        head,
        keys,
    )
}


if __name__ == "__main__":
    endpoint, command, *arguments = sys.argv[1:]
    print(json.dumps(COMMANDS[command](client(endpoint), *arguments)))
