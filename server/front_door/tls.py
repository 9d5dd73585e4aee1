"""Certificates of the server, read again when their files change."""

from __future__ import annotations

import datetime as dt
import logging
import pathlib
from collections.abc import Callable
from typing import Any

import grpc
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization

from server.config import TlsSettings
from server.errors import SettingsError

_log = logging.getLogger(__name__)


class Certificates:
    """A server's certificate with its key, and whose clients it lets in.

    Every handshake begins with a look at the files' times and sizes. What is new is used from then on if it is whole; if not, what was
    read before goes on, and the log says so once.

    Args:
        certificate_file: the server's certificate, PEM, followed by those between it and its authority.
        key_file: its key, PEM.
        client_ca_file: authorities, one of which must have signed a client's certificate, PEM; none lets in every client.
        on_read: called after each further reading, with whether it was whole; from a thread of gRPC's.
        client_ca_setting: what `client_ca_file` is called, for errors.

    Attributes:
        credentials: what gRPC listens with. Keep this object as long as the server: gRPC asks it again and again.

    Raises:
        SettingsError: a file cannot be read, is not what it should be, or they do not belong together.
    """

    def __init__(
        self,
        certificate_file: pathlib.Path,
        key_file: pathlib.Path,
        client_ca_file: pathlib.Path | None,
        on_read: Callable[[bool], None],
        client_ca_setting: str = "tls.client_ca_file",
    ) -> None:
        self._certificate_file = certificate_file
        self._key_file = key_file
        self._client_ca_file = client_ca_file
        self._on_read = on_read
        self._client_ca_setting = client_ca_setting
        self._seen = self._state()
        # The stubs deny that None, for no news, may be answered.
        news: Callable[[], Any] = self._news
        self.credentials = grpc.dynamic_ssl_server_credentials(self._read(), news, client_ca_file is not None)

    def _news(self) -> grpc.ServerCertificateConfiguration | None:
        """Returns the certificates if they have changed. gRPC asks at every handshake, from a thread of its own."""
        state = self._state()
        if state == self._seen:
            return None
        self._seen = state
        try:
            read = self._read()
        except Exception as error:
            # The edge to gRPC's thread: whatever is wrong with new files, the old certificates go on.
            _log.error("the certificates read before go on: %s", error)
            self._on_read(False)
            return None
        _log.info("new certificates are used from now on")
        self._on_read(True)
        return read

    def _state(self) -> list[tuple[int, int, int] | None]:
        return [_state_of(file) for file in (self._certificate_file, self._key_file, self._client_ca_file) if file is not None]

    def _read(self) -> grpc.ServerCertificateConfiguration:
        chain = _read_file("tls.certificate_file", self._certificate_file)
        key = _read_file("tls.key_file", self._key_file)
        leaf = _certificates("tls.certificate_file", self._certificate_file, chain)[0]
        try:
            public = serialization.load_pem_private_key(key, None).public_key()
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            # What the library says of a key stays out of the log.
            raise SettingsError("tls.key_file", str(self._key_file), "a private key, PEM, without a passphrase") from error
        if public != leaf.public_key():
            raise SettingsError("tls.key_file", str(self._key_file), f"the key of the certificate in {self._certificate_file}")
        now = dt.datetime.now(dt.UTC)
        if not leaf.not_valid_before_utc <= now <= leaf.not_valid_after_utc:
            found = f"valid from {leaf.not_valid_before_utc:%Y-%m-%d %H:%M} to {leaf.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
            raise SettingsError(f"tls.certificate_file {self._certificate_file}", found, "a certificate that is valid now")
        authorities = None
        if self._client_ca_file is not None:
            authorities = _read_file(self._client_ca_setting, self._client_ca_file)
            _certificates(self._client_ca_setting, self._client_ca_file, authorities)
        return grpc.ssl_server_certificate_configuration([(key, chain)], authorities)


def certificates_of(tls: TlsSettings, on_read: Callable[[bool], None]) -> tuple[Certificates, Certificates] | tuple[None, None]:
    """Returns the certificates of the two addresses, that of questions first; none of either where there is no TLS.

    Raises:
        SettingsError: see `Certificates`.
    """
    if tls.certificate_file is None or tls.key_file is None:
        return None, None
    questions = Certificates(tls.certificate_file, tls.key_file, tls.client_ca_file, on_read)
    administration = Certificates(
        tls.certificate_file, tls.key_file, tls.admin_client_ca_file, on_read, "tls.admin_client_ca_file"
    )
    return questions, administration


def _certificates(setting: str, file: pathlib.Path, content: bytes) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(content)
    except ValueError as error:
        raise SettingsError(setting, str(file), "one certificate or more, PEM") from error


def _read_file(setting: str, file: pathlib.Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise SettingsError(setting, str(file), f"a readable file ({error.strerror or error})") from error


def _state_of(file: pathlib.Path) -> tuple[int, int, int] | None:
    try:
        stat = file.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_ino, stat.st_size
