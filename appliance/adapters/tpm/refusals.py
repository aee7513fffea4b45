"""What a TPM's return codes mean here: whose fault it is, and the words for an operator."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from tpm2_pytss import TSS2_Exception
from tpm2_pytss.constants import TPM2_RC

from appliance.contract.errors import ApplianceError, TheirsError, WorldError

_LAYER = 0x00FF_0000
_LAYER_TCTI = 0x000A_0000
_LAYER_MARSHAL = 0x0009_0000

_PARAMETER = 0x00C0
"""A format-one code (bit 7) about a parameter (bit 6): Part 2, 6.6.2."""
_GIVEN = frozenset({"verify", "policy_signed", "count", "load", "import"})
"""Steps at which the TPM is given what came from the region: a parameter that it can not use is the region's fault, not the TPM's."""

_OWNER_NEEDED = 0x9A2
"""TPM_RC_BAD_AUTH of session 1: here only hierarchies have passwords, and only the owner's is ever needed."""

AGAIN = "attest again"
ANEW = "enrol this device anew"
CONNECT = "connect it to its region"
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
    ("policy_clock", TPM2_RC.POLICY): ("term", "the lease's term ended, by the TPM's clock", CONNECT),
    ("policy_resets", TPM2_RC.POLICY): ("restarts", "the TPM was restarted more often than the lease allows", CONNECT),
    ("policy_generation", TPM2_RC.POLICY): ("generation", "the lease was ended: the TPM's generation counter counted on", CONNECT),
    ("counter", TPM2_RC.HANDLE): ("generation", "the TPM's generation counter is gone: removed, or the TPM was cleared", CONNECT),
    ("count", TPM2_RC.SIGNATURE): ("signature", "the consent to count is not root's, or is for another session or term", AGAIN),
    ("count", TPM2_RC.EXPIRED): ("expired", "the consent to count arrived after its term", AGAIN),
    ("count", TPM2_RC.POLICY_FAIL): ("policy", "the generation counter belongs to another root", "provision this device anew"),
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
    if step in _GIVEN and error.rc & (_LAYER | _PARAMETER) == _PARAMETER:
        return TheirsError(
            "malformed", f"{step}: the TPM can not use what it was given: {error} (0x{error.rc:x})", where="TPM", remedy=AGAIN
        )
    if error.rc & _LAYER == _LAYER_MARSHAL:
        return TheirsError("malformed", f"{step}: not a TPM structure: {error}", where="TPM structure", remedy=AGAIN)
    if error.rc == _OWNER_NEEDED:
        remedy = "run `appliance provision` (with --owner-auth): it leaves the keys where no authorisation is needed"
        return WorldError("owner", f"{step} needs the owner's authorisation, which was set already", where="TPM", remedy=remedy)
    remedy = "is the TPM there, and may this user open it?" if error.rc & _LAYER == _LAYER_TCTI else ""
    return WorldError("tpm", f"{step} failed: {error} (0x{error.rc:x})", where="TPM", remedy=remedy)
