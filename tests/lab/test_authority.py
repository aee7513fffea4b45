"""The lab's authority and its Workload API, seen as a client sees them."""

import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from spiffe import WorkloadApiClient, X509Svid
from spiffe._proto import workload_pb2, workload_pb2_grpc
from spiffe.errors import PySpiffeError

from appliance.contract.errors import WorldError
from appliance.lab.authority import Authority, Svid, Workload
from appliance.lab.workload_api import WorkloadApi
from tests.fakes.private_region import PrivateRegion, device

JETSON = device("jetson-1")


@pytest.fixture
def region() -> Iterator[PrivateRegion]:
    """A Workload API without a running broker."""
    region = PrivateRegion()
    yield region
    region.__exit__()


def verify(authority: Authority, svid: Svid, directory: Path) -> bool:
    """Ask openssl whether the chain leads to the root."""
    pem = [certificate.public_bytes(serialization.Encoding.PEM) for certificate in svid.chain]
    for name, content in (("root", authority.root_pem), ("signer", pem[1]), ("leaf", pem[0])):
        (directory / name).write_bytes(content)
    command = ["openssl", "verify", "-x509_strict", "-CAfile", "root", "-untrusted", "signer", "leaf"]
    return subprocess.run(command, cwd=directory, capture_output=True, check=False).returncode == 0


def test_an_svid_has_spires_shape(tmp_path: Path) -> None:
    """Subject, SAN, usages and chain are those that SPIRE issues; openssl and the spiffe library accept them."""
    authority = Authority()
    svid = authority.issue(JETSON)
    leaf = svid.chain[0]
    subject = {attribute.oid: attribute.value for attribute in leaf.subject}
    assert subject == {NameOID.COUNTRY_NAME: "US", NameOID.ORGANIZATION_NAME: "SPIRE", NameOID.COMMON_NAME: "jetson-1"}
    san = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert san.get_values_for_type(x509.UniformResourceIdentifier) == [JETSON.spiffe_id]
    assert san.get_values_for_type(x509.DNSName) == ["jetson-1"]
    usage = leaf.extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical
    assert (usage.value.digital_signature, usage.value.key_encipherment, usage.value.key_agreement) == (True, True, True)
    assert not usage.value.key_cert_sign
    purposes = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert set(purposes) == {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
    assert verify(authority, svid, tmp_path)
    assert str(X509Svid.parse_raw(svid.chain_der, svid.key_der).spiffe_id) == JETSON.spiffe_id


def test_the_signing_ca_is_replaced_under_the_same_root(tmp_path: Path) -> None:
    """SVIDs from before and after lead to one root; another authority's lead nowhere."""
    authority = Authority()
    before = authority.issue(JETSON)
    authority.rotate()
    after = authority.issue(JETSON)
    assert before.chain[1].subject != after.chain[1].subject
    assert verify(authority, before, tmp_path)
    assert verify(authority, after, tmp_path)
    assert not verify(authority, Authority().issue(JETSON), tmp_path)


def test_a_call_without_the_header_is_refused(region: PrivateRegion) -> None:
    """The header stops requests that a browser or proxy was tricked into (Workload API, section 3)."""
    with grpc.insecure_channel(region.register(JETSON)) as channel:
        stub = workload_pb2_grpc.SpiffeWorkloadAPIStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            next(stub.FetchX509SVID(workload_pb2.X509SVIDRequest(), timeout=5))
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        with pytest.raises(grpc.RpcError) as caught:
            stub.FetchJWTSVID(workload_pb2.JWTSVIDRequest(audience=["x"]), timeout=5)
        assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_a_revoked_entry_is_denied(region: PrivateRegion) -> None:
    """After revocation running streams end and calls are denied."""
    address = region.register(JETSON)
    header = [("workload.spiffe.io", "true")]
    with grpc.insecure_channel(address) as channel:
        stream = workload_pb2_grpc.SpiffeWorkloadAPIStub(channel).FetchX509SVID(workload_pb2.X509SVIDRequest(), timeout=10, metadata=header)
        assert next(stream).svids[0].spiffe_id == JETSON.spiffe_id
        region.api.revoke(JETSON.spiffe_id)
        with pytest.raises(grpc.RpcError) as caught:
            next(stream)
        assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED
    with WorkloadApiClient(socket_path=address) as client, pytest.raises(PySpiffeError, match="no identity issued"):
        client.fetch_x509_svid(timeout=5)
    with pytest.raises(WorldError, match="no identity"):
        region.api.svid(JETSON.spiffe_id)


def test_an_svid_is_renewed_at_half_of_its_life(region: PrivateRegion) -> None:
    """A stream gets the next SVID by push, and both streams of a workload see the same one."""
    address = region.register(device("jetson-1", ttl_s=2.0))
    header = [("workload.spiffe.io", "true")]
    with grpc.insecure_channel(address) as channel:
        stub = workload_pb2_grpc.SpiffeWorkloadAPIStub(channel)
        streams = [stub.FetchX509SVID(workload_pb2.X509SVIDRequest(), timeout=10, metadata=header) for _ in range(2)]
        first = [next(stream).svids[0].x509_svid for stream in streams]
        began = time.monotonic()
        second = [next(stream).svids[0].x509_svid for stream in streams]
        assert 0.5 < time.monotonic() - began < 1.9
    assert first[0] == first[1] != second[0] == second[1]


def test_the_sockets_are_private(region: PrivateRegion) -> None:
    """The directory stands for process attestation, so nobody else may enter it."""
    address = region.register(JETSON)
    assert stat.S_IMODE(Path(address.removeprefix("unix:")).parent.stat().st_mode) == 0o700


def test_a_socket_path_that_is_too_long_is_said_clearly(tmp_path: Path) -> None:
    """A unix socket's path has 107 bytes; the error names path, length and way out."""
    api = WorkloadApi(Authority(), tmp_path / ("x" * 100))
    api.start()
    with pytest.raises(WorldError, match="at most 107"):
        api.register(Workload("spiffe://appliance.lab/cloud", "cloud"))
