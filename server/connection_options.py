"""Options of the commands that talk to a server: where it is, certificates and a token. Written once for all of them."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import pathlib
from collections.abc import Callable
from typing import Annotated, Any

import typer

from server.config import check_address_option
from server.credentials import Credentials
from server.errors import SettingsError

TOKEN_VARIABLE = "MUNET_TOKEN"
"""The environment variable that holds a client's token where no file is named."""


@dataclasses.dataclass(frozen=True, slots=True)
class Connection:
    """A server, as options name it.

    Attributes:
        address: HOST:PORT.
        credentials: what it is shown, and what is asked of it.
    """

    address: str
    credentials: Credentials


def asks_server(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options to reach a server's questions; it gets a `Connection` as its first argument."""
    return _connects(command, "--server", "127.0.0.1:8500", "HOST:PORT of the server.")


def asks_admin(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options to reach a server's admin address; it gets a `Connection` as its first argument."""
    return _connects(command, "--admin", "127.0.0.1:8501", "HOST:PORT of the server's admin address.")


def _credentials(
    tls: Annotated[bool, typer.Option("--tls", help="Speak TLS and trust the authorities that gRPC knows.")] = False,
    ca_file: Annotated[
        pathlib.Path | None,
        typer.Option("--ca-file", help="Speak TLS and trust these authorities only (PEM).", show_default=False),
    ] = None,
    certificate_file: Annotated[
        pathlib.Path | None,
        typer.Option("--certificate-file", help="Certificate to show a server that asks for one (PEM).", show_default=False),
    ] = None,
    key_file: Annotated[pathlib.Path | None, typer.Option("--key-file", help="Its key (PEM).", show_default=False)] = None,
    server_name: Annotated[
        str | None,
        typer.Option("--server-name", help="Name in the server's certificate, where it is not the host's.", show_default=False),
    ] = None,
    token_file: Annotated[
        pathlib.Path | None,
        typer.Option("--token-file", help="File with a bearer token.", show_default=f"the variable {TOKEN_VARIABLE}"),
    ] = None,
    plain_text_token: Annotated[
        bool,
        typer.Option("--plain-text-token", help="Let the token cross a network without TLS; a proxy here may speak it."),
    ] = False,
) -> Credentials:
    token = os.environ.get(TOKEN_VARIABLE) or None
    if token_file is not None:
        try:
            token = token_file.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError("--token-file", str(token_file), f"a file with a token ({error})") from error
    return Credentials(tls, ca_file, certificate_file, key_file, server_name, token, plain_text_token)


_CREDENTIAL_OPTIONS = [*inspect.signature(_credentials, eval_str=True).parameters.values()]


def _connects(command: Callable[..., None], option: str, default: str, words: str) -> Callable[..., None]:
    address = inspect.Parameter(
        "address", inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[str, typer.Option(option, help=words)]
    )
    own = [*inspect.signature(command, eval_str=True).parameters.values()][1:]
    options = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in (*own, *_CREDENTIAL_OPTIONS)]

    @functools.wraps(command)
    def connected(**given: Any) -> None:
        named = given.pop("address")
        check_address_option(option, named)
        credentials = _credentials(**{parameter.name: given.pop(parameter.name) for parameter in _CREDENTIAL_OPTIONS})
        command(Connection(named, credentials), **given)

    # Typer reads a command's options from these two.
    signature = inspect.Signature([address, *options])
    connected.__signature__ = signature  # type: ignore[attr-defined]
    connected.__annotations__ = {parameter.name: parameter.annotation for parameter in signature.parameters.values()}
    return connected
