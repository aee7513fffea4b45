"""Trusting: enrols this device once, proves its state to the region, and opens the key that opens the weights.

The key-encryption key stays in memory from the first unsealing on; each `reattest_s` the device proves itself again, and a region that
*rejects* it makes the key be dropped. A region that is merely away changes nothing ("unreachable" and "rejected" are never confused).
"""

import asyncio
from collections.abc import Callable

import msgspec
import structlog

from appliance.contract import topics
from appliance.contract.attest import Approval, Challenge, ChallengeAsk, EnrolChallenge, Enrolled
from appliance.contract.codec import M, Message, decode, encode
from appliance.contract.errors import TheirsError, WorldError
from appliance.contract.models import KeyAsk, WrappedKey
from appliance.core.trust.envelope import unwrap_for_device
from appliance.ports import Clock, Depot, Link, SealedKey, Tpm

ENROLMENT_FILE = "enrolment.json"
RETRY_S = (0.5, 1.0, 2.0, 5.0, 10.0)
TICK_S = 1.0
AGAIN = frozenset({"nonce", "expired", "ticket", "no_challenge", "busy", "internal"})
"""Refusals that say nothing of this device: the region restarted, or an answer came too late. It asks again and keeps its key."""


class Trusting:
    """The device's side of attestation, and the only holder of its key-encryption key."""

    def __init__(
        self, tpm: Tpm, link: Link, depot: Depot, clock: Clock, *, region: str, device: str, ask_timeout_s: float, reattest_s: float
    ) -> None:
        self._tpm = tpm
        self._link = link
        self._depot = depot
        self._clock = clock
        self._region = region
        self._device = device
        self._ask_timeout_s = ask_timeout_s
        self._reattest_s = reattest_s
        self._kek: bytes | None = None
        self._lock = asyncio.Lock()
        self._log = structlog.get_logger()
        self.refusal: TheirsError | None = None

    @property
    def attested(self) -> bool:
        """Whether the key is open."""
        return self._kek is not None

    async def run(self, moved: Callable[[], None]) -> None:
        """Open the key, retry while the region is away, prove again each `reattest_s`; ends only by cancellation."""
        failures = 0
        due = self._clock.monotonic()
        while True:
            moved()
            if self._clock.monotonic() >= due:
                try:
                    await self._attest()
                except (TheirsError, WorldError) as error:
                    self._note(error, first=failures == 0)
                    due = self._clock.monotonic() + RETRY_S[min(failures, len(RETRY_S) - 1)]
                    failures += 1
                else:
                    failures = 0
                    due = self._clock.monotonic() + self._reattest_s
            await asyncio.sleep(min(TICK_S, max(due - self._clock.monotonic(), 0.0)))

    async def data_key(self, artifact: str) -> bytes:
        """The data key of an artifact (by container hash), from the region or from its wrapped copy on disk.

        Raises: WorldError (`not_attested`, `not_connected`, `timeout`), TheirsError (the region's refusal, `wrong_key`).
        """
        if self._kek is None:
            raise WorldError(
                "not_attested", "the region has not yet approved this device's state", remedy="see the log for what it waits for"
            )
        kept = self._depot.load(f"key-{artifact[:32]}.json")
        if kept is not None:
            wrapped = decode(kept, WrappedKey)
            try:
                return unwrap_for_device(wrapped, artifact, self._kek)
            except TheirsError:
                self._log.info("kept_key_discarded", artifact=artifact[:12])
        wrapped = await self._ask(topics.key, KeyAsk(artifact=artifact), WrappedKey)
        key = unwrap_for_device(wrapped, artifact, self._kek)
        self._depot.save(f"key-{artifact[:32]}.json", encode(wrapped))
        return key

    async def _attest(self) -> None:
        async with self._lock:
            sealed = await self._enrolment()
            challenge = await self._ask(topics.challenge, ChallengeAsk(), Challenge)
            evidence = await self._tpm.evidence(sealed, challenge)
            approval = await self._ask(topics.attest, evidence, Approval)
            try:
                self._kek = await self._tpm.unseal(sealed, approval)
            except TheirsError as error:
                if error.reason in {"pcr", "expired"}:  # the approval is stale: the region judges the present state in the next round
                    raise WorldError(error.reason, error.what, where=error.where, remedy=error.remedy) from error
                raise
            self.refusal = None
            self._log.info("attested", epoch=sealed.enrolled.epoch)

    async def _enrolment(self) -> SealedKey:
        kept = self._depot.load(ENROLMENT_FILE)
        if kept is not None:
            try:
                return msgspec.json.decode(kept, type=SealedKey)
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                self._log.error("enrolment_damaged", file=ENROLMENT_FILE, what=str(error), remedy="enrolling anew")
        challenge = await self._ask(topics.enrol, await self._tpm.enrol_ask(), EnrolChallenge)
        enrolled = await self._ask(topics.prove, await self._tpm.prove(challenge), Enrolled)
        sealed = await self._tpm.adopt(enrolled)
        self._depot.save(ENROLMENT_FILE, msgspec.json.encode(sealed))
        self._log.info("enrolled", epoch=enrolled.epoch)
        return sealed

    async def _ask(self, topic: Callable[[str, str], str], message: Message, answer: type[M]) -> M:
        payload = await self._link.ask(topic(self._region, self._device), encode(message), timeout_s=self._ask_timeout_s)
        return decode(payload, answer)

    def _note(self, error: TheirsError | WorldError, *, first: bool) -> None:
        """Log once on the way down; a rejection drops the key, a silence does not."""
        if isinstance(error, TheirsError) and error.reason not in AGAIN:
            self._kek = None
            if error.reason == "unknown_device":
                self._depot.save(ENROLMENT_FILE + ".old", self._depot.load(ENROLMENT_FILE) or b"")
                self._depot.forget(ENROLMENT_FILE)
            if self.refusal is None or self.refusal.what != error.what:
                self._log.error("attestation_rejected", reason=error.reason, what=str(error))
            self.refusal = error
        elif first:
            self._log.warning("attestation_deferred", reason=error.reason, what=str(error))
