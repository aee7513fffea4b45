"""Keeping: what trust leaves on a device's disk. Nothing of it is secret: keys are there only as the TPM or a key in memory has wrapped them.

A file that can not be read is as good as none: the device enrols, asks or proves anew. Losing leases costs the restarts in a partition, no more.
"""

from collections.abc import Mapping

import msgspec
import structlog

from appliance.contract.attest import EnrolProof, Grant
from appliance.contract.codec import decode, encode
from appliance.contract.errors import TheirsError
from appliance.contract.models import WrappedKey
from appliance.ports import Depot, SealedKey

ENROLMENT_FILE = "enrolment.json"
LEASES_FILE = "leases.json"
ESCROW_FILE = "escrow.box"


class Kept:
    """Enrolment, leases and wrapped data keys over the device's depot."""

    def __init__(self, depot: Depot) -> None:
        self._depot = depot
        self._log = structlog.get_logger()

    def enrolment(self) -> SealedKey | None:
        """The enrolment; None if there is none that can be read."""
        kept = self._depot.load(ENROLMENT_FILE)
        if kept is None:
            return None
        try:
            return msgspec.json.decode(kept, type=SealedKey)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            self._log.error("enrolment_damaged", file=ENROLMENT_FILE, what=str(error), remedy="enrolling anew")
            return None

    def save_enrolment(self, sealed: SealedKey) -> None:
        """Keep a new enrolment."""
        self._depot.save(ENROLMENT_FILE, msgspec.json.encode(sealed))

    def set_enrolment_aside(self) -> None:
        """Keep it under another name, for whoever looks into it, and be without one."""
        kept = self._depot.load(ENROLMENT_FILE)
        if kept is not None:
            self._depot.save(ENROLMENT_FILE + ".old", kept)
            self._depot.forget(ENROLMENT_FILE)

    def grant(self) -> Grant | None:
        """The kept leases; None if there are none that can be read."""
        kept = self._depot.load(LEASES_FILE)
        try:
            return decode(kept, Grant) if kept is not None else None
        except TheirsError as error:
            self._log.error("leases_damaged", file=LEASES_FILE, what=str(error), remedy="the next proof brings new ones")
            return None

    def save_grant(self, grant: Grant) -> None:
        """Keep leases that opened."""
        self._depot.save(LEASES_FILE, encode(grant))

    def forget_grant(self) -> None:
        """Be without leases."""
        self._depot.forget(LEASES_FILE)

    def forget_lease(self, values: Mapping[int, bytes]) -> None:
        """Be without the leases for one state."""
        kept = self.grant()
        if kept is not None:
            others = [lease for lease in kept.leases if any(values.get(pcr) != value for pcr, value in lease.pcr_values.items())]
            self.save_grant(msgspec.structs.replace(kept, leases=others))

    def wrapped(self, artifact: str) -> WrappedKey | None:
        """An artifact's data key as the region wrapped it; None if none is kept that can be read."""
        kept = self._depot.load(_key_file(artifact))
        try:
            return decode(kept, WrappedKey) if kept is not None else None
        except TheirsError:
            return None

    def save_wrapped(self, artifact: str, wrapped: WrappedKey) -> None:
        """Keep a wrapped data key."""
        self._depot.save(_key_file(artifact), encode(wrapped))

    def with_escrow(self, proof: EnrolProof) -> EnrolProof:
        """The proof, with the TPM's authorisations if provisioning left them for the region."""
        return msgspec.structs.replace(proof, escrow=self._depot.load(ESCROW_FILE) or b"")


def _key_file(artifact: str) -> str:
    return f"key-{artifact[:32]}.json"
