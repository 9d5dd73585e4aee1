"""Who can reach the server's addresses, and whether what is set lets in only whom it should. Asked before anything listens."""

from __future__ import annotations

import ipaddress
import logging
import socket

from server.config import ServerSettings
from server.errors import SettingsError

_log = logging.getLogger(__name__)

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def loopback_of(address: str, setting: str) -> str | None:
    """Returns HOST:PORT with the host as an address of loopback in figures, or None if others than this machine may reach it.

    A name that stands for loopback is one only if all that it resolves to is. Who listens on the figures that are returned does not
    listen on what the name may resolve to a moment later.

    Args:
        address: HOST:PORT.
        setting: what it is called, for the error.

    Raises:
        SettingsError: the name cannot be resolved.
    """
    host, _, port = address.rpartition(":")
    found = [_unmapped(one) for one in _addresses_of(host.removeprefix("[").removesuffix("]"), address, setting)]
    if not all(one.is_loopback for one in found):
        return None
    first = min(found, key=lambda one: one.version)
    return f"{first}:{port}" if first.version == 4 else f"[{first}]:{port}"


def _addresses_of(host: str, address: str, setting: str) -> list[_Address]:
    try:
        return [ipaddress.ip_address(host)]
    except ValueError:
        pass
    try:
        resolved = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        return [ipaddress.ip_address(str(entry[4][0])) for entry in resolved]
    except (OSError, UnicodeError, ValueError) as error:
        raise SettingsError(setting, address, f"an address, or a name that this machine can resolve ({error})") from error


def _unmapped(address: _Address) -> _Address:
    """Returns the IPv4 address that an IPv6 one stands for, or the address itself."""
    return (address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None) or address


def check_exposure(settings: ServerSettings) -> ServerSettings:
    """Checks that nobody is let in who should not be.

    Returns:
        The settings, with names of loopback in figures.

    Raises:
        SettingsError: the settings contradict each other; the admin address could be reached from elsewhere without authentication; or
            tokens would cross a network in plain text.
    """
    tls, tokens = settings.tls, settings.tokens
    if tls.key_file is not None and tls.certificate_file is None:
        raise SettingsError("tls.certificate_file", None, "the certificate that tls.key_file is the key of")
    if tls.certificate_file is not None and tls.key_file is None:
        raise SettingsError("tls.key_file", None, "the key of tls.certificate_file")
    for setting, file in (("client_ca_file", tls.client_ca_file), ("admin_client_ca_file", tls.admin_client_ca_file)):
        if file is not None and tls.certificate_file is None:
            raise SettingsError(f"tls.{setting}", str(file), "none without tls.certificate_file and tls.key_file")
    listen, admin = loopback_of(settings.listen, "listen"), loopback_of(settings.admin_listen, "admin_listen")
    if admin is None and tokens.file is None and tls.admin_client_ca_file is None:
        expected = (
            "an address of loopback such as 127.0.0.1:8501, or who may administer: tokens.file, "
            "or tls.admin_client_ca_file with tls.certificate_file and tls.key_file"
        )
        raise SettingsError("admin_listen", settings.admin_listen, expected)
    if tokens.file is not None and tls.certificate_file is None and not tokens.allow_plain_text:
        for setting, address, loopback in (
            ("listen", settings.listen, listen),
            ("admin_listen", settings.admin_listen, admin),
        ):
            if loopback is None:
                expected = (
                    "an address of loopback, because tokens would cross the network in plain text; set tls.certificate_file and "
                    "tls.key_file, or tokens.allow_plain_text if something before this server speaks TLS"
                )
                raise SettingsError(setting, address, expected)
    if listen is None and tokens.file is None and tls.client_ca_file is None:
        _log.warning(
            "whoever reaches %s may ask questions: there are neither tokens nor certificates of clients", settings.listen
        )
    return settings.model_copy(update={"listen": listen or settings.listen, "admin_listen": admin or settings.admin_listen})
