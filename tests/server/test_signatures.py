"""Only what one of the keys signed is served."""

from __future__ import annotations

import pathlib
import sys

import pytest

from munet.signatures import PrivateKey, new_key, read_private_key
from server.cli import main
from server.client import AdminClient, CallRefusedError, Client
from server.errors import GenerationRefusedError, SettingsError
from server.repository import Repository, read_keys
from tests.support.repository import DIGITS, GREEK, HEBREW, RepositoryBuilder, random_images
from tests.support.serving import serving

OLD, NEW, STRANGER = (PrivateKey.generate() for _ in range(3))


@pytest.fixture
def builder(tmp_path: pathlib.Path) -> RepositoryBuilder:
    builder = RepositoryBuilder(tmp_path / "repository")
    builder.publish({"digits": DIGITS})
    return builder


def sign(builder: RepositoryBuilder, number: int, key: PrivateKey) -> None:
    content = (builder.root / f"generation-{number}.json").read_bytes()
    (builder.root / f"generation-{number}.sig").write_bytes(key.sign(content))


def refusal(builder: RepositoryBuilder, *keys: PrivateKey) -> str:
    with pytest.raises(GenerationRefusedError) as caught:
        Repository(builder.root, [key.public_key() for key in keys]).read()
    return str(caught.value)


def test_signatures_are_asked_of_what_is_gone_back_to_and_of_canaries(builder: RepositoryBuilder, tmp_path: pathlib.Path) -> None:
    builder.publish({"digits": GREEK})
    builder.publish({"digits": HEBREW}, current=False)
    builder.set_canary(3, 50)
    sign(builder, 2, OLD)
    sign(builder, 3, STRANGER)
    with serving(builder.root, require_signature=key_files(tmp_path, OLD)) as server, AdminClient(server.admin_address) as admin:
        canary = admin.status().canary
        assert canary is not None
        assert canary.refusal.startswith("generation 3 is refused: generation-3.sig: found what none of them signed")
        with pytest.raises(CallRefusedError, match=r"generation 1 is refused: generation-1\.sig"):
            admin.rollback()
        sign(builder, 1, OLD)
        assert admin.rollback().generation == 1


def test_each_of_several_keys_will_do(builder: RepositoryBuilder) -> None:
    for key in (OLD, NEW):
        sign(builder, 1, key)
        repository = Repository(builder.root, [OLD.public_key(), NEW.public_key()])
        assert repository.read().number == 1
    assert "what none of them signed" in refusal(builder, OLD)


def test_without_keys_signatures_are_not_looked_at(builder: RepositoryBuilder) -> None:
    assert Repository(builder.root).read().number == 1
    (builder.root / "generation-1.sig").write_bytes(b"nonsense")
    assert Repository(builder.root).read().number == 1


def test_what_is_not_signed_is_not_even_parsed(builder: RepositoryBuilder) -> None:
    sign(builder, 1, OLD)
    whole = (builder.root / "generation-1.json").read_bytes()
    for content in (whole + b" ", b"[" * 100_000, b"", whole.replace(b"digits", b"digitz")):
        (builder.root / "generation-1.json").write_bytes(content)
        words = refusal(builder, OLD)
        assert words.startswith(
            "generation 1 is refused: generation-1.sig: found what none of them signed, expected the signature of generation-1.json by "
            "one of 1 keys; sign it with `munet-evolve export --sign KEYFILE`"
        )
        assert "; and" not in words


def test_signatures_that_are_none(builder: RepositoryBuilder, tmp_path: pathlib.Path) -> None:
    file = builder.root / "generation-1.sig"
    assert "generation-1.sig: found No such file" in refusal(builder, OLD)
    sign(builder, 1, OLD)
    genuine = file.read_bytes()
    for content in (b"", genuine[:-1], genuine + b"\n", genuine.hex().encode(), bytes(64), genuine * 1_000_000):
        file.write_bytes(content)
        assert "what none of them signed" in refusal(builder, OLD)
    sign(builder, 1, STRANGER)
    assert "what none of them signed" in refusal(builder, OLD, NEW)
    (tmp_path / "outside.sig").write_bytes(genuine)
    file.unlink()
    file.symlink_to(tmp_path / "outside.sig")
    assert "a link to" in refusal(builder, OLD)


def test_a_signature_is_of_one_number(builder: RepositoryBuilder) -> None:
    """An old generation under a new number is not what its own file says it is."""
    sign(builder, 1, OLD)
    for kind in ("json", "sig"):
        (builder.root / f"generation-7.{kind}").write_bytes((builder.root / f"generation-1.{kind}").read_bytes())
    builder.set_current(7)
    assert "generation-7.json: number: found 1, expected 7" in refusal(builder, OLD)


def test_the_signature_covers_every_file(builder: RepositoryBuilder) -> None:
    sign(builder, 1, OLD)
    for file in builder.read_manifest(1).files:
        content = (builder.root / file.path).read_bytes()
        builder.alter(file.path)
        assert file.path in refusal(builder, OLD)
        (builder.root / file.path).write_bytes(content)
    assert Repository(builder.root, [OLD.public_key()]).read().number == 1


def key_files(folder: pathlib.Path, *keys: PrivateKey) -> tuple[pathlib.Path, ...]:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    files = tuple(folder / f"{index}.pub" for index in range(len(keys)))
    for file, key in zip(files, keys, strict=True):
        file.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return files


def test_a_running_server_goes_on_with_what_was_signed(builder: RepositoryBuilder, tmp_path: pathlib.Path) -> None:
    sign(builder, 1, OLD)
    keys = key_files(tmp_path, OLD, NEW)
    image = random_images(1, 8)[0]
    with (
        serving(builder.root, require_signature=keys, watch_interval_seconds=600) as server,
        Client(server.address) as client,
        AdminClient(server.admin_address) as admin,
    ):
        builder.publish({"digits": DIGITS, "greek": GREEK})
        with pytest.raises(CallRefusedError, match=r"generation 2 is refused: generation-2\.sig: found No such file"):
            admin.reload()
        sign(builder, 2, STRANGER)
        with pytest.raises(CallRefusedError, match="what none of them signed"):
            admin.reload()
        assert client.classify("digits", image).generation == 1
        # A signature that comes late, by another of the keys.
        sign(builder, 2, NEW)
        assert admin.reload().generation == 2
        assert client.classify("greek", image).generation == 2


def test_a_signature_that_comes_late_is_noticed(builder: RepositoryBuilder) -> None:
    repository = Repository(builder.root, [OLD.public_key()])
    before = repository.fingerprint(), repository.fingerprint_of_files()
    sign(builder, 1, OLD)
    assert repository.fingerprint() != before[0]
    assert repository.fingerprint_of_files() != before[1]


def test_a_server_does_not_start_on_what_nobody_signed(builder: RepositoryBuilder, tmp_path: pathlib.Path) -> None:
    with (
        pytest.raises(GenerationRefusedError, match=r"generation-1\.sig"),
        serving(builder.root, require_signature=key_files(tmp_path, OLD)),
    ):
        raise AssertionError("it serves")


def test_keys_that_are_none(tmp_path: pathlib.Path) -> None:
    private, public = new_key()
    (tmp_path / "private").write_bytes(private)
    (tmp_path / "public").write_bytes(public)
    for file, words in (("private", "expected an ed25519 public key, PEM"), ("none", "expected a readable file")):
        with pytest.raises(SettingsError, match=f"require_signature: found .*{words}"):
            read_keys([tmp_path / "public", tmp_path / file])
    assert read_keys([tmp_path / "public"])[0] == read_private_key(private).public_key()


def test_check_on_the_command_line(
    builder: RepositoryBuilder, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = key_files(tmp_path, OLD, NEW)
    command = ["munet-server", "check", "--repository", str(builder.root)]
    arguments = [*command, "--require-signature", str(old), "--require-signature", str(new)]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit):
        main()
    assert "generation-1.sig: found No such file" in capsys.readouterr().err
    sign(builder, 1, NEW)
    main_ok(monkeypatch, arguments)
    assert "generation 1 in" in capsys.readouterr().out
    # A signature is nothing that a check without keys minds.
    main_ok(monkeypatch, command)


def main_ok(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as caught:
        main()
    assert not caught.value.code
