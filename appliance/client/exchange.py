"""HTTP/1.1 as the client speaks it, without a socket: addresses, requests to bytes, bytes to replies.

1. A reply has a body of `Content-Length`, of chunks, or up to the end of the connection (RFC 9112, 6.3); 1xx replies are passed over.
2. Headers and body are bounded. Framing that is broken, or beyond the bounds, is a TheirsError (`malformed`); an end before the whole reply is a
   `LostError`: the server may have done what it was asked.
3. `ReplyReader` has the shape of asyncio's BufferedProtocol: bytes are received where they stay, a large body is not copied.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from appliance.contract import frames
from appliance.contract.admission import quoted
from appliance.contract.errors import TheirsError, WorldError

MAX_HEAD_BYTES = 65_536
MAX_BODY_BYTES = 256 * 1024 * 1024
"""A whole reply is held in memory; a batch of 8 label readings is 13 MB."""
_LENGTH_DIGITS = 12
_NO_CONTENT = frozenset({204, 304})
_CONTINUE = range(100, 200)
_UNIX = "unix:"

Parts = Sequence[bytes | memoryview]


class LostError(WorldError):
    """The request was sent, in part at least, and no whole reply came back; its reason is `unreachable`."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens: a Unix socket's `path`, or else `host` and `port`. `text` is how the caller wrote it."""

    text: str
    host: str = "localhost"
    port: int = 0
    path: str = ""

    @property
    def frames(self) -> str:
        """The path of the frames socket, beside the API's own; empty for a server that is reached by TCP."""
        return f"{self.path.rpartition('/')[0]}/{frames.SOCKET}" if self.path else ""


def address(server: str) -> Address:
    """Read `http://host:port` or `unix:/path`. Raises: TheirsError (`server`)."""
    if server.startswith(_UNIX):
        return Address(server, path=server.removeprefix(_UNIX))
    try:
        parts = urlsplit(server)
        host, port = parts.hostname if parts.scheme == "http" else None, parts.port or 80
    except ValueError:  # a port or an IPv6 address that is none
        host, port = None, 0
    if not host:
        raise TheirsError("server", f"{server!r} is no address", remedy="write http://host:port or unix:/path")
    return Address(server, host, port)


@dataclass(frozen=True, slots=True)
class Asked:
    """One request: the parts of its body travel as they are, one after the other."""

    method: str
    target: str
    parts: Parts = ()
    headers: Mapping[str, str] = field(default_factory=dict)

    def render(self, host: str) -> list[bytes | memoryview]:
        """Return the bytes to send."""
        lines = [f"{self.method} {self.target} HTTP/1.1", f"Host: {host}", *(f"{name}: {value}" for name, value in self.headers.items())]
        if self.parts or self.method == "POST":
            lines.append(f"Content-Length: {sum(len(part) for part in self.parts)}")
        return ["\r\n".join((*lines, "", "")).encode(), *self.parts]


@dataclass(frozen=True, slots=True)
class Reply:
    """One whole reply; header names are in lower case. `keep`: the connection can be used again."""

    status: int
    headers: Mapping[str, str]
    body: bytearray
    keep: bool


class ReplyReader:
    """Collects one reply after the other from one connection; `where` names the server in errors."""

    def __init__(self, where: str, limit_bytes: int = MAX_BODY_BYTES) -> None:
        self._where = where
        self._limit = limit_bytes
        self._scratch = bytearray(MAX_HEAD_BYTES)
        self._begin()

    def _begin(self) -> None:
        self._have = 0
        self._head: tuple[int, dict[str, str], bool] | None = None
        self._body = bytearray()
        self._is_sized = self._is_chunked = False
        self._raw = bytearray()

    def buffer(self) -> memoryview:
        """Where the next bytes go; never empty."""
        if self._is_sized:
            return memoryview(self._body)[self._have :]
        return memoryview(self._scratch)[self._have :] if self._head is None else memoryview(self._scratch)

    def filled(self, size: int) -> Reply | None:
        """Take the `size` bytes that were put into `buffer()`, 0 at the end of the connection; return the reply when it is whole.

        Raises: TheirsError (`malformed`), LostError.
        """
        if not size:
            return self._ended()
        if self._head is None:
            self._have += size
            return self._read_head()
        if self._is_sized:
            self._have += size
            return self._whole() if self._have == len(self._body) else None
        return self._grow(memoryview(self._scratch)[:size])

    def _ended(self) -> Reply | None:
        if self._head is not None and not self._is_sized and not self._is_chunked:
            return self._whole()
        raise LostError("unreachable", "no answer: the connection ended before it was complete", where=self._where)

    def _read_head(self) -> Reply | None:
        while self._head is None:
            end = self._scratch.find(b"\r\n\r\n", 0, self._have)
            if end < 0:
                if self._have == len(self._scratch):
                    raise self._malformed(f"its headers are longer than {MAX_HEAD_BYTES} bytes")
                return None
            status, headers, is_recent = self._parsed(bytes(self._scratch[:end]))
            rest = self._scratch[end + 4 : self._have]
            if status in _CONTINUE:
                self._have = len(rest)
                self._scratch[: self._have] = rest
                continue
            self._head = status, headers, is_recent
        return self._start_body(memoryview(rest))

    def _start_body(self, rest: memoryview) -> Reply | None:
        status, headers, _ = self._head or (0, {}, False)
        if "transfer-encoding" in headers:
            if headers["transfer-encoding"].lower() != "chunked":
                raise self._malformed(f"Transfer-Encoding {quoted(headers['transfer-encoding'])}")
            self._is_chunked = True
            return self._grow(rest)
        length = headers.get("content-length", "0" if status in _NO_CONTENT else None)
        if length is None:
            return self._grow(rest)
        if not (length.isascii() and length.isdigit() and len(length) <= _LENGTH_DIGITS) or len(rest) > int(length):
            raise self._malformed(f"Content-Length {quoted(length)}")
        self._check(int(length))
        self._body, self._is_sized, self._have = bytearray(int(length)), True, len(rest)
        self._body[: len(rest)] = rest
        return self._whole() if self._have == len(self._body) else None

    def _grow(self, data: memoryview) -> Reply | None:
        if not self._is_chunked:
            self._check(len(self._body) + len(data))
            self._body += data
            return None
        self._raw += data
        while (line := self._raw.find(b"\r\n")) >= 0:
            size = self._chunk_size(bytes(self._raw[:line]))
            end = line + 2 + size
            if len(self._raw) < end + 2:
                return None
            if self._raw[end : end + 2] != b"\r\n":  # trailers, which no server of this protocol sends, are refused too
                raise self._malformed("a chunk does not end where it said")
            self._body += self._raw[line + 2 : end]
            del self._raw[: end + 2]
            if not size:
                return self._whole()
        if len(self._raw) > MAX_HEAD_BYTES:
            raise self._malformed("a chunk without a size")
        return None

    def _chunk_size(self, line: bytes) -> int:
        digits = line.partition(b";")[0].strip()
        try:
            size = int(digits, 16) if digits.isalnum() and len(digits) <= _LENGTH_DIGITS else -1
        except ValueError:
            size = -1
        if size < 0:
            raise self._malformed("a chunk without a size")
        self._check(len(self._body) + size)
        return size

    def _whole(self) -> Reply:
        status, headers, is_recent = self._head or (0, {}, False)
        is_delimited = self._is_sized or self._is_chunked
        keep = is_recent and is_delimited and not self._raw and headers.get("connection", "").lower() != "close"
        reply = Reply(status, headers, self._body, keep)
        self._begin()
        return reply

    def _check(self, size: int) -> None:
        if size > self._limit:
            raise self._malformed(f"more than {self._limit} bytes")

    def _parsed(self, head: bytes) -> tuple[int, dict[str, str], bool]:
        first, *lines = head.decode("latin-1").split("\r\n")
        version, _, rest = first.partition(" ")
        code = rest[:3]
        if version not in {"HTTP/1.0", "HTTP/1.1"} or not (code.isascii() and code.isdigit() and rest[3:4] in {"", " "}):
            raise self._malformed(f"{quoted(first)} is no HTTP")
        headers: dict[str, str] = {}
        for line in lines:
            name, colon, value = line.partition(":")
            name, value = name.lower(), value.strip(" \t")
            if not colon or not name or name != name.strip() or (name == "content-length" and headers.get(name, value) != value):
                raise self._malformed(f"header {quoted(line)}")
            headers[name] = value
        return int(code), headers, version == "HTTP/1.1"

    def _malformed(self, what: str) -> TheirsError:
        return TheirsError("malformed", f"the answer: {what}", where=self._where)
