"""A tiny server of the Open Inference Protocol on TCP and on a Unix socket, for the client's tests."""

import shutil
import socketserver
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

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
        self.end_headers()
        self.wfile.write(payload)
        self.close_connection = "Content-Length" in headers  # a wrong length can only end with the connection

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
