"""HTTP/2 by hand: for clients that do what no client of gRPC does.

    python -m tests.support.http2 HOST:PORT COUNT

opens so many connections that are no use to anybody, says so, and keeps them open until its standard input ends.
"""

from __future__ import annotations

import resource
import socket
import struct
import sys

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, SETTINGS, PING, GOAWAY = 0, 1, 4, 6, 7


def frame(kind: int, content: bytes = b"", flags: int = 0, stream: int = 0) -> bytes:
    """Returns a frame; one of no stream belongs to the connection."""
    return struct.pack(">I", len(content))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + content


def settings(window_bytes: int = 65535) -> bytes:
    """Returns a client's settings: how many bytes of each answer it takes before it asks for more."""
    return frame(SETTINGS, struct.pack(">HI", 4, window_bytes))


def call(method: str, message: bytes, stream: int = 1, missing_bytes: int = 0) -> bytes:
    """Returns a call of gRPC, whole or without the last bytes of its message.

    Args:
        method: as gRPC calls it, `/package.Service/Method`.
        message: what is sent.
        stream: an odd number, greater than that of the call before.
        missing_bytes: how much longer the message is said to be.
    """
    fields = {
        ":method": "POST",
        ":scheme": "http",
        ":path": method,
        ":authority": "localhost",
        "content-type": "application/grpc",
        "te": "trailers",
    }
    # Literal fields without indexing; each string shorter than 127 bytes.
    block = b"".join(
        b"\x00" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode() for name, value in fields.items()
    )
    content = b"\x00" + struct.pack(">I", len(message) + missing_bytes) + message
    end_headers, end_stream = 4, 0 if missing_bytes else 1
    return frame(HEADERS, block, end_headers, stream) + frame(DATA, content, end_stream, stream)


def connect(address: str) -> socket.socket:
    """Returns a connection."""
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=10)


def half_open(address: str, index: int) -> socket.socket:
    """Returns a connection that is never of use: silent, or half set up, or set up and silent, or with half a call."""
    connection = connect(address)
    half_a_call = call("/munet.v1.InferenceService/Classify", b"\x0a\x06digits", missing_bytes=1000)
    set_up = PREFACE + settings() + frame(SETTINGS, flags=1)
    connection.sendall([b"", set_up, PREFACE[:10], set_up + half_a_call][index % 4])
    return connection


def main() -> None:
    address, count = sys.argv[1], int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    connections = [half_open(address, index) for index in range(count)]
    print(len(connections), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
