"""A certificate authority of the lab that issues SVIDs of SPIRE's shape; all keys live in memory only.

1. Root (in every bundle) signs an intermediate, the intermediate signs SVIDs, a workload shows leaf and intermediate: so the signing CA can
   be replaced while mosquitto, which never reloads its `cafile`, goes on trusting the root (SPIRE's UpstreamAuthority has the same shape).
2. Leaf: P-256; subject C=US, O=SPIRE, CN = the one DNS name; SAN = that DNS name and one URI, the SPIFFE ID; key usage and extended key
   usage as in spire v1.13.3, pkg/server/credtemplate/builder.go.
3. An SVID is back-dated by 10 s, as SPIRE does for clocks that differ, and due for renewal at half of its life.
"""

import datetime as dt
import time
from collections.abc import Callable
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from appliance.contract.identities import TRUST_DOMAIN
from appliance.core.trust.certificates import key_usage

_BACKDATE_S = 10.0
_CA_LIFE_S = 30 * 86_400.0
_LEAF_USAGE = {"digital_signature", "key_encipherment", "key_agreement"}
_CA_USAGE = {"key_cert_sign", "crl_sign"}


@dataclass(frozen=True, slots=True)
class Workload:
    """A registration entry: who a workload is, the name by which the broker knows it, and its SVIDs' life if not the authority's."""

    spiffe_id: str
    dns_name: str
    ttl_s: float | None = None


@dataclass(frozen=True, slots=True)
class Svid:
    """An X.509-SVID with its key. `not_after` and `renew_at` are seconds since the epoch."""

    workload: Workload
    chain: tuple[x509.Certificate, ...]
    key: ec.EllipticCurvePrivateKey
    not_after: float
    renew_at: float

    @property
    def chain_der(self) -> bytes:
        """The chain, leaf first, as concatenated DER (Workload API)."""
        return b"".join(certificate.public_bytes(serialization.Encoding.DER) for certificate in self.chain)

    @property
    def key_der(self) -> bytes:
        """The private key as PKCS#8 DER (Workload API)."""
        return self.key.private_bytes(serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())

    @property
    def pem(self) -> bytes:
        """Chain and key as one PEM text, for a descriptor that never becomes a file."""
        chain = b"".join(certificate.public_bytes(serialization.Encoding.PEM) for certificate in self.chain)
        return chain + self.key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


class Authority:
    """Root and intermediate of one trust domain. `ttl_s` is the life of an SVID in seconds; `wall` gives seconds since the epoch."""

    def __init__(self, *, trust_domain: str = TRUST_DOMAIN, ttl_s: float = 3600.0, wall: Callable[[], float] = time.time) -> None:
        self.trust_domain = trust_domain
        self.ttl_s = ttl_s
        self._wall = wall
        self._root_key = ec.generate_private_key(ec.SECP256R1())
        name = _ca_name()
        self.root = self._certificate(name, name, self._root_key.public_key(), self._root_key, ca_path=1, life_s=_CA_LIFE_S)
        self._signer_key, self._signer = self._new_signer()

    @property
    def root_der(self) -> bytes:
        """The trust bundle: the root as DER."""
        return self.root.public_bytes(serialization.Encoding.DER)

    @property
    def root_pem(self) -> bytes:
        """The trust bundle: the root as PEM, for mosquitto's `cafile`."""
        return self.root.public_bytes(serialization.Encoding.PEM)

    def rotate(self) -> None:
        """Replace the intermediate; SVIDs issued before stay valid under the same root."""
        self._signer_key, self._signer = self._new_signer()

    def issue(self, workload: Workload) -> Svid:
        """Issue a fresh key and SVID. A negative `ttl_s` of the workload makes one that has expired."""
        life_s = self.ttl_s if workload.ttl_s is None else workload.ttl_s
        key = ec.generate_private_key(ec.SECP256R1())
        subject = _subject("SPIRE", (NameOID.COMMON_NAME, workload.dns_name))
        san = [x509.DNSName(workload.dns_name), x509.UniformResourceIdentifier(workload.spiffe_id)]
        leaf = self._certificate(subject, self._signer.subject, key.public_key(), self._signer_key, life_s=life_s, san=san)
        not_after = leaf.not_valid_after_utc.timestamp()
        return Svid(workload, (leaf, self._signer), key, not_after=not_after, renew_at=self._wall() + life_s / 2)

    def _new_signer(self) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
        key = ec.generate_private_key(ec.SECP256R1())
        return key, self._certificate(_ca_name(), self.root.subject, key.public_key(), self._root_key, ca_path=0, life_s=_CA_LIFE_S)

    def _certificate(
        self,
        subject: x509.Name,
        issuer: x509.Name,
        public: ec.EllipticCurvePublicKey,
        signer: ec.EllipticCurvePrivateKey,
        *,
        life_s: float,
        ca_path: int | None = None,
        san: list[x509.GeneralName] | None = None,
    ) -> x509.Certificate:
        now = dt.datetime.fromtimestamp(self._wall(), tz=dt.UTC)
        end = now + dt.timedelta(seconds=life_s)
        begin = min(now, end) - dt.timedelta(seconds=_BACKDATE_S)
        names = san or [x509.UniformResourceIdentifier(f"spiffe://{self.trust_domain}")]
        ca = ca_path is not None
        builder = (
            x509.CertificateBuilder(subject_name=subject, issuer_name=issuer, public_key=public, serial_number=x509.random_serial_number())
            .not_valid_before(begin)
            .not_valid_after(end)
            .add_extension(x509.BasicConstraints(ca=ca, path_length=ca_path), critical=True)
            .add_extension(key_usage(*(_CA_USAGE if ca else _LEAF_USAGE)), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
        )
        if not ca:
            purposes = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
            builder = builder.add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        return builder.sign(signer, hashes.SHA256())


def _subject(organisation: str, last: tuple[x509.ObjectIdentifier, str]) -> x509.Name:
    parts = [(NameOID.COUNTRY_NAME, "US"), (NameOID.ORGANIZATION_NAME, organisation), last]
    return x509.Name([x509.NameAttribute(oid, text) for oid, text in parts])


def _ca_name() -> x509.Name:
    """Return a subject that no other CA has: a hash directory and a chain search tell CAs apart by subject."""
    return _subject("SPIFFE", (NameOID.SERIAL_NUMBER, str(x509.random_serial_number())))
