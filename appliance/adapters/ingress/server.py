"""The HTTP server: addresses to the desk and back.

1. By whose fault: the caller's is 4xx and names the problem; the world's is 429, 503 or 504, with `Retry-After` where waiting helps.
2. A caller that hangs up cancels its request. No traceback leaves; what was not foreseen is logged with an id and answered with it.
3. Models are loaded and unloaded only through a listener that is open for it, and never for a web page (which cannot hide its `Origin`).
4. Everything is bounded: body, all bodies together, connections, the time of headers and bodies, and the time of a shutdown.
"""

import asyncio
import contextlib
import secrets
import socket as sockets
from collections.abc import Awaitable, Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeVar

import msgspec
import structlog
from aiohttp import hdrs, web

from appliance.adapters.ingress.body import Intake
from appliance.adapters.ingress.bounds import Bounds, Reserve
from appliance.adapters.ingress.connection import Gate
from appliance.adapters.ingress.frames import FramesSocket
from appliance.adapters.ingress.paths import Place, resolve
from appliance.adapters.ingress.regions import LentRegions
from appliance.adapters.ingress.replies import Reply, accepted, failure, ok, refusal
from appliance.adapters.ingress.sockets import bind_unix, unbind_unix
from appliance.contract.admission import quoted
from appliance.contract.errors import ApplianceError, OursError, TheirsError, WorldError
from appliance.contract.inference import Answer, Promise
from appliance.contract.openinference import HEADER_LENGTH, Layout, header_length, parse, promised, render
from appliance.contract.openinference_catalog import (
    HTTP_EXTENSIONS,
    REPOSITORY_EXTENSION,
    Repository,
    check_load,
    check_open,
    check_unload,
    is_open,
    model_metadata,
    only_ready,
    repository_index,
    server_metadata,
)
from appliance.contract.outcomes import turned_away
from appliance.contract.vocabulary import Outcome
from appliance.ports import Counter, Desk, Share

EXPOSITION = "text/plain; version=0.0.4; charset=utf-8"
BACKLOG = 512
DRAIN_LOOK_S = 0.01
NOT_LOADED = "it is not loaded"

T = TypeVar("T")


def _uncounted(_model: str, _outcome: Outcome) -> None:
    """Count nothing."""


class Ingress:
    """One HTTP server on up to two addresses.

    Attributes:
        metrics, status: render the exposition, and give a msgspec struct or dict.
        body_limit_bytes: the largest body of one request, before and after inflation.
        repository: where models may be loaded and unloaded.
        share: maps memory that a caller lends (`ports.Engine.share`); without it all data comes in bodies.
        counter: where promised answers are fetched; without it there are none.
        refused: told of each infer request that never reached the desk, by model (`-` where it is unknown) and outcome.
    """

    def __init__(
        self,
        desk: Desk,
        *,
        metrics: Callable[[], bytes],
        status: Callable[[], object],
        body_limit_bytes: int = 64 * 1024 * 1024,
        bounds: Bounds | None = None,
        repository: Repository = "socket",
        share: Callable[[int, int], Share] | None = None,
        counter: Counter | None = None,
        refused: Callable[[str, Outcome], None] = _uncounted,
    ) -> None:
        self._desk = desk
        self._metrics = metrics
        self._status = status
        self._repository = repository
        self._counter = counter
        self._refused = refused
        self._bounds = bounds or Bounds()
        reserve = Reserve(max(self._bounds.bodies_bytes, 2 * body_limit_bytes))  # twice: a compressed body and what becomes of it
        self._intake = Intake(body_limit_bytes, self._bounds.body_timeout_s, reserve)
        self._regions = None if share is None else LentRegions(share, self._bounds)
        self._frames: FramesSocket | None = None
        self._log = structlog.get_logger()
        self._gate: Gate | None = None
        self._servers: list[asyncio.Server] = []
        self._socket: Path | None = None
        self._busy = 0
        self._draining = False
        self._calm = asyncio.Event()
        self._calm.set()
        self._answers: dict[str, Callable[[web.BaseRequest, Place], Awaitable[Reply]]] = {
            "infer": self._infer,
            "live": self._live,
            "ready": self._ready,
            "server": self._server,
            "index": self._index,
            "load": self._load,
            "unload": self._unload,
            "metrics": self._scrape,
            "status": self._tell,
            "deferred": self._deferred,
            "deferred_retry": self._deferred_retry,
            "deferred_drop": self._deferred_drop,
            "model": self._model,
            "model_ready": self._model_ready,
            "foreign_memory": self._foreign_memory,
        }
        self.port = 0

    async def start(self, host: str, port: int, socket: Path | None, frames: Path | None = None) -> None:
        """Listen; on `frames` for memory that callers lend. Raises: WorldError (`listen`) that names the address that is taken."""
        loop = asyncio.get_running_loop()
        self._gate = Gate(self._handle, self._bounds)
        try:
            tcp = await loop.create_server(self._gate, host, port, backlog=BACKLOG)
        except OSError as error:
            why = f"cannot listen: {error.strerror or error}"
            raise WorldError("listen", why, where=f"{host}:{port}", remedy="choose another address in [serve]") from error
        self._servers.append(tcp)
        self.port = tcp.sockets[0].getsockname()[1]
        if socket is not None:
            bound = await asyncio.to_thread(bind_unix, socket)
            self._socket = socket
            self._servers.append(await loop.create_unix_server(self._gate, sock=bound, backlog=BACKLOG))
        if frames is not None and self._regions is not None:
            self._frames = FramesSocket(self._regions, self._bounds)
            await self._frames.start(frames)

    async def drain(self, within_s: float) -> None:
        """Stop accepting, let what is in flight be answered to the last byte, bounded by `within_s`."""
        self._draining = True
        self._unlisten()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self._calm.wait()
                while self._gate is not None and self._gate.is_answering():  # noqa: ASYNC110 - aiohttp has no event for it
                    await asyncio.sleep(DRAIN_LOOK_S)

    async def close(self) -> None:
        """Close every connection; what is still unanswered after twice `close_s` is cancelled."""
        self._draining = True
        self._unlisten()
        if self._socket is not None:
            await asyncio.to_thread(unbind_unix, self._socket)
            self._socket = None
        if self._gate is not None:
            self._gate.pre_shutdown()
            await self._gate.shutdown(self._bounds.close_s)
            self._gate = None
        if self._frames is not None:
            await self._frames.close()
            self._frames = None

    def _unlisten(self) -> None:
        while self._servers:
            self._servers.pop().close()

    async def _handle(self, request: web.BaseRequest) -> Reply:
        """Answer one request; turn every error into an answer that names the problem."""
        self._busy += 1
        self._calm.clear()
        try:
            response = await self._answered(request)
        except OursError as error:
            response = self._unforeseen(request, error)
        except ApplianceError as error:
            response = refusal(error)
        except Exception as error:  # noqa: BLE001 - the last line of defence: nothing unforeseen may reach a caller as a traceback
            response = self._unforeseen(request, error)
        finally:
            self._busy -= 1
            if not self._busy:
                self._calm.set()
        if self._draining:
            response.force_close()
        return response

    async def _answered(self, request: web.BaseRequest) -> Reply:
        place = resolve(request.raw_path)
        if place is None:
            raise TheirsError("unknown_path", f"nothing is at {quoted(request.raw_path)}")
        if request.method != place.method and (request.method, place.method) != ("HEAD", "GET"):
            text = f"{quoted(request.method)} is not served at {quoted(request.raw_path)}, only {place.method}"
            return failure(405, text, "method", {"Allow": place.method})
        return await self._answers[place.what](request, place)

    def _unforeseen(self, request: web.BaseRequest, error: Exception) -> Reply:
        token = secrets.token_hex(4)
        self._log.error("request_failed", id=token, path=request.raw_path[:200], exc_info=error)
        return failure(500, f"an internal error; the log has it under {token}", "internal")

    async def _infer(self, request: web.BaseRequest, place: Place) -> Reply:
        body: bytes | bytearray = b""
        try:
            body = await self._intake.receive(request)
            length = header_length(request.headers.get(HEADER_LENGTH))
            asked, layout = parse(place.model, place.version, length, body, self._regions, caller=id(request.protocol))
        except BaseException as error:
            self._intake.done(body)
            self._count(place.model, error)
            raise
        try:
            return _rendered(await self._desk.infer(asked), layout)
        finally:
            self._intake.done(body)

    def _count(self, model: str, error: BaseException) -> None:
        """Tell of a request that the desk never saw; a caller's own text never becomes a label."""
        self._refused(model if model in self._desk.models() else "-", turned_away(error))

    async def _deferred(self, _request: web.BaseRequest, place: Place) -> Reply:
        return _rendered(await self._promises().fetch(place.model), Layout(default_binary=True))

    async def _deferred_retry(self, request: web.BaseRequest, place: Place) -> Reply:
        self._check_open(request)
        await self._promises().revive(place.model)
        return ok()

    async def _deferred_drop(self, request: web.BaseRequest, place: Place) -> Reply:
        self._check_open(request)
        await self._promises().drop(place.model)
        return ok()

    def _promises(self) -> Counter:
        if self._counter is None:
            raise TheirsError("unknown_promise", "this device makes no promises")
        return self._counter

    async def _live(self, _request: web.BaseRequest, _place: Place) -> Reply:
        return ok() if self._desk.live() else failure(503, "the daemon's loops do not move", "not_ready")

    async def _ready(self, _request: web.BaseRequest, _place: Place) -> Reply:
        if self._desk.ready():
            return ok()
        return refusal(WorldError("not_ready", self._desk.why_not_ready()))

    async def _server(self, request: web.BaseRequest, _place: Place) -> Reply:
        changeable = is_open(self._repository, socket=_by_socket(request))
        extensions = (*HTTP_EXTENSIONS, REPOSITORY_EXTENSION) if changeable else HTTP_EXTENSIONS
        return ok(server_metadata("appliance", _version(), extensions))

    async def _index(self, request: web.BaseRequest, _place: Place) -> Reply:
        ready = await self._small(request, only_ready)
        cards = [self._desk.describe(name, "") for name in self._desk.models()]
        why = self._desk.why_not_ready() or NOT_LOADED
        rows = [(card.name, each, card.ready, "" if card.ready else why) for card in cards for each in card.versions]
        return ok(repository_index([row for row in rows if row[2] or not ready]))

    async def _load(self, request: web.BaseRequest, place: Place) -> Reply:
        self._check_open(request)
        await self._small(request, check_load)
        await self._desk.load(place.model)
        return ok()

    async def _unload(self, request: web.BaseRequest, place: Place) -> Reply:
        self._check_open(request)
        await self._small(request, check_unload)
        await self._desk.unload(place.model)
        return ok()

    async def _foreign_memory(self, _request: web.BaseRequest, _place: Place) -> Reply:
        what = "memory by name is not taken: a file that its owner can truncate would fault this process"
        raise TheirsError("unsupported", what, remedy="register a sealed memfd on frames.sock (docs/api.md), or send the data in the body")

    def _check_open(self, request: web.BaseRequest) -> None:
        check_open(self._repository, socket=_by_socket(request))
        if hdrs.ORIGIN in request.headers:
            raise TheirsError("forbidden", "a web page may not change what is served", where=hdrs.ORIGIN)

    async def _small(self, request: web.BaseRequest, read: Callable[[bytes | bytearray], T]) -> T:
        """Read a body that nobody keeps."""
        body = await self._intake.receive(request)
        try:
            return read(body)
        finally:
            self._intake.done(body)

    async def _scrape(self, _request: web.BaseRequest, _place: Place) -> Reply:
        return ok(self._metrics(), EXPOSITION)

    async def _tell(self, _request: web.BaseRequest, _place: Place) -> Reply:
        return ok(msgspec.json.encode(self._status()))

    async def _model(self, _request: web.BaseRequest, place: Place) -> Reply:
        card = self._desk.describe(place.model, place.version)
        return ok(model_metadata(card.name, card.versions, card.signature, card.max_batch))

    async def _model_ready(self, _request: web.BaseRequest, place: Place) -> Reply:
        if self._desk.describe(place.model, place.version).ready:
            return ok()
        return refusal(WorldError("not_ready", self._desk.why_not_ready() or NOT_LOADED, where=place.model))


def _rendered(answer: Answer | Promise, layout: Layout) -> Reply:
    if isinstance(answer, Promise):
        return accepted(promised(answer), answer.retry_after_s)
    headers, parts = render(answer, layout)
    return Reply(parts, headers)


def _by_socket(request: web.BaseRequest) -> bool:
    """Whether a request came through the Unix socket."""
    transport = request.transport
    return transport is not None and transport.get_extra_info("socket").family == sockets.AF_UNIX


@cache
def _version() -> str:
    try:
        return version("appliance")
    except PackageNotFoundError:  # run from a checkout
        return "unknown"
