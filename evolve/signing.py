"""Keys that sign generations, as files."""

from __future__ import annotations

import os
import pathlib

from evolve.errors import SettingsError
from munet.files import write_atomically
from munet.signatures import PrivateKey, new_key, read_private_key


def read_signing_key(file: pathlib.Path) -> PrivateKey:
    """Returns the private key in a file.

    Raises:
        SettingsError: it cannot be read, or holds no ed25519 key.
    """
    try:
        return read_private_key(file.read_bytes())
    except OSError as error:
        raise SettingsError(
            f"found no readable key in {file} ({error.strerror or error})", "an ed25519 private key, PEM"
        ) from error
    except ValueError as error:
        raise SettingsError(f"found something else in {file}", str(error), "`munet-evolve key new` makes one") from error


def write_new_key(file: pathlib.Path) -> pathlib.Path:
    """Writes a new private key, which nobody but its owner may read, and its public key beside it.

    Args:
        file: for the private key; the public key's has `.pub` added.

    Returns:
        The public key's file.

    Raises:
        SettingsError: one of the files is there already, or cannot be written.
    """
    public_file = file.with_name(f"{file.name}.pub")
    private, public = new_key()
    try:
        if public_file.exists():
            raise FileExistsError(0, "it is there already", str(public_file))
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
            stream.write(private)
            stream.flush()
            os.fsync(stream.fileno())
        write_atomically(public_file, public)
    except OSError as error:
        raise SettingsError(
            f"could not write {error.filename or file} ({error.strerror or error})", "a new file in a folder that can be written"
        ) from error
    return public_file
