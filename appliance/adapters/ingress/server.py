"""The HTTP server: addresses to the desk and back.

1. By whose fault: the caller's is 4xx and names the problem; the world's is 429, 503 or 504, with `Retry-After` where waiting helps.
2. A caller that hangs up cancels its request. No traceback leaves; what was not foreseen is logged with an id and answered with it.
3. Everything is bounded: body, all bodies together, connections, the time of headers and bodies, and the time of a shutdown.
"""

import asyncio
import contextlib
import secrets
from collections.abc import Awaitable, Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec
import structlog
from aiohttp import web

from appliance.adapters.ingress.body import Intake
from appliance.adapters.ingress.bounds import Bounds, Reserve
from appliance.adapters.ingress.connection import Gate
from appliance.adapters.ingress.paths import Place, resolve
from appliance.adapters.ingress.replies import failure, ok, refusal
from appliance.adapters.ingress.sockets import bind_unix, unbind_unix
from appliance.contract.admission import quoted
from appliance.contract.errors import ApplianceError, OursError, TheirsError, WorldError
from appliance.contract.openinference import HEADER_LENGTH, header_length, model_metadata, parse, render, repository_index, server_metadata
from appliance.contract.vocabulary import Outcome
from appliance.ports import Desk

EXPOSITION = "text/plain; version=0.0.4; charset=utf-8"
BACKLOG = 512


def _uncounted(_model: str, _outcome: Outcome) -> None:
    """Count nothing."""


class Ingress:
    """One HTTP server on up to two addresses.

    Attributes:
        metrics, status: render the exposition, and give a msgspec struct or dict.
        body_limit_bytes: the largest body of one request, before and after inflation.
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
        refused: Callable[[str, Outcome], None] = _uncounted,
    ) -> None:
        self._desk = desk
        self._metrics = metrics
        self._status = status
        self._refused = refused
        self._bounds = bounds or Bounds()
        reserve = Reserve(max(self._bounds.bodies_bytes, 2 * body_limit_bytes))  # twice: a compressed body and what becomes of it
        self._intake = Intake(body_limit_bytes, self._bounds.body_timeout_s, reserve)
        self._log = structlog.get_logger()
        self._gate: Gate | None = None
        self._servers: list[asyncio.Server] = []
        self._socket: Path | None = None
        self._busy = 0
        self._draining = False
        self._calm = asyncio.Event()
        self._calm.set()
        self._answers: dict[str, Callable[[web.BaseRequest, Place], Awaitable[web.Response]]] = {
            "infer": self._infer,
            "live": self._live,
            "ready": self._ready,
            "server": self._server,
            "index": self._index,
            "metrics": self._scrape,
            "status": self._tell,
            "model": self._model,
            "model_ready": self._model_ready,
        }
        self.port = 0

    async def start(self, host: str, port: int, socket: Path | None) -> None:
        """Listen. Raises: WorldError (`listen`) that names the address that is taken."""
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

    async def drain(self, within_s: float) -> None:
        """Stop accepting, let what is in flight be answered, bounded by `within_s`."""
        self._draining = True
        self._unlisten()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self._calm.wait()

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

    def _unlisten(self) -> None:
        while self._servers:
            self._servers.pop().close()

    async def _handle(self, request: web.BaseRequest) -> web.Response:
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

    async def _answered(self, request: web.BaseRequest) -> web.Response:
        place = resolve(request.raw_path)
        if place is None:
            raise TheirsError("unknown_path", f"nothing is at {quoted(request.raw_path)}")
        if request.method != place.method and (request.method, place.method) != ("HEAD", "GET"):
            text = f"{quoted(request.method)} is not served at {quoted(request.raw_path)}, only {place.method}"
            return failure(405, text, "method", {"Allow": place.method})
        return await self._answers[place.what](request, place)

    def _unforeseen(self, request: web.BaseRequest, error: Exception) -> web.Response:
        token = secrets.token_hex(4)
        self._log.error("request_failed", id=token, path=request.raw_path[:200], exc_info=error)
        return failure(500, f"an internal error; the log has it under {token}", "internal")

    async def _infer(self, request: web.BaseRequest, place: Place) -> web.Response:
        body: bytes | bytearray = b""
        try:
            body = await self._intake.receive(request)
            asked, layout = parse(place.model, place.version, header_length(request.headers.get(HEADER_LENGTH)), body)
        except BaseException as error:
            self._intake.done(body)
            self._count(place.model, error)
            raise
        try:
            headers, parts = render(await self._desk.infer(asked), layout)
            return web.Response(body=b"".join(parts), headers=headers)
        finally:
            self._intake.done(body)

    def _count(self, model: str, error: BaseException) -> None:
        """Tell of a request that the desk never saw; a caller's own text never becomes a label."""
        outcome = Outcome.INTERNAL
        if isinstance(error, TheirsError):
            outcome = Outcome.MALFORMED
        elif isinstance(error, WorldError):
            outcome = Outcome.BACKLOG_FULL
        elif isinstance(error, asyncio.CancelledError | ConnectionError):
            outcome = Outcome.CANCELLED
        self._refused(model if model in self._desk.models() else "-", outcome)

    async def _live(self, _request: web.BaseRequest, _place: Place) -> web.Response:
        return ok() if self._desk.live() else failure(503, "the daemon's loops do not move", "not_ready")

    async def _ready(self, _request: web.BaseRequest, _place: Place) -> web.Response:
        if self._desk.ready():
            return ok()
        return refusal(WorldError("not_ready", self._desk.why_not_ready()))

    async def _server(self, _request: web.BaseRequest, _place: Place) -> web.Response:
        return ok(server_metadata("appliance", _version()))

    async def _index(self, _request: web.BaseRequest, _place: Place) -> web.Response:
        cards = [self._desk.describe(name, "") for name in self._desk.models()]
        why = self._desk.why_not_ready()
        rows = [(card.name, each, card.ready, "" if card.ready else why) for card in cards for each in card.versions]
        return ok(repository_index(rows))

    async def _scrape(self, _request: web.BaseRequest, _place: Place) -> web.Response:
        return ok(self._metrics(), EXPOSITION)

    async def _tell(self, _request: web.BaseRequest, _place: Place) -> web.Response:
        return ok(msgspec.json.encode(self._status()))

    async def _model(self, _request: web.BaseRequest, place: Place) -> web.Response:
        card = self._desk.describe(place.model, place.version)
        return ok(model_metadata(card.name, card.versions, card.signature, card.max_batch))

    async def _model_ready(self, _request: web.BaseRequest, place: Place) -> web.Response:
        if self._desk.describe(place.model, place.version).ready:
            return ok()
        return refusal(WorldError("not_ready", self._desk.why_not_ready() or "it is being made ready", where=place.model))


@cache
def _version() -> str:
    try:
        return version("appliance")
    except PackageNotFoundError:  # run from a checkout
        return "unknown"
