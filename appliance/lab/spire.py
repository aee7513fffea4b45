"""Real SPIRE (1.13) for the lab: one server, and an agent for each machine that the lab plays; docs/spire.md says what production does otherwise.

1. A device's agent is attested by `tpm_devid`: DevID key, EK certificate and credential activation in the very TPM that the device's daemon
   uses (`turnstile`). The agents of cloud, region and broker are attested by `x509pop`, for their machines have no TPM here.
2. All processes of the lab run as one user, so `unix:uid` tells them not apart; the machine does: an entry belongs to one machine (its parent,
   told by the common name in what the agent shows), and each workload has a machine of its own.
3. An entry has exactly one DNS name, which SPIRE copies into the common name (docs/decisions/0006).
4. The server's CA is an intermediate below a root on disk (UpstreamAuthority `disk`): mosquitto trusts the root and never needs another.
5. Agents keep their keys in memory and are attested anew at each start: nothing on a disk is an identity.
"""

import asyncio
import functools
import os
import secrets
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from spiffe import WorkloadApiClient
from spiffe.errors import PySpiffeError

from appliance.adapters.tpm.ownership import DevId, Ownership
from appliance.contract import identities
from appliance.contract.errors import WorldError
from appliance.core.trust import devid
from appliance.core.trust.certificates import SERIAL_BYTES, key_usage
from appliance.core.trust.tpm_structures import parse_public, parse_signature
from appliance.lab import softtpm, spire_settings
from appliance.lab.authority import Workload
from appliance.lab.issuing import Credential
from appliance.lab.ports import free_port
from appliance.lab.turnstile import Turnstile
from appliance.lab.units import Unit

VERSION = "1.13.3"
PROGRAMS = ("spire-server", "spire-agent")
READY_S = 60.0
"""A software TPM makes three RSA keys for each attestation; a busy machine takes seconds for it."""
_LOOK_S = 0.2
_FETCH_S = 5.0


def programs() -> Path:
    """The folder with SPIRE's programs: `APPLIANCE_SPIRE`, or where scripts/build-spire puts them. Raises: WorldError (`spire`)."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(os.environ.get("APPLIANCE_SPIRE") or cache / "appliance" / f"spire-{VERSION}")
    if not all(os.access(folder / name, os.X_OK) for name in PROGRAMS):
        remedy = "run scripts/build-spire (needs Go), or set APPLIANCE_SPIRE to a folder with the released binaries"
        raise WorldError("spire", f"no {' and '.join(PROGRAMS)}", where=str(folder), remedy=remedy)
    return folder


@dataclass(frozen=True, slots=True)
class _Fetched:
    """Implements `Credential`."""

    pem: bytes
    not_after: float
    renew_at: float


@dataclass(frozen=True, slots=True)
class _Ca:
    """An authority of the lab's own."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def pem(self) -> bytes:
        """The certificate."""
        return self.certificate.public_bytes(Encoding.PEM)

    def issue(self, asked: x509.CertificateSigningRequest) -> x509.Certificate:
        """A certificate for a machine, that never expires."""
        return devid.issue(asked, self.certificate, self.key, now=datetime.now(UTC), serial=secrets.token_bytes(SERIAL_BYTES))


class Spire:
    """Implements `Issuer`. `maker`: the TPM maker's state (`softtpm.manufacture`). `unit` makes a supervised process that is stopped at the end."""

    def __init__(self, folder: Path, maker: Path, unit: Callable[[str, list[str]], Unit], ttl_s: float) -> None:
        self.ttl_s = ttl_s
        self.agents: dict[str, Unit] = {}
        self.server: Unit | None = None
        self._folder = folder
        self._maker = maker
        self._unit = unit
        self._programs = programs()
        self._port = free_port()
        self._stack = AsyncExitStack()
        self._root, self._machines, self._devids = (_ca(name) for name in ("lab root", "lab machines", "lab DevID"))

    @property
    def root_pem(self) -> bytes:
        """The trust bundle: the root on disk."""
        return self._root.pem

    async def open(self, stack: AsyncExitStack) -> None:
        """Start the server and wait until it is healthy. Raises: WorldError (`unit`)."""
        self._stack = stack
        endorsement = [x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM) for der in softtpm.roots(self._maker)]
        self._write("root.pem", self._root.pem)
        self._write("root.key", _pem(self._root.key))
        self._write("machines.pem", self._machines.pem)
        self._write("devid-ca.pem", self._devids.pem)
        self._write("endorsement.pem", b"".join(endorsement))
        text = spire_settings.server(self._folder, self._port, trust_domain=identities.TRUST_DOMAIN, ttl_s=self.ttl_s)
        self.server = self._unit(
            "spire-server", [*self._program("spire-server"), "run", "-config", self._write("server.conf", text.encode())]
        )
        await self.server.start()
        await _until(self.server, self._healthy)

    async def admit(self, workload: Workload) -> str:
        """Make a machine, attested by its certificate, and register the workload there. Raises: WorldError (`spire`, `unit`)."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, workload.dns_name)])
        certificate = self._machines.issue(x509.CertificateSigningRequestBuilder(name).sign(key, hashes.SHA256()))
        paths = self._write(f"{workload.dns_name}.key", _pem(key)), self._write(f"{workload.dns_name}.pem", _pem(certificate))
        return await self._admit(workload, "x509pop", spire_settings.x509pop(*paths))

    async def admit_device(self, workload: Workload, host: str, port: int) -> tuple[str, int]:
        """Give the TPM a DevID, have its agent attested by it, and register the device there. Raises: WorldError (`spire`, `unit`, `tpm`)."""
        turnstile = Turnstile(host, port, self._folder / f"{workload.dns_name}.tpm")
        await turnstile.open()
        self._stack.push_async_callback(turnstile.close)
        made, certificate = await asyncio.to_thread(self._devid, turnstile.tcti, workload.dns_name)
        parts = (("priv.blob", made.private), ("pub.blob", made.public), ("crt.pem", _pem(certificate)))
        private, public, chain = (self._write(f"{workload.dns_name}.{suffix}", content) for suffix, content in parts)
        plugin = spire_settings.tpm_devid(str(turnstile.socket), private, public, chain)
        return await self._admit(workload, "tpm_devid", plugin), turnstile.port

    async def broker(self, workload: Workload) -> Callable[[], Credential]:
        """Register the broker; mosquitto speaks no Workload API, so its SVIDs are fetched for it."""
        address = await self.admit(workload)
        return lambda: _fetch(address)

    def _devid(self, tcti: str, name: str) -> tuple[DevId, x509.Certificate]:
        with Ownership(tcti) as tpm:
            made = tpm.make_devid()
            holder = parse_public(made.public, "DevID").key
            if not isinstance(holder, ec.EllipticCurvePublicKey):
                raise WorldError("devid", "is no P-256 key", where=name)
            asked = devid.request(name, holder, lambda content: parse_signature(tpm.sign(made, content), "DevID signature"))
        return made, self._devids.issue(asked)

    async def _admit(self, workload: Workload, attestor: str, plugin: str) -> str:
        """Register machine and workload first, so that the agent knows them from its first look on."""
        machine, ttl = f"spiffe://{identities.TRUST_DOMAIN}/machine/{workload.dns_name}", str(int(workload.ttl_s or self.ttl_s))
        await self._register("-node", "-spiffeID", machine, "-selector", f"{attestor}:subject:cn:{workload.dns_name}")
        named = ["-spiffeID", workload.spiffe_id, "-dns", workload.dns_name, "-x509SVIDTTL", ttl]
        await self._register("-parentID", machine, *named, "-selector", f"unix:uid:{os.geteuid()}")
        socket = self._folder / f"{workload.dns_name}.sock"
        home = self._folder / workload.dns_name
        home.mkdir(mode=0o700)
        text = spire_settings.agent(
            home, socket, self._port, bundle=self._folder / "root.pem", trust_domain=identities.TRUST_DOMAIN, attestor=plugin
        )
        command = [*self._program("spire-agent"), "run", "-config", self._write(f"{workload.dns_name}.conf", text.encode())]
        agent = self.agents[workload.dns_name] = self._unit(f"spire-{workload.dns_name}", command)
        await agent.start()
        await _until(agent, functools.partial(_answers, f"unix:{socket}"))
        return f"unix:{socket}"

    async def _healthy(self) -> bool:
        return await self._ask("healthcheck") == 0

    def _program(self, name: str) -> list[str]:
        return [str(self._programs / name)]

    async def _register(self, *entry: str) -> None:
        code = await self._ask("entry", "create", *entry)
        if code != 0:
            raise WorldError("spire", f"the server takes no entry (exit code {code}): {' '.join(entry)}", where=str(self._folder))

    async def _ask(self, *words: str) -> int:
        """Run a command of the server's own line and return its exit code."""
        asked = [*self._program("spire-server"), *words, "-socketPath", str(self._folder / "server.sock")]
        process = await asyncio.create_subprocess_exec(*asked, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL)
        return await process.wait()

    def _write(self, name: str, content: bytes) -> str:
        path = self._folder / name
        path.touch(mode=0o600)
        path.write_bytes(content)
        return str(path)


async def _until(unit: Unit, condition: Callable[[], Awaitable[bool]]) -> None:
    """Wait at most `READY_S`. Raises: WorldError (`unit`) with the end of the unit's log."""
    loop = asyncio.get_running_loop()
    end = loop.time() + READY_S
    while not await condition():
        if loop.time() >= end:
            raise WorldError("unit", f"was not ready after {READY_S:g} s\n{unit.tail()}", where=unit.name)
        await asyncio.sleep(_LOOK_S)


async def _answers(address: str) -> bool:
    try:
        await asyncio.to_thread(_fetch, address)
    except WorldError:
        return False
    return True


def _fetch(address: str) -> _Fetched:
    """Block for the present SVID. Raises: WorldError (`workload_api`)."""
    try:
        with WorkloadApiClient(socket_path=address) as client:
            svid = client.fetch_x509_svid(timeout=_FETCH_S)
    except PySpiffeError as error:
        raise WorldError("workload_api", f"no SVID: {error}", where=address) from error
    end, begin = svid.leaf.not_valid_after_utc.timestamp(), svid.leaf.not_valid_before_utc.timestamp()
    return _Fetched(b"".join(_pem(each) for each in svid.cert_chain) + _pem(svid.private_key), end, (begin + end) / 2)


def _pem(what: object) -> bytes:
    if isinstance(what, x509.Certificate):
        return what.public_bytes(Encoding.PEM)
    if isinstance(what, ec.EllipticCurvePrivateKey):
        return what.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    raise TypeError(type(what))


def _ca(name: str) -> _Ca:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name), x509.NameAttribute(NameOID.SERIAL_NUMBER, secrets.token_hex(8))])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(
            subject, subject, key.public_key(), x509.random_serial_number(), now - timedelta(days=1), now + timedelta(days=30)
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(key_usage("key_cert_sign", "crl_sign"), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return _Ca(certificate, key)
