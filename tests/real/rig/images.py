"""OCI images made of seeded, incompressible data, and their way into a registry.

The same layer always has the same digest, so two images share a layer by naming it in both.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import platform
import random
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

from rig.network import Machine

MIB = 1 << 20
FILES_PER_LAYER = 8
NATIVE = {"x86_64": "amd64", "aarch64": "arm64"}[platform.machine()]
FOREIGN = "arm64" if NATIVE == "amd64" else "amd64"


@dataclass(frozen=True)
class Layer:
    """A layer to make: `size_mib` of data from `seed`, as a plain tar or compressed with gzip."""

    seed: int
    size_mib: int
    compressed: bool

    def media_type(self) -> str:
        return "application/vnd.oci.image.layer.v1.tar" + ("+gzip" if self.compressed else "")


@dataclass(frozen=True)
class Blob:
    """One blob by digest and size in bytes."""

    digest: str
    size: int


@dataclass
class Image:
    """A multi-arch image in an OCI layout. `blobs` are what a node of this machine's platform must fetch."""

    layout: Path
    index: Blob
    manifest: Blob
    config: Blob
    layers: list[Blob]
    foreign: list[Blob] = field(default_factory=list)

    def blobs(self) -> dict[str, int]:
        """Digest to size of the config and the layers of this platform."""
        return {blob.digest: blob.size for blob in [self.config, *self.layers]}

    def size(self) -> int:
        return sum(self.blobs().values())


class ImageBuilder:
    """Makes images under one directory and makes each layer once."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._made: dict[Layer, tuple[Path, Blob, str]] = {}
        (directory / "layers").mkdir(parents=True, exist_ok=True)

    def build(self, name: str, layers: list[Layer]) -> Image:
        layout = self._directory / name
        (layout / "blobs" / "sha256").mkdir(parents=True)
        (layout / "oci-layout").write_text(json.dumps({"imageLayoutVersion": "1.0.0"}))
        # The other platform has layers of its own: a node that fetched them would be seen in the registry's log.
        foreign = [Layer(seed=layer.seed + 1_000_000, size_mib=1, compressed=layer.compressed) for layer in layers[:2]]
        manifest, config, native_blobs = self._platform(layout, NATIVE, layers)
        other_manifest, other_config, foreign_blobs = self._platform(layout, FOREIGN, foreign)
        index = self._index(layout, [(manifest, NATIVE), (other_manifest, FOREIGN)])
        top = {**_descriptor(index, "application/vnd.oci.image.index.v1+json")}
        top["annotations"] = {"org.opencontainers.image.ref.name": "v1"}
        (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [top]}))
        return Image(layout, index, manifest, config, native_blobs, [other_manifest, other_config, *foreign_blobs])

    def _platform(self, layout: Path, architecture: str, layers: list[Layer]) -> tuple[Blob, Blob, list[Blob]]:
        made = [self._layer(layer) for layer in layers]
        for path, blob, _ in made:
            target = _blob_path(layout, blob.digest)
            if not target.exists():
                target.hardlink_to(path)
        config = _put_json(
            layout,
            {
                "architecture": architecture,
                "os": "linux",
                "config": {"Cmd": ["/none"]},
                "rootfs": {"type": "layers", "diff_ids": [diff_id for _, _, diff_id in made]},
            },
        )
        manifest = _put_json(
            layout,
            {
                "schemaVersion": 2,
                "mediaType": "application/vnd.oci.image.manifest.v1+json",
                "config": _descriptor(config, "application/vnd.oci.image.config.v1+json"),
                "layers": [
                    _descriptor(blob, layer.media_type()) for (_, blob, _), layer in zip(made, layers, strict=True)
                ],
            },
        )
        return manifest, config, [blob for _, blob, _ in made]

    def _index(self, layout: Path, manifests: list[tuple[Blob, str]]) -> Blob:
        entries = [
            {
                **_descriptor(manifest, "application/vnd.oci.image.manifest.v1+json"),
                "platform": {"os": "linux", "architecture": architecture},
            }
            for manifest, architecture in manifests
        ]
        media_type = "application/vnd.oci.image.index.v1+json"
        return _put_json(layout, {"schemaVersion": 2, "mediaType": media_type, "manifests": entries})

    def _layer(self, layer: Layer) -> tuple[Path, Blob, str]:
        if layer not in self._made:
            data = _layer_tar(layer)
            diff_id = f"sha256:{hashlib.sha256(data).hexdigest()}"
            if layer.compressed:
                data = gzip.compress(data, compresslevel=1, mtime=0)
            digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
            path = self._directory / "layers" / digest.removeprefix("sha256:")
            path.write_bytes(data)
            self._made[layer] = (path, Blob(digest, len(data)), diff_id)
        return self._made[layer]


def push(image: Image, machine: Machine, reference: str, credential: str = "") -> None:
    """Pushes every platform of `image`, bytes unchanged, from `machine` to the plain-HTTP registry in `reference`.

    `credential` is `user:password`.
    """
    source, destination = f"oci:{image.layout}:v1", f"docker://{reference}"
    options = ["--all", "--preserve-digests", "--dest-tls-verify=false", "--insecure-policy"]
    options += ["--dest-creds", credential] if credential else []
    machine.run(["skopeo", "copy", "-q", *options, source, destination])


def _layer_tar(layer: Layer) -> bytes:
    numbers = random.Random(layer.seed)
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for number in range(FILES_PER_LAYER):
            data = numbers.randbytes(layer.size_mib * MIB // FILES_PER_LAYER)
            entry = tarfile.TarInfo(f"data/{layer.seed}/{number}.bin")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return archive.getvalue()


def _put_json(layout: Path, value: dict) -> Blob:
    data = json.dumps(value, sort_keys=True).encode()
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    _blob_path(layout, digest).write_bytes(data)
    return Blob(digest, len(data))


def _blob_path(layout: Path, digest: str) -> Path:
    return layout / "blobs" / "sha256" / digest.removeprefix("sha256:")


def _descriptor(blob: Blob, media_type: str) -> dict:
    return {"mediaType": media_type, "digest": blob.digest, "size": blob.size}
