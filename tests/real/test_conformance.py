"""The OCI distribution specification's own conformance suite, as far as it reads, against the mirror."""

from __future__ import annotations

import os
import re
from collections.abc import Callable

import pytest
from rig.cluster import Cluster
from rig.containerd2 import TOOLS
from rig.images import ImageBuilder, Layer, push
from rig.windlass import MIRROR

SUITE = TOOLS / "conformance"

pytestmark = pytest.mark.skipif(not SUITE.exists(), reason="the suite is not built: tests/run builds it where Go is")

COUNT = re.compile(r"^  (Pass|FAIL|Error|Skip|Disabled)\.+: +(\d+)$", re.MULTILINE)

# All that is not the pull category.
NOT_READ = """API_PUSH API_BLOBS_DELETE API_MANIFESTS_DELETE API_TAGS_DELETE API_TAGS_LIST API_REFERRER
API_BLOBS_MOUNT_ANONYMOUS""".split()


@pytest.mark.parametrize("version", ["1.1", "dev"])
def test_the_pull_category_passes(
    cluster: Cluster, images: ImageBuilder, figure: Callable[[str, object], None], version: str
) -> None:
    image = images.build(f"conform-{version}", [Layer(2_300, 9, True), Layer(2_301, 1, False)])
    push(image, cluster.origin, cluster.registry.reference("conform/pull"))
    machine = cluster.machine(f"suite{version.replace('.', '')}")
    cluster.daemon(machine, cluster.settings(machine, [machine.address])).start()

    foreign = [blob.digest for blob in image.foreign]
    manifests = [image.index.digest, image.manifest.digest, foreign[0]]
    blobs = [*image.blobs(), *foreign[1:]]
    settings = {
        "OCI_VERSION": version,
        "OCI_RESULTS_DIR": str(cluster.directory / f"results-{version}"),
        "OCI_REGISTRY": MIRROR.removeprefix("http://"),
        "OCI_TLS": "disabled",
        "OCI_REPO1": "conform/pull",
        "OCI_API_PULL": "true",
        # Of content that it did not make itself, the suite never reads this header, and then says that it is missing.
        "OCI_API_BLOBS_DIGEST_HEADER": "false",
        "OCI_API_MANIFESTS_DIGEST_HEADER": "false",
        "OCI_RO_DATA_TAGS": "v1",
        "OCI_RO_DATA_MANIFESTS": " ".join(manifests),
        "OCI_RO_DATA_BLOBS": " ".join(blobs),
        **{f"OCI_{name}": "false" for name in NOT_READ},
    }
    done = machine.run([str(SUITE)], check=False, env={**os.environ, **settings})

    # Its exit status says nothing: after the report it crashes over one of its own files when it may not push.
    report = done.stdout.decode()
    assert "OCI Conformance Result: Pass" in report, (done.stderr.decode() + report)[:8000]
    counts = {name: int(count) for name, count in COUNT.findall(report)}
    figure(f"OCI conformance {version}, pull", " ".join(f"{name} {count}" for name, count in counts.items()))
    assert counts["FAIL"] == counts["Error"] == counts["Skip"] == 0
    # Each is asked for by HEAD and by GET; the tag, what is missing and what is malformed come on top.
    assert counts["Pass"] >= 2 * (len(manifests) + len(blobs) + 1)
