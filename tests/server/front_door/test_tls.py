"""TLS with real certificates over real connections, and certificates that change under a running server."""

from __future__ import annotations

import pathlib
import socket
import ssl
import time
from collections.abc import Iterator

import grpc
import pytest
from cryptography import x509

from server.client import AdminClient, AsyncAdminClient, AsyncClient, Client, Credentials
from server.config import TlsSettings
from server.errors import ServerUnreachableError, SettingsError
from server.front_door.tls import Certificates
from tests.support.certificates import Authority, Pki
from tests.support.repository import DIGITS, RepositoryBuilder, random_images
from tests.support.serving import ServerThread, serving

IMAGE = random_images(1, 8)[0]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("repository")
    RepositoryBuilder(root).publish({"digits": DIGITS})
    return root


@pytest.fixture
def pki(tmp_path: pathlib.Path) -> Pki:
    return Pki.make(tmp_path / "pki")


def settings(pki: Pki, **further: pathlib.Path) -> TlsSettings:
    return TlsSettings(certificate_file=pki.folder / "server.pem", key_file=pki.folder / "server-key.pem", **further)


@pytest.fixture
def server(root: pathlib.Path, pki: Pki) -> Iterator[ServerThread]:
    """Asks whoever administers for a certificate, and others not."""
    with serving(root, tls=settings(pki, admin_client_ca_file=pki.folder / "ca.pem")) as server:
        yield server


def subject_of(address: str) -> str:
    """Returns the name in a server's certificate, as a new connection sees it."""
    host, _, port = address.rpartition(":")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with socket.create_connection((host, int(port))) as plain, context.wrap_socket(plain) as wrapped:
        certificate = x509.load_der_x509_certificate(wrapped.getpeercert(binary_form=True) or b"")
    return certificate.subject.rfc4514_string()


def test_who_trusts_the_authority_is_answered(server: ServerThread, pki: Pki) -> None:
    with Client(server.address, credentials=pki.credentials()) as client:
        assert client.classify("digits", IMAGE).task == "digits"


def test_the_same_awaited(server: ServerThread, pki: Pki) -> None:
    import asyncio

    async def ask() -> tuple[str, int]:
        async with AsyncClient(server.address, credentials=pki.credentials()) as client:
            task = (await client.classify("digits", IMAGE)).task
        async with AsyncAdminClient(server.admin_address, credentials=pki.credentials("client")) as admin:
            return task, (await admin.status()).generation

    assert asyncio.run(ask()) == ("digits", 1)


@pytest.mark.parametrize("kind", ["plain text", "another authority", "another name"])
def test_who_does_not_is_not(server: ServerThread, pki: Pki, kind: str) -> None:
    credentials = {
        "plain text": Credentials(),
        "another authority": Credentials(ca_file=pki.folder / "stranger-ca.pem"),
        "another name": Credentials(ca_file=pki.folder / "ca.pem", server_name="elsewhere.example"),
    }[kind]
    with Client(server.address, credentials=credentials) as client, pytest.raises(ServerUnreachableError):
        client.list_tasks(timeout_seconds=5)


def test_a_name_of_the_certificate_beside_the_host(server: ServerThread, pki: Pki) -> None:
    credentials = Credentials(ca_file=pki.folder / "ca.pem", server_name="localhost")
    with Client(server.address, credentials=credentials) as client:
        assert client.list_tasks().tasks


def test_administration_asks_for_a_certificate_of_its_authority(server: ServerThread, pki: Pki) -> None:
    with AdminClient(server.admin_address, credentials=pki.credentials("client")) as admin:
        assert admin.status().generation == 1
    for client in (None, "forged"):
        with (
            AdminClient(server.admin_address, credentials=pki.credentials(client)) as admin,
            pytest.raises(ServerUnreachableError),
        ):
            admin.status(timeout_seconds=5)


def test_so_do_questions_where_it_is_set(root: pathlib.Path, pki: Pki) -> None:
    with serving(root, tls=settings(pki, client_ca_file=pki.folder / "ca.pem")) as server:
        with Client(server.address, credentials=pki.credentials("client")) as client:
            assert client.list_tasks().tasks
        with Client(server.address, credentials=pki.credentials("forged")) as client, pytest.raises(ServerUnreachableError):
            client.list_tasks(timeout_seconds=5)
        with AdminClient(server.admin_address, credentials=pki.credentials()) as admin:
            assert admin.status().generation == 1


def test_new_certificates_are_used_without_a_restart_and_open_connections_stay(
    server: ServerThread, pki: Pki, caplog: pytest.LogCaptureFixture
) -> None:
    with Client(server.address, credentials=pki.credentials()) as client:
        client.list_tasks()
        # The first handshake takes what was read at the start; each further one looks at the files.
        assert subject_of(server.address) == "CN=server"
        certificate, key = pki.folder / "server.pem", pki.folder / "server-key.pem"
        renewed = pki.authority.issue("renewed")
        # A key that is not there yet: the old pair goes on meanwhile.
        certificate.write_bytes(renewed.certificate)
        for _ in range(3):
            assert subject_of(server.address) == "CN=server"
        assert caplog.text.count("the certificates read before go on: tls.key_file: found") == 1
        key.write_bytes(renewed.key)
        assert subject_of(server.address) == "CN=renewed"
        assert client.list_tasks().tasks
    for damage in (b"", b"nothing", renewed.certificate[:300]):
        certificate.write_bytes(damage)
        assert subject_of(server.address) == "CN=renewed"
    certificate.unlink()
    assert subject_of(server.address) == "CN=renewed"
    pki.authority.issue("expired", valid_days=-1).write(pki.folder, "server")
    assert subject_of(server.address) == "CN=renewed"
    assert "expected a certificate that is valid now" in caplog.text
    assert renewed.key.decode().splitlines()[1] not in caplog.text


def test_authorities_of_clients_change_too(server: ServerThread, pki: Pki) -> None:
    with AdminClient(server.admin_address, credentials=pki.credentials("client")) as admin:
        admin.status()
    (pki.folder / "ca.pem").replace(pki.folder / "trusted.pem")
    (pki.folder / "ca.pem").write_bytes(pki.stranger.certificate)
    for client, is_welcome in (("client", False), ("forged", True)):
        certificate, key = pki.folder / f"{client}.pem", pki.folder / f"{client}-key.pem"
        credentials = Credentials(ca_file=pki.folder / "trusted.pem", certificate_file=certificate, key_file=key)
        with AdminClient(server.admin_address, credentials=credentials) as admin:
            if is_welcome:
                assert admin.status().generation == 1
            else:
                with pytest.raises(ServerUnreachableError):
                    admin.status(timeout_seconds=5)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("server.pem", None, "tls.certificate_file: found .* expected a readable file"),
        ("server.pem", b"nothing", "tls.certificate_file: found .* expected one certificate or more, PEM"),
        ("server-key.pem", b"nothing", "tls.key_file: found .* expected a private key, PEM, without a passphrase"),
        ("server-key.pem", "client", r"tls.key_file: found .* expected the key of the certificate in .*server\.pem"),
        ("ca.pem", b"", "tls.client_ca_file: found .* expected one certificate or more, PEM"),
        ("server.pem", "expired", "found 'valid from .* UTC', expected a certificate that is valid now"),
    ],
)
def test_what_cannot_be_used_is_refused_at_the_start(pki: Pki, file: str, content: bytes | str | None, words: str) -> None:
    if content is None:
        (pki.folder / file).unlink()
    elif content == "client":
        (pki.folder / file).write_bytes((pki.folder / "client-key.pem").read_bytes())
    elif content == "expired":
        pki.authority.issue("expired", valid_days=-1).write(pki.folder, "server")
    else:
        (pki.folder / file).write_bytes(content)  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match=words):
        Certificates(pki.folder / "server.pem", pki.folder / "server-key.pem", pki.folder / "ca.pem", lambda _: None)


def test_a_server_with_bad_certificates_does_not_start(root: pathlib.Path, pki: Pki) -> None:
    (pki.folder / "server-key.pem").write_bytes(Authority().issue("other").key)
    with pytest.raises(SettingsError, match="tls.key_file"), serving(root, tls=settings(pki)):
        raise AssertionError("it serves")


def test_authorities_of_administrators_are_called_by_their_name(root: pathlib.Path, pki: Pki) -> None:
    with (
        pytest.raises(SettingsError, match="tls.admin_client_ca_file: found"),
        serving(root, tls=settings(pki, admin_client_ca_file=pki.folder / "none.pem")),
    ):
        raise AssertionError("it serves")


def test_clients_are_told_what_is_wrong_with_their_files(pki: Pki) -> None:
    with pytest.raises(SettingsError, match="ca_file: found .*none.pem.* expected a readable file"):
        Client("localhost:1", credentials=Credentials(ca_file=pki.folder / "none.pem"))
    with pytest.raises(SettingsError, match="key_file: found None, expected both certificate_file and key_file"):
        Client("localhost:1", credentials=Credentials(certificate_file=pki.folder / "client.pem"))
    (pki.folder / "ca.pem").write_text("nothing")
    with pytest.raises(SettingsError, match="expected a PEM file"):
        Client("localhost:1", credentials=pki.credentials())


def test_a_handshake_that_is_never_finished_is_ended(root: pathlib.Path, pki: Pki) -> None:
    from server.config import ConnectionSettings

    with serving(root, tls=settings(pki), connections=ConnectionSettings(handshake_seconds=0.5)) as server:
        host, _, port = server.address.rpartition(":")
        started = time.monotonic()
        with socket.create_connection((host, int(port)), timeout=10) as silent:
            assert silent.recv(1) == b""
        assert 0.3 < time.monotonic() - started < 9
        with grpc.secure_channel(server.address, grpc.ssl_channel_credentials((pki.folder / "ca.pem").read_bytes())) as channel:
            grpc.channel_ready_future(channel).result(timeout=30)
