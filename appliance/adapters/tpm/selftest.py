"""Asks of the TPM what the next restart will ask: a quote that verifies, and a sealed object that opens again.

The object is the test's own (32 random bytes, sealed to the PCRs as they are), so it needs no region and spends no lease; nothing stays behind.
"""

import hashlib
import os
from contextlib import ExitStack

from tpm2_pytss import ESAPI
from tpm2_pytss.constants import ESYS_TR, TPM2_ALG, TPM2_SE, TPMA_OBJECT, TPMA_SESSION
from tpm2_pytss.types import TPM2B_PUBLIC, TPM2B_SENSITIVE_CREATE, TPM2B_SENSITIVE_DATA, TPMS_SENSITIVE_CREATE

from appliance.adapters.tpm.objects import attestation_key, hold, quote, selection, storage_key, unpack_signature
from appliance.adapters.tpm.refusals import step
from appliance.contract.errors import TheirsError, WorldError

PCRS = (0, 7)
SECRET_BYTES = 32


def run(esys: ESAPI) -> None:
    """Raises: WorldError (`tpm`, `self_test`) that names the part that failed."""
    try:
        _quote(esys)
        _unseal(esys)
    except TheirsError as error:
        raise _failed(str(error)) from error


def _quote(esys: ESAPI) -> None:
    nonce = os.urandom(SECRET_BYTES)
    with ExitStack() as loaded, step("self-test: quote"):
        ak = attestation_key(esys, loaded)[0]
        _, attest, signature = quote(esys, ak, PCRS, nonce)
        if nonce not in attest:
            raise _failed("a quote does not carry its nonce")
        esys.verify_signature(ak, hashlib.sha256(attest).digest(), unpack_signature(signature))


def _unseal(esys: ESAPI) -> None:
    secret = os.urandom(SECRET_BYTES)
    with ExitStack() as loaded, step("self-test: unseal"):
        template = TPM2B_PUBLIC.parse("keyedhash", objectAttributes=TPMA_OBJECT.FIXEDTPM | TPMA_OBJECT.FIXEDPARENT | TPMA_OBJECT.NODA)
        template.publicArea.authPolicy = _policy(esys)
        sensitive = TPM2B_SENSITIVE_CREATE(TPMS_SENSITIVE_CREATE(data=TPM2B_SENSITIVE_DATA(secret)))
        srk = storage_key(esys, loaded)[0]
        private, public, *_ = esys.create(srk, sensitive, template)
        sealed = hold(esys, loaded, esys.load(srk, private, public))
        session = hold(esys, loaded, _session(esys, TPM2_SE.POLICY))
        esys.policy_pcr(session, b"", selection(PCRS))
        if bytes(esys.unseal(sealed, session1=session)) != secret:
            raise _failed("a sealed object opened as something else")


def _policy(esys: ESAPI) -> bytes:
    """PolicyPCR over the PCRs as they are, by the TPM's own trial session."""
    with ExitStack() as loaded:
        trial = hold(esys, loaded, _session(esys, TPM2_SE.TRIAL))
        esys.policy_pcr(trial, b"", selection(PCRS))
        return bytes(esys.policy_get_digest(trial))


def _session(esys: ESAPI, kind: TPM2_SE) -> ESYS_TR:
    session = esys.start_auth_session(ESYS_TR.NONE, ESYS_TR.NONE, kind, None, TPM2_ALG.SHA256)
    esys.trsess_set_attributes(session, TPMA_SESSION.CONTINUESESSION)
    return session


def _failed(what: str) -> WorldError:
    remedy = "the next restart may not open the key: look at the TPM before that"
    return WorldError("self_test", what, where="TPM self-test", remedy=remedy)
