"""A plain grpc.aio server on uvloop: one method that takes bytes and answers bytes, always the same ones, with nothing in between.

python -m benchmarks.serve.echo_server METHOD ANSWER_BYTES
"""

from __future__ import annotations

import asyncio
import signal
import sys
from typing import Any

import grpc
import grpc.aio
import uvloop


async def serve(method: str, answer: bytes) -> None:
    """Serves until SIGTERM."""

    async def behaviour(_: bytes, __: Any) -> bytes:
        return answer

    service, _, name = method.lstrip("/").partition("/")
    server = grpc.aio.server()
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(service, {name: grpc.unary_unary_rpc_method_handler(behaviour)}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    print(f"127.0.0.1:{port}", flush=True)
    await stop.wait()
    await server.stop(None)


if __name__ == "__main__":
    uvloop.run(serve(sys.argv[1], b"\0" * int(sys.argv[2])))
