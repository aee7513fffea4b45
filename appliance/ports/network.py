"""The network: the broker, an identity, the way to the cloud."""

import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from appliance.contract.inference import Answer, Request, Tags


@dataclass(frozen=True, slots=True)
class Inbound:
    """One received message."""

    topic: str
    payload: bytes


class Link(Protocol):
    """A connection to the region's broker that heals itself; everything here returns within its timeout, connected or not."""

    @property
    def connected(self) -> bool:
        """Whether the broker's session is up now."""

    @property
    def rotations(self) -> int:
        """How many times the connection moved to a renewed SVID since start."""

    async def publish(self, topic: str, payload: bytes, *, retain: bool = False, qos: int = 1, timeout_s: float = 5.0) -> None:
        """Publish. Raises: WorldError (`not_connected`, `timeout`), TheirsError (`not_authorised`: the broker refused)."""

    async def ask(self, topic: str, payload: bytes, *, timeout_s: float = 5.0, qos: int = 1) -> bytes:
        """Send a request (`qos` 0 for chunks, where the answer is the acknowledgement) and return the answer's bytes.

        Raises: WorldError (`not_connected`, `timeout`), TheirsError with the peer's reason if it refused.
        """

    def on(self, pattern: str, handler: Callable[[Inbound], Awaitable[None]]) -> None:
        """Subscribe; the message is acknowledged to the broker after `handler` returned. Call before `run`."""

    def serve(self, pattern: str, handler: Callable[[Inbound], Awaitable[bytes]]) -> None:
        """Answer requests on topics that match; an ApplianceError becomes a `Refused`. Call before `run`."""

    async def run(self) -> None:
        """Connect, reconnect with backoff, rotate with the SVID; ends only by cancellation."""


class Identity(Protocol):
    """The workload's SPIFFE identity; keys live in memory only."""

    @property
    def spiffe_id(self) -> str:
        """This workload's own SPIFFE ID."""

    @property
    def not_after(self) -> float:
        """When the present SVID expires, seconds since the epoch."""

    def client_context(self, peer: str) -> ssl.SSLContext:
        """A TLS 1.3 context with the present SVID that accepts only a server whose SPIFFE ID is `peer`.

        Raises: WorldError (`svid_expired`, `workload_api`).
        """

    async def renewed(self) -> None:
        """Return when a newer SVID than at the time of the call has arrived."""


class Upstream(Protocol):
    """The way to the same models in the cloud, while it is open."""

    @property
    def stands(self) -> bool:
        """Whether the way as a whole can be relied on now; a single failure does not change it."""

    def allows(self, tags: Tags) -> bool:
        """Whether a request with these tags may go there now: the route is up, and nothing forbids it."""

    async def infer(self, request: Request, within_s: float) -> Answer:
        """Answer by the full model in the cloud; returns within the time, always.

        Raises: WorldError (`partitioned`, `deadline`, `backlog_full`), TheirsError with the cloud's reason.
        """
