"""Tokens and certificates on the command line, with the server in a process of its own."""

from __future__ import annotations

import pathlib
import re
import tomllib

import pytest

from server.connection_options import TOKEN_VARIABLE
from server.tokens import Tokens, hash_of
from tests.support.certificates import Pki
from tests.support.images import encode
from tests.support.processes import ServerProcess
from tests.support.repository import RepositoryBuilder, random_images
from tests.support.serving import run_here as run


def test_a_new_token_is_printed_once_with_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "token", "new", "--role", "infer", "--name", "shop", "--task", "pets", "--task", "f-*")
    token, line = out.splitlines()
    assert (status, err) == (0, "")
    assert tomllib.loads(line) == {"shop": {"role": "infer", "sha256": hash_of(token), "tasks": ["pets", "f-*"]}}
    assert Tokens.parse(f"[tokens]\n{line}", "").find(token) is not None


def test_or_its_line_is_added_to_a_file(capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path) -> None:
    file = tmp_path / "tokens.toml"
    status, token, _ = run(capsys, "token", "new", "--role", "read", "--add-to", file)
    assert status == 0
    assert re.fullmatch(r"munet_[A-Za-z0-9_-]{43}\n", token)
    assert Tokens.parse(file.read_text(), "").find(token.strip()) is not None
    status, out, err = run(capsys, "token", "new", "--role", "read", "--add-to", file)
    assert (status, out) == (2, "")
    assert "each name once" in err
    status, out, err = run(capsys, "token", "new", "--role", "king")
    assert (status, out) == (2, "")
    assert "role: found 'king', expected one of read, infer, admin" in err


def test_a_server_with_certificates_and_tokens_and_its_clients(
    capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    RepositoryBuilder(tmp_path / "repository").publish()
    pki = Pki.make(tmp_path / "pki")
    image = tmp_path / "image.png"
    image.write_bytes(encode(random_images(1, 20)[0]))
    tokens = tmp_path / "tokens.toml"
    shop = run(capsys, "token", "new", "--role", "infer", "--name", "shop", "--task", "digits", "--add-to", tokens)[1].strip()
    operator = run(capsys, "token", "new", "--role", "admin", "--name", "operator", "--add-to", tokens)[1]
    (tmp_path / "operator").write_text(operator)
    ca = ("--ca-file", pki.folder / "ca.pem")
    certificate = ("--certificate-file", pki.folder / "client.pem", "--key-file", pki.folder / "client-key.pem")
    arguments = (
        *("--tokens", str(tokens), "--client-ca-file", str(pki.folder / "ca.pem")),
        *("--certificate-file", str(pki.folder / "server.pem"), "--key-file", str(pki.folder / "server-key.pem")),
    )
    with ServerProcess(tmp_path / "repository", *arguments) as server:
        ask = ("classify", "--server", server.address, *ca, image)
        monkeypatch.setenv(TOKEN_VARIABLE, shop)
        status, out, err = run(capsys, *ask, *certificate)
        assert (status, err) == (0, "")
        assert len(out.splitlines()) == 1
        assert f"{image}  digits  " in out
        status, _, err = run(capsys, *ask)
        assert (status, "(UNAVAILABLE)" in err) == (2, True)
        status, _, err = run(capsys, *ask, *certificate, "--task", "greek")
        assert (status, "found 'greek', expected one of the 1 tasks" in err) == (2, True)
        status, _, err = run(capsys, "status", "--admin", server.admin_address, *ca)
        assert (status, "(PERMISSION_DENIED)" in err) == (2, True)
        operating = ("--admin", server.admin_address, *ca, "--token-file", tmp_path / "operator")
        status, out, _ = run(capsys, "status", *operating)
        assert (status, "generation 1, 5 tasks, up" in out) == (0, True)
        status, out, _ = run(capsys, "reload", *operating)
        assert (status, out) == (0, "serving generation 1, as before\n")
        monkeypatch.delenv(TOKEN_VARIABLE)
        status, _, err = run(capsys, "status", "--admin", server.admin_address, *ca)
        assert (status, "(UNAUTHENTICATED)" in err) == (2, True)
        assert shop not in err
    assert server.status == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("serve", "--admin-listen", "0.0.0.0:0"), "admin_listen: found '0.0.0.0:0', expected an address of loopback"),
        (("serve", "--admin-listen", "[::]:0"), "admin_listen: found '[::]:0', expected an address of loopback"),
        (("serve", "--admin-listen", "unix:8501"), "admin_listen: found 'unix:8501', expected HOST:PORT"),
        (("serve", "--listen", "0.0.0.0:0", "--tokens", "t"), "listen: found '0.0.0.0:0', expected an address of loopback"),
        (("serve", "--tokens", "none"), "tokens.file: found 'none', expected a readable file of tokens"),
        (("serve", "--key-file", "k"), "tls.certificate_file: found None"),
        (("status", "--token-file", "none"), "--token-file: found 'none', expected a file with a token"),
        (("status", "--ca-file", "none"), "ca_file: found 'none', expected a readable file"),
    ],
)
def test_what_would_be_unsafe_or_cannot_be_is_told_with_status_2(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert words in err
    assert "Traceback" not in err
