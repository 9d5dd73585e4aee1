"""Who may reach the addresses, whatever they are written like."""

from __future__ import annotations

import pathlib
import socket
from typing import Any

import pytest

from server.config import ServerSettings, TlsSettings, TokenSettings, read_settings
from server.errors import SettingsError
from server.exposure import check_exposure, loopback_of

TLS = TlsSettings(certificate_file=pathlib.Path("c.pem"), key_file=pathlib.Path("k.pem"))
TOKENS = TokenSettings(file=pathlib.Path("tokens.toml"))


def resolving(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
    """Has every name resolve to these addresses."""

    def getaddrinfo(host: str, port: object, **_: object) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


@pytest.mark.parametrize(
    ("address", "pinned"),
    [
        ("127.0.0.1:1", "127.0.0.1:1"),
        ("127.9.8.7:1", "127.9.8.7:1"),
        ("[::1]:1", "[::1]:1"),
        ("[0:0:0:0:0:0:0:1]:1", "[::1]:1"),
        ("[::ffff:127.0.0.1]:1", "127.0.0.1:1"),
        ("localhost:1", "127.0.0.1:1"),
        ("LOCALHOST:1", "127.0.0.1:1"),
        # How inet_aton reads it.
        ("127.1:1", "127.0.0.1:1"),
        ("2130706433:1", "127.0.0.1:1"),
    ],
)
def test_loopback_in_all_its_forms_becomes_figures(address: str, pinned: str) -> None:
    assert loopback_of(address, "listen") == pinned


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0:8501",
        "0:8501",
        "[::]:8501",
        "[0:0::0]:8501",
        "[::ffff:0.0.0.0]:8501",
        "[::ffff:192.0.2.1]:8501",
        "192.0.2.1:8501",
        "[fe80::1]:8501",
        "128.0.0.1:8501",
        "0x0.0:8501",
    ],
)
def test_administration_listens_nowhere_else_without_authentication(address: str) -> None:
    assert loopback_of(address, "admin_listen") is None
    with pytest.raises(SettingsError, match=r"admin_listen: found .*, expected an address of loopback .* tokens\.file"):
        check_exposure(ServerSettings(admin_listen=address))
    with pytest.raises(SettingsError, match="admin_listen"):
        # Certificates of those who ask questions say nothing about who may administer.
        check_exposure(
            ServerSettings(admin_listen=address, tls=TLS.model_copy(update={"client_ca_file": pathlib.Path("ca.pem")}))
        )
    mutual = TLS.model_copy(update={"admin_client_ca_file": pathlib.Path("ca.pem")})
    assert check_exposure(ServerSettings(admin_listen=address, tls=mutual)).admin_listen == address
    assert check_exposure(ServerSettings(admin_listen=address, tls=TLS, tokens=TOKENS)).admin_listen == address


@pytest.mark.parametrize("addresses", [("192.0.2.1",), ("127.0.0.1", "192.0.2.1"), ("::1", "0.0.0.0")])
def test_a_name_is_loopback_only_if_all_it_resolves_to_is(monkeypatch: pytest.MonkeyPatch, addresses: tuple[str, ...]) -> None:
    resolving(monkeypatch, *addresses)
    with pytest.raises(SettingsError, match="admin_listen: found 'localhost:8501'"):
        check_exposure(ServerSettings(admin_listen="localhost:8501"))


def test_a_name_of_loopback_is_listened_on_in_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    resolving(monkeypatch, "::1", "127.0.0.1")
    settings = check_exposure(ServerSettings(listen="here:1", admin_listen="here:2"))
    assert (settings.listen, settings.admin_listen) == ("127.0.0.1:1", "127.0.0.1:2")
    resolving(monkeypatch, "::1")
    assert check_exposure(ServerSettings(admin_listen="here:2")).admin_listen == "[::1]:2"


def test_a_name_that_nothing_resolves() -> None:
    with pytest.raises(SettingsError, match=r"admin_listen: found 'none\.invalid:1', expected an address, or a name"):
        check_exposure(ServerSettings(admin_listen="none.invalid:1"))


@pytest.mark.parametrize(
    "address",
    ["unix:8501", "UNIX:8501", "unix-abstract:1", "vsock:1", "dns:1", "ipv4:1", "ipv6:1", "xds:1", "*:1", ":1", "unix:/tmp/a"],
)
def test_what_grpc_takes_for_another_kind_of_address_is_none(address: str) -> None:
    with pytest.raises(SettingsError, match="admin_listen: found"):
        read_settings(None, {"admin_listen": address})


@pytest.mark.parametrize("setting", ["listen", "admin_listen"])
def test_tokens_cross_no_network_in_plain_text_unless_it_is_said(setting: str) -> None:
    given = ServerSettings(tokens=TOKENS).model_copy(update={setting: "0.0.0.0:1"})
    with pytest.raises(SettingsError, match=rf"^{setting}: found '0\.0\.0\.0:1', .*plain text; set tls\.certificate_file"):
        check_exposure(given)
    allowed = TokenSettings(file=TOKENS.file, allow_plain_text=True)
    assert check_exposure(given.model_copy(update={"tokens": allowed}))
    assert check_exposure(given.model_copy(update={"tls": TLS}))


@pytest.mark.parametrize(
    ("tls", "words"),
    [
        (TlsSettings(key_file=pathlib.Path("k")), "tls.certificate_file: found None"),
        (TlsSettings(certificate_file=pathlib.Path("c")), "tls.key_file: found None, expected the key of"),
        (TlsSettings(client_ca_file=pathlib.Path("ca")), "tls.client_ca_file: found 'ca', expected none without"),
        (TlsSettings(admin_client_ca_file=pathlib.Path("ca")), "tls.admin_client_ca_file: found 'ca', expected none without"),
    ],
)
def test_half_a_certificate(tls: TlsSettings, words: str) -> None:
    with pytest.raises(SettingsError) as caught:
        check_exposure(ServerSettings(tls=tls))
    assert words in str(caught.value)


def test_an_open_front_door_is_said(caplog: pytest.LogCaptureFixture) -> None:
    check_exposure(ServerSettings())
    assert not caplog.records
    check_exposure(ServerSettings(listen="0.0.0.0:8500"))
    assert "whoever reaches 0.0.0.0:8500 may ask questions" in caplog.text
