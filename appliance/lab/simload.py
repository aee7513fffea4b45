"""The load of the simulation, and what its callers were told: items that are to reach the region, and requests for answers now or later."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from appliance.contract.codec import encode
from appliance.contract.deferral import Kind, Parcel
from appliance.contract.errors import ApplianceError
from appliance.contract.inference import Answer, Promise, Request, Tags
from appliance.contract.vitals import Event
from appliance.lab.simfaults import Plant
from appliance.lab.simplant import MODEL, Book, Device

KINDS = (Kind.EVENT, Kind.EVENT, Kind.RESULT, Kind.TELEMETRY)
KEYS = ("", "events", "line")
PROMISE_S = 5.0
"""How long a commit may take here, with what waits before it; a promise is given after it, and so after the caller's deadline at worst by so much."""
BATCH_S = 1.3
"""The longest batch here (two samples, twelve times slower): a batch that runs is not interrupted, so its callers wait for its end."""


@dataclass(slots=True)
class Load:
    """Who asked for what.

    Attributes:
        accepted: by device, the `seq` of each key whose `put` returned (0: it was told to be a duplicate).
        ordered: by device, the ordering key of each item.
        effects: (number, device, key) of each effect at the region, in order.
        promises: by device, the value whose answer each promised id stands for.
        open: callers who wait.
    """

    plant: Plant
    book: Book
    chance: random.Random
    accepted: dict[str, dict[str, int]] = field(default_factory=dict)
    ordered: dict[str, dict[str, str]] = field(default_factory=dict)
    effects: list[tuple[int, str, str]] = field(default_factory=list)
    promises: dict[str, dict[str, float]] = field(default_factory=dict)
    open: dict[str, float] = field(default_factory=dict)
    answers: int = 0
    refusals: int = 0
    _given: dict[int, tuple[str, int]] = field(default_factory=dict)

    def begin(self, span_s: float) -> None:
        """Set a timer for all that will be asked within this time."""
        chance, loop = self.chance, self.plant.net.loop
        for device in self.plant.devices:
            self.accepted[device.name], self.ordered[device.name], self.promises[device.name] = {}, {}, {}
            for number in range(chance.randint(8, 24)):
                kind, key, at = chance.choice(KINDS), chance.choice(KEYS), chance.uniform(1.0, span_s)
                parcel = _parcel(device.name, number, kind, key, chance.randint(10, 300))
                loop.call_at(at, self._put, device, parcel)
                if chance.random() < 0.2:  # noqa: PLR2004 - one caller of five asks twice
                    loop.call_at(at + chance.uniform(0.0, 10.0), self._put, device, parcel)
            for number in range(chance.randint(4, 10)):
                at, tags = chance.uniform(1.0, span_s), _tags(chance)
                for copy in range(chance.choice([1, 1, 1, 6])):
                    request = _request(f"{device.name}-ask-{number}-{copy}", number + copy / 10, chance.choice(["", "", "v2"]), tags)
                    loop.call_at(at, self._ask, device, request)
            loop.call_at(chance.uniform(5.0, span_s), self._release, device)

    def effect(self, number: int, device: str, idem: str, *, crashes: int) -> None:
        """The region gave an item its effect; `crashes` of the region so far. The same number again is the same effect, after a crash alone."""
        known = self._given.get(number)
        if known is None:
            self.effects.append((number, device, idem))
        elif known != (idem, crashes) and known[0] != idem:
            self.book.breach("region", f"number {number} is {known[0]} and {idem}")
        elif known[1] == crashes:
            self.book.breach("region", f"{idem} took effect again as number {number} without a crash")
        self._given[number] = (idem, crashes)

    def _put(self, device: Device, parcel: Parcel) -> None:
        if device.alive:
            device.spawn(self._keep(device, parcel), parcel.idem)

    def _ask(self, device: Device, request: Request) -> None:
        if device.alive:
            device.spawn(self._call(device, request), request.id)

    def _release(self, device: Device) -> None:
        device.released = True
        if device.alive:
            device.spawn(device.mount("v2"), "mount")

    async def _keep(self, device: Device, parcel: Parcel) -> None:
        self.ordered[device.name][parcel.idem] = parcel.key
        try:
            stored = await device.delivering.put(parcel)
        except ApplianceError as error:
            self.book.note(device.name, "put refused", parcel.idem, error.reason)
            return
        self.book.note(device.name, "put accepted", parcel.idem, stored.seq)
        self.accepted[device.name].setdefault(parcel.idem, stored.seq)

    async def _call(self, device: Device, request: Request) -> None:
        loop, tags = self.plant.net.loop, request.tags
        started = self.open[request.id] = loop.time()
        try:
            got = await device.serving.infer(request)
        except ApplianceError as error:
            self.refusals += 1
            self.book.note(device.name, "refused", request.id, error.reason)
        else:
            self._take(device, request, got)
        finally:
            del self.open[request.id]
        late_s = loop.time() - started - (tags.timeout_s or 0.0) - BATCH_S - (PROMISE_S if tags.accept_deferral else 0.0)
        if late_s > 1e-6:  # noqa: PLR2004 - a rounding
            self.book.breach(device.name, f"{request.id} waited {late_s:.3f} s beyond its deadline of {tags.timeout_s:.3f} s")

    def _take(self, device: Device, request: Request, got: Answer | Promise) -> None:
        wanted = float(request.inputs["x"][0, 0])
        if isinstance(got, Promise):
            self.promises[device.name][got.id] = wanted
            self.book.note(device.name, "promised", got.id, got.why)
            return
        self.answers += 1
        self.book.note(device.name, "answered", request.id, got.route)
        if answered(got) != wanted:
            self.book.breach(device.name, f"{request.id} was answered {answered(got)}, expected {wanted}")


def answered(answer: Answer) -> float:
    """The first number of an answer; the model gives back what it is given."""
    return float(answer.outputs["y"][0, 0])


def _parcel(device: str, number: int, kind: Kind, key: str, size: int) -> Parcel:
    idem = f"{device}-{kind}-{number}"
    payload = bytes(size)
    if kind is Kind.EVENT:
        payload = encode(Event(device=device, seq=number, at=0.0, what="tested", fields={"idem": idem}))
    return Parcel(kind=kind, idem=idem, payload=payload, key=key)


def _request(name: str, value: float, version: str, tags: Tags) -> Request:
    return Request(name, MODEL, {"x": np.full((1, 2), value, np.float32)}, version, tags=tags, caller=name)


def _tags(chance: random.Random) -> Tags:
    residencies: Sequence[str] = ("", "", "device")
    return Tags(
        timeout_s=chance.uniform(0.2, 2.5),
        accept_deferral=chance.random() < 0.6,  # noqa: PLR2004 - most, because promises are what is looked at
        data_residency=chance.choice(residencies),
    )
