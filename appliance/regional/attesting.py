"""Attesting: enrols devices, judges their quotes, leases, revokes, and wraps data keys for those that it knows.

The decisions are core.trust's; here are the records (one file for each device, written before the answer), the keys and the link. The
name of a device is the one that the broker's ACL let it publish under, so it is the name that its SVID proves.

A device is revoked while a file `revoked-DEVICE` lies beside its record; its first line says why. It takes effect at the device's next proof,
and the broker cuts the device off as soon as `cutting` has seen it.
"""

import asyncio
import functools
from collections.abc import Awaitable, Callable, Container, Mapping
from dataclasses import dataclass, replace

import msgspec
import structlog
from cryptography.hazmat.primitives.asymmetric import ec

from appliance.contract.attest import ChallengeAsk, CountConsent, EnrolAsk, EnrolProof, Evidence
from appliance.contract.codec import Message, decode, encode
from appliance.contract.errors import TheirsError
from appliance.contract.models import KeyAsk
from appliance.core.trust.anchors import PcrPolicy
from appliance.core.trust.approval import Delegation, consent_count, counter_reference, delegate, delegate_leases
from appliance.core.trust.attestation import Attestation, Leasing
from appliance.core.trust.credential import Chance
from appliance.core.trust.enrolment import Enrolment, Record, unpack
from appliance.core.trust.envelope import NONCE_BYTES, wrap_for_device
from appliance.core.trust.lease import Terms
from appliance.core.trust.tpm_structures import pack_verifier
from appliance.core.trust.vault import NONCE_BYTES as VAULT_NONCE_BYTES
from appliance.core.trust.vault import lock, unlock
from appliance.ports import Clock, Depot, Inbound, Link

REASON_CHARS = 200
"""Of a revocation's reason, as it is told to the device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Authorities:
    """Whom the region believes and what it signs with.

    `root` delegates to `region` for each device; in production the root's key is elsewhere and delegations are brought in.
    `ek_roots`: CA certificates of TPM makers, DER. `vault`: the key (32 bytes) under which the records' keys are stored.
    `terms`: what is allowed offline. `images` reads the approved images anew at each proof, so that a staged release needs no restart.
    """

    root: ec.EllipticCurvePrivateKey
    region: ec.EllipticCurvePrivateKey
    ek_roots: tuple[bytes, ...]
    policy: PcrPolicy
    vault: bytes
    terms: Terms
    images: Callable[[], Mapping[str, Mapping[int, bytes]]] = dict


class Attesting:
    """The region's side of trust. `keys`: data keys by container hash, as the relay has got them; `online_only`: those that no lease opens.

    `judged` hears how each exchange ended: device, what it asked, and the reason of a refusal or nothing.
    """

    def __init__(
        self,
        link: Link,
        clock: Clock,
        depot: Depot,
        authorities: Authorities,
        keys: Mapping[str, bytes],
        *,
        chance: Chance,
        region: str,
        online_only: Container[str] = frozenset(),
        judged: Callable[[str, str, str], None] = lambda _device, _asked, _refused: None,
    ) -> None:
        self._judged = judged
        self._online_only = online_only
        self._delegated: dict[str, tuple[bytes, Delegation]] = {}
        self._delegated_leases: dict[str, tuple[bytes, int, Delegation]] = {}
        self._public = pack_verifier(authorities.region.public_key())
        self._clock = clock
        self._depot = depot
        self._authorities = authorities
        self._keys = keys
        self._chance = chance
        self._enrolments: dict[str, Enrolment] = {}
        self._attestations: dict[str, Attestation] = {}
        self._attested: set[str] = set()
        self._locks: dict[str, asyncio.Lock] = {}
        self._log = structlog.get_logger()
        asks: dict[str, Callable[[str, bytes], Message]] = {
            "enrol": self._enrol,
            "prove": self._prove,
            "challenge": self._challenge,
            "attest": self._attest,
            "key": self._key,
        }
        for word, answer in asks.items():
            link.serve(f"v1/{region}/d/+/up/ask/{word}", self._answering(word, answer))

    def _answering(self, word: str, answer: Callable[[str, bytes], Message]) -> Callable[[Inbound], Awaitable[bytes]]:
        async def serve(inbound: Inbound) -> bytes:
            device = inbound.topic.split("/")[3]
            try:
                async with self._locks.setdefault(device, asyncio.Lock()):  # a nonce is spent once, also by two at the same time
                    answered = encode(await asyncio.to_thread(answer, device, inbound.payload))
            except TheirsError as error:
                self._judged(device, word, error.reason)
                self._log.warning("device_refused", device=device, asked=word, reason=error.reason, what=str(error))
                raise
            else:
                self._judged(device, word, "")
                return answered

        return serve

    def _enrolment(self, device: str) -> Enrolment:
        found = self._enrolments.get(device)
        if found is None:
            kept = self._depot.load(_file(device))
            found = self._enrolments[device] = Enrolment(
                device,
                root_public=pack_verifier(self._authorities.root.public_key()),
                trusted=self._authorities.ek_roots,
                record=unlock(unpack(kept), self._authorities.vault) if kept else None,
            )
        return found

    def _record(self, device: str) -> Record:
        record = self._enrolment(device).record
        if record is None:
            raise TheirsError(
                "unknown_device", "this device is not enrolled here", where=device, remedy="it enrols by itself; if not, see its log"
            )
        return record

    def _save(self, record: Record) -> None:
        self._depot.save(_file(record.device), lock(record, self._authorities.vault, self._chance(VAULT_NONCE_BYTES)).pack())

    def _revoked(self, device: str) -> str:
        """Why a device may open nothing any more; empty if it may."""
        kept = self._depot.load(f"revoked-{device}")
        if kept is None:
            return ""
        lines = kept.decode(errors="replace").splitlines()
        return lines[0][:REASON_CHARS] if lines and lines[0].strip() else "no reason was written down"

    def _check_revoked(self, device: str) -> None:
        revoked = self._revoked(device)
        if revoked:
            self._attested.discard(device)
            raise TheirsError(
                "revoked", f"its region has revoked it: {revoked}", where=device, remedy="an operator decides whether it comes back"
            )

    def _enrol(self, device: str, payload: bytes) -> Message:
        self._check_revoked(device)
        known = [name.removeprefix("device-").removesuffix(".json") for name in self._depot.names("device-")]
        taken = {self._record(name).ek_name for name in known if name != device}
        return self._enrolment(device).ask(
            decode(payload, EnrolAsk), now=self._clock.monotonic(), wall=self._clock.wall(), chance=self._chance, taken=taken
        )

    def _prove(self, device: str, payload: bytes) -> Message:
        self._check_revoked(device)
        proof = decode(payload, EnrolProof)
        record = self._enrolment(device).prove(proof, now=self._clock.monotonic(), chance=self._chance)
        if proof.escrow:
            self._escrow(device, proof.escrow)
        self._save(record)
        self._attestations.pop(device, None)
        self._log.info("device_enrolled", device=device, epoch=record.epoch)
        return record.enrolled(self._public, self._delegation(record))

    def _escrow(self, device: str, box: bytes) -> None:
        """Keep what provisioning sent, and the one before: a TPM whose authorisation is lost can not be administered again."""
        name = f"escrow-{device}"
        before = self._depot.load(name)
        if before is not None and before != box:
            self._depot.save(f"{name}.old", before)
        self._depot.save(name, box)

    def _challenge(self, device: str, payload: bytes) -> Message:
        ask = decode(payload, ChallengeAsk)
        record = self._record(device)
        attestation = self._attestations[device] = self._attestation(record)
        count = self._consent(record, ask.counter_nonce) if ask.counter_nonce else None
        return attestation.ask(now=self._clock.monotonic(), chance=self._chance, count=count)

    def _attestation(self, record: Record) -> Attestation:
        authorities = self._authorities
        policy = replace(authorities.policy, images=authorities.images())
        leasing = Leasing(authorities.terms, functools.partial(self._delegate_leases, record.device))
        return Attestation(record, region=authorities.region, policy=policy, leasing=leasing)

    def _consent(self, record: Record, nonce: bytes) -> CountConsent:
        """Root lets the device's counter count: also a revoked one's, because counting only ever ends leases."""
        self._log.info("counter_consented", device=record.device)
        return consent_count(self._authorities.root, counter_reference(record.ek_name), nonce)

    def _attest(self, device: str, payload: bytes) -> Message:
        attestation = self._attestations.pop(device, None)
        if attestation is None:
            raise TheirsError("no_challenge", "evidence without a challenge", where=device, remedy="ask for a challenge first")
        revoked = self._revoked(device)
        if revoked:
            attestation.revoke()
            self._store(attestation.record)
        try:
            verdict = attestation.judge(decode(payload, Evidence), now=self._clock.monotonic(), revoked=revoked)
        except TheirsError:
            self._attested.discard(device)
            raise
        self._store(verdict.record)
        self._attested.add(device)
        given = verdict.approval.grant
        self._log.info("device_attested", device=device, leases=[lease.label for lease in given.leases] if given else [])
        delegation = self._delegation(verdict.record)
        return msgspec.structs.replace(
            verdict.approval,
            region_public=self._public,
            delegation=delegation.approved,
            delegation_signature=delegation.signature,
        )

    def _store(self, record: Record) -> None:
        """Keep what a proof taught, on disk before anything is answered; a proof that taught nothing writes nothing."""
        enrolment = self._enrolment(record.device)
        if enrolment.record != record:
            self._save(record)
            enrolment.record = record

    def _delegation(self, record: Record) -> Delegation:
        """Root's word for this region's present key, signed once for each device and epoch."""
        reference, found = self._delegated.get(record.device, (b"", None))
        if found is None or reference != record.reference:
            found = delegate(self._authorities.root, self._public, record.reference)
            self._delegated[record.device] = (record.reference, found)
        return found

    def _delegate_leases(self, device: str, reference: bytes, counter: bytes, generation: int) -> Delegation:
        """The same for leases, once for each device, epoch and generation."""
        kept = self._delegated_leases.get(device)
        if kept is not None and kept[:2] == (reference, generation):
            return kept[2]
        found = delegate_leases(self._authorities.root, self._public, reference, counter=counter, generation=generation)
        self._delegated_leases[device] = (reference, generation, found)
        return found

    def _key(self, device: str, payload: bytes) -> Message:
        ask = decode(payload, KeyAsk)
        record = self._record(device)
        if device not in self._attested:
            raise TheirsError("not_attested", "this device has not proved its state since the region started", where=device)
        key = self._keys.get(ask.artifact)
        if key is None:
            raise TheirsError("unknown_artifact", "this region has no key for that artifact", where=ask.artifact[:64])
        self._check_revoked(device)
        given = self._authorities.terms.term_s > 0 and record.generation is not None  # without a counter it never got a lease
        leased = given and ask.artifact not in self._online_only and bool(record.leased_kek)
        kek = record.leased_kek if leased else record.kek
        return wrap_for_device(ask.artifact, key, kek=kek, epoch=record.epoch, nonce=self._chance(NONCE_BYTES), leased=leased)


def _file(device: str) -> str:
    return f"device-{device}.json"
