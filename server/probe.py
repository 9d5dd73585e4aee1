"""Asks a server how it is, for health checks of containers: exit status 0 if it serves, 1 if not. Loads gRPC and nothing else.

Usage: python -m server.probe HOST:PORT [--task NAME] [--live] [--timeout SECONDS] [--ca-file FILE] [--server-name NAME]
           [--certificate-file FILE --key-file FILE]
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Sequence

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc


def probe(arguments: Sequence[str]) -> str:
    """Asks a server.

    Args:
        arguments: of the command line.

    Returns:
        What is wrong with it; empty if nothing is.
    """
    told = _parser().parse_args(arguments)
    files = [file.read_bytes() if file is not None else None for file in (told.ca_file, told.key_file, told.certificate_file)]
    options = [("grpc.ssl_target_name_override", told.server_name)] if told.server_name else []
    if any(files):
        channel = grpc.secure_channel(told.server, grpc.ssl_channel_credentials(*files), options)
    else:
        channel = grpc.insecure_channel(told.server, options)
    with channel:
        try:
            request = health_pb2.HealthCheckRequest(service=told.task)
            answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=told.timeout)
        except grpc.RpcError as error:
            return f"found no health at {told.server}: {error.code().name} {error.details()}; expected it to serve"
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    return "" if told.live or status == "SERVING" else f"found {told.server} {status}; expected it to serve"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m server.probe", description="Exit status 0 if a server serves, 1 if not.")
    parser.add_argument("server", metavar="HOST:PORT")
    parser.add_argument("--task", default="", help="ask about this task")
    parser.add_argument("--live", action="store_true", help="any answer will do, also that it does not serve (now)")
    parser.add_argument("--timeout", type=float, default=3.0, metavar="SECONDS")
    parser.add_argument("--server-name", default="", metavar="NAME", help="in the server's certificate")
    for option, words in (
        ("--ca-file", "authorities of the server (PEM); with them TLS is spoken"),
        ("--certificate-file", "our certificate (PEM), where the server asks for one"),
        ("--key-file", "its key (PEM)"),
    ):
        parser.add_argument(option, type=pathlib.Path, metavar="FILE", help=words)
    return parser


def main() -> None:
    """Asks, says what is wrong on standard error, and ends."""
    try:
        wrong = probe(sys.argv[1:])
    except OSError as error:
        wrong = str(error)
    if wrong:
        sys.stderr.write(f"{wrong}\n")
        sys.exit(1)


if __name__ == "__main__":
    main()
