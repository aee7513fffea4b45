"""Attesting: enrols devices, judges their quotes, and wraps data keys for those that it knows.

The decisions are core.trust's; here are the records (one file for each device, written before the answer), the keys and the link. The
name of a device is the one that the broker's ACL let it publish under, so it is the name that its SVID proves.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

import structlog
from cryptography.hazmat.primitives.asymmetric import ec

from appliance.contract.attest import ChallengeAsk, EnrolAsk, EnrolProof, Evidence
from appliance.contract.codec import Message, decode, encode
from appliance.contract.errors import TheirsError
from appliance.contract.models import KeyAsk
from appliance.core.trust.anchors import PcrPolicy
from appliance.core.trust.approval import delegate
from appliance.core.trust.attestation import Attestation
from appliance.core.trust.credential import Chance
from appliance.core.trust.enrolment import Enrolment, Record, unpack
from appliance.core.trust.envelope import NONCE_BYTES, wrap_for_device
from appliance.core.trust.tpm_structures import pack_verifier
from appliance.ports import Clock, Depot, Inbound, Link


@dataclass(frozen=True, slots=True, kw_only=True)
class Authorities:
    """Whom the region believes and what it signs with.

    `root` delegates to `region` for each device; in production the root's key is elsewhere and delegations are brought in.
    `ek_roots`: CA certificates of TPM makers, DER.
    """

    root: ec.EllipticCurvePrivateKey
    region: ec.EllipticCurvePrivateKey
    ek_roots: tuple[bytes, ...]
    policy: PcrPolicy


class Attesting:
    """The region's side of trust. `keys`: data keys by container hash, as the relay has got them."""

    def __init__(
        self, link: Link, clock: Clock, depot: Depot, authorities: Authorities, keys: Mapping[str, bytes], *, chance: Chance, region: str
    ) -> None:
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
                    return encode(await asyncio.to_thread(answer, device, inbound.payload))
            except TheirsError as error:
                self._log.warning("device_refused", device=device, asked=word, reason=error.reason, what=str(error))
                raise

        return serve

    def _enrolment(self, device: str) -> Enrolment:
        found = self._enrolments.get(device)
        if found is None:
            kept = self._depot.load(_file(device))
            found = self._enrolments[device] = Enrolment(
                device,
                root_public=pack_verifier(self._authorities.root.public_key()),
                trusted=self._authorities.ek_roots,
                record=unpack(kept) if kept else None,
            )
        return found

    def _record(self, device: str) -> Record:
        record = self._enrolment(device).record
        if record is None:
            raise TheirsError(
                "unknown_device", "this device is not enrolled here", where=device, remedy="it enrols by itself; if not, see its log"
            )
        return record

    def _enrol(self, device: str, payload: bytes) -> Message:
        known = [name.removeprefix("device-").removesuffix(".json") for name in self._depot.names("device-")]
        taken = {self._record(name).ek_name for name in known if name != device}
        return self._enrolment(device).ask(
            decode(payload, EnrolAsk), now=self._clock.monotonic(), wall=self._clock.wall(), chance=self._chance, taken=taken
        )

    def _prove(self, device: str, payload: bytes) -> Message:
        record = self._enrolment(device).prove(decode(payload, EnrolProof), now=self._clock.monotonic(), chance=self._chance)
        self._depot.save(_file(device), record.pack())
        self._attestations.pop(device, None)
        self._log.info("device_enrolled", device=device, epoch=record.epoch)
        region_public = pack_verifier(self._authorities.region.public_key())
        return record.enrolled(region_public, delegate(self._authorities.root, region_public, record.reference))

    def _challenge(self, device: str, payload: bytes) -> Message:
        decode(payload, ChallengeAsk)
        record = self._record(device)
        attestation = self._attestations.get(device)
        if attestation is None:
            attestation = self._attestations[device] = Attestation(record, region=self._authorities.region, policy=self._authorities.policy)
        return attestation.ask(now=self._clock.monotonic(), chance=self._chance)

    def _attest(self, device: str, payload: bytes) -> Message:
        attestation = self._attestations.get(device)
        if attestation is None:
            raise TheirsError("no_challenge", "evidence without a challenge", where=device, remedy="ask for a challenge first")
        try:
            verdict = attestation.judge(decode(payload, Evidence), now=self._clock.monotonic())
        except TheirsError:
            self._attested.discard(device)
            raise
        self._depot.save(_file(device), verdict.record.pack())
        self._enrolment(device).record = verdict.record
        self._attested.add(device)
        self._log.info("device_attested", device=device)
        return verdict.approval

    def _key(self, device: str, payload: bytes) -> Message:
        ask = decode(payload, KeyAsk)
        record = self._record(device)
        if device not in self._attested:
            raise TheirsError("not_attested", "this device has not proved its state since the region started", where=device)
        key = self._keys.get(ask.artifact)
        if key is None:
            raise TheirsError("unknown_artifact", "this region has no key for that artifact", where=ask.artifact[:64])
        return wrap_for_device(ask.artifact, key, kek=record.kek, epoch=record.epoch, nonce=self._chance(NONCE_BYTES))


def _file(device: str) -> str:
    return f"device-{device}.json"
