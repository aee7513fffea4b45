"""The device's side of attestation: what an answer or a silence means for the keys it holds, and when it proves itself again.

1. The device asks, the region never calls (it works behind NAT). A round is challenge, evidence, approval; nothing of a round outlives it, so either
   side may be restarted at any step, and the next round begins anew.
2. Silence changes nothing, whatever it is: no link, no answer, an answer that can not be read, a TPM that is away. Only a refusal by the region that
   speaks of this device takes its keys, or its own TPM saying that it is another one. Refusals that speak of the exchange only (`AGAIN`) are silence.
3. A refusal of the *state* (`STATE`) takes the keys from memory and the kept lease for this state; leases for other states stay (a slot to go back to).
4. Two keys, two terms: the session key is held for `FRESH_ROUNDS` rounds after a proof, the leased key until its lease ends. At its end a key is dropped.
5. A round is due at once at the start, `cadence_s` after a good one (earlier for a short lease, see lease.py), and after `RETRY_S` when it failed.
6. Every `self_test_s` the TPM is tested, whether or not the region is there: what would fail at the next restart is told today.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto

from appliance.core.trust.lease import renew_after_s

RETRY_S = (0.5, 1.0, 2.0, 5.0, 10.0)
"""Pauses after failed rounds, in seconds; the last one repeats."""

COUNT_PAUSE_S = 600.0
"""The counter counts at most so often, whatever the region says: NV memory wears, and a region may be confused."""

FRESH_ROUNDS = 2
"""A key for sessions is held so many cadences without a new proof: one round may be missed."""


class Standing(Enum):
    """How the region and this device stand."""

    SHUT = auto()
    LEASED = auto()
    ATTESTED = auto()
    REFUSED = auto()


class Verdict(Enum):
    """What a refusal means. AGAIN: nothing of this device. COUNT: its counter must count on first. ENROL: it is not known (any more)."""

    AGAIN = auto()
    COUNT = auto()
    ENROL = auto()
    STATE = auto()
    REVOKED = auto()


REGION: Mapping[str, Verdict] = {
    **dict.fromkeys(("nonce", "expired", "ticket", "no_challenge", "busy", "internal", "name", "not_authorised"), Verdict.AGAIN),
    **dict.fromkeys(("malformed", "oversized", "version"), Verdict.AGAIN),
    "generation": Verdict.COUNT,
    "unknown_device": Verdict.ENROL,
    **dict.fromkeys(("pcr", "pcr_set", "pcr_reference", "anchor"), Verdict.STATE),
}
"""Refusals by the region; whatever is not here is REVOKED (fail closed): `revoked`, `quote`, `reset_count`, `counter`, `credential`, `ek_…`."""

TPM: Mapping[str, Verdict] = {"srk_name": Verdict.REVOKED, "import": Verdict.REVOKED}
"""Refusals by the device's own TPM; whatever is not here is AGAIN: the region sent something that does not open, which is no rejection."""


@dataclass(frozen=True, slots=True)
class Drop:
    """Forget keys in memory. `leased`: the key that leases open; `session`: the other one."""

    session: bool
    leased: bool
    why: str


@dataclass(frozen=True, slots=True)
class ForgetLeases:
    """Remove kept leases from disk. `all_states`: not only the one for the state that was just shown."""

    all_states: bool


@dataclass(frozen=True, slots=True)
class ForgetEnrolment:
    """Set the kept enrolment aside; the next round enrols."""


@dataclass(frozen=True, slots=True)
class CountOn:
    """Let the generation counter count in the next round."""


Command = Drop | ForgetLeases | ForgetEnrolment | CountOn

CONSEQUENCES: Mapping[Verdict, tuple[Command, ...]] = {
    Verdict.AGAIN: (),
    Verdict.COUNT: (CountOn(),),
    Verdict.ENROL: (Drop(session=True, leased=True, why="unknown"), ForgetLeases(all_states=True), ForgetEnrolment()),
    Verdict.STATE: (Drop(session=True, leased=True, why="state"), ForgetLeases(all_states=False)),
    Verdict.REVOKED: (Drop(session=True, leased=True, why="revoked"), ForgetLeases(all_states=True), CountOn()),
}


class Attester:
    """One device's standing. All times are monotonic seconds."""

    def __init__(self, *, cadence_s: float, self_test_s: float, now: float) -> None:
        self.standing = Standing.SHUT
        self.leased_until: float | None = None
        self.session_until: float | None = None
        self.due = now
        self.test_due = now + self_test_s
        self._cadence_s = cadence_s
        self._self_test_s = self_test_s
        self._failures = 0

    @property
    def waiting(self) -> bool:
        """Whether the last round failed."""
        return self._failures > 0

    def opened(self, *, now: float, ends_after_s: float) -> None:
        """A kept lease opened the leased key."""
        if self.standing is Standing.SHUT:
            self.standing = Standing.LEASED
        self.leased_until = now + ends_after_s

    def attested(self, *, now: float, began: float, term_s: float | None) -> None:
        """A round that quoted at `began` was approved; `term_s` of the lease that came with it and opened, None if none did."""
        self.standing = Standing.ATTESTED
        self.session_until = began + FRESH_ROUNDS * self._cadence_s
        if term_s is not None:
            self.leased_until = began + term_s
        self.due = now + renew_after_s(self._cadence_s, term_s)
        self._failures = 0

    def unreachable(self, *, now: float) -> None:
        """The round failed for a reason that is not this device's."""
        self.due = now + RETRY_S[min(self._failures, len(RETRY_S) - 1)]
        self._failures += 1

    def refused(self, reason: str, *, now: float, by_region: bool) -> tuple[Verdict, tuple[Command, ...]]:
        """The region or the own TPM refused; what it means, and what to do."""
        verdict = REGION.get(reason, Verdict.REVOKED) if by_region else TPM.get(reason, Verdict.AGAIN)
        self.unreachable(now=now)
        if any(isinstance(command, Drop) for command in CONSEQUENCES[verdict]):
            self.standing = Standing.REFUSED
            self.leased_until = self.session_until = None
        return verdict, CONSEQUENCES[verdict]

    def tick(self, *, now: float) -> list[Command]:
        """The keys whose term ended."""
        leased = self.leased_until is not None and now >= self.leased_until
        session = self.session_until is not None and now >= self.session_until
        if not leased and not session:
            return []
        self.leased_until = None if leased else self.leased_until
        self.session_until = None if session else self.session_until
        if self.leased_until is None and self.session_until is None:
            self.standing = Standing.SHUT
        return [Drop(session=session, leased=leased, why="term")]

    def tested(self, *, now: float) -> None:
        """The TPM was tested, well or not."""
        self.test_due = now + self._self_test_s

    def deadline(self) -> float:
        """When something is due next."""
        ends = [each for each in (self.leased_until, self.session_until) if each is not None]
        return min(self.due, self.test_due, *ends)
