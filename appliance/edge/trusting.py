"""Trusting: enrols this device once, proves its state to the region, and opens the keys that open the weights.

Two keys: the session key opens only by the region's consent to one proof, the leased key also by a kept lease without the region. What an answer
or a silence means for them is decided by `core.trust.attester`; here are the TPM, the link, the files and the keys themselves (in memory only).
At the start a kept lease is tried before the network, so a restart in a partition serves again at once; then rounds of proof go on for ever.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import assert_never

import structlog

from appliance.contract import topics
from appliance.contract.attest import Approval, Challenge, ChallengeAsk, EnrolChallenge, Enrolled, Evidence, Grant
from appliance.contract.codec import M, Message, decode, encode
from appliance.contract.errors import TheirsError, WorldError
from appliance.contract.models import KeyAsk, WrappedKey
from appliance.core.trust.attester import COUNT_PAUSE_S, Attester, Command, CountOn, Drop, ForgetEnrolment, ForgetLeases, Standing
from appliance.core.trust.envelope import unwrap_for_device
from appliance.core.trust.lease import Choice, choose, spell
from appliance.edge.keeping import Kept
from appliance.ports import Clock, Depot, Link, SealedKey, Tpm

TICK_S = 1.0
SELF_TEST_S = 3600.0
OPENING_S = 2.0
"""How long a caller that comes before the first proof waits for it: a round takes a tenth of that, and a retry later would cost more."""

Tell = Callable[[str, dict[str, str]], Awaitable[None]]


class _ByRegion(Exception):  # noqa: N818 - not an error of ours: it carries one
    """A refusal that the region sent, told apart from those of the own TPM."""

    def __init__(self, refusal: TheirsError) -> None:
        super().__init__(str(refusal))
        self.refusal = refusal


class Trusting:
    """The device's side of attestation, and the only holder of its key-encryption keys. Set `tell` to hear of refusals and failed self-tests."""

    def __init__(
        self,
        tpm: Tpm,
        link: Link,
        depot: Depot,
        clock: Clock,
        *,
        region: str,
        device: str,
        ask_timeout_s: float,
        reattest_s: float,
        self_test_s: float = SELF_TEST_S,
    ) -> None:
        self._tpm = tpm
        self._link = link
        self._kept = Kept(depot)
        self._clock = clock
        self._region = region
        self._device = device
        self._ask_timeout_s = ask_timeout_s
        self._attester = Attester(cadence_s=reattest_s, self_test_s=self_test_s, now=clock.monotonic())
        self._session: bytes | None = None
        self._leased: bytes | None = None
        self._settled = asyncio.Event()
        self._shown: Evidence | None = None
        self._count_on = False
        self._counted_at: float | None = None
        self._told: dict[str, str] = {}
        self._log = structlog.get_logger()
        self.tell: Tell | None = None
        self.refusal: TheirsError | None = None
        self.weakness = ""

    @property
    def attested(self) -> bool:
        """Whether any key is open."""
        return self._session is not None or self._leased is not None

    @property
    def hint(self) -> str:
        """One sentence on what is wrong, or will be at the next restart; empty if nothing is."""
        if self.weakness:
            return self.weakness
        return str(self.refusal) if self.refusal is not None and not self.attested else ""

    def holds(self, offline: str) -> bool:
        """Whether a model of this class (`Manifest.offline`) may be opened now; if not, `Manifest.at_term` says what becomes of a loaded one."""
        return self._session is not None or (offline == "lease" and self._leased is not None)

    async def run(self, moved: Callable[[], None]) -> None:
        """Open what a kept lease opens, then prove, test and drop as it falls due; ends only by cancellation."""
        attester = self._attester
        await self._resume()
        while True:
            moved()
            await self._obey(attester.tick(now=self._clock.monotonic()))
            if self._clock.monotonic() >= attester.due:
                await self._round()
            if self._clock.monotonic() >= attester.test_due:
                await self._self_test()
            await asyncio.sleep(min(TICK_S, max(attester.deadline() - self._clock.monotonic(), 0.0)))

    async def data_key(self, artifact: str) -> bytes:
        """The data key of an artifact (by container hash), from its wrapped copy on disk or from the region.

        Raises: WorldError (`not_attested`, `not_connected`, `timeout`), TheirsError (the region's refusal, `unwrap`).
        """
        await self._opening()
        try:
            return self.kept_key(artifact)
        except (TheirsError, WorldError) as error:
            self._log.debug("kept_key_not_used", artifact=artifact[:12], reason=error.reason)
        wrapped = await self._ask(topics.key, KeyAsk(artifact=artifact), WrappedKey)
        key = unwrap_for_device(wrapped, artifact, self._kek(wrapped))
        self._kept.save_wrapped(artifact, wrapped)
        return key

    def kept_key(self, artifact: str) -> bytes:
        """The data key of an artifact from its wrapped copy on disk: what a loaded model is opened with again.

        Raises: WorldError (`not_attested`: the key was dropped, or none is kept), TheirsError (`unwrap`).
        """
        wrapped = self._kept.wrapped(artifact)
        if wrapped is None:
            raise self._not_attested()
        return unwrap_for_device(wrapped, artifact, self._kek(wrapped))

    async def _opening(self) -> None:
        """Wait a moment for a key. Raises: WorldError (`not_attested`)."""
        if not self._settled.is_set() and self.refusal is None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(OPENING_S):
                    await self._settled.wait()
        if not self.attested:
            raise self._not_attested()

    def _hold(self, *, session: bytes | None = None, leased: bytes | None = None) -> None:
        self._session = session or self._session
        self._leased = leased or self._leased

    def _kek(self, wrapped: WrappedKey) -> bytes:
        kek = self._leased if wrapped.leased else self._session
        if kek is None:
            raise self._not_attested()
        return kek

    def _not_attested(self) -> WorldError:
        why = f": {self.refusal}" if self.refusal is not None else ""
        return WorldError("not_attested", f"this device may not open its models now{why}", remedy="see the log for what it waits for")

    async def _resume(self) -> None:
        """Open the leased key by a kept lease, if the TPM agrees."""
        sealed, kept = self._kept.enrolment(), self._kept.grant()
        if sealed is None or kept is None or not kept.leases:
            return
        try:
            leased, choice = await self._open(sealed, kept)
        except (TheirsError, WorldError) as error:
            if isinstance(error, TheirsError):
                self.refusal = error
            self._say("lease", "lease_refused" if isinstance(error, TheirsError) else "lease_deferred", error)
            return
        self._hold(leased=leased)
        self._attester.opened(now=self._clock.monotonic(), ends_after_s=choice.ends_after_s)
        self._settled.set()
        self._told.pop("lease", None)
        self._log.info("lease_opened", lease=choice.lease.label, ends_after=spell(choice.ends_after_s), restarts_left=choice.restarts_left)

    async def _open(self, sealed: SealedKey, kept: Grant) -> tuple[bytes, Choice]:
        if not kept.leases:
            raise TheirsError("no_lease", "the region gave no lease for any state", where="lease")
        sight = await self._tpm.look(sorted(kept.leases[0].pcr_values))
        choice = choose(kept, sealed.enrolled.epoch, sight)
        return await self._tpm.unseal_leased(sealed, kept, choice.lease), choice

    async def _round(self) -> None:
        """One proof; whatever it ends in, the attester hears it."""
        try:
            await self._prove()
        except WorldError as error:
            self._attester.unreachable(now=self._clock.monotonic())
            self._say("round", "attestation_deferred", error)
        except TheirsError as error:
            await self._refused(error, by_region=False)
        except _ByRegion as error:
            await self._refused(error.refusal, by_region=True)
        if self._leased is None and self._attester.standing in {Standing.SHUT, Standing.LEASED}:
            await self._resume()

    async def _prove(self) -> None:
        sealed = await self._enrolment()
        began = self._clock.monotonic()
        nonce = await self._count_nonce(sealed)
        challenge = await self._exchange(topics.challenge, ChallengeAsk(counter_nonce=nonce), Challenge)
        await self._count(sealed, challenge, nonce)
        self._shown = evidence = await self._tpm.evidence(sealed, challenge)
        approval = await self._exchange(topics.attest, evidence, Approval)
        self._hold(session=await self._tpm.unseal(sealed, approval))
        term_s = await self._take(sealed, approval.grant)
        if self._attester.standing is not Standing.ATTESTED:
            self._log.info("attested", epoch=sealed.enrolled.epoch, leased_for=spell(term_s) if term_s else "no time")
        self._attester.attested(now=self._clock.monotonic(), began=began, term_s=term_s)
        self._settled.set()
        self.refusal = None
        self._told.pop("round", None)

    async def _take(self, sealed: SealedKey, given: Grant | None) -> float | None:
        """Open the leased key by the new lease, and only then let it replace the kept one; return how long it holds, in seconds."""
        if given is None:
            self._kept.forget_grant()
            return None
        try:
            leased, choice = await self._open(sealed, given)
        except (TheirsError, WorldError) as error:  # the proof was good; a partition would not be: say so while there is time
            self._say("lease", "lease_refused", error)
            return None
        self._hold(leased=leased)
        self._told.pop("lease", None)
        self._kept.save_grant(given)
        return choice.ends_after_s

    async def _count_nonce(self, sealed: SealedKey) -> bytes:
        """Open a session to count in, if the counter must count; a TPM that allows none costs the leases and not the proof."""
        now = self._clock.monotonic()
        anew = self._count_on and (self._counted_at is None or now - self._counted_at >= COUNT_PAUSE_S)
        try:
            return await self._tpm.count_nonce(sealed, anew=anew)
        except WorldError as error:
            if error.reason != "owner":
                raise
            self._say("counter", "counter_refused", error)
        return b""

    async def _count(self, sealed: SealedKey, challenge: Challenge, nonce: bytes) -> None:
        if not nonce or challenge.count is None:
            return
        try:
            await self._tpm.count(sealed, challenge.count)
        except TheirsError as error:
            self._say("counter", "counter_refused", error)
            return
        if self._count_on:  # the counter's first count is no wear
            self._count_on, self._counted_at = False, self._clock.monotonic()
        self._log.info("counted")

    async def _enrolment(self) -> SealedKey:
        kept = self._kept.enrolment()
        if kept is not None and kept.enrolled.leased is not None:
            return kept
        challenge = await self._exchange(topics.enrol, await self._tpm.enrol_ask(), EnrolChallenge)
        proof = self._kept.with_escrow(await self._tpm.prove(challenge))
        enrolled = await self._exchange(topics.prove, proof, Enrolled)
        sealed = await self._tpm.adopt(enrolled)
        self._kept.forget_grant()
        self._kept.save_enrolment(sealed)
        self._log.info("enrolled", epoch=enrolled.epoch)
        return sealed

    async def _ask(self, topic: Callable[[str, str], str], message: Message, answer: type[M]) -> M:
        payload = await self._link.ask(topic(self._region, self._device), encode(message), timeout_s=self._ask_timeout_s)
        return decode(payload, answer)

    async def _exchange(self, topic: Callable[[str, str], str], message: Message, answer: type[M]) -> M:
        """Ask in a round. Raises: _ByRegion if the region refused; WorldError also for an answer that can not be read, which is no refusal."""
        try:
            payload = await self._link.ask(topic(self._region, self._device), encode(message), timeout_s=self._ask_timeout_s)
        except TheirsError as error:
            raise _ByRegion(error) from error
        try:
            return decode(payload, answer)
        except TheirsError as error:
            raise WorldError("answer", f"the region's answer can not be read: {error}", remedy="it is asked again") from error

    async def _refused(self, error: TheirsError, *, by_region: bool) -> None:
        _, commands = self._attester.refused(error.reason, now=self._clock.monotonic(), by_region=by_region)
        if not any(isinstance(command, Drop) for command in commands):
            await self._obey(commands)
            self._say("round", "attestation_deferred", error)
            return
        self.refusal = error
        if self._say("round", "attestation_rejected", error) and self.tell is not None:
            await self.tell("attestation_rejected", {"reason": error.reason, "what": str(error)})
        await self._obey(commands)

    async def _obey(self, commands: "list[Command] | tuple[Command, ...]") -> None:
        for command in commands:
            match command:
                case Drop():
                    await self._drop(command)
                case ForgetLeases(all_states=True):
                    self._kept.forget_grant()
                case ForgetLeases():
                    self._kept.forget_lease(self._shown.pcr_values if self._shown is not None else {})
                case ForgetEnrolment():
                    self._kept.set_enrolment_aside()
                case CountOn():
                    self._count_on = True
                case _:
                    assert_never(command)

    async def _drop(self, drop: Drop) -> None:
        """Forget keys; Python can not wipe the bytes, but nothing refers to them any more."""
        if drop.session:
            self._session = None
        if drop.leased:
            self._leased = None
        if not self.attested:
            self._settled.clear()
        if drop.why == "term":
            self._log.warning("key_term_ended", session=drop.session, leased=drop.leased)
            if drop.leased and self.tell is not None:
                await self.tell("lease_ended", {"device": self._device})

    async def _self_test(self) -> None:
        """What would fail at the next restart is told today: in the log, as an event, and as a hint beside readiness."""
        try:
            await self._tpm.self_test()
        except (TheirsError, WorldError) as error:
            self.weakness = str(error)
            if self._say("test", "tpm_self_test_failed", error) and self.tell is not None:
                await self.tell("tpm_self_test_failed", {"reason": error.reason, "what": str(error)})
        else:
            if self.weakness:
                self._log.info("tpm_self_test_passed")
            self.weakness = ""
            self._told.pop("test", None)
        self._attester.tested(now=self._clock.monotonic())

    def _say(self, about: str, event: str, error: TheirsError | WorldError) -> bool:
        """Log once for each reason in turn; return whether it was new."""
        new = self._told.get(about) != f"{event} {error.reason}"
        if new:
            self._told[about] = f"{event} {error.reason}"
            write = self._log.warning if event.endswith("deferred") else self._log.error
            write(event, reason=error.reason, what=str(error))
        return new
