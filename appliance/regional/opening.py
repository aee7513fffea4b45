"""Opening: a region's keys, its makers' roots, its approved images and its link, from its settings. The other half of the composition root is `daemon`."""

import contextlib
import functools
import json
import os
import secrets
import tomllib
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from appliance.adapters.mqtt.link import LinkSettings, MqttLink
from appliance.adapters.mqtt.session import SessionSettings
from appliance.adapters.spiffe import WorkloadIdentity
from appliance.contract import identities, topics
from appliance.contract.errors import WorldError
from appliance.core.trust.anchors import PcrPolicy
from appliance.core.trust.escrow import escrow_public
from appliance.core.trust.lease import Terms
from appliance.core.trust.tpm_structures import pack_verifier
from appliance.core.trust.tpm_wire import DIGEST_BYTES
from appliance.regional.attesting import Authorities
from appliance.regional.settings import Region, Trust

IDENTITY_TIMEOUT_S = 20.0
SECRET_BYTES = 32
HOUR_S = 3600.0


async def open_link(settings: Region, stack: contextlib.AsyncExitStack) -> MqttLink:
    """The link to the region's broker. Raises: WorldError (`workload_api`)."""
    identity = await WorkloadIdentity.open(settings.trust.workload_api, timeout_s=IDENTITY_TIMEOUT_S)
    stack.push_async_callback(identity.close)
    name = settings.region.name
    return MqttLink(
        identity,
        LinkSettings(
            session=SessionSettings(host=settings.reach.broker_host, port=settings.reach.broker_port),
            backoff_cap_s=settings.reach.retry_cap_s,
        ),
        client_id=identities.region_user(name),
        peer=identities.broker(name, trust_domain=settings.trust.trust_domain),
        answers=topics.upstream_answer(name),
        answers_below=f"v1/{name}/d/+/up/answer",
    )


def open_authorities(trust: Trust) -> Authorities:
    """Read keys and CA certificates; keys are made where there are none. Raises: WorldError (`disk`, `ek_roots`, `images`)."""
    keys = Path(trust.keys_dir)
    policy = PcrPolicy("region", trust_on_first_use=trust.trust_on_first_use, allow_zero_anchor=trust.allow_zero_anchor)
    images = functools.partial(read_images, Path(trust.images)) if trust.images else dict
    root = _key(keys / "root.pem")
    images()
    bench = {"root_public": pack_verifier(root.public_key()).hex(), "escrow_public": escrow_public(_secret(keys, "escrow.key")).hex()}
    _write(keys / "provision.json", json.dumps(bench, indent=1).encode())
    return Authorities(
        root=root,
        region=_key(keys / "region.pem"),
        ek_roots=read_roots(Path(trust.ek_roots)),
        policy=policy,
        vault=_secret(keys, "vault.key"),
        terms=Terms(term_s=trust.lease_h * HOUR_S, restarts=trust.lease_restarts),
        images=images,
    )


def read_images(path: Path) -> dict[str, dict[int, bytes]]:
    """Approved images by label. Raises: WorldError (`images`) that names the file and what is wrong."""
    try:
        tables = tomllib.loads(path.read_text())
        images = {label: {int(pcr): bytes.fromhex(value) for pcr, value in table.items()} for label, table in tables.items()}
        odd = [label for label, image in images.items() if not image or any(len(value) != DIGEST_BYTES for value in image.values())]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise WorldError(
            "images", f"cannot be read: {error}", where=str(path), remedy='a table for each image: 11 = "64 hex digits"'
        ) from error
    if odd:
        raise WorldError(
            "images", f"{odd[0]!r} has no digest, or one that is not 32 bytes", where=str(path), remedy="write each as 64 hex digits"
        )
    return images


def _secret(folder: Path, name: str) -> bytes:
    """32 random bytes: a systemd credential of that name if there is one (which a TPM may guard), else a file of mode 0600, made if absent."""
    credentials = os.environ.get("CREDENTIALS_DIRECTORY")
    path = Path(credentials) / name if credentials and (Path(credentials) / name).exists() else folder / name
    try:
        if not path.exists():
            _write(path, secrets.token_bytes(SECRET_BYTES))
        key = path.read_bytes()
    except OSError as error:
        raise WorldError("disk", f"no key: {error}", where=str(path), remedy="restore it from its escrow") from error
    if len(key) != SECRET_BYTES:
        raise WorldError("disk", f"has {len(key)} bytes, a key has {SECRET_BYTES}", where=str(path), remedy="restore it from its escrow")
    return key


def _write(path: Path, content: bytes) -> None:
    """Replace a file that only its owner reads, whole or not at all."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.new")
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


def _key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        if not path.exists():
            pem = ec.generate_private_key(ec.SECP256R1()).private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
            _write(path, pem)
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError) as error:
        raise WorldError("disk", f"no signing key: {error}", where=str(path), remedy="restore it from its escrow") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise WorldError("disk", "not a P-256 key", where=str(path), remedy="restore it from its escrow")
    return key


def read_roots(folder: Path) -> tuple[bytes, ...]:
    """The CA certificates (DER) in the files of a folder, PEM or DER. Raises: WorldError (`ek_roots`)."""
    found: list[bytes] = []
    try:
        for path in sorted(folder.iterdir()):
            raw = path.read_bytes()
            certificates = x509.load_pem_x509_certificates(raw) if b"-----BEGIN" in raw else [x509.load_der_x509_certificate(raw)]
            found += [certificate.public_bytes(serialization.Encoding.DER) for certificate in certificates]
    except (OSError, ValueError) as error:
        raise WorldError(
            "ek_roots", f"cannot be read: {error}", where=str(folder), remedy="put the TPM makers' CA certificates there"
        ) from error
    if not found:
        raise WorldError("ek_roots", "no CA certificate is here", where=str(folder), remedy="put the TPM makers' CA certificates there")
    return tuple(found)
