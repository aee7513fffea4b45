"""How a region takes up one device: from its endorsement certificate to a key that only its TPM can open.

1. EnrolAsk: the EK must be vouched for by a maker (endorsement.py), AK and SRK must have the attributes of their trades (quote.py). The answer is a
   credential that opens only in a TPM that holds both this EK and this AK.
2. EnrolProof: the secret came back, and the AK certifies the SRK over our nonce. Only now EK, AK and SRK are one record. They are never
   taken from different asks: Keylime once checked the EK with one AK and quotes with another (CVE-2022-1053).
3. One ask is pending at a time; a newer one replaces it. Its ticket holds for 60 s and is spent by the first proof that names it, good or bad.
4. A device that enrols again keeps its EK, or is refused; it gets a new epoch and a new key. An EK that another device has is refused.
   What was learned on first use stays: enrolling again is no way around it. The reset count starts anew only with a new SRK (TPM2_Clear).
5. Two keys are sealed to the SRK (credential.py) under root's policy (approval.py): one for sessions, one for leases. Root signs outside this machine: `Record.enrolled` takes the delegation.
6. Time, chance and the wall clock are arguments. A refusal raises and changes nothing but the spent ticket.
"""

import hmac
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import msgspec

from appliance.contract.attest import EnrolAsk, EnrolChallenge, Enrolled, EnrolProof, SealedObject
from appliance.contract.errors import TheirsError, WorldError
from appliance.core.trust.approval import Delegation, counter_reference, guarding_policy, leased_reference, policy_reference
from appliance.core.trust.credential import KEY_BYTES, Chance, make_credential, wrap_sealed
from appliance.core.trust.endorsement import verify_endorsement
from appliance.core.trust.quote import check_attestation_key, check_storage_key, verify_certify
from appliance.core.trust.tpm_structures import Public, parse_public

TICKET_S = 60.0
"""How long an enrolment challenge can be answered, in seconds."""

_TICKET_BYTES = 16
_NONCE_BYTES = 32


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What a region knows of one enrolled device; everything but `kek` may be read by anyone.

    Attributes:
        ak_public: TPMT_PUBLIC of the key that signs this device's quotes.
        root_public: TPMT_PUBLIC of the key that the sealed key's policy names.
        sealed_public, duplicate, seed: the sealed key as `Enrolled` carries it.
        leased: the second sealed key, which leases open.
        kek, leased_kek: the key-encryption keys themselves, 32 bytes each. The region needs them to wrap data keys. They are fields of their own
            so that a store can keep them apart: `without_key` is the rest, and attestation works with the rest alone.
        kek_wrapped: both, as vault.py stores them.
        reset_count: of the last good quote. `pcr_values`: learned under `trust_on_first_use`.
        generation: the TPM's counter as last certified, None before. Leases are given only from `generation_floor` on.
    """

    device: str
    epoch: int
    ek_name: bytes
    ak_public: bytes
    srk_name: bytes
    root_public: bytes
    sealed_public: bytes
    duplicate: bytes
    seed: bytes
    leased: SealedObject | None = None
    kek: bytes = b""
    leased_kek: bytes = b""
    kek_wrapped: bytes = b""
    reset_count: int = 0
    pcr_values: dict[int, bytes] = {}
    generation: int | None = None
    generation_floor: int = 0

    def __repr__(self) -> str:
        """Name the record without its key: a traceback or a log must not hold it."""
        return f"Record(device={self.device!r}, epoch={self.epoch}, ek_name={self.ek_name.hex()})"

    @property
    def ak_name(self) -> bytes:
        """The attestation key's name."""
        return self.attestation_key.name

    @property
    def attestation_key(self) -> Public:
        """The attestation key, parsed."""
        return parse_public(self.ak_public, "recorded attestation key")

    @property
    def reference(self) -> bytes:
        """The policyRef of this device and epoch."""
        return policy_reference(self.ek_name, self.epoch)

    def enrolled(self, region_public: bytes, delegation: Delegation) -> Enrolled:
        """The message that gives the device its sealed key, for a region whose key root has delegated to."""
        return Enrolled(
            epoch=self.epoch,
            sealed_public=self.sealed_public,
            duplicate=self.duplicate,
            seed=self.seed,
            srk_name=self.srk_name,
            policy_ref=self.reference,
            root_public=self.root_public,
            region_public=region_public,
            delegation=delegation.approved,
            delegation_signature=delegation.signature,
            leased=self.leased,
            counter_ref=counter_reference(self.ek_name),
        )

    def without_key(self) -> "Record":
        """The record without its keys."""
        return msgspec.structs.replace(self, kek=b"", leased_kek=b"")

    def with_key(self, kek: bytes, leased_kek: bytes = b"") -> "Record":
        """The record with its keys put back."""
        return msgspec.structs.replace(self, kek=kek, leased_kek=leased_kek)

    def pack(self) -> bytes:
        """The stored form (JSON, bytes in base64); holds the key unless it was taken out."""
        return msgspec.json.encode(self)


def unpack(payload: bytes) -> Record:
    """Read the stored form. Raises: WorldError (`record`) if it is damaged."""
    try:
        record = msgspec.json.decode(payload, type=Record)
        parse_public(record.ak_public, "recorded attestation key")
    except (msgspec.MsgspecError, UnicodeDecodeError, TheirsError) as error:
        raise WorldError(
            "record", f"a stored enrolment is damaged: {error}", remedy="restore it from a backup, or enrol the device again"
        ) from error
    return record


@dataclass(frozen=True, slots=True)
class _Pending:
    """One ask that waits for its proof."""

    ticket: str
    until: float
    secret: bytes
    nonce: bytes
    ek_name: bytes
    attestation: Public
    storage: Public


class Enrolment:
    """The region's side of one device's enrolment. `trusted` are CA certificates (DER), see endorsement.py; `record` is an earlier enrolment."""

    def __init__(self, device: str, *, root_public: bytes, trusted: Sequence[bytes], record: Record | None = None) -> None:
        self.record = record
        self._device = device
        self._root_public = root_public
        self._trusted = trusted
        self._pending: _Pending | None = None

    def ask(self, message: EnrolAsk, *, now: float, wall: float, chance: Chance, taken: Collection[bytes] = ()) -> EnrolChallenge:
        """Check who asks, and challenge it.

        `now` is monotonic, `wall` since the epoch (both in seconds); `taken` are the EK names of all other devices.

        Raises: TheirsError (`malformed`, `ek_certificate`, `ek_mismatch`, `ek_template`, `ek_changed`, `ek_taken`, `ak_attributes`, `srk_attributes`).
        """
        endorsement = parse_public(message.ek_public, "EK")
        attestation = parse_public(message.ak_public, "attestation key")
        storage = parse_public(message.srk_public, "storage key")
        verify_endorsement(message.ek_certificates, self._trusted, endorsement, wall)
        self._check_identity(endorsement.name, taken)
        check_attestation_key(attestation)
        check_storage_key(storage)
        secret, nonce, ticket = chance(KEY_BYTES), chance(_NONCE_BYTES), chance(_TICKET_BYTES).hex()
        credential = make_credential(endorsement, attestation.name, secret, chance)
        self._pending = _Pending(ticket, now + TICKET_S, secret, nonce, endorsement.name, attestation, storage)
        return EnrolChallenge(ticket=ticket, credential=credential.blob, secret=credential.secret, nonce=nonce)

    def prove(self, message: EnrolProof, *, now: float, chance: Chance) -> Record:
        """Check the proof and make the record with a fresh key; persist it before answering `record.enrolled(…)`.

        Raises: TheirsError (`ticket`, `expired`, `credential`, `certify`, `malformed`).
        """
        pending = self._spend(message.ticket, now)
        if not hmac.compare_digest(message.secret, pending.secret):
            raise TheirsError("credential", "returned another secret: EK and AK are not in one TPM", where=self._device)
        verify_certify(
            message.certify_attest, message.certify_signature, attestation=pending.attestation, storage=pending.storage, nonce=pending.nonce
        )
        self.record = self._seal(pending, chance)
        return self.record

    def deadline(self) -> float | None:
        """When the pending ask is worthless (monotonic seconds); forgetting it then is optional, it is refused anyway."""
        return self._pending.until if self._pending else None

    def _check_identity(self, ek_name: bytes, taken: Collection[bytes]) -> None:
        if ek_name in taken:
            raise TheirsError(
                "ek_taken", "another device is enrolled with this TPM", where=self._device, remedy="remove the other device first"
            )
        if self.record is not None and self.record.ek_name != ek_name:
            what = f"is enrolled with the TPM {self.record.ek_name.hex()[:16]}…, asks with {ek_name.hex()[:16]}…"
            raise TheirsError(
                "ek_changed", what, where=self._device, remedy="if the board was exchanged, remove the device and enrol it anew"
            )

    def _spend(self, ticket: str, now: float) -> _Pending:
        pending = self._pending
        if pending is None or ticket != pending.ticket:
            raise TheirsError("ticket", "names no pending enrolment: used already, replaced by a newer ask, or made up", where=self._device)
        self._pending = None
        if now > pending.until:
            raise TheirsError(
                "expired",
                f"answered {now - pending.until + TICKET_S:.0f} s after the challenge, {TICKET_S:.0f} are allowed",
                where=self._device,
            )
        return pending

    def _seal(self, pending: _Pending, chance: Chance) -> Record:
        earlier = self.record
        epoch = earlier.epoch + 1 if earlier else 1
        same_srk = earlier is not None and earlier.srk_name == pending.storage.name
        kek, leased_kek = chance(KEY_BYTES), chance(KEY_BYTES)
        session = self._wrap(pending, policy_reference(pending.ek_name, epoch), kek, chance)
        return Record(
            device=self._device,
            epoch=epoch,
            ek_name=pending.ek_name,
            ak_public=pending.attestation.raw,
            srk_name=pending.storage.name,
            root_public=self._root_public,
            sealed_public=session.public,
            duplicate=session.duplicate,
            seed=session.seed,
            leased=self._wrap(pending, leased_reference(pending.ek_name, epoch), leased_kek, chance),
            kek=kek,
            leased_kek=leased_kek,
            reset_count=earlier.reset_count if earlier and same_srk else 0,
            pcr_values=earlier.pcr_values if earlier else {},
            generation=earlier.generation if earlier and same_srk else None,
            generation_floor=earlier.generation_floor if earlier and same_srk else 0,
        )

    def _wrap(self, pending: _Pending, reference: bytes, kek: bytes, chance: Chance) -> SealedObject:
        sealed = wrap_sealed(pending.storage, guarding_policy(self._root_public, reference), kek, chance)
        return SealedObject(public=sealed.public, duplicate=sealed.duplicate, seed=sealed.seed, policy_ref=reference)
