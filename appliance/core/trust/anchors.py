"""Which PCR values a region accepts, and the words in which it refuses others.

1. A PCR without a reference is refused, unless the policy says `trust_on_first_use`: then the first good quote becomes the reference.
2. An anchor PCR that is all zero was never extended and proves nothing; it is refused unless the policy says `allow_zero_anchor`
   ("TPM Carte Blanche"; lf-edge/eve PR 6162 refuses to seal on zero PCR 0 or 4).
3. Images are named states that belong together, such as both slots and a staged release: on the PCRs that any image states, a device must show one
   of them whole, so half of one and half of another is refused. Each is a state for which a lease is given (`states`).
4. A refusal names each PCR that differs, what it measures, and both values: an operator sees at once whether the firmware or the image changed.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from appliance.contract.errors import TheirsError
from appliance.core.trust.tpm_wire import DIGEST_BYTES

QUOTED_PCRS = (0, 1, 2, 3, 4, 5, 7, 11)

MEASURES: Mapping[int, str] = {
    0: "firmware",
    1: "firmware settings",
    2: "option ROMs",
    3: "option ROM settings",
    4: "boot loader",
    5: "boot loader settings and partition table",
    7: "secure boot policy",
    8: "kernel command line",
    9: "files read by the boot loader",
    10: "files run (IMA)",
    11: "kernel image and boot phase",
    12: "kernel command line and credentials",
}
"""TCG PC Client Platform Firmware Profile, 3.3.4, and the UAPI group's Linux TPM PCR Registry."""

_SHOWN_HEX = 12


@dataclass(frozen=True, slots=True)
class PcrPolicy:
    """What a quote must show.

    Attributes:
        allowed: for each PCR the digests (32 bytes) that are accepted, such as those of both slots.
        images: for each label the PCRs by which an approved image is known, and their values.
        pcrs: the PCRs to quote. `anchors`: those of them that a platform's boot always extends.
    """

    name: str
    allowed: Mapping[int, Sequence[bytes]] = field(default_factory=dict)
    images: Mapping[str, Mapping[int, bytes]] = field(default_factory=dict)
    pcrs: tuple[int, ...] = QUOTED_PCRS
    anchors: tuple[int, ...] = (0, 4)
    trust_on_first_use: bool = False
    allow_zero_anchor: bool = False

    def judge(self, values: Mapping[int, bytes], learned: Mapping[int, bytes]) -> dict[int, bytes]:
        """Check quoted values, and return the learned ones to keep; nothing is learned over an earlier lesson.

        Raises: TheirsError (`pcr_set`, `anchor`, `pcr`, `pcr_reference`).
        """
        if set(values) != set(self.pcrs):
            raise self._refused("pcr_set", f"PCRs {_listed(values)} are shown, {_listed(self.pcrs)} were asked for")
        zero = [pcr for pcr in self.anchors if values.get(pcr, bytes(DIGEST_BYTES)) == bytes(DIGEST_BYTES)]
        if zero and not self.allow_zero_anchor:
            what = " and ".join(f"PCR {pcr} ({_measure(pcr)})" for pcr in zero)
            raise self._refused(
                "anchor", f"{what} was never extended: the boot was not measured", remedy="enable measured boot in the firmware"
            )
        self._judge_image(values)
        of_images = self._image_pcrs()
        references = {pcr: self._references(pcr, learned) for pcr in self.pcrs if pcr not in of_images}
        unknown = [pcr for pcr, accepted in references.items() if not accepted]
        if unknown and not self.trust_on_first_use:
            raise self._refused(
                "pcr_reference", f"PCRs {_listed(unknown)} have no reference value", remedy=f"add them to the policy {self.name!r}"
            )
        different = [
            describe_difference(pcr, accepted, values[pcr])
            for pcr, accepted in references.items()
            if accepted and values[pcr] not in accepted
        ]
        if different:
            raise self._refused("pcr", "; ".join(different), remedy="boot an approved image, or approve this one")
        return {**{pcr: values[pcr] for pcr in unknown}, **learned}

    def states(self, values: Mapping[int, bytes]) -> dict[str, dict[int, bytes]]:
        """The states for which a device that shows these (good) values gets a lease: itself, as each approved image."""
        if not self.images:
            return {"running": dict(values)}
        return {label: {**values, **image} for label, image in self.images.items()}

    def _image_pcrs(self) -> set[int]:
        return {pcr for image in self.images.values() for pcr in image}

    def _judge_image(self, values: Mapping[int, bytes]) -> None:
        """Raises: TheirsError (`pcr`) if the values are those of no image; it names what differs from the nearest."""
        stated = self._image_pcrs() & set(values)
        different = {
            label: [
                describe_difference(pcr, (image[pcr],), values[pcr]) for pcr in sorted(stated & set(image)) if values[pcr] != image[pcr]
            ]
            for label, image in self.images.items()
        }
        if different and all(different.values()):
            nearest = min(different, key=lambda label: len(different[label]))
            what = "; ".join(different[nearest]) + f"; {nearest!r} is the nearest of {len(self.images)} approved images"
            raise self._refused("pcr", what, remedy="boot an approved image, or approve this one")

    def _references(self, pcr: int, learned: Mapping[int, bytes]) -> tuple[bytes, ...]:
        """What the policy states comes first; what was learned counts only where it is silent and learning is allowed."""
        stated = tuple(self.allowed.get(pcr, ()))
        if stated or not self.trust_on_first_use or pcr not in learned:
            return stated
        return (learned[pcr],)

    def _refused(self, reason: str, what: str, *, remedy: str = "") -> TheirsError:
        return TheirsError(reason, what, where=f"PCR policy {self.name}", remedy=remedy)


def describe_difference(pcr: int, accepted: Sequence[bytes], seen: bytes) -> str:
    """One PCR that is not as it should be, in an operator's words."""
    expected = " or ".join(_short(each) for each in accepted)
    return f"PCR {pcr} differs ({_measure(pcr)}): expected {expected}, saw {_short(seen)}"


def _measure(pcr: int) -> str:
    return MEASURES.get(pcr, "no fixed meaning")


def _short(value: bytes) -> str:
    return f"{value.hex()[:_SHOWN_HEX]}…"


def _listed(pcrs: Iterable[int]) -> str:
    return ", ".join(str(pcr) for pcr in sorted(pcrs)) or "none"
