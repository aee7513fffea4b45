"""The device's side of leases in the TPM: unsealing under a lease, and the generation counter that ends leases.

1. The order of assertions is that of core's `lease_policy` and `delegate_leases`; the TPM compares digests, so another order opens nothing.
2. The counter is an NV index that anybody may read and only root can count. It is defined under the owner's authorisation, which is empty until
   `appliance provision` sets it; so provisioning defines it before.
3. A PCR that is extended meanwhile (IMA does at any moment) makes the TPM refuse with 0x128: the whole sequence is done again.
"""

import hashlib
from contextlib import ExitStack

from tpm2_pytss import ESAPI, TSS2_Exception
from tpm2_pytss.constants import ESYS_TR, TPM2_ALG, TPM2_CC, TPM2_EO, TPM2_RC, TPM2_SE, TPMA_NV, TPMA_SESSION
from tpm2_pytss.types import TPM2B_NV_PUBLIC, TPM2B_PRIVATE, TPMS_NV_PUBLIC, TPMT_SIG_SCHEME

from appliance.adapters.tpm.objects import (
    digest_over,
    hold,
    persistent,
    pinned_storage_key,
    selection,
    unpack_public,
    unpack_signature,
)
from appliance.adapters.tpm.refusals import step
from appliance.contract.attest import COUNTER_INDEX, CountConsent, Enrolled, Grant, Lease, SealedObject
from appliance.contract.errors import TheirsError, WorldError

TRIES = 5
"""How often a sequence that a PCR change broke is done again."""

CLOCK_OFFSET = 8
RESET_OFFSET = 16
"""Offsets in TPMS_TIME_INFO (Part 2, 10.11.6)."""

COUNTER_BYTES = 8
_COUNTER = 0x10
"""TPM_NT_COUNTER in bits 4 to 7 of TPMA_NV (Part 2, 13.4)."""
_ATTRIBUTES = TPMA_NV.POLICYWRITE | TPMA_NV.AUTHREAD | TPMA_NV.NO_DA | _COUNTER
_BAD_AUTH = 0x9A2


def unseal_leased(esys: ESAPI, enrolled: Enrolled, private: bytes, grant: Grant, lease: Lease) -> bytes:
    """Open the leased key. Raises: TheirsError (the reasons of `refusals.py`), WorldError (`tpm`)."""
    leased = enrolled.leased
    if leased is None or not private:
        raise TheirsError("no_lease", "this device was enrolled without a key for leases", where="enrolment", remedy="enrol it anew")
    for left in reversed(range(TRIES)):
        try:
            return _unseal_once(esys, (enrolled, leased), private, grant, lease)
        except TheirsError as error:
            raced = isinstance(error.__cause__, TSS2_Exception) and int(error.__cause__.error) == TPM2_RC.PCR_CHANGED
            if not raced or not left:
                raise
    raise AssertionError("unreachable")


def _unseal_once(esys: ESAPI, key: tuple[Enrolled, SealedObject], private: bytes, grant: Grant, lease: Lease) -> bytes:
    enrolled, leased = key
    with ExitStack() as session_kept, ExitStack() as loaded:
        with step("session"):
            srk = pinned_storage_key(esys, loaded, enrolled)
            session = esys.start_auth_session(srk, ESYS_TR.NONE, TPM2_SE.POLICY, "aes128cfb", TPM2_ALG.SHA256)
            hold(esys, session_kept, session)
            esys.trsess_set_attributes(session, TPMA_SESSION.ENCRYPT | TPMA_SESSION.CONTINUESESSION)
            loaded.close()
        _assert_lease(esys, session, lease)
        assert_authorized(esys, session, grant.region_public, lease.approved, lease.signature, reference=leased.policy_ref)
        _assert_generation(esys, session, grant.generation)
        root = enrolled.root_public
        assert_authorized(esys, session, root, grant.delegation, grant.delegation_signature, reference=leased.policy_ref)
        srk = pinned_storage_key(esys, loaded, enrolled)
        with step("load"):
            handle = hold(esys, loaded, esys.load(srk, TPM2B_PRIVATE(private), unpack_public(leased.public)))
        with step("unseal"):
            return bytes(esys.unseal(handle, session1=session))


def _assert_lease(esys: ESAPI, session: ESYS_TR, lease: Lease) -> None:
    with step("policy_pcr"):
        esys.policy_pcr(session, digest_over(lease.pcr_values), selection(sorted(lease.pcr_values)))
    with step("policy_clock"):
        esys.policy_counter_timer(session, lease.clock_before_ms.to_bytes(8, "big"), TPM2_EO.UNSIGNED_LT, offset=CLOCK_OFFSET)
    with step("policy_resets"):
        esys.policy_counter_timer(session, lease.reset_count_max.to_bytes(4, "big"), TPM2_EO.UNSIGNED_LE, offset=RESET_OFFSET)
    with step("policy_command_code"):
        esys.policy_command_code(session, TPM2_CC.Unseal)


def _assert_generation(esys: ESAPI, session: ESYS_TR, generation: int) -> None:
    with ExitStack() as loaded:
        with step("counter"):
            counter = persistent(esys, loaded, COUNTER_INDEX)
        if counter is None:
            what = "the TPM's generation counter is gone: removed, or the TPM was cleared"
            raise TheirsError("generation", what, where="TPM", remedy="connect it to its region")
        with step("policy_generation"):
            esys.policy_nv(counter, counter, session, generation.to_bytes(COUNTER_BYTES, "big"), TPM2_EO.EQ)


def assert_authorized(esys: ESAPI, session: ESYS_TR, public: bytes, approved: bytes, signature: bytes, *, reference: bytes) -> None:
    """Let the key `public` replace the session's digest, which must be `approved`, by its own authority."""
    with ExitStack() as loaded:
        with step("verify"):
            key = hold(esys, loaded, esys.load_external(unpack_public(public), None, ESYS_TR.OWNER))
            ticket = esys.verify_signature(key, hashlib.sha256(approved + reference).digest(), unpack_signature(signature))
        with step("policy_authorize"):
            esys.policy_authorize(session, approved, esys.tr_get_name(key), ticket, policy_ref=reference)


def define_counter(esys: ESAPI, root_public: bytes, reference: bytes) -> bool:
    """Make the counter that only this root can count, unless it is there; return whether it must count first.

    Raises: WorldError (`owner`) if the owner's authorisation is needed.
    """
    policy = _counter_policy(esys, root_public, reference)
    with ExitStack() as loaded, step("counter"):
        counter = persistent(esys, loaded, COUNTER_INDEX)
        if counter is not None:
            seen = esys.nv_read_public(counter)[0].nvPublic
            if bytes(seen.authPolicy) == policy and int(seen.attributes) & ~int(TPMA_NV.WRITTEN) == int(_ATTRIBUTES):
                return not int(seen.attributes) & int(TPMA_NV.WRITTEN)
        try:
            if counter is not None:  # another root's: this device changed hands
                esys.nv_undefine_space(counter)
                loaded.pop_all()
            public = TPMS_NV_PUBLIC(
                nvIndex=COUNTER_INDEX, nameAlg=TPM2_ALG.SHA256, attributes=_ATTRIBUTES, authPolicy=policy, dataSize=COUNTER_BYTES
            )
            esys.tr_close(esys.nv_define_space(None, TPM2B_NV_PUBLIC(nvPublic=public)))
        except TSS2_Exception as error:
            if error.rc != _BAD_AUTH:
                raise
            what = "the generation counter can not be defined: the TPM's owner has an authorisation"
            remedy = "run `appliance provision` with the region's provision.json, and the owner's authorisation from escrow"
            raise WorldError("owner", what, where="TPM", remedy=remedy) from error
    return True


def _counter_policy(esys: ESAPI, root_public: bytes, reference: bytes) -> bytes:
    """PolicySigned(root, reference) ; PolicyCommandCode(NV_Increment), as core's `counter_policy` computes it."""
    with ExitStack() as loaded, step("counter"):
        root = hold(esys, loaded, esys.load_external(unpack_public(root_public), None, ESYS_TR.OWNER))
        name = bytes(esys.tr_get_name(root))
    signed = hashlib.sha256(bytes(32) + TPM2_CC.PolicySigned.to_bytes(4, "big") + name).digest()
    code = TPM2_CC.PolicyCommandCode.to_bytes(4, "big") + TPM2_CC.NV_Increment.to_bytes(4, "big")
    return hashlib.sha256(hashlib.sha256(signed + reference).digest() + code).digest()


def count(esys: ESAPI, session: ESYS_TR, nonce: bytes, enrolled: Enrolled, consent: CountConsent) -> None:
    """Count once in this session. Raises: TheirsError (`signature`, `expired`, `policy`, `malformed`)."""
    with ExitStack() as loaded, step("count"):
        root = hold(esys, loaded, esys.load_external(unpack_public(enrolled.root_public), None, ESYS_TR.OWNER))
        signature = unpack_signature(consent.signature)
        reference = enrolled.counter_ref
        esys.policy_signed(root, session, signature, nonce_tpm=nonce, policy_ref=reference, expiration=consent.expiration_s)
        esys.policy_command_code(session, TPM2_CC.NV_Increment)
        counter = persistent(esys, loaded, COUNTER_INDEX)
        if counter is None:
            raise TheirsError("generation", "the TPM's generation counter is gone", where="TPM", remedy="attest again")
        esys.nv_increment(counter, session1=session)


def certify_counter(esys: ESAPI, ak: ESYS_TR, nonce: bytes) -> tuple[bytes, bytes]:
    """TPMS_ATTEST and TPMT_SIGNATURE over the counter; nothing if there is none or it never counted."""
    with ExitStack() as loaded, step("counter"):
        counter = persistent(esys, loaded, COUNTER_INDEX)
        if counter is None:
            return b"", b""
        try:
            attest, signature = esys.nv_certify(ak, counter, nonce, TPMT_SIG_SCHEME(scheme=TPM2_ALG.NULL), COUNTER_BYTES)
        except TSS2_Exception as error:
            if int(error.error) != TPM2_RC.NV_UNINITIALIZED:
                raise
            return b"", b""
        return bytes(attest), bytes(signature.marshal())
