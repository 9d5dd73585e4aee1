"""Who may make which call, over real channels."""

from __future__ import annotations

import asyncio
import pathlib
import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
import grpc.aio
import pytest
import tritonclient.grpc as grpcclient
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException

import server.front_door.server as front_door
from munet.v1 import admin_pb2, inference_pb2
from server.access import EVERYTHING, Role, current_grant
from server.client import AdminClient, AsyncClient, Client, Credentials, StreamQuestion
from server.config import Limits, TokenSettings
from server.errors import CallDeniedError, SettingsError, TaskNotFoundError
from server.front_door.doorkeeper import ROLE_OF_METHOD
from server.tokens import add_line, line_of, new_token
from tests.support.repository import TASKS, RepositoryBuilder, random_images
from tests.support.serving import Brake, ServerThread, serving, wait_until

IMAGE = random_images(1, 8)[0]
READ, INFER, ADMIN, FEW, NONE = (new_token() for _ in range(5))
UNKNOWN_WORDS = (
    "authorization: found no token that is valid here, expected metadata `authorization: Bearer TOKEN`; "
    "ask whoever operates this server for one"
)
SMALL_WORDS = (
    "authorization: found a token whose role does not allow this call, expected one that does; "
    "ask whoever operates this server for one"
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("repository")
    RepositoryBuilder(root).publish()
    return root


@pytest.fixture(scope="module")
def token_file(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    file = tmp_path_factory.mktemp("tokens") / "tokens.toml"
    write(file)
    return file


def write(file: pathlib.Path) -> None:
    file.unlink(missing_ok=True)
    for line in (
        line_of("read", "read", READ),
        line_of("infer", "infer", INFER),
        line_of("admin", "admin", ADMIN),
        line_of("few", "infer", FEW, ("digits", "h*")),
        line_of("none", "infer", NONE, ("nobody",)),
    ):
        add_line(file, line)


@pytest.fixture(scope="module")
def server(root: pathlib.Path, token_file: pathlib.Path) -> Iterator[ServerThread]:
    with serving(root, tokens=TokenSettings(file=token_file)) as server:
        yield server


def client(server: ServerThread, token: str | None) -> Client:
    return Client(server.address, credentials=Credentials(token=token))


def raw(address: str, method: str, metadata: tuple[tuple[str, str | bytes], ...], content: bytes = b"") -> tuple[str, str]:
    """Returns the status of a call, and the words that came with it."""
    with grpc.insecure_channel(address, (("grpc.max_send_message_length", -1),)) as channel:
        try:
            channel.unary_unary(method)(content, metadata=metadata, timeout=10)
        except grpc.RpcError as error:
            return error.code().name, error.details()
    return "OK", ""


CLASSIFY = "/munet.v1.InferenceService/Classify"
LIST = "/munet.v1.InferenceService/ListTasks"


@pytest.mark.parametrize(
    "metadata",
    [
        (),
        (("authorization", ""),),
        (("authorization", "Bearer"),),
        (("authorization", "Bearer "),),
        (("authorization", f"Basic {INFER}"),),
        (("authorization", INFER),),
        (("authorization", f"Bearer {INFER[:-1]}"),),
        (("authorization", f"Bearer {INFER} {INFER}"),),
        (("authorization", f"Bearer {new_token()}"),),
        (("authorization", f"Bearer {'x' * 4000}"),),
        (("authorization", f"Bearer {INFER}"), ("authorization", f"Bearer {INFER}")),
        (("authorization", f"Bearer {INFER}"), ("authorization", "Bearer wrong")),
        (("authorization-bin", f"Bearer {INFER}".encode()),),
        (("token", INFER),),
    ],
)
def test_without_a_valid_token_every_call_says_the_same(server: ServerThread, metadata: tuple[tuple[str, str], ...]) -> None:
    for address, method in (
        (server.address, CLASSIFY),
        (server.address, LIST),
        (server.admin_address, "/munet.v1.AdminService/Reload"),
    ):
        # Bytes that are no request: nobody looks at them.
        assert raw(address, method, metadata, b"\xff\xff") == ("UNAUTHENTICATED", UNKNOWN_WORDS)


def test_the_scheme_is_read_in_any_case(server: ServerThread) -> None:
    for scheme in ("Bearer", "bearer", "BEARER"):
        assert raw(server.address, LIST, (("authorization", f"{scheme} {READ}"),))[0] == "OK"


CALLS = {
    "list": (Role.READ, Client, lambda client: client.list_tasks()),
    "get": (Role.READ, Client, lambda client: client.get_task("digits")),
    "classify": (Role.INFER, Client, lambda client: client.classify("digits", IMAGE)),
    "tasks": (Role.INFER, Client, lambda client: client.classify_tasks(IMAGE, ["digits"])),
    "stream": (Role.INFER, Client, lambda client: list(client.classify_stream([StreamQuestion("digits", IMAGE)]))),
    "status": (Role.ADMIN, AdminClient, lambda client: client.status()),
    "reload": (Role.ADMIN, AdminClient, lambda client: client.reload()),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("token", "role"),
    [(READ, Role.READ), (INFER, Role.INFER), (ADMIN, Role.ADMIN), (None, Role.NOBODY)],
    # Tokens are drawn in each process: their tests must have the same names in all.
    ids=["read", "infer", "admin", "nobody"],
)
def test_each_role_makes_its_calls_and_no_others(server: ServerThread, call: str, token: str | None, role: Role) -> None:
    needed, kind, make = CALLS[call]
    address = server.admin_address if needed is Role.ADMIN else server.address
    with kind(address, credentials=Credentials(token=token)) as asking:
        if role >= needed:
            assert make(asking) is not None
            return
        with pytest.raises(CallDeniedError) as caught:
            make(asking)
    expected = ("UNAUTHENTICATED", UNKNOWN_WORDS) if token is None else ("PERMISSION_DENIED", SMALL_WORDS)
    assert (caught.value.status, caught.value.details) == expected


def test_every_call_there_is_has_a_role_or_is_administration() -> None:
    """Also those of the Open Inference Protocol, whose names are somebody else's."""
    administration = {
        *(f"munet.v1.AdminService/{method.name}" for method in admin_pb2.DESCRIPTOR.services_by_name["AdminService"].methods),
        *(
            f"inference.GRPCInferenceService/{name}"
            for name in ("RepositoryModelLoad", "RepositoryModelUnload", "TraceSetting", "LogSettings")
        ),
        *(
            f"inference.GRPCInferenceService/{memory}SharedMemory{what}"
            for memory in ("System", "Cuda")
            for what in ("Status", "Register", "Unregister")
        ),
    }
    there = {
        f"{service.full_name}/{method.name}"
        for file in (inference_pb2, admin_pb2, health_pb2, service_pb2)
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    assert there - ROLE_OF_METHOD.keys() == administration


def test_a_task_of_others_is_one_that_does_not_exist(server: ServerThread) -> None:
    with client(server, FEW) as few, client(server, INFER) as all_, client(server, NONE) as none:
        assert [task.name for task in few.list_tasks().tasks] == ["digits", "hebrew"]
        assert [task.name for task in all_.list_tasks().tasks] == sorted(TASKS)
        assert few.classify("digits", IMAGE).task == "digits"
        assert few.get_task("hebrew").name == "hebrew"
        # Every task means every one that exists for the caller.
        assert [answer.task for answer in few.classify_tasks(IMAGE).tasks] == ["digits", "hebrew"]
        assert none.list_tasks().tasks == ()
        assert none.classify_tasks(IMAGE).tasks == ()
        asked = [StreamQuestion(task, IMAGE) for task in ("digits", "greek", (), ["greek"])]
        first, second, third, fourth = few.classify_stream(asked)
        assert (first.error, [answer.task for answer in third.result.tasks]) == (None, ["digits", "hebrew"])
        assert [type(answer.error) for answer in (second, fourth)] == [TaskNotFoundError] * 2

        def refusal(name: str, of: Client) -> list[str]:
            words = []
            for ask in (
                lambda: of.classify(name, IMAGE),
                lambda: of.get_task(name),
                lambda: of.classify_tasks(IMAGE, ["digits", name]),
            ):
                with pytest.raises(TaskNotFoundError) as caught:
                    ask()
                words.append(caught.value.details)
            return words

        # Neither count nor likeness tells of it: word for word as of a name that nobody has.
        assert refusal("greek", few) == [words.replace("greeq", "greek") for words in refusal("greeq", few)]
        assert refusal("greek", few)[0].startswith("task: found 'greek', expected one of the 2 tasks that are served; ")
        assert "did you mean" not in refusal("greek", few)[0]
        assert "did you mean 'greek'?" in refusal("greeq", all_)[0]


def test_a_client_of_tritons_needs_a_token_too_and_sees_its_tasks_alone(server: ServerThread) -> None:
    image = grpcclient.InferInput("image", [1, 8, 8, 3], "UINT8").set_data_from_numpy(IMAGE[None])

    def headers(token: str) -> dict[str, str]:
        return {"authorization": f"Bearer {token}"}

    def streamed(token: str, *tasks: str) -> list[str | None]:
        answers: queue.Queue[Exception | None] = queue.Queue()
        asking.start_stream(lambda result, error: answers.put(error), headers=headers(token))
        try:
            for task in tasks:
                asking.async_stream_infer(task, [image])
            return [str(error) if (error := answers.get(timeout=10)) else None for _ in tasks]
        finally:
            asking.stop_stream()

    with grpcclient.InferenceServerClient(server.address) as asking:
        assert asking.is_server_live()
        for call in (asking.get_server_metadata, asking.get_model_repository_index):
            with pytest.raises(InferenceServerException, match="found no token that is valid here"):
                call()
        with pytest.raises(InferenceServerException, match="whose role does not allow this call"):
            asking.infer("digits", [image], headers=headers(READ))
        index = asking.get_model_repository_index(headers=headers(FEW)).models
        assert [model.name for model in index] == ["digits", "hebrew"]
        assert asking.infer("digits", [image], headers=headers(FEW)).as_numpy("logits").shape[0] == 1
        assert asking.is_model_ready("digits", headers=headers(FEW))
        assert not asking.is_model_ready("greek", headers=headers(FEW))
        assert asking.is_model_ready("greek", headers=headers(INFER))
        for call in (asking.get_model_metadata, asking.get_model_config, asking.get_inference_statistics):
            with pytest.raises(InferenceServerException, match="found 'greek', expected one of the 2 tasks"):
                call("greek", headers=headers(FEW))
        first, second, third = streamed(FEW, "digits", "greek", "hebrew")
        assert (first, third) == (None, None)
        assert "found 'greek', expected one of the 2 tasks" in second


def test_grants_of_calls_at_the_same_time_do_not_mix(server: ServerThread) -> None:
    async def ask(token: str) -> list[str]:
        async with AsyncClient(server.address, credentials=Credentials(token=token)) as asking:
            return [task.name for task in (await asking.list_tasks()).tasks]

    async def ask_all() -> list[list[str]]:
        return list(await asyncio.gather(*(ask(token) for token in (FEW, INFER, NONE) * 15)))

    assert asyncio.run(ask_all()) == [["digits", "hebrew"], sorted(TASKS), []] * 15
    assert current_grant() is EVERYTHING


def test_health_is_open_but_tells_of_tasks_only_whom_they_are_for(server: ServerThread) -> None:
    for address in (server.address, server.admin_address):
        with grpc.insecure_channel(address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)

            def status(service: str, token: str | None = None, stub: Any = stub) -> str:
                metadata = (("authorization", f"Bearer {token}"),) if token else ()
                try:
                    answer = stub.Check(health_pb2.HealthCheckRequest(service=service), metadata=metadata)
                except grpc.RpcError as error:
                    return str(error.code().name)
                return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))

            assert status("") == "SERVING"
            assert status("munet.v1.InferenceService") == "SERVING"
            assert status("digits") == status("nobody") == "NOT_FOUND"
            assert status("digits", "wrong") == "NOT_FOUND"
            assert status("digits", FEW) == status("greek", INFER) == "SERVING"
            assert status("greek", FEW) == "NOT_FOUND"
            watch = stub.Watch(health_pb2.HealthCheckRequest(service="greek"), metadata=(("authorization", f"Bearer {FEW}"),))
            assert next(watch).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
            watch.cancel()


def test_reflection_needs_a_token(server: ServerThread) -> None:
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    with grpc.insecure_channel(server.address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.ServerReflectionInfo(iter([request])))
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        (answer,) = stub.ServerReflectionInfo(iter([request]), metadata=(("authorization", f"Bearer {READ}"),))
        assert "munet.v1.InferenceService" in {service.name for service in answer.list_services_response.service}


def test_nothing_is_received_of_a_request_that_is_refused(root: pathlib.Path, token_file: pathlib.Path) -> None:
    """Whoever has no token cannot have the server hold what it sends: it may be larger than any message that is accepted."""
    limits = Limits(max_message_bytes=4096)
    with serving(root, tokens=TokenSettings(file=token_file), limits=limits) as server:
        content = bytes(30_000_000)
        assert raw(server.address, CLASSIFY, (), content) == ("UNAUTHENTICATED", UNKNOWN_WORDS)
        with_token = (("authorization", f"Bearer {INFER}"),)
        assert raw(server.address, CLASSIFY, with_token, content)[0] == "RESOURCE_EXHAUSTED"


def test_an_unknown_method_is_unknown_to_everybody(server: ServerThread) -> None:
    assert raw(server.address, "/munet.v1.InferenceService/Teleport", ())[0] == "UNIMPLEMENTED"


def test_tokens_change_under_a_running_server(root: pathlib.Path, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "tokens.toml"
    write(file)
    with serving(root, tokens=TokenSettings(file=file)) as server, client(server, INFER) as asking:
        assert asking.list_tasks().tasks
        later = new_token()
        add_line(file, line_of("later", "read", later))
        wait_until(lambda: raw(server.address, LIST, (("authorization", f"Bearer {later}"),))[0] == "OK")
        file.write_text("nonsense")
        time.sleep(0.1)
        assert asking.list_tasks().tasks
        file.write_text("[tokens]\n" + line_of("later", "read", later))
        wait_until(lambda: raw(server.address, LIST, (("authorization", f"Bearer {INFER}"),))[0] == "UNAUTHENTICATED")
        with pytest.raises(CallDeniedError):
            asking.list_tasks()


class _Ticking:
    """A service whose calls answer for ever: one yields, one reads and writes. No table names it, so it is administration."""

    def __init__(self) -> None:
        self.role: Role | None = None

    async def tick(self, request: bytes, context: object) -> object:
        self.role = current_grant().role
        for _ in range(10_000):
            yield b"tick"
            await asyncio.sleep(0.01)

    async def echo(self, _: object, context: grpc.aio.ServicerContext) -> None:
        while (message := await context.read()) is not grpc.aio.EOF:
            self.role = current_grant().role
            await context.write(message)

    def add_to(self, server: grpc.aio.Server) -> None:
        methods = {
            "Tick": grpc.unary_stream_rpc_method_handler(self.tick),
            "Echo": grpc.stream_stream_rpc_method_handler(self.echo),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("own.Ticking", methods),))


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> _Ticking:
    """Has the front door offer two streams more."""
    ticking = _Ticking()
    add = front_door.inference_pb2_grpc.add_InferenceServiceServicer_to_server

    def add_both(servicer: object, server: grpc.aio.Server) -> None:
        ticking.add_to(server)
        add(servicer, server)

    monkeypatch.setattr(front_door.inference_pb2_grpc, "add_InferenceServiceServicer_to_server", add_both)
    return ticking


def refused(stream: Iterator[bytes]) -> tuple[str, str]:
    with pytest.raises(grpc.RpcError) as caught:
        for _ in stream:
            pass
    return caught.value.code().name, caught.value.details()


def test_a_stream_of_answers_ends_when_its_token_does(root: pathlib.Path, tmp_path: pathlib.Path, ticking: _Ticking) -> None:
    file = tmp_path / "tokens.toml"
    write(file)
    method = "/own.Ticking/Tick"
    with serving(root, tokens=TokenSettings(file=file)) as server, grpc.insecure_channel(server.address) as channel:
        assert refused(channel.unary_stream(method)(b"")) == ("UNAUTHENTICATED", UNKNOWN_WORDS)
        stream = channel.unary_stream(method)(b"", metadata=(("authorization", f"Bearer {ADMIN}"),), timeout=20)
        assert [next(stream) for _ in range(3)] == [b"tick"] * 3
        assert ticking.role is Role.ADMIN
        threading.Timer(0.1, lambda: file.write_text("[tokens]\n")).start()
        assert refused(stream) == ("UNAUTHENTICATED", UNKNOWN_WORDS)


def test_a_stream_of_messages_ends_when_its_token_does(root: pathlib.Path, tmp_path: pathlib.Path, ticking: _Ticking) -> None:
    file = tmp_path / "tokens.toml"
    write(file)
    method = "/own.Ticking/Echo"
    sent = 0

    def messages() -> Iterator[bytes]:
        nonlocal sent
        while True:
            sent += 1
            yield b"message"
            time.sleep(0.01)

    with serving(root, tokens=TokenSettings(file=file)) as server, grpc.insecure_channel(server.address) as channel:
        assert refused(channel.stream_stream(method)(iter([b"a"]), metadata=(("authorization", f"Bearer {INFER}"),))) == (
            "PERMISSION_DENIED",
            SMALL_WORDS,
        )
        stream = channel.stream_stream(method)(messages(), metadata=(("authorization", f"Bearer {ADMIN}"),), timeout=20)
        assert [next(stream) for _ in range(3)] == [b"message"] * 3
        assert ticking.role is Role.ADMIN
        threading.Timer(0.1, lambda: file.write_text("[tokens]\n")).start()
        assert refused(stream) == ("UNAUTHENTICATED", UNKNOWN_WORDS)
    assert 3 < sent < 2000


def test_a_stream_whose_client_waits_for_an_answer_ends_when_its_token_does(root: pathlib.Path, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "tokens.toml"
    write(file)
    questions: queue.Queue[StreamQuestion | None] = queue.Queue()
    with serving(root, tokens=TokenSettings(file=file)) as server, client(server, INFER) as asking:
        answers = asking.classify_stream(iter(questions.get, None), timeout_seconds=20)
        questions.put(StreamQuestion("digits", IMAGE))
        assert next(answers).error is None
        brake = Brake(server.server.engine)
        questions.put(StreamQuestion("digits", IMAGE))
        assert brake.entered.wait(60)
        file.write_text("[tokens]\n")
        wait_until(lambda: raw(server.address, LIST, (("authorization", f"Bearer {INFER}"),))[0] == "UNAUTHENTICATED")
        brake.go_on.set()
        # It asks no more before it has its answer, and gets none.
        with pytest.raises(CallDeniedError):
            next(answers)
        questions.put(None)


def test_refusals_are_counted_and_no_stranger_makes_new_series(
    root: pathlib.Path, token_file: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    import urllib.request

    with serving(root, tokens=TokenSettings(file=token_file), metrics_listen="127.0.0.1:0") as server:
        raw(server.address, LIST, ())
        raw(server.address, CLASSIFY, (("authorization", f"Bearer {READ}"),))
        raw(server.address, "/munet.v1.InferenceService/Invented", ())
        with urllib.request.urlopen(f"http://{server.server.metrics_address}/metrics") as page:
            metrics = page.read().decode()
    assert 'munet_calls_total{method="InferenceService/ListTasks",status="UNAUTHENTICATED"} 1.0' in metrics
    assert 'munet_calls_total{method="InferenceService/Classify",status="PERMISSION_DENIED"} 1.0' in metrics
    assert "Invented" not in metrics


def test_a_server_without_its_tokens_does_not_start(root: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(SettingsError, match=r"tokens\.file"), serving(root, tokens=TokenSettings(file=tmp_path / "none")):
        raise AssertionError("it serves")
    with (
        pytest.raises(SettingsError, match="^listen: .*plain text"),
        serving(root, listen="0.0.0.0:0", tokens=TokenSettings(file=tmp_path / "none")),
    ):
        raise AssertionError("it serves")


def test_a_client_sends_its_token_over_no_network_in_plain_text() -> None:
    with pytest.raises(SettingsError, match=r"server: found '192\.0\.2\.1:8500', expected TLS") as caught:
        Client("192.0.2.1:8500", credentials=Credentials(token=INFER))
    assert INFER not in str(caught.value)
    assert INFER not in repr(Credentials(token=INFER))
    Client("192.0.2.1:8500", credentials=Credentials(token=INFER, allow_plain_text=True)).close()
    Client("192.0.2.1:8500", credentials=Credentials(token=INFER, tls=True)).close()
    Client("localhost:8500", credentials=Credentials(token=INFER)).close()
    for token in ("", "a b", "a\n", "ä"):
        with pytest.raises(SettingsError, match="token: found 'something else'"):
            Client("localhost:8500", credentials=Credentials(token=token))


def test_without_a_file_of_tokens_nobody_is_asked(root: pathlib.Path) -> None:
    with serving(root) as server, client(server, None) as asking, AdminClient(server.admin_address) as admin:
        assert len(asking.list_tasks().tasks) == len(TASKS)
        assert admin.status().generation >= 1
