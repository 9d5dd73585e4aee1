from __future__ import annotations

import pathlib
import subprocess

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from munet.signatures import SIGNATURE_BYTES, PrivateKey, is_signed, new_key, read_private_key, read_public_key, signature_name

CONTENT = b'{"format": 1}\n'


def test_what_a_key_signed_is_signed_and_nothing_else_is() -> None:
    private, public = new_key()
    other = read_public_key(new_key()[1])
    key = read_public_key(public)
    signature = read_private_key(private).sign(CONTENT)
    assert len(signature) == SIGNATURE_BYTES
    assert is_signed(CONTENT, signature, [key])
    assert is_signed(CONTENT, signature, [other, key])
    assert not is_signed(CONTENT, signature, [other])
    assert not is_signed(CONTENT, signature, [])
    assert not is_signed(CONTENT + b" ", signature, [key])
    flipped = bytes([signature[0] ^ 1, *signature[1:]])
    for wrong in (b"", flipped, signature[:-1], signature + b"\n", bytes(64), signature * 2):
        assert not is_signed(CONTENT, wrong, [key])


def test_openssl_makes_the_same_keys_and_signatures(tmp_path: pathlib.Path) -> None:
    def openssl(*arguments: str) -> str:
        return subprocess.run(["openssl", *arguments], cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    openssl("genpkey", "-algorithm", "ed25519", "-out", "key.pem")
    openssl("pkey", "-in", "key.pem", "-pubout", "-out", "key.pem.pub")
    (tmp_path / "generation-1.json").write_bytes(CONTENT)
    openssl("pkeyutl", "-sign", "-rawin", "-inkey", "key.pem", "-in", "generation-1.json", "-out", signature_name(1))
    private = read_private_key((tmp_path / "key.pem").read_bytes())
    public = read_public_key((tmp_path / "key.pem.pub").read_bytes())
    assert (tmp_path / "generation-1.sig").read_bytes() == private.sign(CONTENT)
    assert is_signed(CONTENT, private.sign(CONTENT), [public])


@pytest.mark.parametrize("kind", ["nothing", "public", "private", "another algorithm", "passphrase"])
def test_other_keys_are_refused(kind: str) -> None:
    private, public = new_key()
    elliptic = ec.generate_private_key(ec.SECP256R1())
    passphrase = serialization.BestAvailableEncryption(b"secret")
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    content = {
        "nothing": b"",
        "public": public,
        "private": private,
        "another algorithm": elliptic.private_bytes(pem, pkcs8, serialization.NoEncryption()),
        "passphrase": PrivateKey.generate().private_bytes(pem, pkcs8, passphrase),
    }[kind]
    if kind != "private":
        with pytest.raises(ValueError, match="an ed25519 private key, PEM, without a passphrase"):
            read_private_key(content)
    if kind != "public":
        with pytest.raises(ValueError, match="an ed25519 public key, PEM"):
            read_public_key(content)
