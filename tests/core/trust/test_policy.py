"""Policy digests against published and measured values; the comparison with a TPM's trial session is in tests/adapters/test_tpm.py."""

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from appliance.core.trust.policy import Policy, pcr_digest, pcr_selection
from appliance.core.trust.tpm_wire import Command

PCRS = st.dictionaries(st.integers(0, 23), st.binary(min_size=32, max_size=32), min_size=1)


def test_a_selection_is_marshalled_as_the_tpm_does() -> None:
    """One bank, three bytes, least PCR in the least bit: the bytes that stand in a real quote."""
    assert pcr_selection({0, 1, 2, 3, 4, 5, 7, 11}) == bytes.fromhex("00000001000b03bf0800")


def test_the_quoted_digest_of_zero_pcrs() -> None:
    """Eight zero PCRs hash to what a fresh TPM quotes for them."""
    assert pcr_digest({pcr: bytes(32) for pcr in range(8)}).hex().startswith("5341e6b2646979a70e57653007a1f310")


def test_unseal_only() -> None:
    """PolicyCommandCode(TPM2_Unseal) alone has a digest that can be computed by hand."""
    assert Policy().command_code(Command.UNSEAL).digest == hashlib.sha256(bytes(32) + bytes.fromhex("0000016c0000015e")).digest()


@given(PCRS, st.binary(min_size=34, max_size=34), st.binary(max_size=32))
def test_every_assertion_and_their_order_count(values: dict[int, bytes], name: bytes, reference: bytes) -> None:
    """Leaving out or swapping assertions gives another digest."""
    full = Policy().pcr(values).signed(name, reference).command_code(Command.UNSEAL)
    others = {
        Policy().signed(name, reference).pcr(values).command_code(Command.UNSEAL).digest,
        Policy().pcr(values).command_code(Command.UNSEAL).digest,
        Policy().signed(name, reference).command_code(Command.UNSEAL).digest,
        Policy().pcr(values).signed(name, reference).digest,
        Policy().digest,
    }
    assert full.digest not in others
    assert len(others) == 5


@given(PCRS, st.binary(min_size=34, max_size=34), st.binary(max_size=32))
def test_an_authority_replaces_what_came_before(values: dict[int, bytes], name: bytes, reference: bytes) -> None:
    """After PolicyAuthorize the digest is the authority's, whatever it approved; another reference is another authority."""
    assert Policy().pcr(values).authorize(name, reference) == Policy().authorize(name, reference)
    assert Policy().authorize(name, reference) != Policy().authorize(name, reference + b"x")


@given(PCRS, st.data())
def test_a_changed_pcr_changes_the_digest(values: dict[int, bytes], data: st.DataObject) -> None:
    """One flipped bit in one PCR is another policy."""
    pcr = data.draw(st.sampled_from(sorted(values)))
    flipped = bytes([values[pcr][0] ^ 1]) + values[pcr][1:]
    assert Policy().pcr(values) != Policy().pcr({**values, pcr: flipped})
