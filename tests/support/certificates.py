"""Certificates as an authority issues them, made anew for each test."""

from __future__ import annotations

import dataclasses
import datetime as dt
import ipaddress
import pathlib
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from server.client import Credentials


@dataclasses.dataclass(frozen=True)
class Certificate:
    """A certificate and its key, PEM."""

    certificate: bytes
    key: bytes

    def write(self, folder: pathlib.Path, name: str) -> tuple[pathlib.Path, pathlib.Path]:
        """Writes both and returns their files, certificate first."""
        files = folder / f"{name}.pem", folder / f"{name}-key.pem"
        for file, content in zip(files, (self.certificate, self.key), strict=True):
            temporary = file.with_suffix(".new")
            temporary.write_bytes(content)
            temporary.replace(file)
        return files


class Authority:
    """Issues certificates for 127.0.0.1 and localhost."""

    def __init__(self, name: str = "authority") -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name(name)
        self.certificate = _pem(self._sign(self._name, self._key.public_key(), is_authority=True))

    def issue(self, name: str, *, valid_days: int = 1, host: str = "localhost") -> Certificate:
        """Issues a certificate that is valid since yesterday; -1 means until an hour ago."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._sign(_name(name), key.public_key(), valid_days=valid_days, host=host)
        private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        return Certificate(_pem(certificate), private)

    def _sign(
        self,
        subject: x509.Name,
        key: ec.EllipticCurvePublicKey,
        *,
        is_authority: bool = False,
        valid_days: int = 1,
        host: str = "localhost",
    ) -> x509.Certificate:
        now = dt.datetime.now(dt.UTC)
        until = now + dt.timedelta(days=valid_days) if valid_days > 0 else now - dt.timedelta(hours=1)
        names: list[x509.GeneralName] = [x509.DNSName(host)]
        if host == "localhost":
            names.append(x509.IPAddress(ipaddress.ip_address("127.0.0.1")))
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(days=1))
            .not_valid_after(until)
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .sign(self._key, hashes.SHA256())
        )


@dataclasses.dataclass(frozen=True)
class Pki:
    """An authority with a server's and a client's certificate in a folder, and another authority that nobody trusts."""

    folder: pathlib.Path
    authority: Authority
    stranger: Authority

    @classmethod
    def make(cls, folder: pathlib.Path) -> Self:
        folder.mkdir(parents=True, exist_ok=True)
        pki = cls(folder, Authority(), Authority("stranger"))
        (folder / "ca.pem").write_bytes(pki.authority.certificate)
        (folder / "stranger-ca.pem").write_bytes(pki.stranger.certificate)
        pki.authority.issue("server").write(folder, "server")
        pki.authority.issue("client").write(folder, "client")
        pki.stranger.issue("client").write(folder, "forged")
        return pki

    def credentials(self, client: str | None = None, token: str | None = None) -> Credentials:
        """Returns what a client needs, with its own certificate if it is named."""
        certificate = self.folder / f"{client}.pem" if client else None
        key = self.folder / f"{client}-key.pem" if client else None
        return Credentials(ca_file=self.folder / "ca.pem", certificate_file=certificate, key_file=key, token=token)


def _name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
