"""A real software TPM, and one region's machines around it, for tests on real quotes and real refusals."""

import os
import subprocess
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from tpm2_pytss import ESAPI

from appliance.adapters.tpm import EsysTpm
from appliance.adapters.tpm.objects import handles
from appliance.contract.attest import Approval, Enrolled, Grant
from appliance.contract.codec import Message, decode, encode
from appliance.contract.errors import TheirsError
from appliance.core.trust.anchors import PcrPolicy
from appliance.core.trust.approval import Delegation, consent_count, counter_reference, delegate, delegate_leases
from appliance.core.trust.attestation import Attestation, Leasing, Verdict
from appliance.core.trust.enrolment import Enrolment, Record
from appliance.core.trust.lease import Terms, choose
from appliance.core.trust.tpm_structures import pack_verifier
from appliance.lab import softtpm
from appliance.ports import SealedKey


class Software:
    """One manufactured TPM and the process that runs it."""

    def __init__(self, *, certificate: bool = True) -> None:
        self.state = Path(tempfile.mkdtemp(prefix="ap-", dir="/tmp"))
        softtpm.manufacture(self.state, "dev-1", certificate=certificate)
        self.port = softtpm.free_port()
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def tcti(self) -> str:
        return softtpm.tcti(self.port)

    def start(self) -> None:
        """Start it and wait until it answers: a power-on."""
        self.process = subprocess.Popen(softtpm.command(self.state, self.port), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(100):
            try:
                with closing(ESAPI(self.tcti)):
                    return
            except RuntimeError:
                time.sleep(0.02)
        raise AssertionError("swtpm does not answer")

    def cut(self) -> None:
        """A power cut."""
        assert self.process
        self.process.kill()
        self.process.wait()

    def restart(self) -> None:
        """A power cut and a power-on; an adapter that was connected will notice."""
        self.cut()
        self.start()

    async def boot(self, tpm: EsysTpm, what: str = "image 1") -> None:
        await softtpm.measured_boot(tpm, what)


@dataclass
class Region:
    """Root, region and the two machines of one device."""

    trusted: list[bytes]
    policy: PcrPolicy = field(default_factory=lambda: PcrPolicy("lab", trust_on_first_use=True, allow_zero_anchor=True))
    root: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))
    key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))
    record: Record | None = None
    terms: Terms = field(default_factory=lambda: Terms(3600.0, 4))

    @property
    def public(self) -> bytes:
        return pack_verifier(self.key.public_key())

    def enrolment(self) -> Enrolment:
        return Enrolment("dev-1", root_public=pack_verifier(self.root.public_key()), trusted=self.trusted, record=self.record)

    def enrolled(self, record: Record) -> Enrolled:
        return record.enrolled(self.public, delegate(self.root, self.public, record.reference))

    def attestation(self) -> Attestation:
        assert self.record
        return Attestation(self.record, region=self.key, policy=self.policy, leasing=Leasing(self.terms, self.delegated))

    def delegated(self, reference: bytes, counter: bytes, generation: int) -> Delegation:
        return delegate_leases(self.root, self.public, reference, counter=counter, generation=generation)


async def enrol(tpm: EsysTpm, region: Region) -> SealedKey:
    """The whole enrolment, each message over the wire."""
    machine = region.enrolment()
    challenge = machine.ask(wire(await tpm.enrol_ask()), now=0.0, wall=time.time(), chance=os.urandom)
    region.record = machine.prove(wire(await tpm.prove(wire(challenge))), now=1.0, chance=os.urandom)
    return await tpm.adopt(wire(region.enrolled(region.record)))


async def attest(tpm: EsysTpm, region: Region, sealed: SealedKey) -> Verdict:
    """Challenge, quote and verdict; the session waits for the approval."""
    machine = region.attestation()
    evidence = await tpm.evidence(sealed, wire(machine.ask(now=0.0, chance=os.urandom)))
    verdict = machine.judge(wire(evidence), now=1.0)
    region.record = verdict.record
    return verdict


async def opened(tpm: EsysTpm, region: Region, sealed: SealedKey) -> bytes:
    return await tpm.unseal(sealed, wire((await attest(tpm, region, sealed)).approval))


def wire(message: Any) -> Any:
    """The message as it arrives."""
    if not isinstance(message, Message):
        return msgspec.json.decode(msgspec.json.encode(message), type=type(message))
    return decode(encode(message), type(message))


async def refused(tpm: EsysTpm, sealed: SealedKey, approval: Approval, reason: str, told: str) -> None:
    """The TPM refuses with this reason and these words, and holds nothing afterwards."""
    with pytest.raises(TheirsError, match=told) as refusal:
        await tpm.unseal(sealed, approval)
    assert refusal.value.reason == reason
    assert refusal.value.remedy
    assert await held(tpm) == []


async def held(tpm: EsysTpm) -> list[int]:
    return await tpm._run(handles)


async def counted(tpm: EsysTpm, region: Region, sealed: SealedKey, *, anew: bool = False) -> bool:
    """Let the generation counter count if it must."""
    nonce = await tpm.count_nonce(sealed, anew=anew)
    if nonce:
        assert region.record
        await tpm.count(sealed, wire(consent_count(region.root, counter_reference(region.record.ek_name), nonce)))
    return bool(nonce)


async def leased(tpm: EsysTpm, region: Region, sealed: SealedKey) -> Grant:
    """A whole round: count if need be, prove, and take the leases."""
    await counted(tpm, region, sealed)
    approval = wire((await attest(tpm, region, sealed)).approval)
    await tpm.unseal(sealed, approval)
    granted = approval.grant
    assert granted is not None
    kept: Grant = wire(granted)
    return kept


async def open_kept(tpm: EsysTpm, sealed: SealedKey, kept: Grant) -> bytes:
    """What a device does without its region: look, choose the lease that fits, open."""
    sight = await tpm.look(sorted(kept.leases[0].pcr_values))
    return await tpm.unseal_leased(sealed, kept, choose(kept, sealed.enrolled.epoch, sight).lease)


async def lease_refused(tpm: EsysTpm, sealed: SealedKey, kept: Grant, reason: str, told: str, *, by_tpm: bool = True) -> None:
    """A lease opens nothing, for this reason and in these words. `by_tpm`: the first lease goes straight to the TPM, unlooked at."""
    with pytest.raises(TheirsError, match=told) as refusal:
        await (tpm.unseal_leased(sealed, kept, kept.leases[0]) if by_tpm else open_kept(tpm, sealed, kept))
    assert refusal.value.reason == reason
    assert refusal.value.remedy
    assert await held(tpm) == []
