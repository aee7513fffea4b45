"""A region and a device of it in one process: the real loops of both on a paper TPM, and a wire between them that tests may bend."""

import os
from collections.abc import Awaitable, Callable, Mapping

from cryptography.hazmat.primitives.asymmetric import ec

from appliance.contract.errors import WorldError
from appliance.core.trust.anchors import PcrPolicy
from appliance.core.trust.lease import Terms
from appliance.edge.trusting import Trusting
from appliance.ports import Inbound
from appliance.regional.attesting import Attesting, Authorities
from tests.fakes.paper_port import PaperPort
from tests.fakes.paper_tpm import GOOD_PCRS, WALL

REGION, DEVICE = "eu-1", "dev-1"
ARTIFACT = "ab" * 32


class PaperClock:
    """Time that the test owns."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return WALL

    async def sleep_until(self, deadline: float) -> None:
        self.now = max(self.now, deadline)


class PaperDepot:
    """Small state files in memory; only what trust uses."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.writes = 0

    def save(self, name: str, payload: bytes) -> None:
        self.files[name] = payload
        self.writes += 1

    def load(self, name: str) -> bytes | None:
        return self.files.get(name)

    def names(self, prefix: str) -> list[str]:
        return sorted(name for name in self.files if name.startswith(prefix))

    def forget(self, name: str) -> None:
        self.files.pop(name, None)


Bend = Callable[[str, bytes, Callable[[bytes], Awaitable[bytes]]], Awaitable[bytes]]


class Wire:
    """A link whose other end is in this process. `bend(word, payload, ask)` stands between: it may change, lose or replace either way."""

    def __init__(self) -> None:
        self.handlers: dict[str, Callable[[Inbound], Awaitable[bytes]]] = {}
        self.bend: Bend | None = None
        self.down = False

    @property
    def connected(self) -> bool:
        return not self.down

    def serve(self, pattern: str, handler: Callable[[Inbound], Awaitable[bytes]]) -> None:
        self.handlers[pattern.rsplit("/", 1)[1]] = handler

    async def ask(self, topic: str, payload: bytes, *, timeout_s: float = 5.0, qos: int = 1) -> bytes:
        assert timeout_s > 0
        assert qos >= 0
        if self.down:
            raise WorldError("timeout", "no answer")
        word = topic.rsplit("/", 1)[1]

        async def straight(sent: bytes) -> bytes:
            return await self.handlers[word](Inbound(topic, sent))

        return await (self.bend(word, payload, straight) if self.bend else straight(payload))


class PaperSite:
    """One region, one device, and what each keeps on disk; both may be restarted at any time."""

    def __init__(
        self,
        *,
        terms: Terms | None = None,
        images: Mapping[str, Mapping[int, bytes]] | None = None,
        port: PaperPort | None = None,
        reattest_s: float = 3600.0,
    ) -> None:
        self.clock = PaperClock()
        self.port = port or PaperPort()
        self.wire = Wire()
        self.records, self.kept = PaperDepot(), PaperDepot()
        self.keys = {ARTIFACT: b"k" * 32}
        self.online_only: set[str] = set()
        self.images = dict(images or {})
        self.reattest_s = reattest_s
        self.authorities = Authorities(
            root=ec.generate_private_key(ec.SECP256R1()),
            region=ec.generate_private_key(ec.SECP256R1()),
            ek_roots=tuple(self.port.paper.maker.roots()),
            policy=PcrPolicy("floor", allowed={pcr: [value] for pcr, value in GOOD_PCRS.items()}),
            vault=os.urandom(32),
            terms=terms or Terms(48 * 3600.0, 4),
            images=lambda: self.images,
        )
        self.restart_region()
        self.restart_device()

    def restart_region(self) -> None:
        """A region that was killed and starts from its disk."""
        self.attesting = Attesting(
            self.wire,  # type: ignore[arg-type]  # the part of a link that it uses
            self.clock,
            self.records,  # type: ignore[arg-type]
            self.authorities,
            self.keys,
            chance=os.urandom,
            region=REGION,
            online_only=self.online_only,
        )

    def restart_device(self) -> None:
        """A daemon that was killed and starts from its disk; the TPM stays on."""
        self.port.sessions.clear()
        self.trusting = Trusting(
            self.port,
            self.wire,  # type: ignore[arg-type]
            self.kept,  # type: ignore[arg-type]
            self.clock,
            region=REGION,
            device=DEVICE,
            ask_timeout_s=5.0,
            reattest_s=self.reattest_s,
        )

    async def boot(self) -> None:
        """What the daemon does first: open what a kept lease opens."""
        await self.trusting._resume()

    async def round(self) -> None:
        """One proof."""
        await self.trusting._round()

    def wait(self, seconds: float) -> None:
        """Powered-on time passes, for both clocks."""
        self.clock.now += seconds
        self.port.paper.clock_ms += int(seconds * 1000)

    async def tick(self) -> None:
        """What the daemon does each second."""
        await self.trusting._obey(self.trusting._attester.tick(now=self.clock.now))
