"""The region's daemon: attests devices, relays releases, gathers vitals. This is its composition root."""

import asyncio
import contextlib
import functools
import os
import secrets
from pathlib import Path

import structlog
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from appliance.adapters.clock import SystemClock
from appliance.adapters.depot import Depot
from appliance.adapters.metadata import TrustedMetadata
from appliance.adapters.mqtt.link import LinkSettings, MqttLink
from appliance.adapters.mqtt.session import SessionSettings
from appliance.adapters.spiffe import WorkloadIdentity
from appliance.adapters.systemd import ServiceManager
from appliance.contract import identities, topics
from appliance.contract.errors import WorldError
from appliance.core.trust.anchors import PcrPolicy
from appliance.daily.pulse import Pulse
from appliance.daily.service import serve
from appliance.regional.attesting import Attesting, Authorities
from appliance.regional.gathering import Gathering
from appliance.regional.relaying import Relaying
from appliance.regional.settings import Region, Trust

IDENTITY_TIMEOUT_S = 20.0
SECRET_BYTES = 32


async def run(settings: Region) -> None:
    """Serve a region until SIGTERM or SIGINT. Raises: ApplianceError if it cannot even start."""
    await serve(settings.log, functools.partial(_serve, settings))


async def _serve(settings: Region, stack: contextlib.AsyncExitStack, stop: asyncio.Event) -> None:
    clock, notifier = SystemClock(), ServiceManager()
    name, state = settings.region.name, Path(settings.region.state_dir)
    authorities = await asyncio.to_thread(open_authorities, settings.trust)
    identity = await WorkloadIdentity.open(settings.trust.workload_api, timeout_s=IDENTITY_TIMEOUT_S)
    stack.push_async_callback(identity.close)
    link = MqttLink(
        identity,
        LinkSettings(
            session=SessionSettings(host=settings.reach.broker_host, port=settings.reach.broker_port),
            backoff_cap_s=settings.reach.retry_cap_s,
        ),
        client_id=identities.region_user(name),
        peer=identities.broker(name, trust_domain=settings.trust.trust_domain),
        answers=topics.upstream_answer(name),
    )
    metadata = TrustedMetadata(state / "metadata", await asyncio.to_thread(Path(settings.trust.tuf_root).read_bytes))
    depot = Depot(state / "depot")
    relaying = Relaying(
        link, clock, depot, metadata, region=name, secret=secrets.token_bytes(SECRET_BYTES), ask_timeout_s=settings.reach.ask_timeout_s
    )
    gathering = Gathering(link, clock, region=name)
    Attesting(link, clock, Depot(state / "devices"), authorities, relaying.keys, chance=secrets.token_bytes, region=name)
    pulse = Pulse(clock, notifier, stalled_s=settings.watchdog.stalled_s)
    structlog.get_logger().info("started", region=name, ek_roots=len(authorities.ek_roots))
    async with asyncio.TaskGroup() as group:
        loops = [
            group.create_task(link.run(), name="link"),
            group.create_task(relaying.run(lambda: pulse.moved("relaying")), name="relaying"),
            group.create_task(gathering.run(lambda: pulse.moved("gathering")), name="gathering"),
            group.create_task(pulse.run(), name="pulse"),
        ]
        notifier.ready()
        notifier.status("attesting and relaying")
        await stop.wait()
        notifier.stopping()
        for loop in loops:
            loop.cancel()


def open_authorities(trust: Trust) -> Authorities:
    """Read keys and CA certificates; signing keys are made where there are none. Raises: WorldError (`disk`, `ek_roots`)."""
    keys = Path(trust.keys_dir)
    policy = PcrPolicy("region", trust_on_first_use=trust.trust_on_first_use, allow_zero_anchor=trust.allow_zero_anchor)
    return Authorities(root=_key(keys / "root.pem"), region=_key(keys / "region.pem"), ek_roots=_roots(Path(trust.ek_roots)), policy=policy)


def _key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        if not path.exists():
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            pem = ec.generate_private_key(ec.SECP256R1()).private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(pem)
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError) as error:
        raise WorldError("disk", f"no signing key: {error}", where=str(path), remedy="restore it from its escrow") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise WorldError("disk", "not a P-256 key", where=str(path), remedy="restore it from its escrow")
    return key


def _roots(folder: Path) -> tuple[bytes, ...]:
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
