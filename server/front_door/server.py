"""The gRPC servers: questions on one address, administration on another, health and reflection on both."""

from __future__ import annotations

import asyncio
import logging

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from tritonclient.grpc import service_pb2_grpc

from munet.v1 import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc
from server.config import ServerSettings
from server.errors import SettingsError
from server.front_door.doorkeeper import Doorkeeper
from server.front_door.draining import Draining
from server.front_door.edge import Edge
from server.front_door.health import Health
from server.front_door.open_inference import OPEN_INFERENCE_SERVICE, OpenInferenceServicer
from server.front_door.others import OthersServices
from server.front_door.servicers import AdminServicer, InferenceServicer
from server.front_door.tls import Certificates

_log = logging.getLogger(__name__)

MOST_PENDING_CALLS = 2900
"""Calls that may have come without Python having taken them; beyond, gRPC refuses some at random, and from 3,000 on all."""

INFERENCE_SERVICE = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name
QUESTION_SERVICES = (INFERENCE_SERVICE, OPEN_INFERENCE_SERVICE)
ADMIN_SERVICE = admin_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name
HEALTH_SERVICE = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name


class FrontDoor:
    """Listens, answers, and stops gracefully. For one event loop.

    Args:
        settings: addresses, limits, times.
        inference: answers questions.
        open_inference: the same in the Open Inference Protocol.
        admin: answers whoever operates the server.
        health: says what serves.
        edge: what every call passes.
        draining: takes it all out of service.
        doorkeeper: who asks every call for its token first; none lets everybody in.
        certificates: of the two addresses, questions first; none of either means plain text.
    """

    def __init__(
        self,
        settings: ServerSettings,
        inference: InferenceServicer,
        open_inference: OpenInferenceServicer,
        admin: AdminServicer,
        health: Health,
        edge: Edge,
        draining: Draining,
        doorkeeper: Doorkeeper | None = None,
        certificates: tuple[Certificates | None, Certificates | None] = (None, None),
    ) -> None:
        self._settings = settings
        self._inference = inference
        self._open_inference = open_inference
        self._admin = admin
        self._health = health
        self._edge = edge
        self._draining = draining
        self._doorkeeper = doorkeeper
        self._certificates = certificates
        self._servers: list[grpc.aio.Server] = []
        self.address = ""
        self.admin_address = ""

    async def start(self) -> None:
        """Listens on both addresses; `address` and `admin_address` are then the real ones.

        Raises:
            SettingsError: an address cannot be listened on; nothing is left listening.
        """
        questions = self._new_server()
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(self._inference, questions)  # type: ignore[no-untyped-call]
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self._open_inference, questions)
        administration = self._new_server()
        admin_pb2_grpc.add_AdminServiceServicer_to_server(self._admin, administration)  # type: ignore[no-untyped-call]
        for server, services in ((questions, QUESTION_SERVICES), (administration, (ADMIN_SERVICE,))):
            health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
            reflection.enable_server_reflection((*services, HEALTH_SERVICE, reflection.SERVICE_NAME), server)
        self._servers = [questions, administration]
        try:
            self.address = _bind(questions, "listen", self._settings.listen, self._certificates[0])
            self.admin_address = _bind(administration, "admin_listen", self._settings.admin_listen, self._certificates[1])
        except SettingsError:
            await asyncio.gather(*(server.stop(None) for server in self._servers))
            raise
        for server in self._servers:
            await server.start()

    async def stop(self, grace_seconds: float) -> None:
        """Stops: health says so, then no new requests, then those in flight finish or are cancelled.

        Args:
            grace_seconds: for requests in flight.
        """
        # Calls and messages on open connections are refused in words from here on; gRPC refuses new connections itself.
        await self._draining.shut_down()
        await asyncio.gather(*(server.stop(grace_seconds) for server in self._servers))

    def _new_server(self) -> grpc.aio.Server:
        size = self._settings.limits.max_message_bytes
        bounds = self._settings.connections
        options: list[tuple[str, int]] = [
            ("grpc.max_receive_message_length", size),
            ("grpc.max_send_message_length", size),
            # Of metadata near the first of these two bounds gRPC refuses some at random.
            ("grpc.max_metadata_size", bounds.max_metadata_bytes),
            ("grpc.absolute_max_metadata_size", bounds.max_metadata_bytes),
            ("grpc.max_allowed_incoming_connections", bounds.max_connections),
            ("grpc.max_concurrent_streams", bounds.max_calls),
            # Both would refuse calls at random that are within all bounds: docs/decisions/0031.
            ("grpc.http.overload_protection", 0),
            ("grpc.server.max_pending_requests", MOST_PENDING_CALLS),
            ("grpc.server_handshake_timeout_ms", _milliseconds(bounds.handshake_seconds)),
            ("grpc.max_connection_idle_ms", _milliseconds(bounds.idle_seconds)),
            ("grpc.keepalive_time_ms", _milliseconds(bounds.keepalive_seconds)),
            ("grpc.keepalive_timeout_ms", _milliseconds(bounds.keepalive_timeout_seconds)),
            # Without it gRPC waits a minute for the answer, whatever the line above says.
            ("grpc.http2.ping_timeout_ms", _milliseconds(bounds.keepalive_timeout_seconds)),
            ("grpc.keepalive_permit_without_calls", 1),
            # Otherwise a second server on the same port would silently get half of the first one's calls.
            ("grpc.so_reuseport", 0),
        ]
        asked = [self._edge, OthersServices(HEALTH_SERVICE, reflection.SERVICE_NAME)]
        return grpc.aio.server(interceptors=asked if self._doorkeeper is None else [self._doorkeeper, *asked], options=options)


def _bind(server: grpc.aio.Server, setting: str, address: str, certificates: Certificates | None) -> str:
    try:
        tls = certificates.credentials if certificates is not None else None
        port = server.add_insecure_port(address) if tls is None else server.add_secure_port(address, tls)
    except RuntimeError as error:
        raise SettingsError(setting, address, f"an address to listen on that nobody else uses ({error})") from error
    if port == 0:
        raise SettingsError(setting, address, "an address to listen on that nobody else uses")
    return f"{address.rpartition(':')[0]}:{port}"


def _milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1000))
