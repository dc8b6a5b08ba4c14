"""File systems of a test's own, in files: what a node's disk may be, without a disk."""

from __future__ import annotations

import os
from pathlib import Path

from rig.processes import run

MKFS = {
    "ext4": ["mkfs.ext4", "-q", "-F", "-m", "0"],
    "xfs": ["mkfs.xfs", "-q", "-m", "reflink=1"],
}


class LoopDisk:
    """A file system of `size_bytes` in `image`, mounted at `root`."""

    def __init__(self, kind: str, image: Path, root: Path, size_bytes: int) -> None:
        self.root = root
        image.parent.mkdir(parents=True, exist_ok=True)
        root.mkdir(parents=True)
        with image.open("wb") as file:
            file.truncate(size_bytes)
        run([*MKFS[kind], str(image)])
        run(["mount", "-o", "loop,noatime", str(image), str(root)])
        self._image = image

    def used_bytes(self) -> int:
        status = self._status()
        return (status.f_blocks - status.f_bfree) * status.f_frsize

    def free_bytes(self) -> int:
        status = self._status()
        return status.f_bavail * status.f_frsize

    def close(self) -> None:
        run(["umount", str(self.root)], check=False)
        self._image.unlink(missing_ok=True)

    def _status(self) -> os.statvfs_result:
        # Blocks that were freed and not yet committed count as used until then.
        os.sync()
        return os.statvfs(self.root)


class MemoryDisk:
    """A tmpfs at `root`."""

    def __init__(self, root: Path, size_bytes: int) -> None:
        self.root = root
        root.mkdir(parents=True)
        run(["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(root)])

    def close(self) -> None:
        run(["umount", str(self.root)], check=False)
