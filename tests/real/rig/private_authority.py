"""A certificate authority that no system trusts, as companies have them for their own servers."""

from __future__ import annotations

from pathlib import Path

from rig.processes import run

NEW_KEY = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1"]


class PrivateAuthority:
    """Its certificate is at `certificate`; it vouches for servers by address."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True)
        self._directory = directory
        self.certificate, self._key = directory / "ca.crt", directory / "ca.key"
        self._openssl("the rig's own authority", self.certificate, self._key)

    def issue(self, address: str) -> tuple[Path, Path]:
        """The certificate and the key of a server at `address`."""
        certificate, key = self._directory / f"{address}.crt", self._directory / f"{address}.key"
        of_a_server = ["-addext", f"subjectAltName=IP:{address}", "-addext", "basicConstraints=critical,CA:FALSE"]
        self._openssl(address, certificate, key, "-CA", str(self.certificate), "-CAkey", str(self._key), *of_a_server)
        return certificate, key

    @staticmethod
    def _openssl(name: str, certificate: Path, key: Path, *more: str) -> None:
        out = ["-keyout", str(key), "-out", str(certificate)]
        run(["openssl", "req", "-x509", *NEW_KEY, "-subj", f"/CN={name}", *out, *more])
