"""Stores that machines share: an S3-compatible server, and a proxy before it that is not always there."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import logging
import os
import pathlib
import random
import threading
from collections.abc import Iterator

import pytest
from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
BUCKET = "systems"
_SKEWED = (
    b"<Error><Code>RequestTimeTooSkewed</Code>"
    b"<Message>The difference between the request time and the current time is too large.</Message></Error>"
)
_REFUSALS = {"busy": (503, b""), "skewed": (403, _SKEWED)}


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """Runs a server with one empty bucket and gives its address."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    connection = http.client.HTTPConnection(host, port)
    try:
        # Its objects are the process's, not the server's: an earlier one's would still be there.
        connection.request("POST", "/moto-api/reset")
        assert connection.getresponse().read() is not None
        connection.request(
            "PUT", f"/{BUCKET}", headers={"Authorization": "AWS4-HMAC-SHA256 Credential=test/20200101/us-east-1/s3"}
        )
        assert connection.getresponse().read() is not None
        yield f"http://{host}:{port}"
    finally:
        connection.close()
        server.stop()


@contextlib.contextmanager
def machine(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """What is opened meanwhile is opened as by a machine of its own, with its working copies in this folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MUNET_CACHE", str(folder))
        yield folder


class Faults:
    """What a proxy does to requests.

    Attributes:
        is_down: all are refused.
        share: of requests that fail: before they reach the store, or after it has acted on them, unknown to who asked.
        is_skewed: all are answered as S3 answers a machine whose clock is off.
        seconds: each for a layer is held up so long.
        num_failed: so far.
        asked: method and path of each so far.
    """

    def __init__(self) -> None:
        self.is_down = False
        self.share = 0.0
        self.is_skewed = False
        self.seconds = 0.0
        self.num_failed = 0
        self.asked: list[tuple[str, str]] = []
        self.draws = random.Random(0)
        self.lock = threading.Lock()

    def draw(self) -> str:
        with self.lock:
            fate = "refused" if self.is_down else "skewed" if self.is_skewed else "passed"
            if fate == "passed" and self.draws.random() < self.share:
                fate = self.draws.choice(["refused", "busy", "cut", "lost"])
            self.num_failed += fate != "passed"
            return fate

    def hold_up(self, method: str, path: str) -> None:
        self.asked.append((method, path))
        if "/layers/" in path:
            # Not by sleeping, which tests have taken over.
            threading.Event().wait(self.seconds)


@contextlib.contextmanager
def flaky_proxy(address: str) -> Iterator[tuple[str, Faults]]:
    """Runs a proxy before a server and gives its address, and what makes requests fail."""
    faults = Faults()
    host = address.removeprefix("http://")

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _pass_on(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.close_connection = True
            fate = faults.draw()
            faults.hold_up(self.command, self.path)
            if fate == "refused":
                return
            if fate in _REFUSALS:
                status, body = _REFUSALS[fate]
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body if self.command != "HEAD" else b"")
                return
            connection = http.client.HTTPConnection(host, timeout=30)
            headers = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            data = answer.read()
            connection.close()
            if fate == "lost":
                return
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("connection", "transfer-encoding", "content-length", "date", "server"):
                    self.send_header(name, value)
            length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
            self.send_header("Content-Length", length or "0")
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if fate == "cut" else data)

        def log_message(self, *_: object) -> None:
            pass

    for method in ("GET", "PUT", "POST", "HEAD", "DELETE"):
        setattr(Handler, f"do_{method}", Handler._pass_on)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", faults
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def use_s3(patch: pytest.MonkeyPatch, address: str) -> None:
    """Has this process and those that it starts ask this server."""
    for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": address}.items():
        patch.setenv(name, value)
    for name in [name for name in os.environ if name.lower() in ("http_proxy", "https_proxy", "all_proxy")]:
        patch.delenv(name)
    # It remembers what it was asked for, not what the environment was.
    S3FileSystem.clear_instance_cache()
