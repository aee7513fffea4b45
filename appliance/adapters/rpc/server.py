"""The gRPC server: calls to the desk and back.

1. By whose fault: `statuses`. No traceback leaves; what was not foreseen is logged with an id and answered INTERNAL with it.
2. A caller's gRPC deadline is its request's timeout, unless a tag asks for less; a cancelled call cancels its request.
3. Everything is bounded: message, all messages together, calls, connections, and the time of a shutdown.
4. Only what is served has an answer; the rest of Triton's service is UNIMPLEMENTED, by name.
"""

import asyncio
import contextlib
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, cast

import grpc
import structlog
from grpc import aio

from appliance.adapters.rpc import translation
from appliance.adapters.rpc.intake import Bounds, Intake
from appliance.adapters.rpc.messages import SERVICE
from appliance.adapters.rpc.statuses import Status, failure, refusal
from appliance.contract.admission import quoted
from appliance.contract.errors import ApplianceError, OursError, TheirsError, WorldError
from appliance.contract.inference import Promise, Request
from appliance.contract.openinference_catalog import REPOSITORY_EXTENSION, Repository, check_open, is_open, refuse_overrides, state
from appliance.contract.outcomes import turned_away
from appliance.contract.vocabulary import Outcome
from appliance.ports import Desk

EXTENSIONS = ("parameters",)
NOT_LOADED = "it is not loaded"

Context = aio.ServicerContext[bytes, bytes]


def _uncounted(_model: str, _outcome: Outcome) -> None:
    """Count nothing."""


class Rpc:
    """One gRPC server on one address, without TLS: for loopback, or a network that is trusted otherwise.

    Attributes:
        body_limit_bytes: the largest message of one call, before and after inflation.
        repository: where models may be loaded and unloaded; a TCP address is open for it only `everywhere`.
        refused: told of each infer request that never reached the desk, by model (`-` where it is unknown) and outcome.
    """

    def __init__(
        self,
        desk: Desk,
        *,
        body_limit_bytes: int = 64 * 1024 * 1024,
        bounds: Bounds | None = None,
        repository: Repository = "socket",
        refused: Callable[[str, Outcome], None] = _uncounted,
    ) -> None:
        self._desk = desk
        self._limit = body_limit_bytes
        self._bounds = bounds or Bounds()
        self._intake = Intake(body_limit_bytes, self._bounds)
        self._repository = repository
        self._refused = refused
        self._log = structlog.get_logger()
        self._server: aio.Server | None = None
        self._calls: set[asyncio.Task[Any]] = set()

    async def start(self, host: str, port: int) -> int:
        """Listen, and return the port. Raises: WorldError (`listen`) that names the address that is taken."""
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        server = aio.server(options=_options(self._limit, self._bounds), maximum_concurrent_rpcs=self._bounds.calls)
        server.add_generic_rpc_handlers((_Methods(self._answers(), self._serve),))
        try:
            bound = server.add_insecure_port(address)
        except RuntimeError as error:
            raise WorldError("listen", "cannot listen", where=address, remedy="choose another address in [serve]") from error
        await server.start()
        self._server = server
        return bound

    async def drain(self, within_s: float) -> None:
        """Stop accepting, let what is in flight be answered; what is not within `within_s` is cancelled."""
        if self._server is not None:
            await self._server.stop(within_s)

    async def close(self) -> None:
        """Close every connection and cancel what is unanswered; return when the desk knows of it, or after `close_s`."""
        if self._server is not None:
            await self._server.stop(None)
            self._server = None
        if self._calls:
            await asyncio.wait(self._calls, timeout=self._bounds.close_s)

    def _answers(self) -> "dict[str, Answering]":
        return {
            "ServerLive": self._server_live,
            "ServerReady": self._server_ready,
            "ModelReady": self._model_ready,
            "ServerMetadata": self._server_metadata,
            "ModelMetadata": self._model_metadata,
            "ModelInfer": self._infer,
            "RepositoryIndex": self._index,
            "RepositoryModelLoad": self._load,
            "RepositoryModelUnload": self._unload,
        }

    async def _serve(self, method: str, answering: "Answering", context: Context) -> bytes:
        """Answer one call; turn every error into a status that names the problem."""
        task = cast("asyncio.Task[Any]", asyncio.current_task())
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)
        try:
            return await answering(context)
        except OursError as error:
            status = self._unforeseen(method, error)
        except ApplianceError as error:
            status = refusal(error)
        except Exception as error:  # noqa: BLE001 - the last line of defence: nothing unforeseen may reach a caller as a traceback
            status = self._unforeseen(method, error)
        return await context.abort(*status)

    def _unforeseen(self, method: str, error: Exception) -> Status:
        token = secrets.token_hex(4)
        self._log.error("request_failed", id=token, method=method[:200], exc_info=error)
        return failure(grpc.StatusCode.INTERNAL, f"an internal error; the log has it under {token}", [("reason", "internal")])

    async def _infer(self, context: Context) -> bytes:
        message = b""
        model = "-"
        try:
            message = await self._intake.receive(context)
            asked = translation.read_infer(message, context.peer())
            model = asked.model
            request = _within(asked, context)
        except BaseException as error:
            self._intake.done(message)
            self._count(model, error)
            raise
        try:
            answer = await self._desk.infer(request)
            if isinstance(answer, Promise):
                return translation.promised(answer, request.model)
            return translation.render(answer, request.outputs)
        finally:
            self._intake.done(message)

    def _count(self, model: str, error: BaseException) -> None:
        """Tell of a request that the desk never saw; a caller's own text never becomes a label."""
        self._refused(model if model in self._desk.models() else "-", turned_away(error))

    async def _server_live(self, _context: Context) -> bytes:
        return translation.reply("ServerLiveResponse", live=self._desk.live())

    async def _server_ready(self, _context: Context) -> bytes:
        return translation.reply("ServerReadyResponse", ready=self._desk.ready())

    async def _model_ready(self, context: Context) -> bytes:
        asked = await self._small("ModelReadyRequest", context)
        ready = False
        with contextlib.suppress(TheirsError):  # Triton, too, answers for a model that it does not know
            ready = self._desk.describe(asked.name, asked.version).ready
        return translation.reply("ModelReadyResponse", ready=ready)

    async def _server_metadata(self, context: Context) -> bytes:
        changeable = is_open(self._repository, socket=_by_socket(context))
        extensions = (*EXTENSIONS, REPOSITORY_EXTENSION) if changeable else EXTENSIONS
        return translation.reply("ServerMetadataResponse", name="appliance", version=_version(), extensions=extensions)

    async def _model_metadata(self, context: Context) -> bytes:
        asked = await self._small("ModelMetadataRequest", context)
        return translation.model_metadata(self._desk.describe(asked.name, asked.version))

    async def _index(self, context: Context) -> bytes:
        asked = await self._small("RepositoryIndexRequest", context)
        cards = [self._desk.describe(name, "") for name in self._desk.models()]
        why = self._desk.why_not_ready() or NOT_LOADED
        rows = [
            (card.name, each, state(card.ready), "" if card.ready else why)
            for card in cards
            if card.ready or not asked.ready
            for each in card.versions
        ]
        return translation.repository_index(rows)

    async def _load(self, context: Context) -> bytes:
        check_open(self._repository, socket=_by_socket(context))
        asked = await self._small("RepositoryModelLoadRequest", context)
        refuse_overrides(translation.parameters(asked))
        await self._desk.load(asked.model_name)
        return b""

    async def _unload(self, context: Context) -> bytes:
        check_open(self._repository, socket=_by_socket(context))
        asked = await self._small("RepositoryModelUnloadRequest", context)
        await self._desk.unload(asked.model_name)
        return b""

    async def _small(self, name: str, context: Context) -> Any:
        """Read a message that nobody keeps."""
        message = await self._intake.receive(context)
        try:
            return translation.read(name, message)
        finally:
            self._intake.done(message)


Answering = Callable[[Context], Awaitable[bytes]]
Serving = Callable[[str, Answering, Context], Awaitable[bytes]]


class _Methods(grpc.GenericRpcHandler):
    """Finds what answers a method; messages pass as bytes, so that reading them is ours to bound."""

    def __init__(self, answers: dict[str, Answering], serve: Serving) -> None:
        self._served = {f"/{SERVICE}/{name}": _method(name, answering, serve) for name, answering in answers.items()}
        self._serve = serve

    def service(self, details: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[bytes, bytes] | None":
        """Return a method's handler; one of Triton's that is not served is refused by name, another service's by gRPC."""
        path = details.method
        found = self._served.get(path)
        if found is None and path.startswith(f"/{SERVICE}/"):
            return _method(path, _not_served(path.rpartition("/")[2]), self._serve)
        return found


def _method(name: str, answering: Answering, serve: Serving) -> "grpc.RpcMethodHandler[bytes, bytes]":
    async def answer(_messages: object, context: Context) -> bytes:
        return await serve(name, answering, context)

    return grpc.stream_unary_rpc_method_handler(answer)


def _not_served(name: str) -> Answering:
    async def refuse(_context: Context) -> bytes:
        what = f"{quoted(name)} of {SERVICE} is not served here"
        raise TheirsError("unknown_method", what, remedy="GET v2 and docs/api.md say what is")

    return refuse


def _within(request: Request, context: Context) -> Request:
    """Bound a request by its caller's deadline. Raises: WorldError (`deadline`) where that has passed."""
    left_s = cast("float | None", context.time_remaining())  # None without a deadline, whatever the types say
    if left_s is None:
        return request
    if left_s <= 0:
        raise WorldError("deadline", "the call's deadline had passed when its message was there", where=request.model)
    timeout_s = request.tags.timeout_s
    if timeout_s is not None and timeout_s <= left_s:
        return request
    return replace(request, tags=replace(request.tags, timeout_s=left_s))


def _by_socket(context: Context) -> bool:
    return context.peer().startswith("unix:")


def _options(limit_bytes: int, bounds: Bounds) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", limit_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_concurrent_streams", bounds.streams),
        ("grpc.max_allowed_incoming_connections", bounds.connections),
        ("grpc.server_handshake_timeout_ms", int(bounds.handshake_s * 1e3)),
        ("grpc.max_connection_idle_ms", int(bounds.idle_s * 1e3)),
        ("grpc.so_reuseport", 0),  # else a second daemon would share the port in silence
    ]


@cache
def _version() -> str:
    try:
        return version("appliance")
    except PackageNotFoundError:  # run from a checkout
        return "unknown"
