"""Signatures of generations: ed25519 over the bytes of generation-<n>.json, which hold the checksum of every other file.

A signature is 64 bytes, alone in generation-<n>.sig. Keys are PEM as `openssl genpkey -algorithm ed25519` makes them.
"""

from __future__ import annotations

from collections.abc import Sequence

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

PublicKey = ed25519.Ed25519PublicKey
PrivateKey = ed25519.Ed25519PrivateKey

SIGNATURE_BYTES = 64


def signature_name(number: int) -> str:
    """Returns the name of the file that holds a generation's signature."""
    return f"generation-{number}.sig"


def new_key() -> tuple[bytes, bytes]:
    """Returns a new private key and its public key, both PEM."""
    private = PrivateKey.generate()
    secret = private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    public = private.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return secret, public


def read_private_key(content: bytes) -> PrivateKey:
    """Returns a private key.

    Args:
        content: PEM.

    Raises:
        ValueError: it is none; the message says what is expected, and nothing of what was found.
    """
    try:
        key = serialization.load_pem_private_key(content, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if isinstance(key, PrivateKey):
        return key
    raise ValueError("an ed25519 private key, PEM, without a passphrase")


def read_public_key(content: bytes) -> PublicKey:
    """Returns a public key.

    Args:
        content: PEM.

    Raises:
        ValueError: it is none; the message says what is expected.
    """
    try:
        key = serialization.load_pem_public_key(content)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if isinstance(key, PublicKey):
        return key
    raise ValueError("an ed25519 public key, PEM")


def is_signed(content: bytes, signature: bytes, keys: Sequence[PublicKey]) -> bool:
    """Whether one of some keys signed a generation's file.

    Args:
        content: the file's bytes.
        signature: what is in the file beside it.
        keys: whoever may have signed it.
    """
    for key in keys:
        try:
            key.verify(signature, content)
        except InvalidSignature:
            continue
        return True
    return False
