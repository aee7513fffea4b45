"""Certificates for keys that live as long as their TPM: what a DevID's and an own EK's have in common."""

from datetime import UTC, datetime

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from appliance.contract.errors import TheirsError

AuthorityKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
FOREVER = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)
"""99991231235959Z: no end that anybody knows (RFC 5280, 4.1.2.5)."""
SERIAL_BYTES = 16

_USAGES = (
    "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "key_cert_sign", "crl_sign",
    "encipher_only", "decipher_only",
)  # fmt: skip


def key_usage(*granted: str) -> x509.KeyUsage:
    """The extension that grants these uses, by the names that the library gives them, and no others."""
    return x509.KeyUsage(**{usage: usage in granted for usage in _USAGES})


def lifelong(
    authority: x509.Certificate, key: AuthorityKey, subject: x509.Name, public: ec.EllipticCurvePublicKey | rsa.RSAPublicKey, *, now: datetime, serial: bytes, whose: str
) -> x509.CertificateBuilder:  # fmt: skip
    """Begin a certificate of an authority for a key that is none; the caller adds what it is for, and signs. `serial`: 16 random bytes.

    `whose`: the authority in people's words. Raises: TheirsError (`devid_authority`, `ek_authority`: by the first of these words).
    """
    if authority.public_key() != key.public_key():
        what = f"certificate and key of the {whose} do not belong together"
        raise TheirsError(whose.lower().replace(" ", "_"), what, where=whose)
    builder = x509.CertificateBuilder(
        issuer_name=authority.subject, subject_name=subject, public_key=public, serial_number=int.from_bytes(serial, "big") >> 1 or 1
    )
    return (
        builder.not_valid_before(now)
        .not_valid_after(FOREVER)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
    )
