"""What is done to a TPM once, on the bench: its storage key is left there, its DevID key is made, its authorisations are set.

1. The order matters: key and counter are made while the owner's authorisation is empty or given; afterwards the daemon needs none.
2. A DevID key is a child of the storage key: ECC P-256, for signing anything, fixed to this TPM, without a password. Public and private part are
   written as SPIRE's agent loads them (spire v1.13, pkg/agent/plugin/nodeattestor/tpmdevid: TPMT_PUBLIC, and TPM2B_PRIVATE's contents); its
   storage key template H-2 is ours.
3. Everything here may be called again; what is done already is left as it is.
4. An EK certificate of one's own is kept where a maker's would be (TCG EK Credential Profile 2.0, 2.2.1.4: 0x01C00002 for RSA 2048), as an index of the
   owner's that anybody may read; TPM2_Clear removes it.
"""

import hashlib
import os
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Self

from tpm2_pytss import ESAPI
from tpm2_pytss.constants import ESYS_TR, TPM2_ALG, TPM2_CAP, TPM2_PT, TPM2_PT_FIRMWARE, TPM2_PT_VENDOR, TPMA_NV, TPMA_OBJECT
from tpm2_pytss.types import (
    TPM2B_NV_PUBLIC,
    TPM2B_PRIVATE,
    TPM2B_PUBLIC,
    TPM2B_SENSITIVE_CREATE,
    TPMS_NV_PUBLIC,
    TPMT_SIG_SCHEME,
)

from appliance.adapters.tpm.leasing import define_counter
from appliance.adapters.tpm.objects import (
    SRK_HANDLE,
    endorsement_key,
    hold,
    pack_public,
    persistent,
    storage_key,
    trim_certificate,
    unpack_public,
)
from appliance.adapters.tpm.refusals import step

EK_CERTIFICATE_INDEX = 0x01C00002
_PIECE_BYTES = 512
"""The least that a TPM takes in one NV write (PC Client Platform TPM Profile)."""
_FIXED_PROPERTIES = 64
_VENDOR = (TPM2_PT_VENDOR.STRING_1, TPM2_PT_VENDOR.STRING_2, TPM2_PT_VENDOR.STRING_3, TPM2_PT_VENDOR.STRING_4)
_READABLE = TPMA_NV.OWNERWRITE | TPMA_NV.OWNERREAD | TPMA_NV.AUTHREAD | TPMA_NV.NO_DA
_OWNER_SET = 0x1
_LOCKOUT_SET = 0x4
"""TPMA_PERMANENT (Part 2, 8.6)."""

_SIGNS = (
    TPMA_OBJECT.FIXEDTPM
    | TPMA_OBJECT.FIXEDPARENT
    | TPMA_OBJECT.SENSITIVEDATAORIGIN
    | TPMA_OBJECT.USERWITHAUTH
    | TPMA_OBJECT.SIGN_ENCRYPT
    | TPMA_OBJECT.NODA
)


@dataclass(frozen=True, slots=True)
class DevId:
    """A DevID key: TPMT_PUBLIC, and the private part as only this TPM can load it."""

    public: bytes
    private: bytes


class Ownership:
    """One TPM on the bench. Use it as a context manager. `owner`: the owner's authorisation, empty if none was set."""

    def __init__(self, tcti: str, *, owner: str = "") -> None:
        self._tcti = tcti
        self._owner = owner
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        """Connect. Raises: WorldError (`tpm`)."""
        os.environ.setdefault("TSS2_LOG", "all+none")
        with step("connect"):
            self._esys: ESAPI = self._stack.enter_context(ESAPI(self._tcti))
            self._esys.tr_set_auth(ESYS_TR.OWNER, self._owner)
        return self

    def __exit__(self, *_: object) -> None:
        """Disconnect."""
        self._stack.close()

    def endorsement(self) -> tuple[bytes | None, bytes]:
        """The EK certificate (DER) if the TPM holds one, and the EK (TPMT_PUBLIC). Raises: WorldError (`tpm`)."""
        with ExitStack() as loaded, step("endorsement key"):
            certificate, ek = endorsement_key(self._esys, loaded)
            return trim_certificate(certificate) if certificate else None, pack_public(self._esys.read_public(ek)[0])

    def keep_certificate(self, certificate: bytes) -> None:
        """Keep an EK certificate (DER) where there is none. Raises: WorldError (`tpm`, `owner`).

        Its beginning is written last: one that a power cut left unfinished is none, and is begun anew.
        """
        with ExitStack() as loaded, step("EK certificate"):
            unfinished = persistent(self._esys, loaded, EK_CERTIFICATE_INDEX)
            if unfinished is not None:
                self._esys.nv_undefine_space(unfinished)
                loaded.pop_all()
            public = TPMS_NV_PUBLIC(nvIndex=EK_CERTIFICATE_INDEX, nameAlg=TPM2_ALG.SHA256, attributes=_READABLE, dataSize=len(certificate))
            index = self._esys.nv_define_space(None, TPM2B_NV_PUBLIC(nvPublic=public))
            loaded.callback(self._esys.tr_close, index)
            for offset in reversed(range(0, len(certificate), _PIECE_BYTES)):
                self._esys.nv_write(index, certificate[offset : offset + _PIECE_BYTES], offset, auth_handle=ESYS_TR.OWNER)

    def maker(self) -> tuple[int, str, int]:
        """What the TPM says of itself: its manufacturer's number, its model, its firmware's version. Raises: WorldError (`tpm`)."""
        with step("capability"):
            _, capability = self._esys.get_capability(TPM2_CAP.TPM_PROPERTIES, TPM2_PT.FIXED, _FIXED_PROPERTIES)
            held = {int(each.property): int(each.value) for each in capability.data.tpmProperties}
        vendor = b"".join(held.get(int(part), 0).to_bytes(4, "big") for part in _VENDOR)
        model = vendor.replace(b"\0", b"").decode("ascii", "replace").strip()
        return held.get(int(TPM2_PT.MANUFACTURER), 0), model, held.get(int(TPM2_PT_FIRMWARE.VERSION_1), 0)

    def keep_storage_key(self) -> bool:
        """Leave the storage key at its handle; return whether it was not there. Raises: WorldError (`tpm`)."""
        with ExitStack() as loaded, step("storage key"):
            if persistent(self._esys, loaded, SRK_HANDLE) is not None:
                return False
            srk = storage_key(self._esys, loaded)[0]
            self._esys.tr_close(self._esys.evict_control(ESYS_TR.OWNER, srk, SRK_HANDLE))
            return True

    def define_counter(self, root_public: bytes, reference: bytes) -> bool:
        """Make the generation counter; return whether it never counted. Raises: WorldError (`owner`, `tpm`), TheirsError (`malformed`)."""
        return define_counter(self._esys, root_public, reference)

    def make_devid(self) -> DevId:
        """Make a DevID key. Raises: WorldError (`tpm`)."""
        with ExitStack() as loaded, step("DevID key"):
            template = TPM2B_PUBLIC.parse("ecc256:ecdsa-sha256:null", objectAttributes=_SIGNS)
            private, public, *_ = self._esys.create(storage_key(self._esys, loaded)[0], TPM2B_SENSITIVE_CREATE(), template)
            return DevId(pack_public(public), bytes(private))

    def sign(self, devid: DevId, content: bytes) -> bytes:
        """TPMT_SIGNATURE (ECDSA, SHA-256) by a DevID key. Raises: TheirsError (`import`: it is another TPM's; `malformed`), WorldError (`tpm`)."""
        with ExitStack() as loaded:
            srk = storage_key(self._esys, loaded)[0]
            with step("load"):
                key = hold(self._esys, loaded, self._esys.load(srk, TPM2B_PRIVATE(devid.private), unpack_public(devid.public)))
            with step("sign"):
                scheme = TPMT_SIG_SCHEME(scheme=TPM2_ALG.NULL)
                return bytes(self._esys.sign(key, hashlib.sha256(content).digest(), scheme).marshal())

    @property
    def owner_set(self) -> bool:
        """Whether the owner has an authorisation."""
        return bool(self._permanent() & _OWNER_SET)

    @property
    def lockout_set(self) -> bool:
        """Whether lockout has an authorisation: without one, any program with access to the TPM can clear it."""
        return bool(self._permanent() & _LOCKOUT_SET)

    def set_owner(self, value: str) -> None:
        """Set the owner's authorisation. Raises: WorldError (`tpm`)."""
        with step("owner authorisation"):
            self._esys.hierarchy_change_auth(ESYS_TR.OWNER, value)

    def set_lockout(self, value: str) -> None:
        """Set lockout's authorisation. Raises: WorldError (`tpm`)."""
        with step("lockout authorisation"):
            self._esys.hierarchy_change_auth(ESYS_TR.LOCKOUT, value)

    def _permanent(self) -> int:
        with step("capability"):
            _, capability = self._esys.get_capability(TPM2_CAP.TPM_PROPERTIES, TPM2_PT.PERMANENT, 1)  # a name of its own: see `handles`
            return int(capability.data.tpmProperties[0].value)
