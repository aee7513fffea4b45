"""A region, a network or a device that lies: each message of the exchange mutated, cut, replayed, reordered, lost. Never an unseal, never a crash.

Both real loops run on a paper TPM; hypothesis bends the wire in both directions. What is opened is opened by exactly what the region meant.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from appliance.contract.attest import Approval, Challenge, EnrolChallenge, Enrolled, Evidence
from appliance.contract.codec import Message, decode
from appliance.contract.errors import TheirsError, WorldError
from appliance.core.trust.tpm_structures import parse_signature
from tests.fakes.paper_region import PaperSite

ANSWERS: dict[str, type[Message]] = {"enrol": EnrolChallenge, "prove": Enrolled, "challenge": Challenge, "attest": Approval}
ROUNDS = 4

Ask = Callable[[bytes], Awaitable[bytes]]


class Liar:
    """Bends what passes by hypothesis's choice, and remembers what each answer truly was."""

    def __init__(self, data: st.DataObject, site: PaperSite) -> None:
        self.data = data
        self.site = site
        self.seen: list[bytes] = []
        self.changed = False
        self.lied: list[str] = []

    async def bend(self, word: str, payload: bytes, ask: Ask) -> bytes:
        deed = self.data.draw(st.sampled_from(["straight", "straight", "ask", "answer", "replay", "lose", "refuse", "restart"]), label=word)
        if deed == "lose":
            raise WorldError("timeout", "no answer")
        if deed == "restart":
            self.site.restart_region()
        if deed == "refuse":
            reason = self.data.draw(
                st.sampled_from(["nonce", "malformed", "pcr", "revoked", "quote", "unknown_device", "generation", "", "x"])
            )
            raise TheirsError(reason, "a made-up refusal")
        sent = self.mutated(payload) if deed == "ask" else payload
        true = await ask(sent)
        answer = self.mutated(true) if deed == "answer" else true
        if deed == "replay" and self.seen:
            answer = self.data.draw(st.sampled_from(self.seen))
        self.seen.append(true)
        self.note(word, true, answer)
        return answer

    def note(self, word: str, true: bytes, answer: bytes) -> None:
        """Whether what arrives means something else than what was sent."""
        try:
            same = meaning(decode(answer, ANSWERS[word])) == meaning(decode(true, ANSWERS[word]))
        except TheirsError:
            same = False
        if not same:
            self.lied.append(word)

    def mutated(self, content: bytes) -> bytes:
        """A changed field (still well-formed), or changed bytes."""
        if self.data.draw(st.booleans()):
            fields: dict[str, Any] = msgspec.json.decode(content)
            name = self.data.draw(st.sampled_from(sorted(fields)))
            fields[name] = self.data.draw(st.sampled_from([None, "", "AA==", 0, 2**40, -1, [], [0], {"0": "AA=="}, fields[name], "x"]))
            return msgspec.json.encode(fields)
        at = self.data.draw(st.integers(0, len(content)))
        return content[:at] + self.data.draw(st.binary(max_size=3)) + content[at + self.data.draw(st.integers(0, 3)) :]


def meaning(message: Message) -> object:
    """What opens something: of an approval only what a TPM checks, and so on; words and bookkeeping open nothing, a lost count costs the leases."""
    if isinstance(message, Challenge):
        return message.nonce, set(message.pcrs)
    if isinstance(message, Enrolled):
        return message.sealed_public, message.duplicate, message.seed, message.srk_name, message.policy_ref, message.root_public
    if not isinstance(message, Approval):
        return message
    grant = message.grant
    signed = (
        [(each.pcr_values, each.clock_before_ms, each.reset_count_max, each.approved, each.signature) for each in grant.leases]
        if grant
        else []
    )
    rest = (grant.generation, grant.region_public, grant.delegation, grant.delegation_signature) if grant else ()
    return msgspec.structs.replace(message, grant=None), signed, rest


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.data())
def test_a_fuzzed_exchange_opens_nothing_and_always_says_why(data: st.DataObject) -> None:
    """After each round: no foreign exception, a reason if it failed, no unseal by a message that means something else, only true keys."""
    asyncio.run(fuzz(data, PaperSite()))


async def fuzz(data: st.DataObject, site: PaperSite) -> None:
    liar = Liar(data, site)
    site.wire.bend = liar.bend
    said: list[str] = []
    original = site.trusting._say

    def hear(about: str, event: str, error: TheirsError | WorldError) -> bool:
        assert error.reason or error.what
        said.append(event)
        return original(about, event, error)

    for _ in range(ROUNDS):
        site.trusting._say = hear  # type: ignore[method-assign]  # to hear each reason
        before, reasons = len(site.port.unsealed), len(said)
        liar.lied.clear()
        await site.round()
        opened = site.port.unsealed[before:]
        if {"challenge", "prove", "enrol"} & set(liar.lied):
            assert "session" not in opened, liar.lied
        if "session" not in opened:
            assert len(said) > reasons, "a round failed without a reason"
        check_keys(site)
        assert len(site.port.sessions) <= 1
        if data.draw(st.booleans(), label="device restarts"):
            site.restart_device()
            original = site.trusting._say
            await site.boot()
            check_keys(site)


def check_keys(site: PaperSite) -> None:
    """What the device holds is what some record of the region holds, and a refused device holds nothing."""
    trusting = site.trusting
    record = site.attesting._enrolments["dev-1"].record if "dev-1" in site.attesting._enrolments else None
    if record is not None and trusting._session is not None:
        sealed = trusting._kept.enrolment()
        assert sealed is None or sealed.enrolled.epoch != record.epoch or trusting._session == record.kek
    if trusting.refusal is not None and trusting._attester.standing.name == "REFUSED":
        assert not trusting.attested


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_a_fuzzed_device_is_refused_by_name(data: st.DataObject) -> None:
    """Evidence, proofs and asks bent on their way up: the region approves nothing but what a TPM said, and every refusal is one of ours."""

    async def run() -> None:
        site = PaperSite()
        await site.round()
        liar = Liar(data, site)

        async def bend(word: str, payload: bytes, ask: Ask) -> bytes:
            sent = liar.mutated(payload)
            answer = await ask(sent)
            if word == "attest":
                assert meaning_up(sent) == meaning_up(payload), "evidence was approved that no TPM gave"
            return answer

        site.wire.bend = bend
        await site.round()

    asyncio.run(run())


def meaning_up(payload: bytes) -> object:
    """What a TPM stated; a proof that lost its counter gets no lease, and opens by session all the same."""
    shown = decode(payload, Evidence)
    return shown.nonce, shown.quote_attest, parse_signature(shown.quote_signature, "quote"), shown.pcr_values, shown.session_nonce
