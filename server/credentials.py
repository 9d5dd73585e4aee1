"""What a client shows a server, and what it asks of it: certificates and a token. Free of gRPC."""

from __future__ import annotations

import dataclasses
import pathlib

from server.errors import SettingsError
from server.exposure import loopback_of


@dataclasses.dataclass(frozen=True, slots=True)
class Credentials:
    """TLS and token of a client. Without any of it, it speaks plain text and has no token.

    Attributes:
        tls: whether to speak TLS; a file of certificates says so too.
        ca_file: authorities one of which must have signed the server's certificate, PEM; none means those that gRPC knows.
        certificate_file: the client's own certificate, PEM, where the server asks for one.
        key_file: its key, PEM, without a passphrase.
        server_name: the name in the server's certificate, where it is not the host that is called.
        token: the bearer token.
        allow_plain_text: whether the token may cross a network in plain text, as where a proxy on this machine speaks TLS.
    """

    tls: bool = False
    ca_file: pathlib.Path | None = None
    certificate_file: pathlib.Path | None = None
    key_file: pathlib.Path | None = None
    server_name: str | None = None
    token: str | None = dataclasses.field(default=None, repr=False)
    allow_plain_text: bool = False

    @property
    def speaks_tls(self) -> bool:
        """Whether TLS is spoken."""
        return self.tls or self.ca_file is not None or self.certificate_file is not None

    def metadata(self, server: str | None) -> tuple[tuple[str, str], ...] | None:
        """Returns what goes with every call; None if nothing does.

        Args:
            server: HOST:PORT that the token is sent to; none if somebody else says how it gets there.

        Raises:
            SettingsError: the token is none, or would cross a network in plain text.
        """
        if self.token is None:
            return None
        if not self.token or not self.token.isascii() or not self.token.isprintable() or " " in self.token:
            raise SettingsError("token", "something else", "a token as `munet-server token new` prints it")
        is_safe = self.speaks_tls or self.allow_plain_text or server is None
        if not is_safe and loopback_of(server or "", "server") is None:
            expected = (
                "TLS (tls, or ca_file), because the token would cross the network in plain text; "
                "or allow_plain_text, if a proxy on this machine speaks TLS"
            )
            raise SettingsError("server", server, expected)
        return (("authorization", f"Bearer {self.token}"),)

    def read(self) -> tuple[bytes | None, bytes | None, bytes | None]:
        """Returns authorities, key and certificate as they stand in their files.

        Raises:
            SettingsError: a file cannot be read, or one of key and certificate is missing.
        """
        if (self.certificate_file is None) is not (self.key_file is None):
            missing = "key_file" if self.key_file is None else "certificate_file"
            raise SettingsError(missing, None, "both certificate_file and key_file, or neither")
        return _read("ca_file", self.ca_file), _read("key_file", self.key_file), _read("certificate_file", self.certificate_file)


def _read(setting: str, file: pathlib.Path | None) -> bytes | None:
    if file is None:
        return None
    try:
        content = file.read_bytes()
    except OSError as error:
        raise SettingsError(setting, str(file), f"a readable file ({error.strerror or error})") from error
    if b"-----BEGIN " not in content:
        raise SettingsError(setting, str(file), "a PEM file")
    return content
