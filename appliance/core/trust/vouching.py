"""An EK certificate by one's own authority, for boards whose maker left none (firmware TPMs without the ODM's): the bench vouches for the TPM it sees.

1. It has the form of a maker's certificate (TCG EK Credential Profile 2.0, 3.2): for encryption only, EKU 2.23.133.8.1, and the TPM's maker, model and
   firmware as a directoryName, so the region judges it like any other (`endorsement`).
2. It never expires, as the key never does; an authority that is no longer trusted leaves the region's `ek_roots`.
3. It says less than a maker's: that this key was on the bench, not that it lies in a chip. What the bench is worth, the certificate is.
"""

import hashlib
from dataclasses import dataclass
from datetime import datetime

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID

from appliance.contract.errors import TheirsError
from appliance.core.trust.certificates import AuthorityKey, key_usage, lifelong
from appliance.core.trust.endorsement import EK_CERTIFICATE
from appliance.core.trust.tpm_structures import Public

_MANUFACTURER, _MODEL, _VERSION = (x509.ObjectIdentifier(f"2.23.133.2.{number}") for number in (1, 2, 3))
"""tcg-at-tpmManufacturer, -Model, -Version."""
_SHOWN = 16


@dataclass(frozen=True, slots=True)
class Maker:
    """What a TPM says of itself: its manufacturer's and firmware's numbers (32 bits), and its model."""

    manufacturer: int
    model: str
    firmware: int


def vouch(endorsement: Public, maker: Maker, authority: x509.Certificate, key: AuthorityKey, *, now: datetime, serial: bytes) -> bytes:
    """The certificate (DER) for an EK. `serial`: 16 random bytes. Raises: TheirsError (`ek_authority`)."""
    public = endorsement.key
    digest = hashlib.sha256(public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"EK {digest[:_SHOWN]}")])
    builder = lifelong(authority, key, subject, public, now=now, serial=serial, whose="EK authority")
    if not _is_authority(authority):
        raise TheirsError("ek_authority", "is not a CA, so no region will trust what it signs", where="EK authority")
    certificate = (
        builder.add_extension(x509.SubjectAlternativeName([x509.DirectoryName(_named(maker))]), critical=False)
        .add_extension(x509.ExtendedKeyUsage([EK_CERTIFICATE]), critical=False)
        .add_extension(key_usage("key_encipherment" if isinstance(public, rsa.RSAPublicKey) else "key_agreement"), critical=True)
        .sign(key, hashes.SHA256())
    )
    return certificate.public_bytes(Encoding.DER)


def _is_authority(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False


def _named(maker: Maker) -> x509.Name:
    words = ((_MANUFACTURER, f"id:{maker.manufacturer:08X}"), (_MODEL, maker.model or "unknown"), (_VERSION, f"id:{maker.firmware:08X}"))
    return x509.Name([x509.NameAttribute(oid, word) for oid, word in words])
