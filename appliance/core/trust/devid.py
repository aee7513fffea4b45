"""An IEEE 802.1AR device identity: a request for a certificate that a key in a TPM signs, and the certificate that a DevID authority issues for it.

1. The request (PKCS #10, RFC 2986) is put together here, because its signature is made by the TPM and not by a key in this process.
2. The certificate never expires (99991231235959Z) and names the device by its serial number (IEEE 802.1AR-2018, 8.6 and 8.7; RFC 5280, 4.1.2.5).
3. An authority issues only for a request whose signature is good: whoever asks holds the key.
"""

from collections.abc import Callable
from datetime import datetime

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID

from appliance.contract.errors import TheirsError
from appliance.core.trust.certificates import AuthorityKey, key_usage, lifelong

_SEQUENCE, _BIT_STRING, _ATTRIBUTES = 0x30, 0x03, 0xA0
_VERSION_0 = b"\x02\x01\x00"
_ECDSA_SHA256 = bytes.fromhex("300a06082a8648ce3d040302")
"""AlgorithmIdentifier ecdsa-with-SHA256 (RFC 5758, 3.2)."""
_LONG, _SHORT_MOST = 0x80, 0x7F


def subject(device: str) -> x509.Name:
    """The name in a device's certificate."""
    return x509.Name([x509.NameAttribute(NameOID.SERIAL_NUMBER, device), x509.NameAttribute(NameOID.COMMON_NAME, device)])


def request(device: str, public: ec.EllipticCurvePublicKey, sign: Callable[[bytes], bytes]) -> x509.CertificateSigningRequest:
    """A request for `device`. `sign` returns an ECDSA signature with SHA-256 in DER over what it is given."""
    spki = public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    info = _der(_SEQUENCE, _VERSION_0 + subject(device).public_bytes() + spki + _der(_ATTRIBUTES, b""))
    signed = info + _ECDSA_SHA256 + _der(_BIT_STRING, b"\0" + sign(info))
    return x509.load_der_x509_csr(_der(_SEQUENCE, signed))


def issue(
    asked: x509.CertificateSigningRequest, authority: x509.Certificate, key: AuthorityKey, *, now: datetime, serial: bytes
) -> x509.Certificate:
    """The certificate for a good request. `serial`: 16 random bytes. Raises: TheirsError (`devid_request`, `devid_authority`)."""
    public = asked.public_key()
    if not isinstance(public, ec.EllipticCurvePublicKey) or not asked.is_signature_valid:
        raise TheirsError("devid_request", "is not signed by the key that it is for", where="DevID request")
    return (
        lifelong(authority, key, asked.subject, public, now=now, serial=serial, whose="DevID authority")
        .add_extension(key_usage("digital_signature"), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .sign(key, hashes.SHA256())
    )


def _der(tag: int, content: bytes) -> bytes:
    """One DER value (X.690, 8.1.3)."""
    if len(content) <= _SHORT_MOST:
        return bytes([tag, len(content)]) + content
    length = len(content).to_bytes((len(content).bit_length() + 7) // 8, "big")
    return bytes([tag, _LONG | len(length)]) + length + content
