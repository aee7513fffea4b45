"""`appliance provision` on a real software TPM: once, again, after a cut in the middle, on a board that is not what it says; and the daemon's TPM after."""

import asyncio
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from tpm2_pytss import ESAPI
from tpm2_pytss.constants import ESYS_TR, TPM2_ALG, TPMA_NV
from tpm2_pytss.types import TPM2B_NV_PUBLIC, TPMS_NV_PUBLIC

from appliance.adapters.tpm import EsysTpm
from appliance.adapters.tpm.ownership import EK_CERTIFICATE_INDEX, DevId, Ownership
from appliance.adapters.tpm.refusals import step
from appliance.cli import provision as command
from appliance.cli.provision import escrow, provision
from appliance.contract.errors import TheirsError, WorldError
from appliance.core.trust.devid import issue, request
from appliance.core.trust.escrow import disclose, escrow_public
from appliance.core.trust.tpm_structures import pack_verifier, parse_public, parse_signature
from appliance.lab import softtpm
from tests.fakes.soft_tpm import Region, Software, enrol, held, leased, open_kept, opened

pytestmark = pytest.mark.slow

SETTINGS = """
[device]
name = "dev-1"
region = "eu-1"
state_dir = "{state}"
[reach]
broker_host = "broker"
[trust]
trust_domain = "example.org"
tcti = "{tcti}"
"""


class Bench:
    """A board on the bench: TPM, settings, the region's file, a DevID authority."""

    def __init__(self, folder: Path, *, bare: bool = False) -> None:
        os.environ.setdefault("TSS2_LOG", "all+none")
        self.folder = folder
        self.software = Software(certificate=not bare)
        self.software.start()
        self._authority()
        self.region = Region([self.authority.public_bytes(Encoding.DER)] if bare else softtpm.roots(self.software.state))
        self.escrow = secrets.token_bytes(32)
        self.out, self.state = folder / "out", folder / "state"
        (folder / "device.toml").write_text(SETTINGS.format(state=self.state, tcti=self.software.tcti))
        public = {"root_public": pack_verifier(self.region.root.public_key()).hex(), "escrow_public": escrow_public(self.escrow).hex()}
        (folder / "provision.json").write_text(json.dumps(public))
        (folder / "roots").mkdir()
        for number, der in enumerate(self.region.trusted):
            (folder / "roots" / f"{number}.der").write_bytes(der)

    def _authority(self) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "DevID authority")])
        now = datetime.now(UTC)
        builder = x509.CertificateBuilder(name, name, key.public_key(), 1, now - timedelta(days=1), now + timedelta(days=9))
        self.authority = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True).sign(key, hashes.SHA256())
        (self.folder / "ca.pem").write_bytes(self.authority.public_bytes(Encoding.PEM))
        (self.folder / "ca.key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        self.authority_key = key

    def run(self, *more: str, authority: bool = True, roots: str = "roots") -> Result:
        """Run the command as an operator would."""
        given = ["--config", str(self.folder / "device.toml"), "--region", str(self.folder / "provision.json")]
        given += ["--ek-roots", str(self.folder / roots), "--out", str(self.out)]
        if authority:
            given += ["--devid-ca-cert", str(self.folder / "ca.pem"), "--devid-ca-key", str(self.folder / "ca.key")]
        return CliRunner().invoke(provision, [*given, *more])

    def authorisations(self) -> Any:
        return disclose((self.out / "escrow.box").read_bytes(), self.escrow)[1]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.software.cut()
    shutil.rmtree(made.software.state)


@pytest.fixture
def bare_bench(tmp_path: Path) -> Iterator[Bench]:
    """A board whose maker left no EK certificate, and a region that trusts the bench's own authority."""
    made = Bench(tmp_path, bare=True)
    yield made
    made.software.cut()
    shutil.rmtree(made.software.state)


def direct(bench: Bench, work: Callable[[ESAPI], object]) -> None:
    """A command by somebody on the device, with what errors say."""
    with ESAPI(bench.software.tcti) as esys, step("somebody"):
        work(esys)


async def test_a_provisioned_board_enrols_and_serves(bench: Bench) -> None:
    """Key, counter, DevID, authorisations; then enrolment, lease and both keys without any authorisation; and again after a power cut."""
    done = await asyncio.to_thread(bench.run)
    assert done.exit_code == 0, (done.output, done.exception)
    assert "its EK certificate is good" in done.output
    again = await asyncio.to_thread(bench.run)
    assert again.output.count("was there") == 2
    assert "were set" in again.output
    tpm = EsysTpm(bench.software.tcti)
    sealed = await enrol(tpm, bench.region)
    kept = await leased(tpm, bench.region, sealed)
    assert bench.region.record
    bench.software.restart()
    await tpm.close()
    tpm = EsysTpm(bench.software.tcti)
    assert await open_kept(tpm, sealed, kept) == bench.region.record.leased_kek
    assert await opened(tpm, bench.region, sealed) == bench.region.record.kek
    await tpm.self_test()
    assert await held(tpm) == []
    await tpm.close()


def test_nobody_clears_the_tpm_or_sets_its_clock_without_the_escrowed_words(bench: Bench) -> None:
    """TPM2_Clear 0x98e and ClockSet 0x9a2 without, and with what the region's escrow key reads they work; the box is for the daemon too."""
    assert bench.run().exit_code == 0
    with pytest.raises(WorldError, match="needs the owner's authorisation"):
        direct(bench, lambda esys: esys.clock_set(10**9))
    with pytest.raises(WorldError, match="0x98e"):
        direct(bench, lambda esys: esys.clear(ESYS_TR.LOCKOUT))
    words = bench.authorisations()
    assert (bench.state / "depot/state/escrow.box").read_bytes() == (bench.out / "escrow.box").read_bytes()
    assert words.owner not in (bench.out / "escrow.box").read_text()
    assert not (bench.out / ".authorisations").exists()

    def with_word(esys: ESAPI) -> None:
        esys.tr_set_auth(ESYS_TR.OWNER, words.owner)
        esys.clock_set(10**9)

    direct(bench, with_word)
    (bench.folder / "escrow.key").write_bytes(bench.escrow)
    read = CliRunner().invoke(escrow, [str(bench.out / "escrow.box"), "--key", str(bench.folder / "escrow.key")])
    assert json.loads(read.output)["lockout"] == words.lockout


def test_the_devid_is_a_key_of_this_tpm_certified_for_ever(bench: Bench) -> None:
    """Certificate, TPMT_PUBLIC and private blob belong together, sign by this TPM only, and the plugin's settings name them."""
    assert bench.run().exit_code == 0
    certificate = x509.load_pem_x509_certificate((bench.out / "devid.crt.pem").read_bytes())
    certificate.verify_directly_issued_by(bench.authority)
    assert certificate.not_valid_after_utc.year == 9999
    assert certificate.subject.rfc4514_string() == "CN=dev-1,2.5.4.5=dev-1"
    devid = DevId((bench.out / "devid.pub.blob").read_bytes(), (bench.out / "devid.priv.blob").read_bytes())
    key = parse_public(devid.public, "DevID").key
    assert key == certificate.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    with Ownership(bench.software.tcti) as tpm:
        key.verify(parse_signature(tpm.sign(devid, b"challenge"), "answer"), b"challenge", ec.ECDSA(hashes.SHA256()))
    conf = (bench.out / "spire-tpm-devid.conf").read_text()
    assert f'devid_priv_path = "{bench.out}/devid.priv.blob"' in conf
    assert f'owner_hierarchy_password = "{bench.authorisations().owner}"' in conf
    for path in bench.out.iterdir():
        assert path.stat().st_mode & 0o077 == 0, path


def test_without_an_authority_a_request_waits_to_be_signed(bench: Bench) -> None:
    """The request is signed by the TPM's key; with the certificate laid beside it, the next run takes it as it is."""
    assert "signed by your DevID authority" in bench.run(authority=False).output
    asked = x509.load_pem_x509_csr((bench.out / "devid.csr.pem").read_bytes())
    assert asked.is_signature_valid
    signed = issue(asked, bench.authority, bench.authority_key, now=datetime.now(UTC), serial=b"s" * 16)
    (bench.out / "devid.crt.pem").write_bytes(signed.public_bytes(Encoding.PEM))
    assert "DevID: was there" in bench.run(authority=False).output


def test_a_board_without_a_trusted_maker_is_left_untouched(bench: Bench) -> None:
    """No path to a root: refused by name before anything is changed in the TPM."""
    other = Path(bench.folder / "others")
    other.mkdir()
    (other / "ca.pem").write_bytes(bench.authority.public_bytes(Encoding.PEM))
    refused = bench.run(roots="others")
    assert isinstance(refused.exception, TheirsError)
    assert "no path to a trusted root" in str(refused.exception)
    with Ownership(bench.software.tcti) as tpm:
        assert not tpm.owner_set
        assert tpm.keep_storage_key()


@pytest.mark.parametrize("cut", ["set_owner", "set_lockout", "_write"])
def test_a_cut_in_the_middle_loses_no_authorisation(bench: Bench, cut: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was set when the power went, the next run finishes with the same words, and they are the boxed ones."""

    def dies(*_: object) -> None:
        raise WorldError("power", "cut")

    if cut == "_write":
        monkeypatch.setattr(command, "_spire", dies)
    else:
        monkeypatch.setattr(Ownership, cut, dies)
    assert isinstance(bench.run().exception, WorldError)
    monkeypatch.undo()
    assert bench.run().exit_code == 0
    words = bench.authorisations()

    def clear(esys: ESAPI) -> None:
        esys.tr_set_auth(ESYS_TR.OWNER, words.owner)
        esys.clock_set(10**9)
        esys.tr_set_auth(ESYS_TR.LOCKOUT, words.lockout)
        esys.clear(ESYS_TR.LOCKOUT)

    direct(bench, clear)


def test_what_is_there_and_does_not_fit_is_told_with_its_remedy(bench: Bench) -> None:
    """Another TPM's DevID, a file that is no region's, an owner that somebody else has set."""
    bench.out.mkdir()
    other = Bench.__new__(Bench)
    other.software = Software()
    other.software.start()
    try:
        with Ownership(other.software.tcti) as tpm:
            foreign = tpm.make_devid()
    finally:
        other.software.cut()
        shutil.rmtree(other.software.state)
    (bench.out / "devid.pub.blob").write_bytes(foreign.public)
    (bench.out / "devid.priv.blob").write_bytes(foreign.private)
    assert "the DevID key is not this TPM's" in str(bench.run().exception)
    for name in ("devid.pub.blob", "devid.priv.blob"):
        (bench.out / name).unlink()
    good = (bench.folder / "provision.json").read_text()
    (bench.folder / "provision.json").write_text("{}")
    assert "copy provision.json from the region's keys_dir" in str(bench.run().exception)
    (bench.folder / "provision.json").write_text(good)
    direct(bench, lambda esys: esys.hierarchy_change_auth(ESYS_TR.OWNER, "somebody"))
    assert "set by somebody else" in str(bench.run().exception)
    (bench.folder / "owner").write_text("somebody\n")
    assert "set by somebody else" in str(bench.run("--owner-auth", str(bench.folder / "owner")).exception)


async def test_an_owner_that_was_there_before_is_told_with_its_remedy(bench: Bench) -> None:
    """A TPM whose owner has an authorisation and whose keys were never left in it: the daemon says what to run."""
    direct(bench, lambda esys: esys.hierarchy_change_auth(ESYS_TR.OWNER, "somebody"))
    tpm = EsysTpm(bench.software.tcti)
    with pytest.raises(WorldError, match=r"needs the owner's authorisation.*appliance provision") as told:
        await tpm.enrol_ask()
    assert told.value.reason == "owner"
    await tpm.close()
    refused = await asyncio.to_thread(bench.run)
    assert "--owner-auth" in str(refused.exception)


def test_an_authority_issues_only_for_who_holds_the_key(bench: Bench) -> None:
    """A request signed by another key, and an authority's certificate with another key, are refused by name."""
    mine, other = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    forged = request("dev-1", mine.public_key(), lambda content: other.sign(content, ec.ECDSA(hashes.SHA256())))
    good = request("dev-1", mine.public_key(), lambda content: mine.sign(content, ec.ECDSA(hashes.SHA256())))
    for asked, key, told in ((forged, bench.authority_key, "not signed by the key"), (good, other, "do not belong together")):
        with pytest.raises(TheirsError, match=told):
            issue(asked, bench.authority, key, now=datetime.now(UTC), serial=os.urandom(16))


async def test_a_board_without_an_ek_certificate_gets_one_of_the_operators_own_authority(bare_bench: Bench) -> None:
    """Refused without an authority, with the remedy; with one it is vouched for, enrols and opens; another run leaves the certificate as it is."""
    refused = await asyncio.to_thread(bare_bench.run)
    assert isinstance(refused.exception, TheirsError)
    assert refused.exception.reason == "ek_certificate"
    assert "--ek-ca-cert" in str(refused.exception)
    own = ("--ek-ca-cert", str(bare_bench.folder / "ca.pem"), "--ek-ca-key", str(bare_bench.folder / "ca.key"))
    half = await asyncio.to_thread(bare_bench.run, *own[:2])
    assert half.exit_code == 2
    assert "belong together" in half.output
    done = await asyncio.to_thread(bare_bench.run, *own)
    assert done.exit_code == 0, (done.output, done.exception)
    assert "EK certificate: issued by CN=DevID authority" in done.output
    again = await asyncio.to_thread(bare_bench.run, *own)
    assert again.exit_code == 0, (again.output, again.exception)
    assert "EK certificate: was there" in again.output
    tpm = EsysTpm(bare_bench.software.tcti)
    [shown] = (await tpm.enrol_ask()).ek_certificates
    certificate = x509.load_der_x509_certificate(shown)
    [name] = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value.get_values_for_type(x509.DirectoryName)
    assert [each.oid.dotted_string for each in name] == ["2.23.133.2.1", "2.23.133.2.2", "2.23.133.2.3"]
    assert name.get_attributes_for_oid(x509.ObjectIdentifier("2.23.133.2.1"))[0].value == "id:49424D00", "IBM, who wrote swtpm's core"
    sealed = await enrol(tpm, bare_bench.region)
    kept = await leased(tpm, bare_bench.region, sealed)
    assert bare_bench.region.record
    assert await open_kept(tpm, sealed, kept) == bare_bench.region.record.leased_kek
    await tpm.close()


@pytest.mark.parametrize("fault", ["other key", "no authority"])
async def test_an_authority_that_no_region_could_trust_signs_nothing(bare_bench: Bench, fault: str) -> None:
    """A key that is not the certificate's, or a certificate that is no CA: said before the TPM is touched."""
    folder = bare_bench.folder
    key = ec.generate_private_key(ec.SECP256R1())
    (folder / "other.key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "no authority")])
    now = datetime.now(UTC)
    plain = x509.CertificateBuilder(name, name, key.public_key(), 1, now - timedelta(days=1), now + timedelta(days=9)).sign(
        key, hashes.SHA256()
    )
    (folder / "plain.pem").write_bytes(plain.public_bytes(Encoding.PEM))
    certificate = "ca.pem" if fault == "other key" else "plain.pem"
    done = await asyncio.to_thread(bare_bench.run, "--ek-ca-cert", str(folder / certificate), "--ek-ca-key", str(folder / "other.key"))
    assert isinstance(done.exception, TheirsError)
    assert done.exception.reason == "ek_authority"
    with Ownership(bare_bench.software.tcti) as tpm:
        assert tpm.endorsement()[0] is None


@pytest.mark.parametrize("written", [False, True], ids=["defined", "half written"])
async def test_a_certificate_that_a_power_cut_left_unfinished_is_begun_anew(bare_bench: Bench, written: bool) -> None:
    """Between making the index and writing its beginning the board is one without a certificate, for the daemon and for the next run."""

    def begin(esys: ESAPI) -> None:
        attributes = TPMA_NV.OWNERWRITE | TPMA_NV.OWNERREAD | TPMA_NV.AUTHREAD | TPMA_NV.NO_DA
        public = TPMS_NV_PUBLIC(nvIndex=EK_CERTIFICATE_INDEX, nameAlg=TPM2_ALG.SHA256, attributes=attributes, dataSize=700)
        index = esys.nv_define_space(None, TPM2B_NV_PUBLIC(nvPublic=public))
        if written:
            esys.nv_write(index, bytes(188), 512, auth_handle=ESYS_TR.OWNER)
        esys.tr_close(index)

    direct(bare_bench, begin)
    bare_bench.software.restart()
    tpm = EsysTpm(bare_bench.software.tcti)
    assert (await tpm.enrol_ask()).ek_certificates == []
    await tpm.close()
    own = ("--ek-ca-cert", str(bare_bench.folder / "ca.pem"), "--ek-ca-key", str(bare_bench.folder / "ca.key"))
    done = await asyncio.to_thread(bare_bench.run, *own)
    assert done.exit_code == 0, (done.output, done.exception)
    assert "EK certificate: issued by" in done.output
