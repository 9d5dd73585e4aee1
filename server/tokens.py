"""Bearer tokens: who may call, by the hashes in a file.

    [tokens]
    dashboard = { role = "read", sha256 = "9f86d081884c7d65..." }
    shop = { role = "infer", sha256 = "60303ae22b998861...", tasks = ["pets", "flowers-*"] }

A token is 256 random bits, so its SHA-256 says nothing about it, and guessing is hopeless at any speed: what slows down guessing of
passwords (scrypt, argon2) would slow down every call and protect nothing. docs/decisions/0022 has the reasons.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import hmac
import logging
import pathlib
import re
import secrets
import tomllib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from munet.files import write_atomically
from server.access import Grant, Role
from server.errors import SettingsError

_log = logging.getLogger(__name__)

PREFIX = "munet_"
"""What every token begins with, so that scanners for secrets find one that went astray."""

MAX_TOKEN_CHARACTERS = 256
_MAX_FILE_BYTES = 16 * 1024 * 1024
_ROLES = {"read": Role.READ, "infer": Role.INFER, "admin": Role.ADMIN}
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PATTERN = re.compile(r"[a-z0-9_*?-]{1,64}")
_HEADER = "[tokens]\n"


def new_token() -> str:
    """Returns a token that nobody has: 256 random bits."""
    return PREFIX + secrets.token_urlsafe(32)


def hash_of(token: str) -> str:
    """Returns what the file keeps of a token: its SHA-256 in hex."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def line_of(name: str, role: str, token: str, tasks: Sequence[str] = ()) -> str:
    """Returns a token's line in the file.

    Args:
        name: what people call it.
        role: `read`, `infer` or `admin`.
        token: the token; only its hash goes into the line.
        tasks: names or patterns of the tasks that it is for; none means all.

    Raises:
        SettingsError: one of them cannot be.
    """
    listed = f", tasks = [{', '.join(f'{chr(34)}{task}{chr(34)}' for task in tasks)}]" if tasks else ""
    if not _NAME.fullmatch(name):
        raise SettingsError("--name", name, "1 to 64 of letters, digits, - and _")
    entry = {"role": role, "sha256": hash_of(token)} | ({"tasks": list(tasks)} if tasks else {})
    _to_grant(name, entry)
    return f'{name} = {{ role = "{role}", sha256 = "{hash_of(token)}"{listed} }}\n'


def add_line(file: pathlib.Path, line: str) -> None:
    """Adds a line to a file of tokens, which is made if missing; nobody ever sees half of it.

    Raises:
        SettingsError: the file cannot be read or written, or is no file of tokens with this line in it.
    """
    try:
        before = file.read_text(encoding="utf-8") if file.exists() else _HEADER
        after = before + ("" if before.endswith("\n") else "\n") + line
        Tokens.parse(after, str(file))
        write_atomically(file.resolve(), after.encode())
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError("--add-to", str(file), f"a file of tokens that can be written ({error})") from error


class Tokens:
    """The tokens that are valid, as of one reading of their file. Never changes.

    Args:
        grants: what each may do, by its SHA-256 in hex.
    """

    def __init__(self, grants: Mapping[str, Grant]) -> None:
        # Found by a keyed hash of its own: how long the look takes says nothing to whoever does not know the key.
        self._key = secrets.token_bytes(32)
        self._entries = {self._tag(digest): (digest, grant) for digest, grant in grants.items()}

    @classmethod
    def parse(cls, text: str, where: str) -> Tokens:
        """Returns the tokens of a file.

        Args:
            text: what is in it.
            where: what it is called, for errors.

        Raises:
            SettingsError: it is no file of tokens.
        """
        try:
            document = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise SettingsError(where, str(error), "a TOML file of tokens, each name once") from error
        if set(document) != {"tokens"} or not isinstance(document["tokens"], dict):
            raise SettingsError(where, sorted(document), "one table, [tokens]; `munet-server token new` writes its lines")
        grants: dict[str, Grant] = {}
        for name, entry in document["tokens"].items():
            digest, grant = _to_grant(f"{where}: {name}", entry)
            if digest in grants:
                raise SettingsError(f"{where}: {name}", "a token that stands there under another name", "each token once")
            grants[digest] = grant
        return cls(grants)

    def find(self, token: str) -> Grant | None:
        """Returns what a token may do; None if it is not valid."""
        if len(token) > MAX_TOKEN_CHARACTERS:
            return None
        digest = hash_of(token)
        found = self._entries.get(self._tag(digest))
        return found[1] if found is not None and hmac.compare_digest(found[0], digest) else None

    def __len__(self) -> int:
        return len(self._entries)

    def _tag(self, digest: str) -> bytes:
        return hashlib.blake2b(digest.encode(), key=self._key, digest_size=32).digest()


@dataclasses.dataclass(frozen=True, slots=True)
class _State:
    """How a file looked when it was read."""

    modified_ns: int
    inode: int
    num_bytes: int


class TokenFile:
    """The tokens of a file, read again when it changes.

    A file that was changed and cannot be read leaves the tokens that were read before; the log says so once, and `on_read`.

    Args:
        file: where they are.
        on_read: called after each further reading, with whether it was whole.

    Attributes:
        tokens: those that are valid now.

    Raises:
        SettingsError: the file cannot be read or is no file of tokens.
    """

    def __init__(self, file: pathlib.Path, on_read: Callable[[bool], None] = lambda _: None) -> None:
        self._file = file
        self._on_read = on_read
        self._seen = self._state()
        self.tokens = self._read()

    def refresh(self) -> None:
        """Reads the file again if it has changed."""
        state = self._state()
        if state == self._seen:
            return
        self._seen = state
        try:
            self.tokens = self._read()
        except SettingsError as error:
            _log.error("the tokens read before go on, %d of them: %s", len(self.tokens), error)
            self._on_read(False)
        else:
            _log.info("%d tokens are valid from now on", len(self.tokens))
            self._on_read(True)

    async def watch(self, interval_seconds: float) -> None:
        """Reads the file again whenever it changes, until it is cancelled."""
        while True:
            await asyncio.sleep(interval_seconds)
            try:
                await asyncio.to_thread(self.refresh)
            except Exception:
                # The edge of the task: without it no change would ever be noticed again.
                _log.exception("watching %s failed", self._file)

    def _read(self) -> Tokens:
        try:
            with self._file.open("rb") as stream:
                text = stream.read(_MAX_FILE_BYTES).decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError("tokens.file", str(self._file), f"a readable file of tokens ({error})") from error
        return Tokens.parse(text, str(self._file))

    def _state(self) -> _State | None:
        try:
            stat = self._file.stat()
        except OSError:
            return None
        return _State(stat.st_mtime_ns, stat.st_ino, stat.st_size)


def _to_grant(where: str, entry: Any) -> tuple[str, Grant]:
    """Returns a token's hash and what it may do.

    Raises:
        SettingsError: the entry is none. What stands where the hash should is not shown: it may be the token itself.
    """
    expected = '{ role = "...", sha256 = "..." }, and tasks = ["..."] if it is for some only'
    if not isinstance(entry, dict) or not {"role", "sha256"} <= entry.keys() <= {"role", "sha256", "tasks"}:
        raise SettingsError(where, sorted(entry) if isinstance(entry, dict) else type(entry).__name__, expected)
    role = _ROLES.get(entry["role"]) if isinstance(entry["role"], str) else None
    if role is None:
        raise SettingsError(f"{where}: role", entry["role"], f"one of {', '.join(_ROLES)}")
    digest = entry["sha256"]
    if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
        raise SettingsError(
            f"{where}: sha256", "something else", "64 hex digits, the SHA-256 of the token and not the token itself"
        )
    if "tasks" not in entry:
        return digest, Grant(role)
    tasks = entry["tasks"]
    if role is Role.ADMIN:
        raise SettingsError(f"{where}: tasks", tasks, "none for the role admin, which sees every task")
    if not isinstance(tasks, list) or not all(isinstance(task, str) and _PATTERN.fullmatch(task) for task in tasks):
        raise SettingsError(f"{where}: tasks", tasks, "a list of names of tasks, or patterns of a-z 0-9 - _ with * and ?")
    return digest, Grant(role, tuple(tasks))
