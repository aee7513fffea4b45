"""Whether an endorsement key belongs to a real TPM: its certificate, the path to a maker's root, and the key's own template.

1. The path runs from the shown certificate to a self-signed certificate that the operator trusts, at most 5 certificates long. Others,
   shown or given, only help to build it (RFC 5280, 6.1).
2. Each certificate is valid at the given time, signed with SHA-2, and has no critical extension that is not understood here.
3. An issuer is a CA, may sign certificates, and keeps its path length (RFC 5280, 4.2.1.3 and 4.2.1.9).
4. The leaf is no CA, is for encryption, has EKU 2.23.133.8.1 if it has any, and names the TPM in its alternative name as a directoryName,
   critical or not (TCG EK Credential Profile 2.0, 3.2).
5. The key follows the TCG's template to the bit, so one certificate has one name: a device can not appear as two.
"""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtensionOID

from appliance.contract.errors import TheirsError
from appliance.core.trust.tpm_structures import Public, PublicKey
from appliance.core.trust.tpm_wire import Algorithm

EK_CERTIFICATE = x509.ObjectIdentifier("2.23.133.8.1")
"""tcg-kp-EKCertificate."""

MAX_PATH = 5

E = TypeVar("E", bound=x509.ExtensionType)

_UNDERSTOOD = {
    ExtensionOID.BASIC_CONSTRAINTS,
    ExtensionOID.KEY_USAGE,
    ExtensionOID.EXTENDED_KEY_USAGE,
    ExtensionOID.SUBJECT_ALTERNATIVE_NAME,
}
_HASHES = (hashes.SHA256, hashes.SHA384, hashes.SHA512)
_LOW_RANGE = 0x0003_00B2
_HIGH_RANGE = 0x0003_00F2
_POLICY_A = bytes.fromhex("837197674484b3f81a90cc8d46a5d724fd52d76e06520b64f2a1da1b331469aa")
_POLICY_B_384 = bytes.fromhex("b26e7d28d11a50bc53d882bcf5fd3a1a074148bb35d3b4e4cb1c0ad9bde419cacb47ba09699646150f9fc000f3f80e12")
_TEMPLATES = {
    (Algorithm.RSA, 2048): (Algorithm.SHA256, _LOW_RANGE, _POLICY_A, 128),
    (Algorithm.ECC, 256): (Algorithm.SHA256, _LOW_RANGE, _POLICY_A, 128),
    (Algorithm.ECC, 384): (Algorithm.SHA384, _HIGH_RANGE, _POLICY_B_384, 256),
}
"""Templates L-1, L-2 and H-3 (TCG EK Credential Profile 2.5, B.3 and B.4): name hash, attributes, policy, AES bits."""


def verify_endorsement(shown: Sequence[bytes], trusted: Sequence[bytes], endorsement: Public, wall: float) -> None:
    """Check that the shown certificates (DER, leaf first) vouch for `endorsement` at `wall` (seconds since the epoch).

    Raises: TheirsError (`ek_certificate`, `ek_mismatch`, `ek_template`).
    """
    if not shown:
        raise _refused(
            "the device shows no EK certificate",
            remedy="let your own EK authority issue one: appliance provision --ek-ca-cert FILE --ek-ca-key FILE",
        )
    if len(shown) > MAX_PATH:
        raise _refused(f"{len(shown)} certificates are shown, at most {MAX_PATH} are accepted")
    try:
        leaf = _verify_path([_parse(each) for each in shown], [_parse(each) for each in trusted], wall)
        _check_leaf(leaf)
        certified = leaf.public_key()
    except (
        ValueError,
        TypeError,
        OverflowError,
        OSError,
        UnsupportedAlgorithm,
        x509.DuplicateExtension,
        x509.UnsupportedGeneralNameType,
    ) as error:
        raise _refused(f"can not be read: {error}") from error
    if _spki(certified) != _spki(endorsement.key):
        raise TheirsError("ek_mismatch", "the EK certificate is for another key than the EK that the device shows", where="EK certificate")
    _check_template(endorsement)


def _verify_path(shown: Sequence[x509.Certificate], trusted: Sequence[x509.Certificate], wall: float) -> x509.Certificate:
    """Walk from the leaf to a trusted root and return the leaf."""
    at = datetime.fromtimestamp(wall, UTC)
    roots = [each for each in trusted if each.subject == each.issuer]
    helpers = [each for each in (*shown[1:], *trusted) if each.subject != each.issuer]
    current = shown[0]
    for below in range(MAX_PATH):
        _check_any(current, at)
        root = next(_issuers(current, roots), None)
        issuer = root or next(_issuers(current, helpers), None)
        if issuer is None:
            raise _refused(
                f"no path to a trusted root: nobody known issued {_name(current)}", remedy="add the maker's certificate to ek_roots"
            )
        _check_issuer(issuer, below)
        if root is not None:
            _check_any(root, at)
            return shown[0]
        current = issuer
    raise _refused(f"the path is longer than {MAX_PATH} certificates")


def _issuers(certificate: x509.Certificate, candidates: Sequence[x509.Certificate]) -> Iterator[x509.Certificate]:
    for candidate in candidates:
        if candidate.subject == certificate.issuer:
            try:
                certificate.verify_directly_issued_by(candidate)
            except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
                continue
            yield candidate


def _check_any(certificate: x509.Certificate, at: datetime) -> None:
    if not certificate.not_valid_before_utc <= at <= certificate.not_valid_after_utc:
        period = f"{certificate.not_valid_before_utc:%Y-%m-%d} to {certificate.not_valid_after_utc:%Y-%m-%d}"
        raise _refused(f"{_name(certificate)} is valid {period}, now is {at:%Y-%m-%d %H:%M}Z", remedy="check this machine's clock first")
    if not isinstance(certificate.signature_hash_algorithm, _HASHES):
        raise _refused(f"{_name(certificate)} is signed with a hash that is not SHA-2")
    for extension in certificate.extensions:
        if extension.critical and extension.oid not in _UNDERSTOOD:
            raise _refused(f"{_name(certificate)} has the critical extension {extension.oid.dotted_string}, which is not understood")


def _check_issuer(certificate: x509.Certificate, below: int) -> None:
    constraints = _extension(certificate, x509.BasicConstraints)
    if constraints is None or not constraints.ca:
        raise _refused(f"{_name(certificate)} is not a CA")
    if constraints.path_length is not None and constraints.path_length < below:
        raise _refused(f"{_name(certificate)} allows {constraints.path_length} authorities below it, the path has {below}")
    usage = _extension(certificate, x509.KeyUsage)
    if usage is not None and not usage.key_cert_sign:
        raise _refused(f"{_name(certificate)} may not sign certificates")
    _check_purpose(certificate)


def _check_leaf(certificate: x509.Certificate) -> None:
    constraints = _extension(certificate, x509.BasicConstraints)
    if constraints is not None and constraints.ca:
        raise _refused(f"{_name(certificate)} is a CA, not an endorsement certificate")
    usage = _extension(certificate, x509.KeyUsage)
    if usage is not None and not (usage.key_encipherment or usage.key_agreement):
        raise _refused(f"{_name(certificate)} is not for encryption")
    _check_purpose(certificate)
    names = _extension(certificate, x509.SubjectAlternativeName)
    if names is not None and not names.get_values_for_type(x509.DirectoryName):
        raise _refused(f"{_name(certificate)} does not name its TPM: no directoryName in the alternative name")


def _check_purpose(certificate: x509.Certificate) -> None:
    purposes = _extension(certificate, x509.ExtendedKeyUsage)
    if purposes is not None and EK_CERTIFICATE not in purposes:
        raise _refused(f"{_name(certificate)} is not for endorsement: its extended key usage lacks {EK_CERTIFICATE.dotted_string}")


def _check_template(endorsement: Public) -> None:
    size = endorsement.key.key_size
    seen = (endorsement.name_algorithm, int(endorsement.attributes), endorsement.auth_policy, endorsement.symmetric_bits)
    if _TEMPLATES.get((endorsement.kind, size)) != seen or endorsement.scheme is not Algorithm.NULL:
        raise TheirsError(
            "ek_template", "the EK does not follow the TCG template of its kind", where=f"EK ({endorsement.kind.name} {size})"
        )


def _extension(certificate: x509.Certificate, kind: type[E]) -> E | None:
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None


def _parse(der: bytes) -> x509.Certificate:
    return x509.load_der_x509_certificate(der)


def _spki(key: object) -> bytes:
    if not isinstance(key, PublicKey):
        raise _refused(f"is for a key of kind {type(key).__name__}; RSA and ECC are accepted")
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _name(certificate: x509.Certificate) -> str:
    return certificate.subject.rfc4514_string()[:120] or "a certificate without subject"


def _refused(what: str, *, remedy: str = "") -> TheirsError:
    return TheirsError("ek_certificate", what, where="EK certificate", remedy=remedy)
