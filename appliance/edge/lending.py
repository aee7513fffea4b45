"""Lending: answers another device's request that the region placed here (`regional.placing`), through the desk at which everybody asks.

The request carries the tag that keeps it on this device, so that it is answered here or refused: never sent on, never promised. It waits behind this
device's own callers.
"""

from collections.abc import Awaitable, Callable

from appliance.contract import topics
from appliance.contract.errors import TheirsError
from appliance.contract.inference import Answer, Request, Tags
from appliance.contract.remote import AnswerHead, pack, unpack_ask
from appliance.ports import Clock, Inbound, Link

PRIORITY = 7
"""Below the 5 of a caller who says nothing."""


class Lending:
    """The neighbours' window of one desk, `answer`. `dollars_per_hour` is what this device costs."""

    def __init__(
        self, link: Link, clock: Clock, answer: Callable[[Request], Awaitable[Answer]], *, region: str, device: str, dollars_per_hour: float
    ) -> None:
        self._clock = clock
        self._answer = answer
        self._dollars_per_hour = dollars_per_hour
        link.serve(topics.lent(region, device), self._infer)

    async def _infer(self, inbound: Inbound) -> bytes:
        """Answer one frame. Raises: TheirsError (`malformed`, `unknown_model`, …), WorldError (`backlog_full`, `deadline`, `degraded`, …)."""
        arrived = self._clock.monotonic()
        ask = unpack_ask(inbound.payload)
        head = ask.head
        if head.stage != "input":
            raise TheirsError("unknown_model", "devices finish no features", where=head.model)
        tags = Tags(PRIORITY, head.within_ms / 1e3, accept_degradation=head.accept_degradation, data_residency="device")
        answer = await self._answer(Request("", head.model, ask.tensors, head.version, head.outputs, tags, caller="neighbours"))
        told = AnswerHead(
            version=answer.version,
            took_ms=(self._clock.monotonic() - arrived) * 1e3,
            dollars_per_hour=self._dollars_per_hour,
            confidence=answer.confidence,
            mode=answer.mode,
            why=answer.why,
            dollars=answer.cost,
        )
        return pack(told, answer.outputs)
