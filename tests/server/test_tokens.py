"""Tokens and their file."""

from __future__ import annotations

import asyncio
import hashlib
import pathlib
import tomllib

import pytest

from server.access import Grant, Role
from server.errors import SettingsError
from server.tokens import MAX_TOKEN_CHARACTERS, PREFIX, TokenFile, Tokens, add_line, hash_of, line_of, new_token
from tests.support.reloading import until

TOKEN = new_token()
HASH = hash_of(TOKEN)


def parse(text: str) -> Tokens:
    return Tokens.parse(text, "tokens.toml")


def test_a_token_has_256_random_bits() -> None:
    assert TOKEN.startswith(PREFIX)
    assert len(TOKEN) == len(PREFIX) + 43
    assert len({new_token() for _ in range(1000)}) == 1000


def test_a_file_holds_hashes_only_and_says_what_each_token_may_do() -> None:
    other = new_token()
    text = "[tokens]\n" + line_of("shop", "infer", TOKEN, ("pets", "flower-*")) + line_of("ops", "admin", other)
    assert TOKEN not in text
    assert hashlib.sha256(TOKEN.encode()).hexdigest() in text
    tokens = parse(text)
    assert len(tokens) == 2
    assert tokens.find(TOKEN) == Grant(Role.INFER, ("pets", "flower-*"))
    assert tokens.find(other) == Grant(Role.ADMIN)
    for stranger in ("", PREFIX, TOKEN[:-1], TOKEN + "a", TOKEN.upper(), HASH, new_token(), "\udcff", "x" * 10_000_000):
        assert tokens.find(stranger) is None


def test_what_is_longer_than_any_token_is_not_even_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    long = "x" * (MAX_TOKEN_CHARACTERS + 1)
    assert parse(f'[tokens]\na = {{ role = "read", sha256 = "{hash_of(long)}" }}').find(long) is None


def test_patterns_of_tasks() -> None:
    grant = Grant(Role.READ, ("pets", "flower-?", "b*"))
    assert [name for name in ("pets", "pets2", "flower-1", "flower-12", "b", "birds", "a") if grant.sees(name)] == [
        "pets",
        "flower-1",
        "b",
        "birds",
    ]
    assert not Grant(Role.READ, ()).sees("pets")
    assert Grant(Role.READ).sees("pets")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "expected one table, [tokens]"),
        ("tokens = 3", "expected one table, [tokens]"),
        ("[tokens]\n[more]", "expected one table, [tokens]"),
        (f'shop = {{ role = "read", sha256 = "{HASH}" }}', "expected one table, [tokens]"),
        ("[tokens", "expected a TOML file of tokens"),
        ("[tokens]\na = 3", "tokens.toml: a: found 'int', expected { role"),
        ('[tokens]\na = { role = "read" }', "a: found ['role'], expected { role"),
        (f'[tokens]\na = {{ role = "read", sha256 = "{HASH}", task = ["a"] }}', "a: found ['role', 'sha256', 'task']"),
        (f'[tokens]\na = {{ role = "root", sha256 = "{HASH}" }}', "a: role: found 'root', expected one of read, infer, admin"),
        (f'[tokens]\na = {{ role = ["read"], sha256 = "{HASH}" }}', "a: role: found ['read']"),
        (f'[tokens]\na = {{ role = "read", sha256 = "{HASH[:-1]}" }}', "a: sha256: found 'something else', expected 64 hex"),
        (f'[tokens]\na = {{ role = "read", sha256 = "{HASH}", tasks = "pets" }}', "a: tasks: found 'pets', expected a list"),
        (f'[tokens]\na = {{ role = "read", sha256 = "{HASH}", tasks = ["[a]"] }}', "a: tasks: found ['[a]']"),
        (f'[tokens]\na = {{ role = "admin", sha256 = "{HASH}", tasks = ["a"] }}', "expected none for the role admin"),
        (f'[tokens]\na = {{ role = "read", sha256 = "{HASH}" }}\na = {{}}', "expected a TOML file of tokens, each name once"),
        (
            f'[tokens]\na = {{ role = "read", sha256 = "{HASH}" }}\nb = {{ role = "admin", sha256 = "{HASH}" }}',
            "b: found 'a token that stands there under another name'",
        ),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused(text: str, words: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse(text)
    assert words in str(caught.value)


def test_a_token_where_its_hash_should_be_is_not_told_to_the_log() -> None:
    with pytest.raises(SettingsError) as caught:
        parse(f'[tokens]\na = {{ role = "read", sha256 = "{TOKEN}" }}')
    assert TOKEN not in str(caught.value)


def test_a_changed_file_is_read_again_and_a_broken_one_leaves_the_old(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "tokens.toml"
    add_line(file, line_of("a", "read", TOKEN))
    outcomes: list[bool] = []
    held = TokenFile(file, outcomes.append)
    held.refresh()
    assert outcomes == []
    second = new_token()
    add_line(file, line_of("b", "infer", second))
    held.refresh()
    assert held.tokens.find(second) == Grant(Role.INFER)
    whole = file.read_text()
    for damage in (whole + "c = 3\n", "", "[tokens"):
        file.write_text(damage)
        held.refresh()
        held.refresh()
        assert held.tokens.find(TOKEN) == Grant(Role.READ)
    file.unlink()
    held.refresh()
    assert held.tokens.find(second) == Grant(Role.INFER)
    assert outcomes == [True, False, False, False, False]
    assert caplog.text.count("the tokens read before go on, 2 of them") == 4
    # Revoked one by one, or all at once.
    file.write_text("[tokens]\n" + whole.splitlines()[1] + "\n")
    held.refresh()
    assert (held.tokens.find(TOKEN), held.tokens.find(second)) == (Grant(Role.READ), None)
    file.write_text("[tokens]\n")
    held.refresh()
    assert held.tokens.find(TOKEN) is None


def test_the_watch_outlives_whatever_goes_wrong(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "tokens.toml"
    add_line(file, line_of("a", "read", TOKEN))

    def fail(_: bool) -> None:
        raise KeyError("bug")

    async def watch() -> None:
        held = TokenFile(file, fail)
        task = asyncio.create_task(held.watch(0.01))
        for text, grant in (("[tokens]\n", None), ("[tokens]\n" + line_of("a", "infer", TOKEN), Grant(Role.INFER))):
            file.write_text(text)
            await until(lambda: held.tokens.find(TOKEN) == grant)  # noqa: B023  # called at once
        task.cancel()

    asyncio.run(watch())
    assert "watching" in caplog.text


def test_a_line_is_added_whole_or_not_at_all(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "tokens.toml"
    add_line(file, line_of("a", "read", TOKEN))
    before = file.read_text()
    with pytest.raises(SettingsError, match="each name once"):
        add_line(file, line_of("a", "read", new_token()))
    with pytest.raises(SettingsError, match="under another name"):
        add_line(file, line_of("b", "read", TOKEN))
    assert file.read_text() == before
    # A file that somebody ended without a line break.
    file.write_text(before.rstrip())
    add_line(file, line_of("b", "read", new_token()))
    assert sorted(tomllib.loads(file.read_text())["tokens"]) == ["a", "b"]
    with pytest.raises(SettingsError, match="--add-to"):
        add_line(tmp_path, line_of("c", "read", new_token()))


@pytest.mark.parametrize(
    ("name", "role", "tasks", "words"),
    [
        ("a b", "read", (), "--name: found 'a b'"),
        ('a"\n[more]', "read", (), "--name: found"),
        ("a", "root", (), "role: found 'root'"),
        ("a", "admin", ("pets",), "expected none for the role admin"),
        ("a", "read", ('pets"]',), "tasks: found"),
    ],
)
def test_a_line_that_cannot_be(name: str, role: str, tasks: tuple[str, ...], words: str) -> None:
    with pytest.raises(SettingsError) as caught:
        line_of(name, role, TOKEN, tasks)
    assert words in str(caught.value)
