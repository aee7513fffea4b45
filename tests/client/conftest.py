"""For the client's tests: a tiny server that answers what a test says, the real ingress with a desk that doubles, and both clients in one dress."""

import asyncio
import contextlib
import shutil
import socketserver
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, Self

import pytest
import uvloop

from appliance.adapters.inference.shares import Shares
from appliance.adapters.ingress import Ingress
from appliance.client.aio import AsyncAppliance
from appliance.client.sync import Appliance
from appliance.contract.frames import SOCKET
from tests.fakes.desk import DoublingDesk

Reply = tuple[int, dict[str, str], bytes]


@dataclass
class Site:
    """Where the server listens, what it was asked, and how it answers; `reply(method, path, headers, body)` may be replaced."""

    tcp: str
    unix: str
    reply: Callable[[str, str, dict[str, str], bytes], Reply]
    asked: list[tuple[str, str, dict[str, str], bytes]] = field(default_factory=list)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 10
    site: Site

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        asked = (self.command, self.path, {name.lower(): value for name, value in self.headers.items()}, body)
        self.site.asked.append(asked)
        status, headers, payload = self.site.reply(*asked)
        self.send_response(status)
        for name, value in {"Content-Length": str(len(payload)), **headers}.items():
            self.send_header(name, value)
        with contextlib.suppress(OSError):  # the client has left
            self.end_headers()
            self.wfile.write(payload)
        self.close_connection = "Content-Length" in headers  # a wrong length can only end with the connection

    def finish(self) -> None:
        with contextlib.suppress(OSError):  # the client has left
            super().finish()

    do_GET = do_POST = _answer  # noqa: N815 - the names that http.server looks for

    def address_string(self) -> str:
        return "test"

    def log_message(self, *_: Any) -> None:
        pass


class _Tcp(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False


class _Unix(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    block_on_close = False


def not_there(*_: Any) -> Reply:
    return 404, {}, b'{"error": "nothing is here"}'


@pytest.fixture
def site() -> Iterator[Site]:
    """A running server that answers 404 until a test says otherwise."""
    folder = Path(tempfile.mkdtemp(prefix="ap-", dir="/tmp"))
    handler = type("Handler", (_Handler,), {})
    servers = [_Tcp(("127.0.0.1", 0), handler), _Unix(str(folder / "s"), handler)]
    handler.site = Site(f"http://127.0.0.1:{servers[0].server_address[1]}", f"unix:{folder / 's'}", not_there)
    threads = [threading.Thread(target=server.serve_forever, args=(0.02,)) for server in servers]
    for thread in threads:
        thread.start()
    yield handler.site
    for server, thread in zip(servers, threads, strict=True):
        server.shutdown()
        server.server_close()
        thread.join()
    shutil.rmtree(folder)


class Looped:
    """An event loop in a thread."""

    def __init__(self) -> None:
        self.loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()

    def run(self, work: Any) -> Any:
        """Run a coroutine there, and wait for what it returns."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(20)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()


@pytest.fixture
def looped() -> Iterator[Looped]:
    looped = Looped()
    yield looped
    looped.close()


class Daemon:
    """The real ingress, with frames, on a Unix socket; `with_frames` is looked at when it starts."""

    def __init__(self, folder: Path, looped: Looped) -> None:
        self.desk = DoublingDesk()
        self.url = f"unix:{folder / 'api.sock'}"
        self.with_frames = True
        self.counter: Any = None
        self._folder = folder
        self._looped = looped
        self._ingress: Ingress | None = None
        self.shares = Shares(lambda _number: None)

    def start(self) -> None:
        self._looped.run(self._start())

    def stop(self) -> None:
        if self._ingress is not None:
            self._looped.run(self._ingress.close())
            self._ingress = None

    @property
    def mapped(self) -> int:
        """Regions that are mapped now; every arrears of the loop is done first."""
        self._looped.run(asyncio.sleep(0.05))
        return len(self.shares.regions)

    async def _start(self) -> None:
        self._ingress = Ingress(self.desk, metrics=lambda: b"", status=dict, share=self.shares.open, counter=self.counter)
        frames = self._folder / SOCKET if self.with_frames else None
        await self._ingress.start("127.0.0.1", 0, self._folder / "api.sock", frames)


@pytest.fixture
def daemon(looped: Looped) -> Iterator[Daemon]:
    """A running ingress, which a test may stop and start."""
    folder = Path(tempfile.mkdtemp(prefix="ap-", dir="/tmp"))
    daemon = Daemon(folder, looped)
    daemon.start()
    yield daemon
    daemon.desk.asked.clear()
    daemon.stop()
    shutil.rmtree(folder)


class Dressed:
    """The async client with the sync one's calls."""

    def __init__(self, looped: Looped, *arguments: Any, **options: Any) -> None:
        self._looped = looped
        self.inner: Any = looped.run(self._made(arguments, options))

    async def _made(self, arguments: Any, options: Any) -> AsyncAppliance:
        return AsyncAppliance(*arguments, **options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *arguments, **options: self._looped.run(getattr(self.inner, name)(*arguments, **options))


@pytest.fixture(params=["sync", "async"])
def client_of(request: pytest.FixtureRequest, looped: Looped) -> Callable[..., Any]:
    """Makes the sync client, and the async one in its dress: what is promised is promised of both."""
    if request.param == "sync":
        return Appliance
    return lambda *arguments, **options: Dressed(looped, *arguments, **options)
