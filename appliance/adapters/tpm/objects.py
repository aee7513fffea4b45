"""Keys, handles and PCRs of a TPM: what the port's verbs are made of. Each key that is loaded is flushed when its stack closes."""

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

from tpm2_pytss import ESAPI, TSS2_Exception
from tpm2_pytss.constants import ESYS_TR, TPM2_CAP, TPM2_RC, TPMA_OBJECT
from tpm2_pytss.types import TPM2B_PUBLIC, TPMS_ATTEST, TPMT_PUBLIC, TPMT_SIGNATURE
from tpm2_pytss.utils import NoSuchIndex, NVReadEK, create_ek_template

from appliance.adapters.tpm.refusals import ANEW, step
from appliance.contract.attest import Enrolled
from appliance.contract.errors import TheirsError, WorldError

PCR_COUNT = 24
DIGEST_BYTES = 32
READ_AT_ONCE = 8
"""Digests that TPM2_PCR_Read returns at most (TPML_DIGEST)."""

QUOTE_TRIES = 3
"""PCRs may be extended between reading and quoting; then both are done again."""

EK_TEMPLATE = "EK-RSA2048"
EK_HANDLE = 0x8101_0001
"""Where a maker leaves the RSA-2048 EK (TCG TPM v2.0 Provisioning Guidance, 7.8); making it anew takes seconds on real TPMs."""

SRK_HANDLE = 0x8100_0011
"""Where `appliance provision` leaves our storage key, so that it is there without the owner's authorisation; makers use 0x81000001."""

_BORN_INSIDE = (
    TPMA_OBJECT.FIXEDTPM | TPMA_OBJECT.FIXEDPARENT | TPMA_OBJECT.SENSITIVEDATAORIGIN | TPMA_OBJECT.USERWITHAUTH | TPMA_OBJECT.RESTRICTED
)
_FIRST_HANDLES = (0x8000_0000, 0x0200_0000, 0x0300_0000)
_MANY = 64
_HANDLE_ABSENT = 0x18B
_ERASED = b"\xff"
"""What an NV index holds where nobody has written yet; no certificate and no template begins with it."""


def quote(esys: ESAPI, ak: ESYS_TR, pcrs: Sequence[int], nonce: bytes) -> tuple[dict[int, bytes], bytes, bytes]:
    """Read and quote PCRs until both agree; return values, TPMS_ATTEST and TPMT_SIGNATURE."""
    for _ in range(QUOTE_TRIES):
        values = read_pcrs(esys, pcrs)
        attest, signature = esys.quote(ak, selection(pcrs), nonce)
        statement = TPMS_ATTEST.unmarshal(bytes(attest))[0]
        if bytes(statement.attested.quote.pcrDigest) == digest_over(values):
            return values, bytes(attest), bytes(signature.marshal())
    raise WorldError(
        "tpm", f"the PCRs changed at each of {QUOTE_TRIES} quotes", where="TPM", remedy="attest again when the boot has settled"
    )


def read_pcrs(esys: ESAPI, pcrs: Sequence[int]) -> dict[int, bytes]:
    """Read PCRs of the bank sha256. Raises: WorldError (`tpm`) if there is no such bank."""
    values: dict[int, bytes] = {}
    for start in range(0, len(pcrs), READ_AT_ONCE):
        part = pcrs[start : start + READ_AT_ONCE]
        _, _, digests = esys.pcr_read(selection(part))
        read = [bytes(each) for each in digests]
        if [len(each) for each in read] != [DIGEST_BYTES] * len(part):
            raise WorldError("tpm", "has no PCR bank sha256", where="TPM", remedy="enable the bank in the firmware's settings")
        values.update(zip(part, read, strict=True))
    return values


def attestation_key(esys: ESAPI, loaded: ExitStack) -> tuple[ESYS_TR, TPM2B_PUBLIC]:
    """Make the key that signs quotes: ECC P-256, restricted, in the endorsement hierarchy.

    NODA: each power cut after a use of a key without it counts as a wrong password; some cuts later the TPM locks the key (0x921).
    """
    template = TPM2B_PUBLIC.parse("ecc256:ecdsa-sha256:null", objectAttributes=_BORN_INSIDE | TPMA_OBJECT.SIGN_ENCRYPT | TPMA_OBJECT.NODA)
    return primary(esys, loaded, template, ESYS_TR.ENDORSEMENT)


def storage_key(esys: ESAPI, loaded: ExitStack) -> tuple[ESYS_TR, TPM2B_PUBLIC]:
    """The storage root key, ECC P-256 with AES-128-CFB in the owner hierarchy: where provisioning left it, or made anew."""
    found = persistent(esys, loaded, SRK_HANDLE)
    if found is not None:
        return found, esys.read_public(found)[0]
    template = TPM2B_PUBLIC.parse("ecc256:aes128cfb", objectAttributes=_BORN_INSIDE | TPMA_OBJECT.DECRYPT | TPMA_OBJECT.NODA)
    return primary(esys, loaded, template, ESYS_TR.OWNER)


def pinned_storage_key(esys: ESAPI, loaded: ExitStack, enrolled: Enrolled) -> ESYS_TR:
    """Load the storage key if it is the enrolled one. Raises: TheirsError (`srk_name`)."""
    srk = storage_key(esys, loaded)[0]
    seen = bytes(esys.tr_get_name(srk))
    if seen != enrolled.srk_name:
        what = f"its name is {seen.hex()[:16]}…, enrolled was {enrolled.srk_name.hex()[:16]}…: the TPM was cleared or exchanged, or its bus is tapped"
        raise TheirsError("srk_name", what, where="storage key", remedy=f"look at the board, then {ANEW}")
    return srk


def endorsement_key(esys: ESAPI, loaded: ExitStack) -> tuple[bytes | None, ESYS_TR]:
    """The EK's certificate, None if none was ever written to its end, and the EK, from its handle if the maker left it there."""
    read = NVReadEK(esys)

    def written(index: int) -> bytes:
        try:
            content: bytes = read(index)
        except TSS2_Exception as error:
            if int(error.error) != TPM2_RC.NV_UNINITIALIZED:
                raise
            raise NoSuchIndex(index) from error
        if content.startswith(_ERASED):
            raise NoSuchIndex(index)
        return content

    certificate, template = create_ek_template(EK_TEMPLATE, written)
    found = persistent(esys, loaded, EK_HANDLE)
    return certificate, found if found is not None else primary(esys, loaded, template, ESYS_TR.ENDORSEMENT)[0]


def persistent(esys: ESAPI, loaded: ExitStack, handle: int) -> ESYS_TR | None:
    """A persistent object or NV index; None if there is none. Its place in the library, not in the TPM, is given back with the stack."""
    try:
        found = esys.tr_from_tpmpublic(handle)
    except TSS2_Exception as error:
        if error.rc != _HANDLE_ABSENT:
            raise
        return None
    loaded.callback(esys.tr_close, found)
    return found


def primary(esys: ESAPI, loaded: ExitStack, template: TPM2B_PUBLIC, hierarchy: ESYS_TR) -> tuple[ESYS_TR, TPM2B_PUBLIC]:
    """Derive a primary key from its hierarchy's seed; the same template gives the same key."""
    handle, public, *_ = esys.create_primary(None, template, hierarchy)
    return hold(esys, loaded, handle), public


def hold(esys: ESAPI, loaded: ExitStack, handle: ESYS_TR) -> ESYS_TR:
    """Flush the handle when the stack closes. If the TPM failed already, that failure is told, not the flush's."""

    def close(_kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None) -> None:
        try:
            flush(esys, handle)
        except WorldError:
            if not isinstance(error, WorldError):
                raise

    loaded.push(close)
    return handle


def flush(esys: ESAPI, handle: ESYS_TR) -> None:
    """Flush one handle. Raises: WorldError (`tpm`)."""
    with step("flush"):
        esys.flush_context(handle)


def handles(esys: ESAPI) -> list[int]:
    """The TPM handles of all transient objects and of all sessions, loaded and saved."""
    found: list[int] = []
    for first in _FIRST_HANDLES:
        _, capability = esys.get_capability(TPM2_CAP.HANDLES, first, _MANY)  # a name of its own: its parts point into it
        found += [int(each) for each in capability.data.handles]
    return found


def checked_pcrs(pcrs: Sequence[int]) -> list[int]:
    """The PCRs in ascending order, each once. Raises: TheirsError (`malformed`) if there are none or a TPM has not so many."""
    listed = sorted(set(pcrs))
    if not listed or not 0 <= listed[0] <= listed[-1] < PCR_COUNT:
        raise TheirsError("malformed", f"asks for PCRs {listed}; 0 to {PCR_COUNT - 1} exist", where="challenge")
    return listed


def selection(pcrs: Sequence[int]) -> str:
    """A PCR selection as tpm2_pytss parses it."""
    return "sha256:" + ",".join(map(str, pcrs))


def digest_over(values: Mapping[int, bytes]) -> bytes:
    """SHA-256 over PCR values in ascending order, as a quote holds it."""
    return hashlib.sha256(b"".join(values[pcr] for pcr in sorted(values))).digest()


def unpack_public(content: bytes) -> TPM2B_PUBLIC:
    """Read a TPMT_PUBLIC. Raises: ValueError, TSS2_Exception; `step` translates them."""
    return TPM2B_PUBLIC(publicArea=_whole(TPMT_PUBLIC, content))


def unpack_signature(content: bytes) -> TPMT_SIGNATURE:
    """Read a TPMT_SIGNATURE. Raises: as `unpack_public`."""
    return _whole(TPMT_SIGNATURE, content)


def pack_public(public: TPM2B_PUBLIC) -> bytes:
    """Marshal as TPMT_PUBLIC."""
    return bytes(public.publicArea.marshal())


def trim_certificate(padded: bytes) -> bytes:
    """Cut what some makers' NV indices hold after the certificate: a long-form DER SEQUENCE says its own length."""
    if padded[:2] == b"\x30\x82":
        return padded[: 4 + int.from_bytes(padded[2:4], "big")]
    return padded


def _whole(kind: Any, content: bytes) -> Any:
    """Unmarshal a structure that must fill its bytes; the TSS would ignore what follows."""
    value, used = kind.unmarshal(content)
    if used != len(content):
        raise ValueError(f"{len(content) - used} bytes too many")
    return value
