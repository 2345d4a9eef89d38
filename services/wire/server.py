"""A gRPC server: listener, health, and the boundary where exceptions become status.

    client ──► listener ──► Boundary ──► servicer
                              │  span, child of the caller's traceparent (unary calls)
                              │  TesseraError -> status + class in the trailing metadata
                              │  anything else -> logged once with traceback, INTERNAL
                              └  on stop: streams end at once (UNAVAILABLE), unary calls get GRACE_S

Servicers raise; they neither set codes nor log failures.
"""

from __future__ import annotations

import asyncio
import errno
import inspect
import os
import socket
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2_grpc

from services.runtime.errors import Retry, TesseraError, Unusable
from services.runtime.log import logger
from services.runtime.tracing import span
from services.wire.status import ERROR_KEY, STATUS_OF, TRACE_KEY, class_of, details_of
from services.wire.tls import ServerTls

log = logger(__name__)

GRACE_S = 3.0
UNIX = "unix:"

_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # Without it two processes share a port and each answers half of the calls.
    ("grpc.so_reuseport", 0),
    # Clients ping every 10 s, calls or none; gRPC's default closes such connections.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 1000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
)

_Context = grpc.aio.ServicerContext[Any, Any]
_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
_Behaviour = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class BoundServer:
    """`target` is what a client dials; `port` is 0 for a unix socket."""

    server: grpc.aio.Server
    target: str
    port: int


@asynccontextmanager
async def serve(
    listen: str,
    register: Callable[[grpc.aio.Server], None],
    *,
    tls: ServerTls | None = None,
    socket_mode: int = 0o600,
) -> AsyncIterator[BoundServer]:
    """Serves while the block runs. `listen`: "host:port" (port 0: any) or "unix:///path".

    Raises `Unusable` when the address cannot be had.
    """
    boundary = Boundary()
    server = grpc.aio.server(interceptors=[boundary], options=_OPTIONS)
    register(server)
    watcher = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(watcher, server)
    bound = _bind(server, listen, tls, socket_mode)
    await server.start()
    try:
        yield bound
    finally:
        boundary.stop_streams()
        await server.stop(GRACE_S)


class Boundary(grpc.aio.ServerInterceptor):
    """Wraps every handler of a server."""

    def __init__(self) -> None:
        self._streams: set[asyncio.Task[Any]] = set()
        self._stopping = asyncio.Event()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler | None:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        serializers = (handler.request_deserializer, handler.response_serializer)
        inner = _behaviour(handler)
        if handler.response_streaming:
            streaming = self._streaming(method, inner)
            if handler.request_streaming:
                return grpc.stream_stream_rpc_method_handler(streaming, *serializers)
            return grpc.unary_stream_rpc_method_handler(streaming, *serializers)
        unary = self._unary(method, inner, _traceparent(handler_call_details))
        if handler.request_streaming:
            return grpc.stream_unary_rpc_method_handler(unary, *serializers)
        return grpc.unary_unary_rpc_method_handler(unary, *serializers)

    def stop_streams(self) -> None:
        """Ends every open stream; a stream is endless, so waiting for it is not a grace."""
        self._stopping.set()
        for task in self._streams:
            task.cancel()

    def _unary(self, method: str, inner: _Behaviour, traceparent: str | None) -> _Behaviour:
        name = method.lstrip("/")

        async def handle(request: object, context: _Context) -> object:
            try:
                with span(name, traceparent=traceparent):
                    return await inner(request, context)
            except Exception as error:  # noqa: BLE001 - the boundary; logged or translated inside
                await _refuse(error, method, context)

        return handle

    def _streaming(self, method: str, inner: _Behaviour) -> _Behaviour:
        async def handle(request: object, context: _Context) -> None:
            task = asyncio.current_task()
            if task is None or self._stopping.is_set():
                await _refuse(_stopping_error(), method, context)
            stream = _Stream(context)
            self._streams.add(task)
            try:
                if inspect.isasyncgenfunction(inner):
                    async with aclosing(inner(request, stream)) as answers:
                        async for answer in answers:
                            await stream.write(answer)
                else:
                    await inner(request, stream)
            except asyncio.CancelledError:
                if not self._stopping.is_set() or context.cancelled():
                    raise
                # Cancelled by stop_streams: the client is still there and is told why.
                task.uncancel()
                await stream.between_messages()
                await _refuse(_stopping_error(), method, context)
            except Exception as error:  # noqa: BLE001 - the boundary; logged or translated inside
                await stream.between_messages()
                await _refuse(error, method, context)
            finally:
                self._streams.discard(task)

        return handle


class _Stream:
    """A stream's context whose messages are written to their end, whoever cancels the writing.

    gRPC takes no status while a message is on its way (GRPC_CALL_ERROR_TOO_MANY_OPERATIONS) and
    forgets about a cancelled one, so nobody could tell when it is off. A task around each write
    would do as well, and costs half as much again as the write itself.
    """

    def __init__(self, context: _Context) -> None:
        self._context = context
        self._unfinished: _Whole | None = None

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  the rest of the context as it is
        return getattr(self._context, name)

    async def write(self, message: object) -> None:
        writing = _Whole(self._context.write(message))
        try:
            await writing
        except asyncio.CancelledError:
            self._unfinished = writing
            raise

    async def between_messages(self) -> None:
        """Before a status. For as long as the client takes its time; when it goes away, or the
        server's grace ends, gRPC cancels the handler, and this."""
        if self._unfinished is not None:
            await self._unfinished


class _Whole:
    """Awaits `operation`; when cancelled, leaves it as it is, to be awaited again."""

    def __init__(self, operation: Coroutine[Any, Any, None]) -> None:
        self._operation = operation
        self._pending: asyncio.Future[Any] | None = None

    def __await__(self) -> Generator[Any, None, None]:
        while True:
            if self._pending is not None:
                yield from asyncio.shield(self._pending).__await__()
                self._pending = None
            try:
                self._pending = self._operation.send(None)
            except StopIteration:
                return
            if self._pending is None:
                yield
            else:
                # It was given to us as a task would be given it; we wait for it in our own way.
                self._pending._asyncio_future_blocking = False  # noqa: SLF001


def _behaviour(handler: _Handler) -> _Behaviour:
    return next(
        behaviour
        for behaviour in (
            handler.unary_unary,
            handler.unary_stream,
            handler.stream_unary,
            handler.stream_stream,
        )
        if behaviour is not None
    )


def _stopping_error() -> Retry:
    return Retry("the service is stopping; connect again")


async def _refuse(error: Exception, method: str, context: _Context) -> NoReturn:
    """Ends the call with the status that `error` means."""
    if isinstance(error, grpc.aio.AbortError) or context.done() or context.cancelled():
        # Already answered, or nobody is left to answer.
        raise error
    known = _known(error)
    if known is None:
        log.error("rpc.failed", name=method, exc_info=error)
        await context.abort(
            grpc.StatusCode.INTERNAL,
            f"internal error ({type(error).__name__}) in {method.lstrip('/')}; see its log",
        )
    kind = class_of(known)
    await context.abort(STATUS_OF[kind], details_of(known), ((ERROR_KEY, kind.__name__.lower()),))


def _known(error: BaseException) -> TesseraError | None:
    """`error` itself, or what a handler's TaskGroup wrapped, when all of it is of our tree."""
    if isinstance(error, TesseraError):
        return error
    if isinstance(error, BaseExceptionGroup):
        inner = [_known(e) for e in error.exceptions]
        return inner[0] if all(e is not None for e in inner) else None
    return None


def _traceparent(details: grpc.HandlerCallDetails) -> str | None:
    for key, value in details.invocation_metadata or ():
        if key == TRACE_KEY:
            return value if isinstance(value, str) else None
    return None


# ------------------------------------------------------------------ listeners


def _bind(
    server: grpc.aio.Server, listen: str, tls: ServerTls | None, socket_mode: int
) -> BoundServer:
    credentials = tls.credentials() if tls is not None else None
    is_unix = listen.startswith(UNIX)
    if is_unix:
        _clear_socket(socket_path(listen))
    elif not 0 <= _port_of(listen) <= 65535:
        raise Unusable(f"cannot listen on {listen}: give host:port, with port 0 to 65535")
    # The mode a socket is born with; chmod afterwards would leave it open for a moment.
    previous = os.umask(0o777 & ~socket_mode) if is_unix else None
    try:
        if credentials is None:
            port = server.add_insecure_port(listen)
        else:
            port = server.add_secure_port(listen, credentials)
    except RuntimeError as error:
        raise Unusable(_cannot_listen(listen)) from error
    finally:
        if previous is not None:
            os.umask(previous)
    if port == 0:
        raise Unusable(_cannot_listen(listen))
    if is_unix:
        return BoundServer(server, listen, 0)
    return BoundServer(server, f"{listen.rpartition(':')[0]}:{port}", port)


def _port_of(listen: str) -> int:
    """-1 when there is none."""
    _, colon, port = listen.rpartition(":")
    return int(port) if colon and port.isascii() and port.isdigit() else -1


def socket_path(listen: str) -> Path:
    """The file of "unix:///run/x.sock", "unix:/run/x.sock" or "unix:x.sock"."""
    rest = listen.removeprefix(UNIX)
    return Path("/" + rest.lstrip("/") if rest.startswith("/") else rest)


def _clear_socket(path: Path) -> None:
    """Removes what a dead process left; refuses to take the place of a live one."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise Unusable(f"cannot listen on {path}: {error.strerror}") from error
    if not stat.S_ISSOCK(mode):
        raise Unusable(f"cannot listen on {path}: the file is there and is not a socket")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        outcome = probe.connect_ex(str(path))
    if outcome in (0, errno.EAGAIN, errno.EINPROGRESS):
        raise Unusable(f"cannot listen on {path}: another process serves it; stop that one first")
    try:
        path.unlink()
    except OSError as error:
        raise Unusable(f"cannot remove the stale socket {path}: {error.strerror}") from error


def _cannot_listen(listen: str) -> str:
    if not listen.startswith(UNIX):
        return f"cannot listen on {listen}: {_tcp_reason(listen)}"
    path = socket_path(listen)
    if not path.parent.is_dir():
        return f"cannot listen on {path}: the folder {path.parent} does not exist; create it"
    if not os.access(path.parent, os.W_OK):
        return f"cannot listen on {path}: no permission to write to {path.parent}"
    if len(os.fsencode(path)) > 107:
        return f"cannot listen on {path}: a socket path is at most 107 bytes; choose a shorter one"
    return f"cannot listen on {path}"


def _tcp_reason(listen: str) -> str:
    """The errno that gRPC keeps to itself: the same bind, tried once more."""
    host, _, port = listen.rpartition(":")
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
        )[0]
        with socket.socket(family, kind, proto) as probe:
            probe.bind(address)
    except OSError as error:
        return f"{error.strerror}; free it or choose another address"
    return "the address is not usable; choose another"
