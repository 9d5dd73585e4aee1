"""Settings of a server: one TOML file, frozen, unknown keys refused; flags of the command line override by name."""

from __future__ import annotations

import os
import pathlib
import re
import tomllib
import urllib.parse
from typing import Annotated, Any, Literal

import pydantic

from munet.names import check_task_name
from munet.preprocessing import ImageLimits
from munet.settings import findings, validate
from server.errors import SettingsError

_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):(\d{1,5})")
_SCHEMES = ("dns", "ipv4", "ipv6", "unix", "unix-abstract", "vsock", "xds")
"""What gRPC takes for a kind of address where a host should stand: `unix:8500` would be a socket in a file."""

MIB = 1024 * 1024
MAX_THREADS = 512
"""More than any one machine computes on, and few enough for every machine to start."""

CACHE_BYTES = 512 * 1024
"""What a core of a CPU has for itself in its second-level cache, or near enough: docs/decisions/0007."""


def check_address(address: str) -> str:
    """Returns the address if it is HOST:PORT, with port 0 for any free one.

    Raises:
        ValueError: it is not; the message says what is expected.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None or int(match.group(2)) > 65535 or match.group(1).lower() in _SCHEMES:
        raise ValueError("HOST:PORT such as 127.0.0.1:8500, with port 0 for any free one")
    return address


def check_address_option(option: str, address: str) -> None:
    """Checks an address that a command was given by an option.

    Raises:
        SettingsError: it is not HOST:PORT.
    """
    try:
        check_address(address)
    except ValueError as error:
        raise SettingsError(option, address, str(error)) from error


_BYTE_COUNT = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT]i?B|B)", re.ASCII | re.IGNORECASE)


def parse_byte_count(value: object) -> object:
    """Returns how many bytes a text such as `2GiB` or `500 MB` says; what is no text as it is.

    Raises:
        ValueError: it says no number of bytes; the message says what is expected.
    """
    if isinstance(value, str):
        match = _BYTE_COUNT.fullmatch(value)
        number, unit = match.groups() if match is not None else ("0", "B")
        scale = 1024 if "i" in unit.lower() else 1000
        value = round(float(number) * scale ** "BKMGT".index(unit[0].upper()))
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError("a number of bytes of at least 1, or text such as '2GiB' or '500MB'")
    return value


ByteCount = Annotated[int, pydantic.BeforeValidator(parse_byte_count)]
"""A number of bytes; settings may say it with a unit."""


def check_url(url: str) -> str:
    """Returns the URL if it is one of HTTP with a host.

    Raises:
        ValueError: it is not; the message says what is expected.
    """
    expected = "a URL such as http://127.0.0.1:4318"
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError as error:
        raise ValueError(expected) from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(expected)
    return url


Address = Annotated[str, pydantic.AfterValidator(check_address)]
"""HOST:PORT."""


class _Settings(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)


class Limits(_Settings):
    """What is accepted from a stranger.

    Attributes:
        max_image_bytes: greatest size of one encoded image.
        max_image_pixels: greatest height x width of one image, known before it is decoded.
        max_images: images in one request.
        max_tasks: tasks named in one request.
        max_message_bytes: greatest request or answer.
        max_requests_in_flight: requests that are worked on or wait; more are refused. One task has eight ninths of it at most.
        max_bytes_in_flight: sum of their messages' sizes; more are refused. One task has eight ninths of it at most.
        max_streams: streams that are open; more are refused, unless one of them is idle.
        idle_stream_seconds: a stream that sent no message and took no answer for so long ends as soon as another one wants its place.
        max_stream_messages: messages of one stream that are worked on or whose answers wait to be taken; more are not read.
    """

    max_image_bytes: pydantic.PositiveInt = 16 * MIB
    max_image_pixels: pydantic.PositiveInt = 64 * MIB
    max_images: pydantic.PositiveInt = 64
    max_tasks: pydantic.PositiveInt = 1024
    max_message_bytes: Annotated[int, pydantic.Field(ge=4096, le=2**31 - 1)] = 64 * MIB
    max_requests_in_flight: pydantic.PositiveInt = 2048
    max_bytes_in_flight: pydantic.PositiveInt = 512 * MIB
    max_streams: pydantic.PositiveInt = 256
    idle_stream_seconds: pydantic.PositiveFloat = 60.0
    max_stream_messages: pydantic.PositiveInt = 32

    @property
    def image(self) -> ImageLimits:
        """The limits of one image, as preprocessing takes them."""
        return ImageLimits(self.max_image_bytes, self.max_image_pixels, formats=("JPEG", "PNG", "WEBP", "BMP"))


class TaskLimits(_Settings):
    """What one task may have at most, whoever else is there; what is not given is not limited. See docs/overload.md.

    Attributes:
        max_requests_in_flight: requests to it that are worked on or wait.
        max_images_in_flight: images in these.
        max_images_per_second: images that it takes in the long run; as many as in one second may come at once.
    """

    max_requests_in_flight: pydantic.PositiveInt | None = None
    max_images_in_flight: pydantic.PositiveInt | None = None
    max_images_per_second: pydantic.PositiveFloat | None = None


class ConnectionSettings(_Settings):
    """What is borne from whoever connects, before anything is asked. For each of the two addresses by itself.

    Attributes:
        max_connections: connections open at once; more are closed as they come.
        max_calls: calls open at once on one connection; a client's further calls wait at the client.
        max_metadata_bytes: greatest metadata of a call.
        handshake_seconds: a connection that is not set up by then is closed.
        idle_seconds: a connection without a call for so long is closed; a client opens another when it needs one.
        keepalive_seconds: a connection that is silent for so long is asked whether anybody is there.
        keepalive_timeout_seconds: and closed if nobody says so by then.
    """

    max_connections: Annotated[int, pydantic.Field(ge=1, le=2**31 - 1)] = 4096
    max_calls: Annotated[int, pydantic.Field(ge=1, le=2**31 - 1)] = 1024
    max_metadata_bytes: Annotated[int, pydantic.Field(ge=1024, le=65536)] = 8192
    handshake_seconds: Annotated[float, pydantic.Field(gt=0, le=86400)] = 10.0
    idle_seconds: Annotated[float, pydantic.Field(gt=0, le=86400)] = 600.0
    keepalive_seconds: Annotated[float, pydantic.Field(ge=1, le=86400)] = 60.0
    keepalive_timeout_seconds: Annotated[float, pydantic.Field(gt=0, le=86400)] = 20.0


class TlsSettings(_Settings):
    """Certificates, all PEM. They are read again when the files change; a connection keeps what it began with.

    Attributes:
        certificate_file: the server's certificate, followed by those between it and its authority; with it, both addresses speak TLS.
        key_file: its key, without a passphrase.
        client_ca_file: authorities; whoever asks questions needs a certificate of one of them.
        admin_client_ca_file: the same for whoever administers.
    """

    certificate_file: pathlib.Path | None = None
    key_file: pathlib.Path | None = None
    client_ca_file: pathlib.Path | None = None
    admin_client_ca_file: pathlib.Path | None = None


class TokenSettings(_Settings):
    """Who may call, by bearer token.

    Attributes:
        file: the tokens' hashes and what each may do, see `server.tokens`; with it, nothing but health is answered without a token. It is
            read again when it changes.
        allow_plain_text: whether tokens may cross a network in plain text, as where something before this server speaks TLS.
    """

    file: pathlib.Path | None = None
    allow_plain_text: bool = False


class EngineSettings(_Settings):
    """What computes, and how the embedded engine does. Of a Triton, `max_waiting_rows` and `patience_seconds` count too.

    Attributes:
        kind: `embedded`, in this process, or `triton`, in the Tritons of the table `triton`.
        device: what it computes on: `cpu`, or `cuda` for the first GPU that CUDA shows this process.
        threads: threads that compute one batch, all batches' in one ONNX Runtime pool; 0 means one for each CPU this process may use.
            More than one answers a single large image sooner, but costs throughput, and the pool's threads wait in busy loops.
        workers: batches that run at the same time; 0 means as many as the CPUs this process may use have room for, or two on a GPU,
            one of which is put together while the other computes.
        max_batch_rows: greatest batch, beside each segment's own limit.
        max_batch_bytes: greatest batch by the size of what goes into the segment; one row always goes. 0 means 512 KiB on a CPU, where a
            batch whose hidden states leave the cache of a core costs more time for each image, not less, and no such bound on a GPU.
        measure_batches: whether to choose `max_batch_bytes` on a CPU by a measurement of under a second when the first generation is
            loaded. Without it every start is alike.
        memory_limit_bytes: what segments may take of memory, in bytes or as text such as "2GiB"; others are loaded when a question needs
            them. None means that all of them stay in memory.
        max_waiting_rows: rows times segments that admitted requests may still have to run; more are refused. One task has eight ninths
            of it at most.
        patience_seconds: a row that waits longer goes before younger rows with nearer deadlines.
    """

    kind: Literal["embedded", "triton"] = "embedded"
    device: Literal["cpu", "cuda"] = "cpu"
    threads: Annotated[int, pydantic.Field(ge=0, le=MAX_THREADS)] = 1
    workers: Annotated[int, pydantic.Field(ge=0, le=MAX_THREADS)] = 0
    max_batch_rows: pydantic.PositiveInt = 16
    max_batch_bytes: pydantic.NonNegativeInt = 0
    measure_batches: bool = False
    memory_limit_bytes: ByteCount | None = None
    max_waiting_rows: pydantic.PositiveInt = 65536
    patience_seconds: pydantic.PositiveFloat = 10.0

    @property
    def num_threads(self) -> int:
        """`threads`, with 0 resolved."""
        return self.threads or num_usable_cpus()

    @property
    def num_workers(self) -> int:
        """`workers`, with 0 resolved."""
        return self.workers or (2 if self.device == "cuda" else max(1, num_usable_cpus() // self.num_threads))

    def max_rows(self, row_bytes: int) -> int:
        """Returns how many rows of so many bytes may go into one batch: 1 or more."""
        bound = self.max_batch_bytes or (CACHE_BYTES if self.device == "cpu" else 0)
        return max(1, min(self.max_batch_rows, bound // row_bytes)) if bound else self.max_batch_rows


class TritonSettings(_Settings):
    """How the engine `triton` works.

    Attributes:
        endpoints: HOST:PORT of each Triton's gRPC. All serve the same model repository and start with explicit model control.
        ca_file: certificate of the authority that signed Triton's, PEM; with it, TLS is spoken, else plain text.
        certificate_file: our own certificate, PEM, where Triton asks for one.
        key_file: its key, PEM.
        server_name: the name in Triton's certificate, where it is not the endpoint's host.
        keys_file: lines NAME=VALUE, as in Triton's --grpc-restricted-protocol=PROTOCOLS:NAME=VALUE.
        max_rows_in_flight: rows that one Triton has at a time; more wait here, where late and cancelled ones cost nothing.
        probe_interval_seconds: how often a Triton is looked at, and what has not answered since is asked.
        probe_timeout_seconds: a Triton that answers nothing at all for so long is taken out.
        load_timeout_seconds: what loading one model may take.
        unload_after_seconds: a model that is not needed any more is unloaded when nobody has asked it for so long. Another server of the
            same Triton that is slower than this may still need it.
        start_seconds: at start-up, how long to wait for a first Triton.
        retry_seconds: a generation that was refused is tried again after so long, because a Triton may have been to blame.
        aliases: whether to load each task under its plain name too, for clients that talk to Triton itself.
    """

    endpoints: tuple[Address, ...] = ()
    ca_file: pathlib.Path | None = None
    certificate_file: pathlib.Path | None = None
    key_file: pathlib.Path | None = None
    server_name: str | None = None
    keys_file: pathlib.Path | None = None
    max_rows_in_flight: pydantic.PositiveInt = 256
    probe_interval_seconds: pydantic.PositiveFloat = 1.0
    probe_timeout_seconds: pydantic.PositiveFloat = 5.0
    load_timeout_seconds: pydantic.PositiveFloat = 300.0
    unload_after_seconds: pydantic.NonNegativeFloat = 30.0
    start_seconds: pydantic.NonNegativeFloat = 30.0
    retry_seconds: pydantic.PositiveFloat = 30.0
    aliases: bool = True


class LogSettings(_Settings):
    """What is logged, to standard error.

    Attributes:
        level: `debug`, `info`, `warning` or `error`.
        format: `text`, lines for people, or `json`, one object a line.
        access: whether each call is a line at the level `info`; if not, it is one at `debug`.
    """

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["text", "json"] = "text"
    access: bool = False


class MetricsSettings(_Settings):
    """How much Prometheus is told, where `metrics_listen` is given.

    Attributes:
        max_tasks: so many tasks have series of their own, about 40 each; the first that are asked.
        max_segments: so many segments have, about 60 each; the first that run.
    """

    max_tasks: pydantic.NonNegativeInt = 128
    max_segments: pydantic.NonNegativeInt = 128


class TracingSettings(_Settings):
    """Where traces go. What is not said here is as the variables OTEL_* of OpenTelemetry say; it needs the extra `otel`.

    Attributes:
        otlp_endpoint: base URL of a collector that takes OTLP over HTTP, such as http://127.0.0.1:4318; none means what
            OTEL_EXPORTER_OTLP_ENDPOINT or OTEL_EXPORTER_OTLP_TRACES_ENDPOINT says, and no traces if neither does.
    """

    otlp_endpoint: Annotated[str, pydantic.AfterValidator(check_url)] | None = None


class ServerSettings(_Settings):
    """Everything a server is told.

    Attributes:
        repository: the model repository.
        listen: address of the inference service; port 0 for any free one.
        admin_listen: address of the admin service. Other than on loopback it needs tokens or `tls.admin_client_ca_file`.
        metrics_listen: address of Prometheus metrics over HTTP; none by default.
        decode_threads: threads that decode and resize images; 0 means one for each CPU this process may use.
        watch_interval_seconds: how often CURRENT is looked at.
        drain_seconds: at shutdown, how long requests are still accepted after health says NOT_SERVING, so that load balancers look
            away first.
        grace_seconds: at shutdown, how long requests in flight may take to finish.
        require_signature: files of public keys (ed25519, PEM); with them, only generations that one of them signed are served.
        limits: what is accepted from a stranger.
        task_limits: by name of a task, what that may have at most.
        connections: what is borne from whoever connects.
        tls: certificates.
        tokens: who may call.
        engine: what computes, and how.
        triton: the Tritons, if they are what computes.
        log: what is logged, and how.
        metrics: how much Prometheus is told.
        tracing: where traces go.
    """

    repository: pathlib.Path = pathlib.Path("model_repository")
    listen: Address = "127.0.0.1:8500"
    admin_listen: Address = "127.0.0.1:8501"
    metrics_listen: Address | None = None
    decode_threads: Annotated[int, pydantic.Field(ge=0, le=MAX_THREADS)] = 0
    watch_interval_seconds: pydantic.PositiveFloat = 0.2
    drain_seconds: pydantic.NonNegativeFloat = 0.5
    grace_seconds: pydantic.NonNegativeFloat = 10.0
    require_signature: tuple[pathlib.Path, ...] = ()
    limits: Limits = Limits()
    task_limits: dict[Annotated[str, pydantic.AfterValidator(check_task_name)], TaskLimits] = {}
    connections: ConnectionSettings = ConnectionSettings()
    tls: TlsSettings = TlsSettings()
    tokens: TokenSettings = TokenSettings()
    engine: EngineSettings = EngineSettings()
    triton: TritonSettings = TritonSettings()
    log: LogSettings = LogSettings()
    metrics: MetricsSettings = MetricsSettings()
    tracing: TracingSettings = TracingSettings()

    @property
    def num_decode_threads(self) -> int:
        """`decode_threads`, with 0 resolved."""
        return self.decode_threads or num_usable_cpus()


def num_usable_cpus() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_settings(file: pathlib.Path | None, overrides: dict[str, Any]) -> ServerSettings:
    """Reads settings from a TOML file, with overrides by name.

    Args:
        file: the TOML file; none means the defaults.
        overrides: settings by name; those of a table as `table.name`. Values of None are passed over.

    Raises:
        SettingsError: the file cannot be read, a key is unknown or a value impossible.
    """
    values: dict[str, Any] = {}
    if file is not None:
        try:
            values = tomllib.loads(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise SettingsError(f"settings file {file}", str(error), "a readable TOML file") from error
    for name, value in overrides.items():
        if value is None:
            continue
        table, _, key = name.rpartition(".")
        target = values.setdefault(table, {}) if table else values
        if isinstance(target, dict):
            target[key] = value
    try:
        return validate(ServerSettings, values)
    except pydantic.ValidationError as error:
        raise _to_settings_error(error) from error


def _to_settings_error(error: pydantic.ValidationError) -> SettingsError:
    first = findings(error, ServerSettings)[0]
    if first.kind == "extra_forbidden":
        tables: dict[str, type[_Settings]] = {
            "limits": Limits,
            "task_limits": TaskLimits,
            "connections": ConnectionSettings,
            "tls": TlsSettings,
            "tokens": TokenSettings,
            "engine": EngineSettings,
            "triton": TritonSettings,
            "log": LogSettings,
            "metrics": MetricsSettings,
            "tracing": TracingSettings,
        }
        table = tables.get(first.name.partition(".")[0], ServerSettings)
        return SettingsError(first.name, first.found, f"no such key; the keys here are {', '.join(sorted(table.model_fields))}")
    return SettingsError(first.name, first.found, first.expected)
