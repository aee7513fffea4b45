"""TPM structures from a network: exact, bounded, and never a foreign exception."""

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from hypothesis import given
from hypothesis import strategies as st

from appliance.contract.attest import Challenge
from appliance.contract.errors import TheirsError
from appliance.core.trust.tpm_structures import (
    Certified,
    Quoted,
    pack_signature,
    pack_verifier,
    parse_attest,
    parse_public,
    parse_signature,
)
from appliance.core.trust.tpm_wire import Hierarchy, Reader, sized
from tests.fakes.paper_tpm import GOOD_PCRS, PaperTpm, refusal_of, sign

# Made by a software TPM (libtpms 0.9.2).
EK_HEAD = "0001000b000300b20020837197674484b3f81a90cc8d46a5d724fd52d76e06520b64f2a1da1b331469aa000600800043"
SRK = bytes.fromhex(
    "0023000b00030472000000060080004300100003001000200c0b56406acea7b7859980c68d7665f23e3110a5d54c78a77538999d3f484efa"
    "00204d0e3444451e4569d36949dcfb6f3194e6f8a9903c01875e135675c1d4c9c0b1"
)
AK = bytes.fromhex(
    "0023000b00050072000000100018000b0003001000207958c588d773ea5cc3b63617c6bf406d3534f2157164b3d777d5f7caf736f8e7"
    "0020be8d21ba36ee902a101401e6b4ec02263eea3d51264192a5f7f35665697a1d5f"
)
QUOTE = bytes.fromhex(
    "ff54434780180022000b0bf8dc16b7f39183d17912c118d27871274feb4e29f369cc174f4e311053c43f00206e6e6e6e6e6e6e6e6e6e6e6e6e6e6e6e"
    "6e6e6e6e6e6e6e6e6e6e6e6e6e6e6e6e00000000000002ba000000030000000000201910230016363600000001000b03bf080000205341e6b2646979"
    "a70e57653007a1f310169421ec9bdd9f1a5648f75ade005af1"
)
SIGNATURE = bytes.fromhex(
    "0018000b00208ee302dcc62dd103e76ff4999553f2c97dca38d81631e461b9848374546da84200202ff5c55b88645b23353d2e6d444e1b2d6199c3fb"
    "f2ce0a2341bc99c7ec49be77"
)
TPM = PaperTpm()
EVIDENCE = TPM.evidence(Challenge(nonce=bytes(32), pcrs=[]), GOOD_PCRS)
PARSERS = (parse_public, parse_attest, parse_signature)
SAMPLES = (SRK, AK, TPM.ek_public, QUOTE, SIGNATURE, EVIDENCE.quote_attest)


def test_a_real_quote_is_read() -> None:
    """The fields of a quote that a TPM made are where the specification says, and its signer is the AK in the endorsement hierarchy."""
    ak = parse_public(AK, "AK")
    quote = parse_attest(QUOTE, "quote")
    assert quote.signer == ak.qualified_name(Hierarchy.ENDORSEMENT)
    assert quote.extra_data == b"n" * 32
    assert (quote.clock.clock_ms, quote.clock.reset_count, quote.clock.restart_count, quote.clock.safe) == (698, 3, 0, False)
    assert isinstance(quote.stated, Quoted)
    assert quote.stated.selections == ((0x0B, frozenset({0, 1, 2, 3, 4, 5, 7, 11})),)
    assert isinstance(ak.key, ec.EllipticCurvePublicKey)


def test_a_certification_is_not_taken_for_a_quote() -> None:
    """The type decides what a statement is read as."""
    attest = TPM.attest(0x8017, b"", sized(b"a") + sized(b"b"))
    assert parse_attest(attest, "x").stated == Certified(b"a", b"b")
    with pytest.raises(TheirsError, match="attests type 0x801a"):
        parse_attest(TPM.attest(0x801A, b"", sized(b"a") + sized(b"b")), "x")


def test_a_statement_that_no_tpm_made_is_refused() -> None:
    """Without the magic anyone could have had the bytes signed as data."""
    with pytest.raises(TheirsError, match="magic"):
        parse_attest(b"\xff\x54\x43\x48" + QUOTE[4:], "quote")


def test_keys_are_read_with_their_attributes() -> None:
    """Type, attributes and symmetric algorithm of real templates."""
    srk, ek = parse_public(SRK, "SRK"), parse_public(TPM.ek_public, "EK")
    assert (srk.symmetric_bits, int(srk.attributes), srk.key.key_size) == (128, 0x0003_0472, 256)
    assert TPM.ek_public.hex().startswith(EK_HEAD)
    assert ek.key == TPM.ek.public_key()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (AK.replace(bytes.fromhex("be8d21ba"), bytes.fromhex("be8d21bb")), "not a point"),
        (AK[:-1], "needs 32 bytes"),
        (AK + b"\0", "1 bytes too many"),
        (b"\x00\x25" + AK[2:], "algorithm 0x0025"),
        (AK.replace(bytes.fromhex("00030010"), bytes.fromhex("00100010")), "curve 0x0010"),
        (SRK.replace(bytes.fromhex("000600800043"), bytes.fromhex("000600070043")), "AES with 7 bits"),
        (TPM.ek_public.replace(bytes.fromhex("0800000000000100"), bytes.fromhex("0400000000000100")), "an RSA key of 2048 bits"),
    ],
    ids=["off the curve", "cut", "appended", "unknown type", "unknown curve", "odd AES", "odd RSA"],
)
def test_a_broken_key_is_refused_by_what_is_wrong(change: bytes, told: str) -> None:
    """Each refusal says what was expected."""
    with pytest.raises(TheirsError, match=told):
        parse_public(change, "key")


def test_a_selection_beyond_the_last_pcr_is_refused() -> None:
    """Bits above PCR 23 would be read by nobody."""
    with pytest.raises(TheirsError, match="above 23"):
        parse_attest(QUOTE.replace(bytes.fromhex("03bf0800"), bytes.fromhex("04bf080001")), "quote")


@given(st.integers(1, 2**256 - 1), st.integers(1, 2**256 - 1))
def test_signatures_survive_the_wire(r: int, s: int) -> None:
    """Marshalling and reading an ECDSA signature gives it back, with leading zeros too."""
    der = encode_dss_signature(r, s)
    assert parse_signature(pack_signature(der), "signature") == der


def test_a_signing_key_survives_the_wire() -> None:
    """The key that root and region publish reads as the same key, with a name."""
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    public = parse_public(pack_verifier(key), "verifier")
    assert public.key == key
    assert len(public.name) == 34
    assert parse_signature(sign(TPM.ak, b"x"), "signature")


@given(st.sampled_from(PARSERS), st.binary(max_size=400))
def test_noise_is_refused_and_nothing_else_happens(parser: object, noise: bytes) -> None:
    """Random bytes raise TheirsError or parse; they never raise anything else."""
    attempt(parser, noise)


@given(st.sampled_from(PARSERS), st.sampled_from(SAMPLES), st.data())
def test_mutated_structures_are_refused_and_nothing_else_happens(parser: object, sample: bytes, data: st.DataObject) -> None:
    """Real structures with changed, cut or inserted bytes raise TheirsError or parse."""
    at = data.draw(st.integers(0, len(sample)))
    removed = data.draw(st.integers(0, 8))
    attempt(parser, sample[:at] + data.draw(st.binary(max_size=8)) + sample[at + removed :])


@given(st.binary(max_size=40), st.lists(st.sampled_from(["u8", "u16", "u32", "u64", "sized"]), max_size=8))
def test_the_reader_never_reads_past_the_end(content: bytes, reads: list[str]) -> None:
    """Whatever is read in whatever order, the reader returns bytes that were there, or refuses."""
    reader = Reader(content, "x")

    def read_all() -> None:
        for read in reads:
            reader.sized(16) if read == "sized" else getattr(reader, read)()
        reader.end()

    refusal = refusal_of(read_all)
    assert refusal is None or refusal.reason == "malformed"


def attempt(parser: object, content: bytes) -> None:
    assert callable(parser)
    refusal = refusal_of(lambda: parser(content, "fuzz"))
    assert refusal is None or (refusal.reason, refusal.where) == ("malformed", "fuzz")
