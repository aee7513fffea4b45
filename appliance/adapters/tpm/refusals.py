"""What a TPM's return codes mean here: whose fault it is, and the words for an operator."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from tpm2_pytss import TSS2_Exception
from tpm2_pytss.constants import TPM2_RC

from appliance.contract.errors import ApplianceError, TheirsError, WorldError

_LAYER = 0x00FF_0000
_LAYER_TCTI = 0x000A_0000
_LAYER_MARSHAL = 0x0009_0000

AGAIN = "attest again"
ANEW = "enrol this device anew"
REFUSALS: Mapping[tuple[str, int], tuple[str, str, str]] = {
    ("activate", TPM2_RC.INTEGRITY): ("credential", "the challenge was made for another attestation key or another TPM", ANEW),
    ("activate", TPM2_RC.VALUE): ("credential", "the challenge was made for another endorsement key", ANEW),
    ("import", TPM2_RC.INTEGRITY): ("import", "the sealed key was made for another storage key, or was altered", ANEW),
    ("import", TPM2_RC.VALUE): ("import", "the sealed key is not encrypted to this storage key", ANEW),
    ("import", TPM2_RC.ECC_POINT): ("import", "the sealed key is not encrypted to this storage key", ANEW),
    ("load", TPM2_RC.INTEGRITY): (
        "import",
        "the sealed key is not of this storage key: the TPM was cleared, or the file was altered",
        ANEW,
    ),
    ("policy_pcr", TPM2_RC.VALUE): ("pcr", "PCRs changed since the quote that the region approved", AGAIN),
    ("policy_signed", TPM2_RC.SIGNATURE): (
        "signature",
        "the consent is not the region's, or is for another session or another term",
        AGAIN,
    ),
    ("policy_signed", TPM2_RC.EXPIRED): ("expired", "the consent arrived after its term", AGAIN),
    ("verify", TPM2_RC.SIGNATURE): ("signature", "an approval or delegation is not signed for this device by the key that it names", ANEW),
    ("policy_authorize", TPM2_RC.VALUE): ("policy", "what was approved is not what this device shows", AGAIN),
    ("unseal", TPM2_RC.POLICY_FAIL): ("policy", "the approvals do not lead to the authority that the sealed key names", ANEW),
    ("unseal", TPM2_RC.POLICY_CC): ("policy", "the approval is for another command", AGAIN),
    ("unseal", TPM2_RC.EXPIRED): ("expired", "the consent's term ended before the key was opened", AGAIN),
    ("unseal", TPM2_RC.PCR_CHANGED): ("pcr", "PCRs changed while the key was being opened", AGAIN),
}
"""By step and base return code (docs/rooms/trust.md): reason, what is wrong, what to do."""


@contextmanager
def step(name: str) -> Iterator[None]:
    """Name what is being done, and translate what the TSS raises there."""
    try:
        yield
    except ApplianceError:
        raise
    except TSS2_Exception as error:
        raise _translated(name, error) from error
    except (ValueError, TypeError, AttributeError, IndexError, OverflowError) as error:  # what cffi says of bytes that do not fit
        raise TheirsError("malformed", f"{name}: {error}", where="TPM structure", remedy=AGAIN) from error


def _translated(step: str, error: TSS2_Exception) -> ApplianceError:
    known = REFUSALS.get((step, int(error.error)))
    if known is not None:
        reason, what, remedy = known
        return TheirsError(reason, what, where=f"TPM at {step} (0x{error.rc:x})", remedy=remedy)
    if error.rc & _LAYER == _LAYER_MARSHAL:
        return TheirsError("malformed", f"{step}: not a TPM structure: {error}", where="TPM structure", remedy=AGAIN)
    remedy = "is the TPM there, and may this user open it?" if error.rc & _LAYER == _LAYER_TCTI else ""
    return WorldError("tpm", f"{step} failed: {error} (0x{error.rc:x})", where="TPM", remedy=remedy)
