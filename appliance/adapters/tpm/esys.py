"""The device's TPM 2.0 through the TSS's ESAPI: enrolment, quotes, and unsealing under the region's approval.

1. All commands run in one worker thread: a TPM does one thing at a time, and the loop never waits for it.
2. What a call loads it flushes, also when it fails: a bare TPM has room for three objects and three sessions.
   One thing outlives its call: the policy session of `evidence` (or of `count_nonce`), until `unseal` (`count`), the next of either kind,
   `session_s`, or `close`.
3. The attestation key is in the endorsement hierarchy (elsewhere its quotes hide the reset count), the storage key in the owner's; both are derived
   from the TPM's seeds at each use, so nothing is stored.
4. The policy session is salted to the storage key and encrypts the answer. So the storage key's name is compared with the enrolled one first:
   someone on the bus could hand out a key of his own.
5. A connection that broke is opened anew by the next call. A TPM that is ours alone is then swept: a killed process leaves its objects behind.
"""

import asyncio
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import TypeVar, TypeVarTuple

import msgspec
import structlog
from tpm2_pytss import ESAPI
from tpm2_pytss.constants import ESYS_TR, TPM2_ALG, TPM2_CC, TPM2_SE, TPMA_SESSION
from tpm2_pytss.types import (
    TPM2B_ENCRYPTED_SECRET,
    TPM2B_ID_OBJECT,
    TPM2B_PRIVATE,
    TPML_DIGEST_VALUES,
    TPMT_HA,
    TPMT_SIG_SCHEME,
    TPMT_SYM_DEF_OBJECT,
    TPMU_HA,
)

from appliance.adapters.tpm import selftest
from appliance.adapters.tpm.leasing import assert_authorized, certify_counter, count, define_counter, unseal_leased
from appliance.adapters.tpm.objects import (
    attestation_key,
    checked_pcrs,
    digest_over,
    endorsement_key,
    flush,
    handles,
    hold,
    pack_public,
    pinned_storage_key,
    quote,
    read_pcrs,
    selection,
    storage_key,
    trim_certificate,
    unpack_public,
    unpack_signature,
)
from appliance.adapters.tpm.refusals import AGAIN, step
from appliance.contract.attest import (
    Approval,
    Challenge,
    CountConsent,
    EnrolAsk,
    EnrolChallenge,
    Enrolled,
    EnrolProof,
    Evidence,
    Grant,
    Lease,
    SealedObject,
    quoted_nonce,
)
from appliance.contract.errors import TheirsError, WorldError
from appliance.ports import SealedKey, Sight

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


@dataclass(frozen=True, slots=True)
class _Waiting:
    """The open policy session, and the PCRs and their digest that were quoted for it (empty: it waits to count)."""

    session: ESYS_TR
    nonce: bytes
    selection: str = ""
    digest: bytes = b""


class EsysTpm:
    """Port `Tpm`. `tcti` is a TCTI string such as `device:/dev/tpmrm0`; `session_s` is how long a session waits for its approval."""

    def __init__(self, tcti: str, *, session_s: float = 60.0) -> None:
        self._tcti = tcti
        self._session_s = session_s
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="tpm")
        self._open_esys: ESAPI | None = None
        self._waiting: _Waiting | None = None
        self._alarm: asyncio.TimerHandle | None = None
        self._log = structlog.get_logger()

    async def enrol_ask(self) -> EnrolAsk:
        """Read the EK certificate and the public parts of EK, AK and SRK. Raises: WorldError (`tpm`)."""
        return await self._run(self._read_identity)

    async def prove(self, challenge: EnrolChallenge) -> EnrolProof:
        """Activate the credential and certify the SRK. Raises: TheirsError (`credential`, `malformed`), WorldError (`tpm`)."""
        return await self._run(self._prove, challenge)

    async def adopt(self, enrolled: Enrolled) -> SealedKey:
        """Import the sealed key. Raises: TheirsError (`srk_name`, `import`, `malformed`), WorldError (`tpm`)."""
        return await self._run(self._adopt, enrolled)

    async def evidence(self, sealed: SealedKey, challenge: Challenge) -> Evidence:
        """Open a policy session and quote for it; it waits for `unseal`. Raises: TheirsError (`srk_name`, `malformed`), WorldError (`tpm`)."""
        return await self._run_waiting(self._make_evidence, sealed.enrolled, challenge)

    async def count_nonce(self, sealed: SealedKey, *, anew: bool) -> bytes:
        """Make the generation counter if need be, and open a session to count in. Raises: TheirsError (`malformed`), WorldError (`tpm`, `owner`)."""
        return await self._run_waiting(self._open_count, sealed.enrolled, anew)

    async def count(self, sealed: SealedKey, consent: CountConsent) -> None:
        """Count once; the session is spent either way. Raises: TheirsError (`expired`, `signature`, `policy`, `malformed`), WorldError (`tpm`)."""
        self._disarm()
        await self._run(self._count, sealed.enrolled, consent)

    async def look(self, pcrs: Sequence[int]) -> Sight:
        """Read PCRs, clock and reset count. Raises: TheirsError (`malformed`), WorldError (`tpm`)."""
        return await self._run(self._look, pcrs)

    async def unseal_leased(self, sealed: SealedKey, grant: Grant, lease: Lease) -> bytes:
        """Open the leased key, in a session of its own.

        Raises: TheirsError (`policy`, `signature`, `pcr`, `term`, `restarts`, `generation`, `srk_name`, `import`, `no_lease`, `malformed`),
            WorldError (`tpm`).
        """
        return await self._run(unseal_leased, sealed.enrolled, sealed.leased_private, grant, lease)

    async def self_test(self) -> None:
        """Quote, and unseal an object of the test's own. Raises: WorldError (`tpm`, `self_test`)."""
        await self._run(selftest.run)

    async def unseal(self, sealed: SealedKey, approval: Approval) -> bytes:
        """Satisfy the policy with the approval and return the 32-byte key; the session is spent either way.

        Raises: TheirsError (`policy`, `expired`, `signature`, `pcr`, `srk_name`, `import`, `malformed`), WorldError (`tpm`).
        """
        self._disarm()
        return await self._run(self._unseal, sealed, approval)

    async def extend(self, pcr: int, digest: bytes) -> None:
        """Extend a PCR (0 to 23, bank sha256) by a 32-byte digest, as a measuring boot stage does. Raises: WorldError (`tpm`)."""
        await self._run(self._extend, pcr, digest)

    async def close(self) -> None:
        """Flush the waiting session and disconnect; the object is of no use afterwards."""
        self._disarm()
        await asyncio.get_running_loop().run_in_executor(self._pool, self._close)
        self._pool.shutdown(wait=False)

    async def _run_waiting(self, work: Callable[[ESAPI, *Ts], T], *args: *Ts) -> T:
        """Run what may leave a session that waits, and see that it does not wait for ever."""
        self._disarm()
        try:
            return await self._run(work, *args)
        finally:  # also when the caller gave up: the worker thread goes on and may leave a session
            self._disarm()
            self._alarm = asyncio.get_running_loop().call_later(self._session_s, self._expire)

    def _disarm(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None

    def _expire(self) -> None:
        self._alarm = None
        self._pool.submit(self._drop_waiting)

    async def _run(self, work: Callable[[ESAPI, *Ts], T], *args: *Ts) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._guarded, work, args)

    # Everything below runs in the worker thread.

    def _guarded(self, work: Callable[..., T], args: Sequence[object]) -> T:
        """Run one piece of work on an open connection; whatever escapes is one of our errors."""
        with step("connect"):
            esys = self._open()
        try:
            with step("tpm"):
                return work(esys, *args)
        except WorldError:
            self._close()
            raise

    def _open(self) -> ESAPI:
        if self._open_esys is None:
            os.environ.setdefault("TSS2_LOG", "all+none")  # the library would write each expected refusal to stderr
            self._open_esys = ESAPI(self._tcti)
            if self._tcti.startswith(("swtpm", "mssim", "device:/dev/tpm0", "device:/dev/tpm1")):
                self._sweep(self._open_esys)
        return self._open_esys

    def _close(self) -> None:
        self._drop_waiting()
        if self._open_esys is not None:
            self._open_esys.close()
            self._open_esys = None

    def _sweep(self, esys: ESAPI) -> None:
        """Flush what a killed process left behind. ESAPI has no reference to it, so the command is written by hand (Part 3, 28.4)."""
        swept = 0
        for handle in handles(esys):
            esys.tcti.transmit(bytes.fromhex("80010000000e00000165") + handle.to_bytes(4, "big"))
            esys.tcti.receive()
            swept += 1
        if swept:
            self._log.info("leftovers_flushed", handles=swept)

    def _drop_waiting(self) -> None:
        waiting, self._waiting = self._waiting, None
        if waiting is not None and self._open_esys is not None:
            with suppress(WorldError):  # it died with the TPM's power; whatever else is wrong, the next command tells
                flush(self._open_esys, waiting.session)

    def _read_identity(self, esys: ESAPI) -> EnrolAsk:
        with ExitStack() as loaded:
            certificate, ek = endorsement_key(esys, loaded)
            ek_public = esys.read_public(ek)[0]
            loaded.close()
            ak_public = attestation_key(esys, loaded)[1]
            srk_public = storage_key(esys, loaded)[1]
            return EnrolAsk(
                ek_certificates=[trim_certificate(certificate)] if certificate else [],
                ek_public=pack_public(ek_public),
                ak_public=pack_public(ak_public),
                srk_public=pack_public(srk_public),
            )

    def _prove(self, esys: ESAPI, challenge: EnrolChallenge) -> EnrolProof:
        with ExitStack() as loaded, step("activate"):
            ak = attestation_key(esys, loaded)[0]
            ek = endorsement_key(esys, loaded)[1]
            session = hold(esys, loaded, esys.start_auth_session(ESYS_TR.NONE, ESYS_TR.NONE, TPM2_SE.POLICY, None, TPM2_ALG.SHA256))
            esys.policy_secret(ESYS_TR.ENDORSEMENT, session)
            blob, seed = TPM2B_ID_OBJECT(challenge.credential), TPM2B_ENCRYPTED_SECRET(challenge.secret)
            secret = esys.activate_credential(ak, ek, blob, seed, session2=session)
        with ExitStack() as loaded, step("certify"):
            ak, srk = attestation_key(esys, loaded)[0], storage_key(esys, loaded)[0]
            attest, signature = esys.certify(srk, ak, challenge.nonce, TPMT_SIG_SCHEME(scheme=TPM2_ALG.NULL))
            return EnrolProof(
                ticket=challenge.ticket, secret=bytes(secret), certify_attest=bytes(attest), certify_signature=bytes(signature.marshal())
            )

    def _adopt(self, esys: ESAPI, enrolled: Enrolled) -> SealedKey:
        with ExitStack() as loaded, step("import"):
            srk = pinned_storage_key(esys, loaded, enrolled)
            session = SealedObject(
                public=enrolled.sealed_public, duplicate=enrolled.duplicate, seed=enrolled.seed, policy_ref=enrolled.policy_ref
            )
            leased = enrolled.leased
            return SealedKey(
                enrolled=enrolled,
                private=_import(esys, srk, session),
                leased_private=_import(esys, srk, leased) if leased is not None else b"",
            )

    def _make_evidence(self, esys: ESAPI, enrolled: Enrolled, challenge: Challenge) -> Evidence:
        self._drop_waiting()
        pcrs = checked_pcrs(challenge.pcrs)
        with ExitStack() as session_kept, ExitStack() as loaded, step("quote"):
            srk = pinned_storage_key(esys, loaded, enrolled)
            session = esys.start_auth_session(srk, ESYS_TR.NONE, TPM2_SE.POLICY, "aes128cfb", TPM2_ALG.SHA256)
            hold(esys, session_kept, session)
            esys.trsess_set_attributes(session, TPMA_SESSION.ENCRYPT | TPMA_SESSION.CONTINUESESSION)
            session_nonce = bytes(esys.trsess_get_nonce_tpm(session))
            loaded.close()
            ak = attestation_key(esys, loaded)[0]
            nonce = quoted_nonce(challenge.nonce, session_nonce)
            values, attest, signature = quote(esys, ak, pcrs, nonce)
            counter_attest, counter_signature = certify_counter(esys, ak, nonce)
            self._waiting = _Waiting(session, session_nonce, selection(pcrs), digest_over(values))
            session_kept.pop_all()
        return Evidence(
            nonce=challenge.nonce,
            quote_attest=attest,
            quote_signature=signature,
            pcr_values=values,
            session_nonce=session_nonce,
            counter_attest=counter_attest,
            counter_signature=counter_signature,
        )

    def _open_count(self, esys: ESAPI, enrolled: Enrolled, anew: bool) -> bytes:
        self._drop_waiting()
        if not enrolled.counter_ref or not (define_counter(esys, enrolled.root_public, enrolled.counter_ref) or anew):
            return b""
        with step("session"):
            session = esys.start_auth_session(ESYS_TR.NONE, ESYS_TR.NONE, TPM2_SE.POLICY, None, TPM2_ALG.SHA256)
            self._waiting = _Waiting(session, bytes(esys.trsess_get_nonce_tpm(session)))
            return self._waiting.nonce

    def _count(self, esys: ESAPI, enrolled: Enrolled, consent: CountConsent) -> None:
        waiting, self._waiting = self._waiting, None
        if waiting is None:
            raise TheirsError("expired", f"no session waits to count: none was opened, or {self._session_s:.0f} s passed", remedy=AGAIN)
        with ExitStack() as kept:
            session = hold(esys, kept, waiting.session)
            esys.trsess_set_attributes(session, TPMA_SESSION.CONTINUESESSION)
            count(esys, session, waiting.nonce, enrolled, consent)

    def _look(self, esys: ESAPI, pcrs: Sequence[int]) -> Sight:
        with step("look"):
            values = read_pcrs(esys, checked_pcrs(pcrs))
            now = esys.read_clock()
            return Sight(pcr_values=values, clock_ms=int(now.clockInfo.clock), reset_count=int(now.clockInfo.resetCount))

    def _unseal(self, esys: ESAPI, sealed: SealedKey, approval: Approval) -> bytes:
        waiting, self._waiting = self._waiting, None
        if waiting is None:
            raise TheirsError("expired", f"no policy session waits: none was opened, or {self._session_s:.0f} s passed", remedy=AGAIN)
        with ExitStack() as loaded:
            session = hold(esys, loaded, waiting.session)
            enrolled = _as_approved(sealed.enrolled, approval)
            _assert_session(esys, waiting, enrolled, approval)
            assert_authorized(
                esys, session, enrolled.root_public, enrolled.delegation, enrolled.delegation_signature, reference=enrolled.policy_ref
            )
            srk = pinned_storage_key(esys, loaded, enrolled)
            with step("load"):
                key = hold(esys, loaded, esys.load(srk, TPM2B_PRIVATE(sealed.private), unpack_public(enrolled.sealed_public)))
            with step("unseal"):
                return bytes(esys.unseal(key, session1=session))

    def _extend(self, esys: ESAPI, pcr: int, digest: bytes) -> None:
        with step("extend"):
            values = TPML_DIGEST_VALUES([TPMT_HA(hashAlg=TPM2_ALG.SHA256, digest=TPMU_HA(sha256=digest))])
            esys.pcr_extend(ESYS_TR.PCR0 + pcr, values)


def _assert_session(esys: ESAPI, waiting: _Waiting, enrolled: Enrolled, approval: Approval) -> None:
    """Bring the session to what an online approval approves. Another kind of approval is another function beside this one."""
    session = waiting.session
    with step("policy_pcr"):
        esys.policy_pcr(session, waiting.digest, waiting.selection)
    with ExitStack() as loaded, step("policy_signed"):
        region = hold(esys, loaded, esys.load_external(unpack_public(enrolled.region_public), None, ESYS_TR.OWNER))
        signature = unpack_signature(approval.session_signature)
        esys.policy_signed(
            region, session, signature, nonce_tpm=waiting.nonce, policy_ref=enrolled.policy_ref, expiration=approval.expiration_s
        )
    with step("policy_command_code"):
        esys.policy_command_code(session, TPM2_CC.Unseal)
    assert_authorized(esys, session, enrolled.region_public, approval.approved, approval.approved_signature, reference=enrolled.policy_ref)


def _as_approved(enrolled: Enrolled, approval: Approval) -> Enrolled:
    """The enrolment with the region's present key, if the approval says that it was rotated; root's delegation proves it to the TPM."""
    if not approval.region_public:
        return enrolled
    return msgspec.structs.replace(
        enrolled,
        region_public=approval.region_public,
        delegation=approval.delegation,
        delegation_signature=approval.delegation_signature,
    )


def _import(esys: ESAPI, srk: ESYS_TR, sealed: SealedObject) -> bytes:
    private = esys.import_(
        srk,
        b"",
        unpack_public(sealed.public),
        TPM2B_PRIVATE(sealed.duplicate),
        TPM2B_ENCRYPTED_SECRET(sealed.seed),
        TPMT_SYM_DEF_OBJECT(algorithm=TPM2_ALG.NULL),
    )
    return bytes(private)
