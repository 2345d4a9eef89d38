"""The exception tree across real connections, over unix sockets and TCP, unary and streaming."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import given
from hypothesis import strategies as st
from tessera_wire.ipam.v1 import ipam_pb2, ipam_pb2_grpc
from tessera_wire.policy.v1 import policy_pb2, policy_pb2_grpc

from services.runtime.errors import (
    Conflict,
    Exhausted,
    Invalid,
    NotFound,
    Retry,
    TesseraError,
    Unusable,
)
from services.runtime.tracing import configure, current_traceparent, span
from services.wire.client import call, channel, translate
from services.wire.server import BoundServer, serve
from services.wire.status import MAX_DETAILS_BYTES, STATUS_OF, details_of

TREE = [Retry, Conflict, Invalid, NotFound, Exhausted, Unusable]
TRANSPORTS = ["tcp", "unix"]


@pytest.fixture(scope="module", autouse=True)
def traced() -> None:
    configure("test", "")


class Servicer(ipam_pb2_grpc.IpamServiceServicer):
    """Allocate does what the test says; the rest answers itself."""

    def __init__(self) -> None:
        self.outcome: Exception | None = None
        self.seen_traceparent = ""
        self.entered = asyncio.Event()
        self.hold = asyncio.Event()
        self.hold.set()

    async def Allocate(self, request, context):
        self.entered.set()
        await self.hold.wait()
        self.seen_traceparent = current_traceparent()
        if self.outcome is not None:
            raise self.outcome
        wanted = [ipam_pb2.Address(ip=each) for each in request.addresses]
        return ipam_pb2.AllocateResponse(addresses=wanted)

    async def Release(self, request, context):
        await context.abort(grpc.StatusCode.PERMISSION_DENIED, "said by hand")

    async def ListPools(self, request, context):
        return ipam_pb2.ListPoolsResponse(pools=[ipam_pb2.Pool(name="x" * 8_000_000)])

    async def ListBlocks(self, request, context):
        return ipam_pb2.ListBlocksResponse()

    async def ListAddresses(self, request, context):
        return ipam_pb2.ListAddressesResponse()


class Stream(policy_pb2_grpc.PolicyDistributionServicer):
    """Echoes one update per message until `fail` is set."""

    def __init__(self) -> None:
        self.outcome: Exception | None = None
        self.closed = asyncio.Event()

    async def Subscribe(self, request_iterator, context):
        try:
            async for message in request_iterator:
                if self.outcome is not None:
                    raise self.outcome
                yield policy_pb2.Update(revision=message.ack.revision)
        finally:
            self.closed.set()


class WritingStream(policy_pb2_grpc.PolicyDistributionServicer):
    """The same through context.write."""

    async def Subscribe(self, request_iterator, context):
        async for message in request_iterator:
            await context.write(policy_pb2.Update(revision=message.ack.revision))
            if message.ack.revision == 3:
                raise Conflict("three is taken")


class HeavyStream(policy_pb2_grpc.PolicyDistributionServicer):
    """In the middle of a message that fits into no buffer, until the client reads. `tear`: what the
    reading half ends with, which cancels the writing half."""

    def __init__(self, tear: Exception | None = None) -> None:
        self.tear = tear
        self.writing = asyncio.Event()

    async def Subscribe(self, request_iterator, context):
        async with asyncio.TaskGroup() as group:
            group.create_task(self._write(context))
            async for _ in request_iterator:
                if self.tear is not None:
                    raise self.tear

    async def _write(self, context):
        self.writing.set()
        while True:
            await context.write(policy_pb2.Update(traceparent="x" * 32_000_000))


async def read_to_the_end(updates, *, after_s: float = 0.0) -> grpc.aio.AioRpcError:
    await asyncio.sleep(after_s)
    async with asyncio.timeout(10):
        try:
            while True:
                await updates.read()
        except grpc.aio.AioRpcError as error:
            return error


def listen_on(transport: str, folder: Path) -> str:
    return "127.0.0.1:0" if transport == "tcp" else f"unix://{folder}/t.sock"


@asynccontextmanager
async def serving(
    listen: str, ipam: Servicer, stream: policy_pb2_grpc.PolicyDistributionServicer | None = None
) -> AsyncIterator[tuple[BoundServer, grpc.aio.Channel]]:
    def register(server: grpc.aio.Server) -> None:
        ipam_pb2_grpc.add_IpamServiceServicer_to_server(ipam, server)
        policy_pb2_grpc.add_PolicyDistributionServicer_to_server(stream or Stream(), server)

    async with serve(listen, register) as bound, channel(bound.target) as dialled:
        yield bound, dialled


def ack(revision: int) -> policy_pb2.AgentMessage:
    return policy_pb2.AgentMessage(ack=policy_pb2.Ack(revision=revision))


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("kind", TREE)
async def test_each_error_class_makes_the_round_trip_with_its_words(
    kind: type[TesseraError], transport: str, tmp_path: Path
) -> None:
    servicer = Servicer()
    servicer.outcome = kind("pool 'blau' – 7 of 7 addresses in use; add a CIDR")
    async with serving(listen_on(transport, tmp_path), servicer) as (_, dialled):
        stub = ipam_pb2_grpc.IpamServiceStub(dialled)
        with pytest.raises(kind) as caught:
            await call(stub.Allocate, ipam_pb2.AllocateRequest(), deadline_s=5)
    assert type(caught.value) is kind
    assert str(caught.value) == str(servicer.outcome)


@pytest.mark.parametrize("kind", TREE)
async def test_a_stream_ends_with_the_error_the_handler_raised(
    kind: type[TesseraError], tmp_path: Path
) -> None:
    stream = Stream()
    async with serving(listen_on("unix", tmp_path), Servicer(), stream) as (bound, dialled):
        updates = policy_pb2_grpc.PolicyDistributionStub(dialled).Subscribe()
        await updates.write(ack(1))
        assert (await updates.read()).revision == 1
        stream.outcome = kind("group 7 is gone")
        await updates.write(ack(2))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await updates.read()
        translated = translate(caught.value, bound.target, service="policyd")
    assert type(translated) is kind
    assert str(translated) == "group 7 is gone"


async def test_a_handler_that_writes_to_its_context_is_translated_too(tmp_path: Path) -> None:
    async with serving(listen_on("unix", tmp_path), Servicer(), WritingStream()) as (bound, d):
        updates = policy_pb2_grpc.PolicyDistributionStub(d).Subscribe()
        await updates.write(ack(3))
        assert (await updates.read()).revision == 3
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await updates.read()
    assert isinstance(translate(caught.value, bound.target), Conflict)


async def test_what_a_task_group_wrapped_keeps_its_class() -> None:
    servicer = Servicer()
    servicer.outcome = ExceptionGroup("unhandled errors in a TaskGroup", [Invalid("bad label")])
    async with serving("127.0.0.1:0", servicer) as (_, dialled):
        stub = ipam_pb2_grpc.IpamServiceStub(dialled)
        with pytest.raises(Invalid, match=r"^bad label$"):
            await call(stub.Allocate, ipam_pb2.AllocateRequest(), deadline_s=5)


async def test_an_unexpected_exception_is_logged_once_and_answered_in_short(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    servicer = Servicer()
    servicer.outcome = KeyError("/etc/secret")
    with caplog.at_level(logging.ERROR):
        async with serving("127.0.0.1:0", servicer) as (bound, dialled):
            stub = ipam_pb2_grpc.IpamServiceStub(dialled)
            with pytest.raises(Retry) as caught:
                await call(stub.Allocate, ipam_pb2.AllocateRequest(), deadline_s=5)
    assert str(caught.value) == (
        f"ipamd at {bound.target} failed: internal error (KeyError) in"
        " tessera.ipam.v1.IpamService/Allocate; see its log"
    )
    printed = capsys.readouterr()
    logged = caplog.text + printed.out + printed.err
    assert logged.count("rpc.failed") == 1
    assert "Traceback" in logged


async def test_a_status_set_by_hand_is_left_alone() -> None:
    async with serving("127.0.0.1:0", Servicer()) as (_, dialled):
        stub = ipam_pb2_grpc.IpamServiceStub(dialled)
        with pytest.raises(Unusable, match="said by hand"):
            await call(stub.Release, ipam_pb2.ReleaseRequest(), deadline_s=5)


async def test_nobody_listening_names_the_service_and_the_target(tmp_path: Path) -> None:
    target = f"unix://{tmp_path}/none.sock"
    async with channel(target) as dialled:
        stub = ipam_pb2_grpc.IpamServiceStub(dialled)
        with pytest.raises(Retry) as caught:
            await call(stub.Allocate, ipam_pb2.AllocateRequest(), deadline_s=5)
    assert f"ipamd at {target} cannot be reached; is it running?" in str(caught.value)


async def test_a_late_answer_is_a_retry(tmp_path: Path) -> None:
    servicer = Servicer()
    servicer.hold.clear()
    async with serving(listen_on("unix", tmp_path), servicer) as (_, dialled):
        stub = ipam_pb2_grpc.IpamServiceStub(dialled)
        with pytest.raises(Retry, match="did not answer in time"):
            await call(stub.Allocate, ipam_pb2.AllocateRequest(), deadline_s=0.2)


async def test_an_unknown_method_asks_about_versions() -> None:
    async with (
        serve("127.0.0.1:0", lambda server: None) as bound,
        channel(bound.target) as dialled,
    ):
        stub = ipam_pb2_grpc.IpamServiceStub(dialled)
        with pytest.raises(Unusable, match="do the versions match"):
            await call(stub.Allocate, ipam_pb2.AllocateRequest(), deadline_s=5)


async def test_messages_above_the_grpc_default_pass(tmp_path: Path) -> None:
    async with serving(listen_on("unix", tmp_path), Servicer()) as (_, dialled):
        stub = ipam_pb2_grpc.IpamServiceStub(dialled)
        answer = await call(stub.ListPools, ipam_pb2.ListPoolsRequest(), deadline_s=10)
    assert len(answer.pools[0].name) == 8_000_000


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_the_trace_crosses_the_call(transport: str, tmp_path: Path) -> None:
    servicer = Servicer()
    async with serving(listen_on(transport, tmp_path), servicer) as (_, dialled):
        stub = ipam_pb2_grpc.IpamServiceStub(dialled)
        with span("test"):
            mine = current_traceparent()
            await call(stub.Allocate, ipam_pb2.AllocateRequest(), deadline_s=5)
    version, trace, parent, _ = mine.split("-")
    assert servicer.seen_traceparent.split("-")[:2] == [version, trace]
    assert servicer.seen_traceparent.split("-")[2] != parent


async def test_health_says_serving() -> None:
    async with serving("127.0.0.1:0", Servicer()) as (_, dialled):
        stub = health_pb2_grpc.HealthStub(dialled)
        answer = await call(stub.Check, health_pb2.HealthCheckRequest(), deadline_s=5)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_stopping_ends_open_streams_with_a_retry(tmp_path: Path) -> None:
    stream = Stream()
    async with channel(f"unix://{tmp_path}/t.sock") as dialled:
        async with serving(listen_on("unix", tmp_path), Servicer(), stream):
            updates = policy_pb2_grpc.PolicyDistributionStub(dialled).Subscribe()
            await updates.write(ack(1))
            await updates.read()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await updates.read()
    error = translate(caught.value, "x")
    assert isinstance(error, Retry)
    assert "stopping" in str(error)
    assert stream.closed.is_set()


async def test_stopping_in_the_middle_of_a_message_still_tells_the_client(tmp_path: Path) -> None:
    stream = HeavyStream()
    async with asyncio.TaskGroup() as group, channel(f"unix://{tmp_path}/t.sock") as dialled:
        async with serving(listen_on("unix", tmp_path), Servicer(), stream):
            updates = policy_pb2_grpc.PolicyDistributionStub(dialled).Subscribe()
            await stream.writing.wait()
            reading = group.create_task(read_to_the_end(updates, after_s=0.2))
        error = translate(await reading, "x")
    assert isinstance(error, Retry)
    assert "stopping" in str(error)


async def test_an_error_that_tears_a_message_still_reaches_the_client(tmp_path: Path) -> None:
    stream = HeavyStream(Invalid("group 7 is gone"))
    async with serving(listen_on("unix", tmp_path), Servicer(), stream) as (_, dialled):
        updates = policy_pb2_grpc.PolicyDistributionStub(dialled).Subscribe()
        await stream.writing.wait()
        await updates.write(ack(1))
        error = translate(await read_to_the_end(updates), "x")
    assert isinstance(error, Invalid)
    assert str(error) == "group 7 is gone"


async def test_stopping_lets_a_call_in_flight_finish(tmp_path: Path) -> None:
    servicer = Servicer()
    servicer.hold.clear()
    async with (
        channel(f"unix://{tmp_path}/t.sock") as dialled,
        asyncio.TaskGroup() as tasks,
        serving(listen_on("unix", tmp_path), servicer),
    ):
        stub = ipam_pb2_grpc.IpamServiceStub(dialled)
        answer = tasks.create_task(
            call(stub.Allocate, ipam_pb2.AllocateRequest(addresses=["10.0.0.1"]), deadline_s=5)
        )
        await servicer.entered.wait()
        asyncio.get_running_loop().call_later(0.05, servicer.hold.set)
    assert answer.result().addresses[0].ip == "10.0.0.1"


async def test_a_client_that_goes_away_closes_the_handler_quietly(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stream = Stream()
    async with serving(listen_on("unix", tmp_path), Servicer(), stream) as (_, dialled):
        updates = policy_pb2_grpc.PolicyDistributionStub(dialled).Subscribe()
        await updates.write(ack(1))
        await updates.read()
        updates.cancel()
        async with asyncio.timeout(5):
            await stream.closed.wait()
    assert caplog.text == ""


@pytest.mark.parametrize("extension", [type("Own", (k,), {}) for k in TREE])
async def test_a_class_that_extends_the_tree_arrives_as_its_base(
    extension: Callable[[str], TesseraError],
) -> None:
    servicer = Servicer()
    servicer.outcome = extension("more precisely")
    async with serving("127.0.0.1:0", servicer) as (_, dialled):
        stub = ipam_pb2_grpc.IpamServiceStub(dialled)
        with pytest.raises(TesseraError) as caught:
            await call(stub.Allocate, ipam_pb2.AllocateRequest(), deadline_s=5)
    assert isinstance(servicer.outcome, type(caught.value))
    assert type(caught.value) in STATUS_OF


@given(st.text())
def test_details_fit_the_header(text: str) -> None:
    assert len(details_of(Invalid(text * 50)).encode()) <= MAX_DETAILS_BYTES + 2
