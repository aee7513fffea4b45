"""An EK certificate of one's own authority is judged like any maker's."""

from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from appliance.contract.errors import TheirsError
from appliance.core.trust import vouching
from appliance.core.trust.endorsement import verify_endorsement
from appliance.core.trust.tpm_structures import parse_public
from tests.fakes.paper_tpm import WALL, PaperTpm

TPM = PaperTpm()
EK = parse_public(TPM.ek_public, "EK")
NOW = datetime.fromtimestamp(WALL, UTC)
MAKER = vouching.Maker(0x4E564441, "fTPM", 0x0001_0002)
KEY = ec.generate_private_key(ec.SECP256R1())


def authority(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey, *, is_ca: bool | None = True) -> x509.Certificate:
    """A self-signed certificate; None: it says nothing of being a CA."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "our EK authority")])
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, NOW - timedelta(days=1), NOW + timedelta(days=9))
    if is_ca is not None:
        builder = builder.add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
    return builder.sign(key, hashes.SHA256())


@pytest.mark.parametrize("kind", ["ECC", "RSA"])
def test_what_an_own_authority_issues_is_believed_where_it_is_trusted_and_nowhere_else(kind: str) -> None:
    """The path, purpose, usage and name that a maker's certificate must have; and another authority's trust does not help."""
    key = KEY if kind == "ECC" else rsa.generate_private_key(65537, 2048)
    issuer = authority(key)
    made = vouching.vouch(EK, MAKER, issuer, key, now=NOW, serial=b"s" * 16)
    verify_endorsement([made], [issuer.public_bytes(Encoding.DER)], EK, WALL)
    verify_endorsement([made], [issuer.public_bytes(Encoding.DER)], EK, WALL + 8 * 86_400)
    stranger = authority(ec.generate_private_key(ec.SECP256R1()))
    with pytest.raises(TheirsError, match="no path to a trusted root"):
        verify_endorsement([made], [stranger.public_bytes(Encoding.DER)], EK, WALL)
    other = parse_public(PaperTpm(ek="other").ek_public, "EK")
    with pytest.raises(TheirsError, match="for another key"):
        verify_endorsement([made], [issuer.public_bytes(Encoding.DER)], other, WALL)


def test_it_says_whose_tpm_it_is() -> None:
    """Manufacturer, model and firmware, as the profile writes them; two TPMs have two subjects."""
    made = x509.load_der_x509_certificate(vouching.vouch(EK, MAKER, authority(KEY), KEY, now=NOW, serial=b"s" * 16))
    [name] = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value.get_values_for_type(x509.DirectoryName)
    assert [each.value for each in name] == ["id:4E564441", "fTPM", "id:00010002"]
    other = parse_public(PaperTpm(ek="other").ek_public, "EK")
    twin = x509.load_der_x509_certificate(vouching.vouch(other, MAKER, authority(KEY), KEY, now=NOW, serial=b"t" * 16))
    assert made.subject != twin.subject


@pytest.mark.parametrize("is_ca", [False, None])
def test_who_is_no_authority_signs_nothing(is_ca: bool | None) -> None:
    """A certificate that is no CA, or does not say so, would be refused by every region."""
    with pytest.raises(TheirsError, match="is not a CA"):
        vouching.vouch(EK, MAKER, authority(KEY, is_ca=is_ca), KEY, now=NOW, serial=b"s" * 16)


def test_a_key_of_somebody_else_signs_nothing() -> None:
    """Certificate and key must belong together."""
    with pytest.raises(TheirsError, match="do not belong together"):
        vouching.vouch(EK, MAKER, authority(KEY), ec.generate_private_key(ec.SECP256R1()), now=NOW, serial=b"s" * 16)
