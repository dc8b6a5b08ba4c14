"""A program: what the tests ask of S3 through boto3, run inside a machine's namespace.

`python s3_client.py ENDPOINT COMMAND ...`; prints one JSON value. `upload` makes seeded objects, so nothing is read
from disk; `download` is boto3's default, multi-threaded transfer.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from pathlib import Path

import boto3
from botocore.config import Config
from botocore.exceptions import ClientError

BUCKETS_NEED_A_REGION = "us-east-1"


def client(endpoint: str):
    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name=BUCKETS_NEED_A_REGION,
        aws_access_key_id="rig",
        aws_secret_access_key="rig",
        config=Config(
            s3={"addressing_style": "path"},
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
        data = random.Random(f"{bucket}/{key}").randbytes(size)
        s3.put_object(Bucket=bucket, Key=key, Body=data)
        hashes[key] = hashlib.sha256(data).hexdigest()
    return hashes


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


COMMANDS = {f.__name__: f for f in (upload, download, put, delete, get, head, keys)}


if __name__ == "__main__":
    endpoint, command, *arguments = sys.argv[1:]
    print(json.dumps(COMMANDS[command](client(endpoint), *arguments)))
