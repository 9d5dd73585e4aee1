"""Entry of munet-server."""

from __future__ import annotations

from munet.start import start


def main() -> None:
    """Runs the command line; says what to install if a package is missing."""
    start("server.cli", "server")
