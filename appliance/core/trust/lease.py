"""The lease: what a region grants after a proof, and what a device may still open with it, and until when.

1. A lease holds for `term_s` of powered-on time after the quote and for `restarts` resets of the TPM: D = clock + term, R = resetCount + restarts.
   A power cut may set the clock back by what the TPM had not yet stored (a conforming one: 70 min, Part 2, 10.11.2), so the true bound is
   term + restarts * 70 min; that is why restarts are counted.
2. One lease for each approved state (running, the other slot, a staged release), signed before the switch, so a switch needs no region.
3. Each proof renews all leases, and a proof is due at the latest after a twentieth of the term: a partition begins with 95 % of it or more.
4. The device chooses the lease whose PCRs are its own, so that a wrong one costs no TPM call; the TPM enforces each condition again.
5. A reset count below that of the grant is refused: TPM2_Clear and restored TPM states look like that.
6. Expiry does not take a key out of a process: the daemon drops it at `ends_after_s` by its own clock, which never runs slower than the TPM's.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric import ec

from appliance.contract.attest import Grant, Lease
from appliance.contract.errors import TheirsError
from appliance.core.trust.anchors import describe_difference
from appliance.core.trust.approval import Delegation, approve_lease
from appliance.core.trust.tpm_structures import ClockInfo, pack_verifier
from appliance.ports import Sight

RENEWALS = 20
"""Proofs in a term, at least."""

CONNECT = "connect it to its region"
_MS = 1000.0
_HOUR_S = 3600.0
_MINUTE_S = 60.0


@dataclass(frozen=True, slots=True)
class Terms:
    """What a region allows offline. `term_s` 0: nothing. `restarts`: how often the TPM may be reset within the term."""

    term_s: float
    restarts: int


@dataclass(frozen=True, slots=True)
class Choice:
    """The lease that fits, how long it holds from now on, and how many restarts it still allows."""

    lease: Lease
    ends_after_s: float
    restarts_left: int


def grant(
    terms: Terms,
    states: Mapping[str, Mapping[int, bytes]],
    clock: ClockInfo,
    *,
    region: ec.EllipticCurvePrivateKey,
    reference: bytes,
    epoch: int,
    generation: int,
    delegation: Delegation,
) -> Grant:
    """Lease each approved state (label to PCR values) from this quote's clock on."""
    before, most = clock.clock_ms + int(terms.term_s * _MS), clock.reset_count + terms.restarts
    return Grant(
        epoch=epoch,
        generation=generation,
        region_public=pack_verifier(region.public_key()),
        delegation=delegation.approved,
        delegation_signature=delegation.signature,
        term_s=terms.term_s,
        restarts=terms.restarts,
        leases=[
            approve_lease(region, reference, label, values, clock_before_ms=before, reset_count_max=most)
            for label, values in states.items()
        ],
    )


def renew_after_s(cadence_s: float, term_s: float | None) -> float:
    """When the next proof is due, in seconds after a good one."""
    return min(cadence_s, term_s / RENEWALS) if term_s else cadence_s


def choose(kept: Grant, epoch: int, sight: Sight) -> Choice:
    """The lease that opens the key in this state.

    Raises: TheirsError (`lease_epoch`, `no_lease`, `reset_count`, `pcr`, `term`, `restarts`), in an operator's words.
    """
    if kept.epoch != epoch:
        raise _refused("lease_epoch", f"the kept lease is for key epoch {kept.epoch}, this device has {epoch}", CONNECT)
    if not kept.leases:
        raise _refused("no_lease", "its region allows nothing offline", CONNECT)
    lease = _fitting(kept.leases, sight.pcr_values)
    granted_at = lease.reset_count_max - kept.restarts
    if sight.reset_count < granted_at:
        what = f"the TPM's reset count went back from {granted_at} to {sight.reset_count}: it was cleared, or its state restored"
        raise _refused("reset_count", what, "look at the board, then enrol it anew")
    if sight.clock_ms >= lease.clock_before_ms:
        over = (sight.clock_ms - lease.clock_before_ms) / _MS
        raise _refused("term", f"the lease of {spell(kept.term_s)} ended {spell(over)} ago, counted while powered on", CONNECT)
    if sight.reset_count > lease.reset_count_max:
        since = sight.reset_count - granted_at
        raise _refused(
            "restarts", f"the TPM was restarted {since} times since the region last saw it, {kept.restarts} are allowed", CONNECT
        )
    left = lease.reset_count_max - sight.reset_count
    return Choice(lease, (lease.clock_before_ms - sight.clock_ms) / _MS, left)


def _fitting(leases: list[Lease], values: Mapping[int, bytes]) -> Lease:
    """The lease whose PCRs are these; else the refusal names what differs from the nearest one."""
    different = {
        lease.label: [
            describe_difference(pcr, (expected,), values.get(pcr, b""))
            for pcr, expected in lease.pcr_values.items()
            if values.get(pcr) != expected
        ]
        for lease in leases
    }
    fitting = [lease for lease in leases if not different[lease.label]]
    if fitting:
        return fitting[0]
    nearest = min(different, key=lambda label: len(different[label]))
    beside = f"; compared with {nearest!r}, the nearest of {len(leases)} leases" if len(leases) > 1 else ""
    raise _refused("pcr", "; ".join(different[nearest]) + beside, "boot an approved image, or " + CONNECT)


def spell(seconds: float) -> str:
    """A duration for a person: 90 s, 5 min, 48 h."""
    if seconds < 2 * _MINUTE_S:
        return f"{seconds:.0f} s"
    if seconds < 2 * _HOUR_S:
        return f"{seconds / _MINUTE_S:.0f} min"
    return f"{seconds / _HOUR_S:.0f} h"


def _refused(reason: str, what: str, remedy: str) -> TheirsError:
    return TheirsError(reason, what, where="lease", remedy=remedy)
