"""The local API: Open Inference Protocol v2 over HTTP on loopback TCP and on a Unix socket, beside `/metrics` and `/status`.

1. Bodies are bounded: a declared size above the limit is refused before a byte of it is read, an undeclared one when it has grown too large.
2. By whose fault: the caller's is 4xx and names the problem; ours or the world's is 429, 503 or 504 with `Retry-After`.
3. A caller that hangs up cancels its request. No traceback leaves; what was not foreseen is logged with an id and answered with it.
"""

import asyncio
import contextlib
import math
import secrets
import zlib
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import structlog
from aiohttp import web

from appliance.contract.errors import ApplianceError, TheirsError, WorldError
from appliance.contract.openinference import HEADER_LENGTH, header_length, model_metadata, parse, render
from appliance.ports import Desk

SERVER = {"name": "appliance", "version": "0.1.0", "extensions": ["binary_tensor_data", "model_repository"]}
STATUS = {"unknown_model": 404, "backlog_full": 429, "deadline": 504, "worker_lost": 503, "not_ready": 503, "draining": 503}
BODY_TIMEOUT_S = 30.0
KEEPALIVE_S = 75.0
JSON = "application/json"


class Ingress:
    """One HTTP server on up to two addresses. `metrics` renders the exposition, `status` gives a msgspec struct or dict."""

    def __init__(self, desk: Desk, *, metrics: Callable[[], bytes], status: Callable[[], object], body_limit_bytes: int) -> None:
        self._desk = desk
        self._metrics = metrics
        self._status = status
        self._limit = body_limit_bytes
        self._runner: web.AppRunner | None = None
        self._log = structlog.get_logger()
        self._busy = 0
        self._calm = asyncio.Event()
        self._calm.set()
        self.port = 0

    async def start(self, host: str, port: int, socket: Path | None) -> None:
        """Listen. Raises: WorldError (`listen`) that names the address that is taken."""
        app = web.Application(client_max_size=self._limit, middlewares=[self._guard])
        app.add_routes(
            [
                web.get("/v2/health/live", self._live),
                web.get("/v2/health/ready", self._ready),
                web.get("/v2", self._server),
                web.post("/v2/repository/index", self._index),
                web.get("/metrics", self._scrape),
                web.get("/status", self._tell),
            ]
        )
        for prefix in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
            app.add_routes(
                [web.get(prefix, self._model), web.get(prefix + "/ready", self._model_ready), web.post(prefix + "/infer", self._infer)]
            )
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, auto_decompress=False, keepalive_timeout=KEEPALIVE_S)
        await self._runner.setup()
        await self._listen(web.TCPSite(self._runner, host, port), f"{host}:{port}")
        self.port = self._runner.addresses[0][1]
        if socket is not None:
            await asyncio.to_thread(_clear, socket)
            await self._listen(web.UnixSite(self._runner, str(socket)), str(socket))
            await asyncio.to_thread(socket.chmod, 0o660)

    async def _listen(self, site: web.BaseSite, where: str) -> None:
        try:
            await site.start()
        except OSError as error:
            raise WorldError(
                "listen", f"cannot listen: {error.strerror or error}", where=where, remedy="choose another address in [serve]"
            ) from error

    async def drain(self, within_s: float) -> None:
        """Stop accepting, let what is in flight be answered, bounded by `within_s`."""
        if self._runner is None:
            return
        for site in tuple(self._runner.sites):
            await site.stop()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._calm.wait(), within_s)

    async def close(self) -> None:
        """Close every connection."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    @web.middleware
    async def _guard(self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> web.StreamResponse:
        """Turn every error into an answer that names the problem."""
        self._busy += 1
        self._calm.clear()
        try:
            return await handler(request)
        except ApplianceError as error:
            return _refusal(error)
        except web.HTTPException as error:
            return _error(error.status, f"{request.method} {request.path}: {error.reason}", dict(error.headers))
        except Exception:  # noqa: BLE001 - the last line of defence: nothing unforeseen may reach a caller as a traceback
            token = secrets.token_hex(4)
            self._log.exception("request_failed", id=token, path=request.path)
            return _error(500, f"an internal error; the log has it under {token}", {})
        finally:
            self._busy -= 1
            if not self._busy:
                self._calm.set()

    async def _live(self, _request: web.Request) -> web.Response:
        return web.Response(status=200 if self._desk.live() else 503)

    async def _ready(self, _request: web.Request) -> web.Response:
        return web.Response() if self._desk.ready() else _error(503, self._desk.why_not_ready(), {"Retry-After": "1"})

    async def _server(self, _request: web.Request) -> web.Response:
        return _json(msgspec.json.encode(SERVER))

    async def _index(self, _request: web.Request) -> web.Response:
        cards = [self._desk.describe(name, "") for name in self._desk.models()]
        rows = [
            {"name": card.name, "version": version, "state": "READY" if card.ready else "UNAVAILABLE"}
            for card in cards
            for version in card.versions
        ]
        return _json(msgspec.json.encode(rows))

    async def _scrape(self, _request: web.Request) -> web.Response:
        return web.Response(body=self._metrics(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def _tell(self, _request: web.Request) -> web.Response:
        return _json(msgspec.json.encode(self._status()))

    async def _model(self, request: web.Request) -> web.Response:
        card = self._desk.describe(request.match_info["model"], request.match_info.get("version", ""))
        return _json(model_metadata(card.name, card.versions, card.signature, card.max_batch))

    async def _model_ready(self, request: web.Request) -> web.Response:
        card = self._desk.describe(request.match_info["model"], request.match_info.get("version", ""))
        return web.Response(status=200 if card.ready else 503)

    async def _infer(self, request: web.Request) -> web.Response:
        body = await self._body(request)
        length = header_length(request.headers.get(HEADER_LENGTH))
        asked, layout = parse(request.match_info["model"], request.match_info.get("version", ""), length, body)
        headers, parts = render(await self._desk.infer(asked), layout)
        return web.Response(body=b"".join(parts), headers=headers)

    async def _body(self, request: web.Request) -> bytes:
        if (request.content_length or 0) > self._limit:
            raise self._too_large()
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                body = await request.read()
        except web.HTTPRequestEntityTooLarge:
            raise self._too_large() from None
        except TimeoutError:
            raise TheirsError("timeout", f"the body did not arrive within {BODY_TIMEOUT_S:g} s") from None
        encoding = request.headers.get("Content-Encoding", "identity")
        return body if encoding == "identity" else self._inflate(body, encoding)

    def _inflate(self, body: bytes, encoding: str) -> bytes:
        if encoding not in {"gzip", "deflate"}:
            raise TheirsError("encoding", f"Content-Encoding {encoding[:40]!r} is not supported", remedy="use gzip, deflate or none")
        unpacker = zlib.decompressobj(wbits=47)  # 32 + 15: gzip or zlib by their headers
        try:
            plain = unpacker.decompress(body, self._limit + 1)
        except zlib.error as error:
            raise TheirsError("malformed", f"the body is not {encoding}: {error}") from error
        if len(plain) > self._limit:
            raise self._too_large()
        if not unpacker.eof:
            raise TheirsError("malformed", f"the {encoding} body is cut short")
        return plain

    def _too_large(self) -> TheirsError:
        return TheirsError("too_large", f"the body is larger than {self._limit} bytes", remedy="send less, or raise serve.body_limit_mib")


def _clear(socket: Path) -> None:
    socket.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
    socket.unlink(missing_ok=True)


def _json(body: bytes) -> web.Response:
    return web.Response(body=body, headers={"Content-Type": JSON})


def _error(status: int, text: str, headers: dict[str, str]) -> web.Response:
    kept = {name: value for name, value in headers.items() if name in {"Allow", "Retry-After", "Retry-After-Ms"}}
    return web.Response(status=status, body=msgspec.json.encode({"error": text}), headers={"Content-Type": JSON, **kept})


def _refusal(error: ApplianceError) -> web.Response:
    """The status that says by whose fault."""
    status = STATUS.get(error.reason) or {"too_large": 413, "timeout": 408, "encoding": 415}.get(error.reason)
    if status is None:
        status = 400 if isinstance(error, TheirsError) else 503
    headers = {}
    if status in {429, 503}:
        after_s = error.retry_after_s or 1.0
        headers = {"Retry-After": str(math.ceil(after_s)), "Retry-After-Ms": str(math.ceil(after_s * 1e3))}
    return _error(status, str(error), headers)
