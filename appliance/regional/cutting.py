"""Cutting: has the broker disconnect devices whose state was refused or that were revoked, until they have attested again.

1. Cut is who is revoked (a file `revoked-DEVICE` beside the records), or whose last proof or enrolment was refused for what it is. A refusal
   of the exchange only (`core.trust.attester.REGION`) changes nothing: a region that was restarted must not cut its healthy devices.
2. Only a good proof lifts it; removing the file is not enough. Who is cut may still enrol and attest, nothing else: the broker's ACL says so.
3. The broker is told the whole list, at each change and every `REPEAT_S`, because it forgets it when it is restarted. The list is on disk before it
   is sent: a region that was restarted does not let anyone back in.
4. Expired SVIDs need no region: the broker's plugin sees them (docs/decisions/0023).
"""

import asyncio
from collections.abc import Callable

import structlog

from appliance.contract.errors import TheirsError, WorldError
from appliance.core.trust.attester import REGION, Verdict
from appliance.ports import Clock, Depot, Link

CONTROL = "$CONTROL/appliance/v1"
"""Region to its broker's plugin: the names of all that are cut off, one a line."""

TICK_S = 1.0
REPEAT_S = 5.0
TIMEOUT_S = 2.0
_KEPT = "cut"
_PROOFS = {"enrol", "prove", "attest"}
_CUTTING = {Verdict.STATE, Verdict.REVOKED}


class Cutting:
    """The list of those that are cut off. `depot` is the one that holds the devices' records."""

    def __init__(self, link: Link, clock: Clock, depot: Depot) -> None:
        self._link = link
        self._clock = clock
        self._depot = depot
        self._cut = set((depot.load(_KEPT) or b"").decode().split())
        self._kept = set(self._cut)
        self._told: frozenset[str] | None = None
        self._again_at = 0.0
        self._unheard = False
        self._log = structlog.get_logger()

    @property
    def cut(self) -> frozenset[str]:
        """Who is cut off now, by name."""
        return frozenset(self._cut)

    def judged(self, device: str, asked: str, refused: str) -> None:
        """Hear how an exchange of trust ended; `refused` is the reason, empty where it went well."""
        if not refused and asked == "attest":
            self._cut.discard(device)
        elif refused and asked in _PROOFS and REGION.get(refused, Verdict.REVOKED) in _CUTTING:
            self._cut.add(device)

    async def run(self, moved: Callable[[], None]) -> None:
        """Keep the broker's list as it should be; ends only by cancellation."""
        while True:
            moved()
            await self.look()
            await self._clock.sleep_until(self._clock.monotonic() + TICK_S)

    async def look(self) -> None:
        """Take in new revocations, and tell the broker if anything changed or it is time. Never raises for a broker or a disk that is away."""
        try:
            self._cut |= {name.removeprefix("revoked-") for name in await asyncio.to_thread(self._depot.names, "revoked-")}
            await self._keep()
            now = self._clock.monotonic()
            if self.cut == self._told and now < self._again_at:
                return
            cut = self.cut
            await self._link.publish(CONTROL, "\n".join(sorted(cut)).encode(), timeout_s=TIMEOUT_S)
        except (WorldError, TheirsError) as error:
            if not self._unheard:
                self._log.warning("cuts_not_told", reason=error.reason, what=str(error))
            self._unheard = True
            return
        self._unheard = False
        self._again_at = now + REPEAT_S
        if cut != self._told and (cut or self._told):
            self._log.info("devices_cut", devices=sorted(cut))
        self._told = cut

    async def _keep(self) -> None:
        if self._cut != self._kept:
            cut = set(self._cut)
            await asyncio.to_thread(self._depot.save, _KEPT, "\n".join(sorted(cut)).encode())
            self._kept = cut
