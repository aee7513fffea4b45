"""How a region decides whether one enrolled device may open its key now.

1. Device-initiated: ChallengeAsk gets a nonce, Evidence must answer it within 60 s; then the region approves one session of one TPM, or refuses.
2. One challenge is open at a time; a newer one replaces it. Its nonce is spent by the first evidence that names it, good or bad.
3. The quote is over nonce and session nonce together, by the attestation key of the record, over exactly the policy's PCRs.
4. The TPM's reset count never goes back: TPM2_Clear and a restored TPM state do that. The clock may: it falls after power cuts (not checked).
5. What is judged good is kept in the record (reset count, values learned on first use); the caller stores a record that changed before it answers.
6. A refusal raises `TheirsError` and changes nothing but the spent nonce.
"""

import hmac
from dataclasses import dataclass

import msgspec
from cryptography.hazmat.primitives.asymmetric import ec

from appliance.contract.attest import Approval, Challenge, Evidence, quoted_nonce
from appliance.contract.errors import TheirsError
from appliance.core.trust.anchors import PcrPolicy
from appliance.core.trust.approval import approve_session
from appliance.core.trust.credential import Chance
from appliance.core.trust.enrolment import Record
from appliance.core.trust.quote import verify_quote

NONCE_S = 60.0
"""How long a challenge can be answered, in seconds."""

_NONCE_BYTES = 32
_SESSION_NONCE_BYTES = 32


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

    def __init__(self, record: Record, *, region: ec.EllipticCurvePrivateKey, policy: PcrPolicy) -> None:
        self.record = record
        self._region = region
        self._policy = policy
        self._open: _Open | None = None

    def ask(self, *, now: float, chance: Chance) -> Challenge:
        """Challenge the device. `now` is in monotonic seconds."""
        self._open = _Open(chance(_NONCE_BYTES), now + NONCE_S)
        return Challenge(nonce=self._open.nonce, pcrs=list(self._policy.pcrs))

    def judge(self, evidence: Evidence, *, now: float) -> Verdict:
        """Approve one unsealing, or refuse.

        Raises: TheirsError (`nonce`, `expired`, `malformed`, `quote`, `reset_count`, `pcr_set`, `anchor`, `pcr`, `pcr_reference`).
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
        if clock.reset_count < self.record.reset_count:
            what = f"the reset count went back from {self.record.reset_count} to {clock.reset_count}: the TPM was cleared, or its state restored"
            raise self._refused("reset_count", what, remedy="find out who did it, then remove the device and enrol it anew")
        learned = self._policy.judge(evidence.pcr_values, self.record.pcr_values)
        approval = approve_session(self._region, self.record.reference, evidence.pcr_values, evidence.session_nonce)
        if (clock.reset_count, learned) != (self.record.reset_count, self.record.pcr_values):
            self.record = msgspec.structs.replace(self.record, reset_count=clock.reset_count, pcr_values=learned)
        return Verdict(approval, self.record)

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
