"""What callers of the fleet do all the while: labels at a steady rate, requests that may be answered later, and a note of all that they were promised.

Each caller asks its own device first and a neighbour if that one is silent, and has `PATIENCE_S` for an answer, as a till or a scale would.
Latency counts from the time at which a label was due, so a caller that is late because an answer was late hides nothing.
"""

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from appliance.client.aio import AsyncAppliance
from appliance.client.images import tensor_of
from appliance.client.results import Deferred, Result
from appliance.contract.errors import ApplianceError
from appliance.contract.inference import Tags
from appliance.lab.daemon import MODEL, Lab
from appliance.lab.labels import draw

PATIENCE_S = 0.8
SUBMIT_TIMEOUT_S = 2.0
IMPOSSIBLE_SLO_S = 0.001
"""Nobody answers so soon: the device promises instead."""
LABELS = 64
INPUT = "x"
FETCH_S = 60.0
FETCH_AT_ONCE = 8

Tensor = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Sample:
    """One label as its caller saw it: when it was due (loop seconds), how long it took, and why it was not read (empty: it was)."""

    due: float
    device: str
    ms: float
    reason: str
    is_own: bool


@dataclass(slots=True)
class Promised:
    """What became of the requests that may be answered later; `held`: promised, by id, and `fetched` of these."""

    held: dict[str, Deferred] = field(default_factory=dict)
    fetched: set[str] = field(default_factory=set)
    at_once: int = 0
    refused: Counter[str] = field(default_factory=Counter)


def tensors(seed: int) -> list[Tensor]:
    """Labels as the model takes them, drawn before the run so that drawing costs nothing in it."""
    rng = random.Random(seed)
    return [tensor_of(draw(rng).image) for _ in range(LABELS)]


class Load:
    """The callers of a lab's devices. `run` until cancelled; `samples` and `promised` grow."""

    def __init__(self, lab: Lab, *, rate_per_s: float, submit_every_s: float) -> None:
        self.samples: list[Sample] = []
        self.promised = Promised()
        self._rate_per_s = rate_per_s
        self._submit_every_s = submit_every_s
        self._tensors = tensors(1)
        self._servers = {device.name: f"unix:{device.socket}" for device in lab.devices}
        names = list(self._servers)
        self._clients = {
            name: AsyncAppliance([self._servers[name], self._servers[other]], timeout_s=PATIENCE_S)
            for name, other in zip(names, names[1:] + names[:1], strict=True)
        }
        self._holders = {name: AsyncAppliance(server, timeout_s=SUBMIT_TIMEOUT_S) for name, server in self._servers.items()}

    async def run(self) -> None:
        """Ask; ends only by cancellation."""
        async with asyncio.TaskGroup() as group:
            for number, name in enumerate(self._servers):
                group.create_task(self._labels(name, number / len(self._servers), group))
                group.create_task(self._requests(name, group))

    async def close(self) -> None:
        """Close all connections."""
        for client in (*self._clients.values(), *self._holders.values()):
            await client.close()

    async def _labels(self, name: str, phase: float, group: asyncio.TaskGroup) -> None:
        loop = asyncio.get_running_loop()
        due, content = loop.time() + phase / self._rate_per_s, itertools.cycle(self._tensors)
        while True:
            await asyncio.sleep(due - loop.time())
            group.create_task(self._label(name, due, next(content)))
            due += 1 / self._rate_per_s

    async def _label(self, name: str, due: float, tensor: Tensor) -> None:
        loop, reason, server = asyncio.get_running_loop(), "", ""
        try:
            result = await self._clients[name].infer(MODEL, {INPUT: tensor})
            server = result.server
        except ApplianceError as error:
            reason = error.reason
        self.samples.append(Sample(due, name, (loop.time() - due) * 1e3, reason, server == self._servers[name]))

    async def _requests(self, name: str, group: asyncio.TaskGroup) -> None:
        for number in itertools.count():
            await asyncio.sleep(self._submit_every_s)
            group.create_task(self._request(name, f"{name}-later-{number:05d}", self._tensors[number % LABELS]))

    async def _request(self, name: str, ident: str, tensor: Tensor) -> None:
        tags = Tags(slo_s=IMPOSSIBLE_SLO_S, data_residency="device")
        try:
            got = await self._holders[name].submit(MODEL, {INPUT: tensor}, tags=tags, id=ident)
        except ApplianceError as error:
            self.promised.refused[error.reason] += 1
        else:
            if isinstance(got, Deferred):
                self.promised.held[ident] = got
                await self._fetch(ident, FETCH_S)  # in vain while its device is away: it is asked for again at the end
            else:
                self.promised.at_once += 1

    async def fetched(self, within_s: float) -> dict[str, str]:
        """Ask for every promised answer that was not fetched yet; returns what is missing, and why."""
        places, missing = asyncio.Semaphore(FETCH_AT_ONCE), dict[str, str]()
        end = asyncio.get_running_loop().time() + within_s

        async def fetch(ident: str) -> None:
            async with places:
                why = await self._fetch(ident, max(1.0, end - asyncio.get_running_loop().time()))
                if why:
                    missing[ident] = why

        async with asyncio.TaskGroup() as group:
            for ident in self.promised.held.keys() - self.promised.fetched:
                group.create_task(fetch(ident))
        return missing

    async def _fetch(self, ident: str, wait_s: float) -> str:
        """Fetch one answer; returns why not, or an empty text."""
        try:
            answer: Result = await self._holders[_holder(ident)].fetch(self.promised.held[ident], wait_s=wait_s)
        except ApplianceError as error:
            return str(error)
        if not answer.outputs:
            return "an answer without outputs"
        self.promised.fetched.add(ident)
        return ""


def _holder(ident: str) -> str:
    """The device that promised."""
    return ident.partition("-later-")[0]


def within(samples: list[Sample], begin: float, end: float) -> Iterator[Sample]:
    """Samples that were due in a period."""
    return (sample for sample in samples if begin <= sample.due < end)
