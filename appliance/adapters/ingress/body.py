"""Reads a request's body within bounds: size, time, and the memory that all bodies share.

1. A declared size above the limit is refused before a byte of it is read, an undeclared one when it has grown too large.
2. Bytes are counted against the reserve as they come, not as they are announced: nobody can reserve what he does not send.
3. gzip and deflate are inflated to at most the limit, off the loop where it could take long.
"""

import asyncio
import zlib

from aiohttp import StreamReader, hdrs, web
from aiohttp.http_exceptions import HttpProcessingError

from appliance.adapters.ingress.bounds import Reserve
from appliance.contract.admission import quoted
from appliance.contract.errors import TheirsError

ENCODINGS = ("gzip", "deflate")
INLINE_BYTES = 4_096
"""A compressed body of this size inflates to 4 MiB at most, in about 10 ms; larger ones go to a thread."""
PIECE_BYTES = 65_536
"""Inflated at a time, so that a thread never keeps the interpreter from the loop for long."""
DEFLATE_RATIO = 1_032
"""The largest ratio that deflate reaches (zlib's technical details)."""


class Intake:
    """Reads bodies of at most `limit_bytes` within `timeout_s`; what it holds is taken from `reserve` until `done`."""

    def __init__(self, limit_bytes: int, timeout_s: float, reserve: Reserve) -> None:
        self._limit = limit_bytes
        self._timeout_s = timeout_s
        self._reserve = reserve

    async def receive(self, request: web.BaseRequest) -> bytes | bytearray:
        """Return the body; the caller owes `done(body)`.

        Raises: TheirsError (`oversized`, `timeout`, `encoding`, `malformed`), WorldError (`backlog_full`).
        """
        headers, content = request.headers, request.content
        encoding = headers.get(hdrs.CONTENT_ENCODING, "identity").strip().lower()
        if encoding != "identity" and encoding not in ENCODINGS:
            what = f"Content-Encoding {quoted(encoding)} is not supported"
            raise TheirsError("encoding", what, remedy=f"use {', '.join(ENCODINGS)} or none")
        if (request.content_length or 0) > self._limit:
            raise self._oversized(f"{request.content_length} bytes are announced")
        if content.is_eof():  # it came together with the headers
            body = content.read_nowait()
            self._take(len(body), 0)
        else:
            if hdrs.EXPECT in headers and request.transport is not None:
                request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            body = await self._wait_for(content)
        return body if encoding == "identity" else await self._inflate(body, encoding)

    def done(self, body: bytes | bytearray) -> None:
        """Give the body's bytes back to the reserve."""
        self._reserve.give(len(body))

    async def _wait_for(self, content: StreamReader) -> bytes:
        chunks: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._timeout_s):
                while chunk := await content.readany():
                    self._take(len(chunk), size)
                    size += len(chunk)
                    chunks.append(chunk)
        except BaseException as error:
            self._reserve.give(size)
            if isinstance(error, TimeoutError):
                raise TheirsError("timeout", f"the body did not arrive within {self._timeout_s:g} s; {size} bytes did") from error
            if isinstance(error, HttpProcessingError | web.RequestPayloadError):
                raise TheirsError("malformed", f"the body's framing is broken: {_first_line(error)}") from error
            raise
        return b"".join(chunks)

    def _take(self, size: int, before: int) -> None:
        """Take the bytes of one more piece of a body."""
        if before + size > self._limit:
            raise self._oversized("one without a declared size grew beyond it")
        self._reserve.take(size)

    async def _inflate(self, body: bytes, encoding: str) -> bytearray:
        most = min(len(body) * DEFLATE_RATIO, self._limit)
        try:
            self._reserve.take(most)
        except BaseException:
            self._reserve.give(len(body))
            raise
        plain = bytearray()
        try:
            if len(body) <= INLINE_BYTES:
                plain = self._inflated(body, encoding)
            else:
                plain = await asyncio.to_thread(self._inflated, body, encoding)
        finally:
            self._reserve.give(most + len(body) - len(plain))
        return plain

    def _inflated(self, body: bytes, encoding: str) -> bytearray:
        inflater = zlib.decompressobj(wbits=47)  # 32 + 15: a gzip or a zlib header, whichever is there
        plain = bytearray()
        view = memoryview(body)
        offset = 0
        try:
            while not inflater.eof and (offset < len(view) or inflater.unconsumed_tail):
                piece = inflater.unconsumed_tail
                if not piece:
                    piece = bytes(view[offset : offset + PIECE_BYTES])
                    offset += PIECE_BYTES
                plain += inflater.decompress(piece, PIECE_BYTES)
                if len(plain) > self._limit:
                    raise self._oversized(f"the {encoding} body grew beyond it when inflated")
        except zlib.error as error:
            raise TheirsError("malformed", f"the body is not {encoding}: {error}") from error
        if not inflater.eof:
            raise TheirsError("malformed", f"the {encoding} body is cut short")
        if inflater.unused_data or offset < len(view):
            raise TheirsError("malformed", f"more bytes follow the {encoding} body")
        return plain

    def _oversized(self, how: str) -> TheirsError:
        what = f"the body is larger than {self._limit} bytes: {how}"
        return TheirsError("oversized", what, remedy="send less, or raise serve.body_limit_mib")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
