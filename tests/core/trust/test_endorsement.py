"""Whose EK certificates are believed."""

from dataclasses import replace
from datetime import timedelta

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.contract.errors import TheirsError
from appliance.core.trust.endorsement import verify_endorsement
from appliance.core.trust.tpm_structures import parse_public
from appliance.core.trust.tpm_wire import u32
from tests.fakes.paper_tpm import NOW, WALL, Maker, PaperTpm, refusal_of

TPM = PaperTpm()
EK = parse_public(TPM.ek_public, "EK")
GOOD = TPM.maker.certify(TPM.ek.public_key())


def test_a_path_to_a_trusted_root_is_accepted() -> None:
    """Leaf, intermediate, root; the critical directoryName does not stand in the way."""
    verify_endorsement([GOOD], TPM.maker.roots(), EK, WALL)


def test_the_device_may_show_the_intermediate_itself() -> None:
    """A chain that the device shows helps to build the path, and proves nothing alone."""
    root, issuer = TPM.maker.roots()
    verify_endorsement([GOOD, issuer], [root], EK, WALL)
    with pytest.raises(TheirsError, match="no path to a trusted root"):
        verify_endorsement([GOOD, issuer, root], [], EK, WALL)


@pytest.mark.parametrize(
    ("bend", "told"),
    [
        ({"not_after": NOW - timedelta(days=1)}, "is valid 2026-05-02 to 2026-05-31"),
        ({"not_before": NOW + timedelta(days=1)}, "is valid 2026-06-02"),
        ({"purposes": ()}, ""),
        ({"purposes": (Maker().purposes[0].__class__("1.3.6.1.5.5.7.3.1"),)}, "lacks 2.23.133.8.1"),
        ({"issuer_is_ca": False}, "CN=issuer is not a CA"),
        ({"issuer_signs": False}, "CN=issuer may not sign"),
        ({"root_path_length": 0}, "allows 0 authorities below it, the path has 1"),
        ({"root_path_length": 1}, ""),
        ({"leaf_is_ca": True}, "is a CA, not an endorsement certificate"),
        ({"leaf_encrypts": False}, "not for encryption"),
        ({"names_tpm": False}, "no directoryName"),
        ({"odd_extension": True}, "critical extension 1.2.3.4"),
    ],
)
def test_each_rule_of_the_path_is_kept(bend: dict[str, object], told: str) -> None:
    """A maker that breaks one rule is refused by that rule; an absent EKU and a sufficient path length are fine."""
    maker = replace(Maker(), **bend)  # type: ignore[arg-type]  # the table's values fit their fields
    shown = [maker.certify(TPM.ek.public_key())]
    if not told:
        verify_endorsement(shown, maker.roots(), EK, WALL)
        return
    with pytest.raises(TheirsError, match=told) as refusal:
        verify_endorsement(shown, maker.roots(), EK, WALL)
    assert refusal.value.reason == "ek_certificate"


def test_a_certificate_of_another_key_is_refused() -> None:
    """A stolen certificate does not make an EK."""
    other = parse_public(PaperTpm(ek="other").ek_public, "EK")
    with pytest.raises(TheirsError) as refusal:
        verify_endorsement([GOOD], TPM.maker.roots(), other, WALL)
    assert refusal.value.reason == "ek_mismatch"


def test_no_certificate_is_told_apart() -> None:
    """A board without an EK certificate gets words that say so."""
    with pytest.raises(TheirsError, match="shows no EK certificate"):
        verify_endorsement([], TPM.maker.roots(), EK, WALL)


def test_an_impostor_root_of_the_same_name_is_refused() -> None:
    """Names do not make a path, signatures do: swap the intermediate for one signed by a stranger."""
    stranger = ec.generate_private_key(ec.SECP256R1())
    forged = Maker()._builder("dev-1", "issuer", TPM.ek.public_key()).sign(stranger, Maker().hash_algorithm)  # type: ignore[arg-type]
    with pytest.raises(TheirsError, match="nobody known issued"):
        verify_endorsement([forged.public_bytes(Encoding.DER)], TPM.maker.roots(), EK, WALL)


def test_a_key_off_the_template_is_refused() -> None:
    """The same modulus with other attributes would be another name for one TPM."""
    bent = parse_public(TPM.ek_public.replace(u32(0x0003_00B2), u32(0x0003_00F2)), "EK")
    with pytest.raises(TheirsError) as refusal:
        verify_endorsement([GOOD], TPM.maker.roots(), bent, WALL)
    assert refusal.value.reason == "ek_template"


@pytest.mark.filterwarnings("ignore::UserWarning")  # the library warns of odd serial numbers and the like before it refuses them
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_mutated_certificates_are_refused_and_nothing_else_happens(data: st.DataObject) -> None:
    """Any byte changed, cut or inserted: refused by reason; no other exception."""
    at = data.draw(st.integers(0, len(GOOD)))
    mutated = GOOD[:at] + data.draw(st.binary(max_size=4)) + GOOD[at + data.draw(st.integers(0, 4)) :]
    refusal = refusal_of(lambda: verify_endorsement([mutated], TPM.maker.roots(), EK, WALL))
    assert (refusal is None) == (mutated == GOOD)
    assert refusal is None or refusal.reason in {"ek_certificate", "ek_mismatch"}
