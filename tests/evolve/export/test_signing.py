"""Generations that are signed, and what a signer takes over from before."""

from __future__ import annotations

import hashlib
import pathlib
import shutil
import stat
import sys

import onnx
import pytest

from evolve import cli
from evolve.errors import SettingsError
from evolve.export.publish import export_system
from evolve.signing import read_signing_key, write_new_key
from evolve.store import System
from munet.signatures import PrivateKey, is_signed, read_public_key
from tests.evolve.export.conftest import Published
from tests.evolve.export.whole import check_whole, read_generation
from tests.support.system import TaskSketch, add_task

KEY, OTHER = PrivateKey.generate(), PrivateKey.generate()


def signer_of(repository: pathlib.Path, number: int) -> str:
    content, signature = (repository / f"generation-{number}.{kind}" for kind in ("json", "sig"))
    if not signature.exists():
        return "nobody"
    for name, key in (("key", KEY), ("other", OTHER)):
        if is_signed(content.read_bytes(), signature.read_bytes(), [key.public_key()]):
            return name
    return "somebody else"


@pytest.fixture(scope="module")
def pristine_signed(pristine: Published, tmp_path_factory: pytest.TempPathFactory) -> Published:
    """Read only."""
    repository = tmp_path_factory.mktemp("signed") / "repository"
    export_system(pristine.system, repository, signing_key=KEY)
    return Published(pristine.system, repository)


@pytest.fixture
def signed(pristine_signed: Published, tmp_path: pathlib.Path) -> Published:
    """A copy to change."""
    shutil.copytree(pristine_signed.system.folder, tmp_path / "system")
    shutil.copytree(pristine_signed.repository, tmp_path / "repository")
    return Published(System.open(tmp_path / "system"), tmp_path / "repository")


def test_a_signature_lies_beside_its_generation_and_changes_nothing_else(pristine: Published, pristine_signed: Published) -> None:
    unsigned, signed = check_whole(pristine.repository), check_whole(pristine_signed.repository)
    assert (signed.segments, signed.tasks, signed.files) == (unsigned.segments, unsigned.tasks, unsigned.files)
    assert signer_of(pristine_signed.repository, 1) == "key"
    assert signer_of(pristine.repository, 1) == "nobody"


def test_what_the_same_key_signed_is_used_again(signed: Published) -> None:
    result = export_system(signed.system, signed.repository, signing_key=KEY)
    assert (result.changed, result.new_segments) == (False, ())
    add_task(signed.system, "another", TaskSketch(classes=6))
    result = export_system(signed.system, signed.repository, signing_key=KEY)
    assert (result.generation, len(result.new_segments), len(result.reused_segments)) == (2, 1, 12)
    assert [signer_of(signed.repository, number) for number in (1, 2)] == ["key", "key"]


def test_signatures_are_collected_with_their_generations(signed: Published) -> None:
    for number in range(2, 6):
        add_task(signed.system, "another", TaskSketch(classes=4 + number))
        told: list[str] = []
        export_system(signed.system, signed.repository, signing_key=KEY if number != 4 else None, progress=told.append)
        assert any("is not signed, as the one before was" in line for line in told) is (number == 4)
    check_whole(signed.repository)
    assert sorted(file.name for file in signed.repository.glob("generation-*")) == [
        "generation-3.json",
        "generation-3.sig",
        "generation-4.json",
        "generation-5.json",
        "generation-5.sig",
    ]


def test_a_signer_vouches_for_nothing_that_others_put_there(published: Published) -> None:
    """Nobody signed what is there, and one segment was altered together with its checksum: signing it would make it good."""
    before = read_generation(published.repository)
    segment = before.tasks[0].route[0]
    model = published.repository / segment / "1" / "model.onnx"
    genuine = model.read_bytes()
    altered = onnx.load(model)
    altered.graph.node[0].doc_string = "evil"
    content = altered.SerializeToString()
    model.write_bytes(content)
    file = published.repository / "generation-1.json"
    text = file.read_text().replace(hashlib.sha256(genuine).hexdigest(), hashlib.sha256(content).hexdigest())
    file.write_text(text.replace(f'"{len(genuine)}"', f'"{len(content)}"'))
    check_whole(published.repository)
    # Whoever does not sign takes it for what was published, as it says it is.
    assert not export_system(published.system, published.repository).changed
    assert model.read_bytes() == content
    result = export_system(published.system, published.repository, signing_key=KEY)
    assert (result.changed, result.generation, len(result.new_segments), result.reused_segments) == (True, 2, 12, ())
    assert model.read_bytes() == genuine
    assert signer_of(published.repository, 2) == "key"
    assert signer_of(published.repository, 1) == "nobody"
    assert read_generation(published.repository).tasks == before.tasks


@pytest.mark.parametrize("damage", ["altered", "missing", "of another", "short"])
def test_what_is_signed_no_more_is_made_anew(signed: Published, damage: str) -> None:
    file, signature = signed.repository / "generation-1.json", signed.repository / "generation-1.sig"
    if damage == "altered":
        file.write_text(file.read_text() + "\n")
    elif damage == "missing":
        signature.unlink()
    elif damage == "of another":
        signature.write_bytes(OTHER.sign(file.read_bytes()))
    else:
        signature.write_bytes(signature.read_bytes()[:-1])
    result = export_system(signed.system, signed.repository, signing_key=KEY)
    assert (result.changed, result.generation, len(result.new_segments)) == (True, 2, 12)
    assert signer_of(signed.repository, 2) == "key"


def test_a_new_key_signs_from_the_next_publication_on(signed: Published) -> None:
    result = export_system(signed.system, signed.repository, signing_key=OTHER)
    assert (result.changed, result.generation) == (True, 2)
    assert [signer_of(signed.repository, number) for number in (1, 2)] == ["key", "other"]


def test_what_a_killed_signer_left_signs_nothing_later(published: Published) -> None:
    """Its signature lies there, its generation was never written: the next one of that number is another."""
    left = published.repository / "generation-2.sig"
    left.write_bytes(bytes(64))
    add_task(published.system, "another", TaskSketch(classes=6))
    assert export_system(published.system, published.repository).generation == 2
    assert not left.exists()
    (published.repository / "generation-3.sig").write_bytes(bytes(64))
    (published.repository / ".generation-3.sig.abc.part").write_bytes(b"half")
    assert not export_system(published.system, published.repository).changed
    assert not list(published.repository.glob("*generation-3.sig*"))


# The commands


def main(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["munet-evolve", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as error:
        return int(error.code or 0)
    return 0


def test_a_key_is_made_and_signs(
    signed: Published, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    key = tmp_path / "signing.pem"
    assert main(monkeypatch, "key", "new", key) == 0
    assert f"{key}: private key" in capsys.readouterr().out
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    export = ("export", "--system", signed.system.folder, "--repository", signed.repository, "--sign", key)
    assert main(monkeypatch, *export) == 0
    assert "published generation 2, signed, 12 new segments" in capsys.readouterr().out
    public = read_public_key(key.with_name("signing.pem.pub").read_bytes())
    content, signature = (signed.repository / f"generation-2.{kind}" for kind in ("json", "sig"))
    assert is_signed(content.read_bytes(), signature.read_bytes(), [public])
    assert main(monkeypatch, *export) == 0
    assert "generation 2 is up to date" in capsys.readouterr().out
    before = key.read_bytes()
    assert main(monkeypatch, "key", "new", key) == 2
    assert "signing.pem.pub (it is there already)" in capsys.readouterr().err
    key.with_name("signing.pem.pub").unlink()
    assert main(monkeypatch, "key", "new", key) == 2
    assert "could not write" in capsys.readouterr().err
    assert key.read_bytes() == before


def test_keys_that_cannot_be_are_told_before_anything_else(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere = ("--system", tmp_path / "none", "--repository", tmp_path / "repository")
    assert main(monkeypatch, "export", *nowhere, "--sign", tmp_path / "none.pem") == 2
    assert "found no readable key in" in capsys.readouterr().err
    public = write_new_key(tmp_path / "key.pem")
    assert main(monkeypatch, "export", *nowhere, "--sign", public) == 2
    assert "expected an ed25519 private key, PEM, without a passphrase" in capsys.readouterr().err
    assert main(monkeypatch, "run", tmp_path / "none.toml", "--system", tmp_path / "s", "--sign", tmp_path / "key.pem") == 2
    assert "found --sign without --repository" in capsys.readouterr().err
    with pytest.raises(SettingsError, match="found something else"):
        read_signing_key(public)
    with pytest.raises(SettingsError, match="could not write"):
        write_new_key(tmp_path / "none" / "key.pem")
