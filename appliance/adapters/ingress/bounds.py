"""What one caller, and all callers together, may take of the ingress."""

from dataclasses import dataclass

from appliance.contract.errors import WorldError


@dataclass(frozen=True, slots=True)
class Bounds:
    """Limits beside the size of one body. Sizes in bytes, times in seconds.

    Attributes:
        bodies_bytes: all bodies that are being read or wait for their answer, together (at least one largest body is let in).
        connections: open connections; one more is answered 503 and closed.
        header_timeout_s: from the first byte of a request to the end of its headers.
        body_timeout_s: from the end of the headers to the end of the body.
        keepalive_s: how long an idle connection stays open.
        linger_s: how long the rest of a refused body is thrown away, so that the caller can read the refusal.
        close_s: how long `close` lets an answer finish.
        lenders: open connections of the frames socket; each may have `regions` regions of together `region_bytes`.
        all_regions, all_regions_bytes: the regions of all lenders together, those included that are not yet unmapped.
    """

    bodies_bytes: int = 256 * 1024 * 1024
    connections: int = 512
    header_timeout_s: float = 10.0
    body_timeout_s: float = 30.0
    keepalive_s: float = 75.0
    linger_s: float = 2.0
    close_s: float = 0.5
    lenders: int = 64
    regions: int = 32
    region_bytes: int = 512 * 1024 * 1024
    all_regions: int = 256
    all_regions_bytes: int = 1024 * 1024 * 1024


class Reserve:
    """The bytes that all bodies share."""

    __slots__ = ("_free", "_total")

    def __init__(self, total: int) -> None:
        self._total = total
        self._free = total

    @property
    def free(self) -> int:
        """Bytes that nobody holds."""
        return self._free

    def take(self, size: int) -> None:
        """Take bytes. Raises: WorldError (`backlog_full`) if they are not there; nothing is taken then."""
        if size > self._free:
            what = f"the bodies of all requests in flight would exceed {self._total} bytes"
            raise WorldError("backlog_full", what, remedy="ask again later", retry_after_s=1.0)
        self._free -= size

    def give(self, size: int) -> None:
        """Give taken bytes back."""
        self._free += size
