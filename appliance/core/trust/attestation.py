"""How a region decides whether one enrolled device may open its key now.

1. Device-initiated: ChallengeAsk gets a nonce, Evidence must answer it within 60 s; then the region approves one session of one TPM, or refuses.
2. One challenge is open at a time; a newer one replaces it. Its nonce is spent by the first evidence that names it, good or bad.
3. The quote is over nonce and session nonce together, by the attestation key of the record, over exactly the policy's PCRs.
4. The TPM's reset count never goes back: TPM2_Clear and a restored TPM state do that. The clock may: it falls after power cuts (not checked).
5. With a good proof come leases (lease.py), if the region gives any, and if the TPM's generation counter was certified in the same proof. The
   counter never goes back, and no lease is given while it is below the floor that a revocation has set.
6. A revoked device is refused by that name, whatever it proves; it may still let its counter count, which ends the leases that it holds.
7. What is judged good is kept in the record (reset count, counter, values learned on first use); the caller stores a record that changed
   before it answers. So either side may be restarted at any step: what is lost is an open nonce, and the device asks again.
8. A refusal raises `TheirsError` and changes nothing but the spent nonce.
"""

import hmac
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
from cryptography.hazmat.primitives.asymmetric import ec

from appliance.contract.attest import Approval, Challenge, CountConsent, Evidence, Grant, quoted_nonce
from appliance.contract.errors import TheirsError
from appliance.core.trust.anchors import PcrPolicy
from appliance.core.trust.approval import Delegation, approve_session, counter_name, counter_reference, leased_reference
from appliance.core.trust.credential import Chance
from appliance.core.trust.enrolment import Record
from appliance.core.trust.lease import Terms, grant
from appliance.core.trust.quote import verify_counter, verify_quote
from appliance.core.trust.tpm_structures import ClockInfo

NONCE_S = 60.0
"""How long a challenge can be answered, in seconds."""

_NONCE_BYTES = 32
_SESSION_NONCE_BYTES = 32


@dataclass(frozen=True, slots=True)
class Leasing:
    """How a region gives leases. `delegate(reference, counter, generation)` is root's consent (approval.py)."""

    terms: Terms
    delegate: Callable[[bytes, bytes, int], Delegation]


@dataclass(frozen=True, slots=True)
class Verdict:
    """A consent, and the record as it is now (the same object if nothing was learned)."""

    approval: Approval
    record: Record


@dataclass(frozen=True, slots=True)
class _Open:
    nonce: bytes
    until: float


class Attestation:
    """The region's side of one device's attestation. `region` is the P-256 key that root delegated to."""

    def __init__(self, record: Record, *, region: ec.EllipticCurvePrivateKey, policy: PcrPolicy, leasing: Leasing | None = None) -> None:
        self.record = record
        self._leasing = leasing
        self._region = region
        self._policy = policy
        self._open: _Open | None = None

    def ask(self, *, now: float, chance: Chance, count: CountConsent | None = None) -> Challenge:
        """Challenge the device, and pass on root's consent to count. `now` is in monotonic seconds."""
        self._open = _Open(chance(_NONCE_BYTES), now + NONCE_S)
        return Challenge(nonce=self._open.nonce, pcrs=list(self._policy.pcrs), count=count)

    def revoke(self) -> None:
        """Give no lease until the device's counter has counted on, which ends those that it holds."""
        if self.record.generation is not None and self.record.generation_floor <= self.record.generation:
            self.record = msgspec.structs.replace(self.record, generation_floor=self.record.generation + 1)

    def judge(self, evidence: Evidence, *, now: float, revoked: str = "") -> Verdict:
        """Approve one unsealing and give leases, or refuse. `revoked`: why this device may open nothing any more, empty if it may.

        Raises: TheirsError (`nonce`, `expired`, `malformed`, `quote`, `revoked`, `reset_count`, `pcr_set`, `anchor`, `pcr`, `pcr_reference`,
            `counter`, `generation`).
        """
        self._spend(evidence.nonce, now)
        if len(evidence.session_nonce) != _SESSION_NONCE_BYTES:
            raise self._refused("malformed", f"the session nonce has {len(evidence.session_nonce)} bytes, not {_SESSION_NONCE_BYTES}")
        clock = verify_quote(
            evidence.quote_attest,
            evidence.quote_signature,
            attestation=self.record.attestation_key,
            nonce=quoted_nonce(evidence.nonce, evidence.session_nonce),
            values=evidence.pcr_values,
        )
        if revoked:
            raise self._refused("revoked", f"its region has revoked it: {revoked}", remedy="an operator decides whether it comes back")
        self._check_resets(clock)
        learned = self._policy.judge(evidence.pcr_values, self.record.pcr_values)
        generation = self._generation(evidence)
        approval = approve_session(self._region, self.record.reference, evidence.pcr_values, evidence.session_nonce)
        given = self._grant(evidence, clock, generation)
        if given is not None:
            approval = msgspec.structs.replace(approval, grant=given)
        after = msgspec.structs.replace(self.record, reset_count=clock.reset_count, pcr_values=learned, generation=generation)
        if after != self.record:
            self.record = after
        return Verdict(approval, self.record)

    def _check_resets(self, clock: ClockInfo) -> None:
        before = self.record.reset_count
        if clock.reset_count < before:
            what = f"the reset count went back from {before} to {clock.reset_count}: the TPM was cleared, or its state restored"
            raise self._refused("reset_count", what, remedy="find out who did it, then remove the device and enrol it anew")

    def _generation(self, evidence: Evidence) -> int | None:
        """The counter's value, if it was certified; without it there are no leases, and what was known stays known."""
        record = self.record
        if not evidence.counter_attest:
            return record.generation
        generation = verify_counter(
            evidence.counter_attest,
            evidence.counter_signature,
            attestation=record.attestation_key,
            nonce=quoted_nonce(evidence.nonce, evidence.session_nonce),
            name=counter_name(record.root_public, counter_reference(record.ek_name)),
        )
        if record.generation is not None and generation < record.generation:
            what = f"the generation counter went back from {record.generation} to {generation}: the TPM's state was restored"
            raise self._refused("counter", what, remedy="find out who did it, then remove the device and enrol it anew")
        if generation < record.generation_floor:
            what = f"its leases were ended, but its counter is still at {generation}, not at {record.generation_floor}"
            raise self._refused("generation", what, remedy="the device counts on by itself at the next proof")
        return generation

    def _grant(self, evidence: Evidence, clock: ClockInfo, generation: int | None) -> Grant | None:
        leasing = self._leasing
        if leasing is None or leasing.terms.term_s <= 0 or generation is None or not evidence.counter_attest:
            return None
        record = self.record
        reference = leased_reference(record.ek_name, record.epoch)
        counter = counter_name(record.root_public, counter_reference(record.ek_name))
        return grant(
            leasing.terms,
            self._policy.states(evidence.pcr_values),
            clock,
            region=self._region,
            reference=reference,
            epoch=record.epoch,
            generation=generation,
            delegation=leasing.delegate(reference, counter, generation),
        )

    def deadline(self) -> float | None:
        """When the open challenge is worthless (monotonic seconds); forgetting it then is optional, it is refused anyway."""
        return self._open.until if self._open else None

    def _spend(self, nonce: bytes, now: float) -> None:
        opened = self._open
        if opened is None or not hmac.compare_digest(nonce, opened.nonce):
            raise self._refused("nonce", "answers no open challenge: a replay, or replaced by a newer one", remedy="attest again")
        self._open = None
        if now > opened.until:
            late = now - opened.until + NONCE_S
            raise self._refused("expired", f"answered {late:.0f} s after the challenge, {NONCE_S:.0f} are allowed", remedy="attest again")

    def _refused(self, reason: str, what: str, *, remedy: str = "") -> TheirsError:
        return TheirsError(reason, what, where=self.record.device, remedy=remedy)
