"""How payloads become columns: compressed where it helps, with a checksum over what is stored.

1. zstd level 1 from 512 bytes on, kept if it saves an eighth; a class whose last 8 payloads did not shrink is tried again only every 16th time.
2. CRC-32 over the stored bytes: it finds rot on the disk, not malice (the disk is the device's own).
3. Decompression never yields more than the length that was noted, nor more than `PAYLOAD_LIMIT`.
"""

import zlib
from enum import IntEnum

import zstandard

from appliance.contract.deferral import PAYLOAD_LIMIT
from appliance.contract.errors import WorldError

_LEAST = 512
_GIVE_UP, _TRY_AGAIN = 8, 16


class Codec(IntEnum):
    """How the column `data` is to be read; `SEGMENT` with the raw or compressed payload in a file of its own."""

    RAW = 0
    ZSTD = 1
    SEGMENT_RAW = 2
    SEGMENT_ZSTD = 3


class Packer:
    """Compresses; one instance for each thread, because its contexts are reused."""

    def __init__(self) -> None:
        self._compressor = zstandard.ZstdCompressor(level=1)
        self._decompressor = zstandard.ZstdDecompressor()
        self._vain: dict[str, int] = {}

    def pack(self, kind: str, payload: bytes) -> tuple[Codec, bytes]:
        """Return codec and stored bytes; `kind` names the class, whose payloads resemble each other."""
        if len(payload) < _LEAST:
            return Codec.RAW, payload
        vain = self._vain.get(kind, 0)
        if vain >= _GIVE_UP and vain % _TRY_AGAIN:
            self._vain[kind] = vain + 1
            return Codec.RAW, payload
        small = self._compressor.compress(payload)
        if len(small) > len(payload) - len(payload) // 8:
            self._vain[kind] = vain + 1
            return Codec.RAW, payload
        self._vain[kind] = 0
        return Codec.ZSTD, small

    def unpack(self, codec: int, raw_len: int, checksum: int, stored: bytes) -> bytes:
        """Return the payload. Raises: WorldError (`damaged`) if it is not what was stored."""
        if zlib.crc32(stored) != checksum:
            raise WorldError("damaged", "the stored payload does not agree with its checksum", remedy="check the disk")
        if codec in (Codec.RAW, Codec.SEGMENT_RAW):
            return stored
        try:
            payload: bytes = self._decompressor.decompress(stored, max_output_size=min(raw_len, PAYLOAD_LIMIT))
        except zstandard.ZstdError as error:
            raise WorldError("damaged", f"the stored payload cannot be decompressed: {error}", remedy="check the disk") from error
        return payload
