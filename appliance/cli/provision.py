"""`appliance provision`: what a board needs once, on the bench, before it is trusted; and `appliance escrow`, which reads what it left for later."""

import asyncio
import json
import os
import secrets
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from appliance.contract.errors import TheirsError, WorldError
from appliance.contract.settings import parse

ESCROW_FILE = "escrow.box"
PENDING_FILE = ".authorisations"
KEY_BYTES = 32
AUTHORISATION_BYTES = 16
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_FOLDER = click.Path(file_okay=False, path_type=Path)


@dataclass(frozen=True, slots=True)
class Bench:
    """What the region gave to the bench: its file provision.json."""

    root_public: bytes
    escrow_public: bytes


@click.command()
@click.option("--config", type=_FILE, default=Path("/etc/appliance/device.toml"), show_default=True, help="The device's settings.")
@click.option("--region", type=_FILE, required=True, help="The region's provision.json (beside its keys).")
@click.option(
    "--ek-roots", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True, help="TPM makers' CA certificates."
)
@click.option("--ek-ca-cert", type=_FILE, help="Certificate of your own EK authority, for a board whose maker left no EK certificate.")
@click.option("--ek-ca-key", type=_FILE, help="Its key, PEM.")
@click.option("--out", type=_FOLDER, default=Path("/etc/appliance/devid"), show_default=True, help="Where the DevID's files go.")
@click.option(
    "--devid-ca-cert", type=_FILE, help="Certificate of the DevID authority; without it a request is written, and you have it signed."
)
@click.option("--devid-ca-key", type=_FILE, help="Its key, PEM.")
@click.option("--owner-auth", type=_FILE, help="File with the owner's authorisation, if one was set before (see `appliance escrow`).")
def provision(**given: Any) -> None:
    """Prepare this board's TPM: check its maker, leave its keys in it, make its device identity, set and escrow its authorisations.

    May be run again at any time; what is done already is left as it is. Nothing is changed before the TPM has proved whose it is, but that a board without
    an EK certificate gets one of your own authority, where you give that.
    """
    from appliance.adapters.tpm.ownership import Ownership  # noqa: PLC0415 - a region has no TPM library
    from appliance.edge.settings import Edge  # noqa: PLC0415

    settings = parse(given["config"].read_text(), str(given["config"]), Edge)
    bench = _bench(given["region"])
    out: Path = given["out"]
    owner = given["owner_auth"].read_text().strip() if given["owner_auth"] else _pending(out).get("owner", "")
    with Ownership(settings.trust.tcti, owner=owner) as tpm:
        owner = owner if tpm.owner_set else ""
    with Ownership(settings.trust.tcti, owner=owner) as tpm:
        _vouch(tpm, given["ek_ca_cert"], given["ek_ca_key"])
    ek_name = asyncio.run(_prove(settings.trust.tcti, settings.device.name, given["ek_roots"]))
    click.echo(f"TPM: its EK certificate is good; EK {ek_name.hex()[4:20]}…")
    out.mkdir(mode=0o700, parents=True, exist_ok=True)
    with Ownership(settings.trust.tcti, owner=owner) as tpm:
        from appliance.core.trust.approval import counter_reference  # noqa: PLC0415

        click.echo(f"storage key: {'left in the TPM' if tpm.keep_storage_key() else 'was there'}")
        fresh = tpm.define_counter(bench.root_public, counter_reference(ek_name))
        click.echo(f"generation counter: {'waits for its first count at enrolment' if fresh else 'was there'}")
        _devid(tpm, settings.device.name, out, given["devid_ca_cert"], given["devid_ca_key"])
        box = _authorise(tpm, bench, ek_name, out)
    if box is not None:
        _hand_over(Path(settings.device.state_dir), box)
    click.echo("provisioned")


@click.command()
@click.argument("box", type=_FILE)
@click.option("--key", type=_FILE, required=True, help="The region's escrow.key.")
def escrow(box: Path, key: Path) -> None:
    """Read a TPM's authorisations from the box that its region keeps (state_dir/devices/state/escrow-DEVICE). Prints secrets."""
    from appliance.core.trust.escrow import disclose  # noqa: PLC0415

    ek_name, held = disclose(box.read_bytes(), key.read_bytes())
    click.echo(json.dumps({"ek_name": ek_name.hex(), "lockout": held.lockout, "owner": held.owner}, indent=1))


def _bench(path: Path) -> Bench:
    try:
        fields = json.loads(path.read_text())
        return Bench(bytes.fromhex(fields["root_public"]), bytes.fromhex(fields["escrow_public"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TheirsError(
            "provision", f"can not be read: {error!r}", where=str(path), remedy="copy provision.json from the region's keys_dir"
        ) from error


def _vouch(tpm: Any, authority: Path | None, key: Path | None) -> None:
    """Give a TPM that has none an EK certificate of the operator's own authority."""
    if authority is None and key is None:
        return
    if authority is None or key is None:
        raise click.UsageError("--ek-ca-cert and --ek-ca-key belong together")
    from appliance.core.trust.certificates import SERIAL_BYTES  # noqa: PLC0415
    from appliance.core.trust.tpm_structures import parse_public  # noqa: PLC0415
    from appliance.core.trust.vouching import Maker, vouch  # noqa: PLC0415

    certificate, public = tpm.endorsement()
    if certificate is not None:
        click.echo("EK certificate: was there")
        return
    try:
        issuer = x509.load_pem_x509_certificate(authority.read_bytes())
    except ValueError as error:
        raise TheirsError("ek_authority", f"no certificate can be read: {error}", where=str(authority), remedy="give one in PEM") from error
    signer, serial = _authority_key(key, "ek_authority"), secrets.token_bytes(SERIAL_BYTES)
    tpm.keep_certificate(vouch(parse_public(public, "EK"), Maker(*tpm.maker()), issuer, signer, now=datetime.now(UTC), serial=serial))
    click.echo(f"EK certificate: issued by {issuer.subject.rfc4514_string()}, which the region must trust (its ek_roots)")


async def _prove(tcti: str, device: str, roots: Path) -> bytes:
    """The whole enrolment against a region that is made up here and forgotten: EK chain, EK and AK in one TPM, SRK certified. Returns the EK's name."""
    from appliance.adapters.tpm import EsysTpm  # noqa: PLC0415
    from appliance.core.trust.enrolment import Enrolment  # noqa: PLC0415
    from appliance.core.trust.tpm_structures import pack_verifier  # noqa: PLC0415
    from appliance.regional.opening import read_roots  # noqa: PLC0415

    root = pack_verifier(ec.generate_private_key(ec.SECP256R1()).public_key())
    machine = Enrolment(device, root_public=root, trusted=read_roots(roots))
    tpm = EsysTpm(tcti)
    try:
        challenge = machine.ask(await tpm.enrol_ask(), now=0.0, wall=time.time(), chance=secrets.token_bytes)
        return machine.prove(await tpm.prove(challenge), now=0.0, chance=secrets.token_bytes).ek_name
    finally:
        await tpm.close()


def _devid(tpm: Any, device: str, out: Path, authority: Path | None, key: Path | None) -> None:
    """Make key, request and certificate, or find them there. Raises: TheirsError (`devid`) if what is there is not this TPM's."""
    from appliance.adapters.tpm.ownership import DevId  # noqa: PLC0415
    from appliance.core.trust.certificates import SERIAL_BYTES  # noqa: PLC0415
    from appliance.core.trust.devid import issue, request  # noqa: PLC0415
    from appliance.core.trust.tpm_structures import parse_public, parse_signature  # noqa: PLC0415

    public, private, certificate = out / "devid.pub.blob", out / "devid.priv.blob", out / "devid.crt.pem"
    if public.exists() and private.exists():
        devid = DevId(public.read_bytes(), private.read_bytes())
    else:
        devid = tpm.make_devid()
        _write(private, devid.private)
        _write(public, devid.public)
    holder = parse_public(devid.public, str(public)).key
    if not isinstance(holder, ec.EllipticCurvePublicKey):
        raise TheirsError("devid", "is no P-256 key", where=str(public), remedy="remove the files devid.* and run this again")
    try:
        asked = request(device, holder, lambda content: parse_signature(tpm.sign(devid, content), "DevID signature"))
    except TheirsError as error:
        remedy = "remove the files devid.* there and run this again"
        raise TheirsError("devid", f"the DevID key is not this TPM's: {error.what}", where=str(private), remedy=remedy) from error
    if certificate.exists() and x509.load_pem_x509_certificate(certificate.read_bytes()).public_key() == holder:
        click.echo("DevID: was there")
        return
    if authority is None or key is None:
        _write(out / "devid.csr.pem", asked.public_bytes(Encoding.PEM))
        click.echo(f"DevID: have {out / 'devid.csr.pem'} signed by your DevID authority, and put the certificate at {certificate}")
        return
    issuer = x509.load_pem_x509_certificates(authority.read_bytes())
    signed = issue(asked, issuer[0], _authority_key(key), now=datetime.now(UTC), serial=secrets.token_bytes(SERIAL_BYTES))
    between = [each for each in issuer if each.subject != each.issuer]
    _write(certificate, b"".join(each.public_bytes(Encoding.PEM) for each in (signed, *between)))
    click.echo(f"DevID: {signed.subject.rfc4514_string()} certified by {signed.issuer.rfc4514_string()}")


def _authority_key(path: Path, whose: str = "devid_authority") -> ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey:
    try:
        key = load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise TheirsError(whose, f"no key can be read: {error}", where=str(path), remedy="give an unencrypted PEM key") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey):
        raise TheirsError(whose, "is neither an ECC nor an RSA key", where=str(path))
    return key


def _authorise(tpm: Any, bench: Bench, ek_name: bytes, out: Path) -> bytes | None:
    """Set what is not set, after it was written down and boxed for the region; returns the box, or None if nothing was to be done.

    A file of mode 0600 holds the values until both are set, so that a power cut in between loses none of them.
    """
    from appliance.core.trust.escrow import Authorisations, enclose  # noqa: PLC0415

    pending = _pending(out)
    if tpm.owner_set and tpm.lockout_set and not pending:
        click.echo("authorisations: were set")
        return None
    if (tpm.owner_set or tpm.lockout_set) and not pending:
        which = "the owner's" if tpm.owner_set else "lockout's"
        what = f"{which} authorisation was set by somebody else, and only one of both"
        raise WorldError(
            "owner", what, where="TPM", remedy="clear it with its value, or clear the TPM in the firmware's settings, and begin anew"
        )
    if not pending:
        pending = {name: secrets.token_hex(AUTHORISATION_BYTES) for name in ("lockout", "owner")}
        _write(out / PENDING_FILE, json.dumps(pending).encode())
    box = enclose(Authorisations(**pending), ek_name, bench.escrow_public, secrets.token_bytes(KEY_BYTES))
    _write(out / ESCROW_FILE, box)
    if not tpm.owner_set:
        tpm.set_owner(pending["owner"])
    if not tpm.lockout_set:
        tpm.set_lockout(pending["lockout"])
    _write(out / "spire-tpm-devid.conf", _spire(out, pending["owner"]).encode())
    (out / PENDING_FILE).unlink()
    click.echo(f"authorisations: lockout and owner set; {out / ESCROW_FILE} goes to the region at the next enrolment")
    return box


def _spire(out: Path, owner: str) -> str:
    """The agent's plugin (spire v1.13, doc/plugin_agent_nodeattestor_tpm_devid.md). It makes the storage key anew, so it needs the owner's word."""
    return f"""NodeAttestor "tpm_devid" {{
    plugin_data {{
        devid_cert_path = "{out / "devid.crt.pem"}"
        devid_priv_path = "{out / "devid.priv.blob"}"
        devid_pub_path = "{out / "devid.pub.blob"}"
        owner_hierarchy_password = "{owner}"
    }}
}}
"""


def _pending(out: Path) -> dict[str, str]:
    path = out / PENDING_FILE
    if not path.exists():
        return {}
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, str])
    except (OSError, msgspec.MsgspecError) as error:
        raise WorldError(
            "disk", f"can not be read: {error}", where=str(path), remedy="it may hold the TPM's only authorisations: restore it"
        ) from error


def _hand_over(state: Path, box: bytes) -> None:
    """Lay the box where the daemon finds it, as the owner of the state directory."""
    from appliance.adapters.depot import Depot  # noqa: PLC0415

    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    Depot(state / "depot").save(ESCROW_FILE, box)
    owner = state.stat()
    if os.geteuid() == 0 and owner.st_uid != 0:
        for path in (state / "depot", *(state / "depot").rglob("*")):
            os.chown(path, owner.st_uid, owner.st_gid)


def _write(path: Path, content: bytes) -> None:
    """Replace a file that only its owner reads, whole or not at all, and see it on disk."""
    fresh = path.with_name(f"{path.name}.new")
    try:
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except OSError as error:
        raise WorldError(
            "disk", f"can not be written: {error.strerror}", where=str(path), remedy="run as root, or choose another --out"
        ) from error
