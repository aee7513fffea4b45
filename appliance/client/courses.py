"""The course of each call, written once for the sync and the async client: what to do next, given what came of it.

A course is a generator. It yields a step, is sent what the step gave or thrown the ApplianceError that it raised, and returns the call's result.
The shells (`sync`, `aio`) only carry steps out; when to try again, and where, is `retrying`'s.
"""

import random
import secrets
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from typing import Any, TypeVar

from appliance.client import asking, results
from appliance.client.asking import Inputs, Options
from appliance.client.exchange import Address, Asked, LostError, Reply, address
from appliance.client.frames import Frame
from appliance.client.results import Deferred, Result
from appliance.client.retrying import Attempts, Policy, Preference
from appliance.contract.errors import TheirsError, WorldError
from appliance.contract.inference import Array, Tags

TIMEOUT_S = 30.0

T = TypeVar("T")
Fallback = Callable[[str, Mapping[str, Array]], Mapping[str, Array]]
"""Answers in the appliance's place: model and inputs to outputs."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """Send a request and bring the reply, before `deadline` (monotonic seconds). May raise: TheirsError (`malformed`), WorldError, LostError."""

    address: Address
    asked: Asked
    deadline: float


@dataclass(frozen=True, slots=True)
class Lend:
    """Register a frame with a server and bring its name, None where it has to travel. `anew`: what it knew is not to be trusted."""

    address: Address
    frame: Frame
    anew: bool


@dataclass(frozen=True, slots=True)
class Pause:
    """Wait."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Compute:
    """Run the caller's own fallback, and bring what it returns."""

    work: Callable[[], Mapping[str, Array]]


Step = Exchange | Lend | Pause | Compute
Course = Generator[Step, Any, T]
Render = Callable[[Address, bool], Course[Asked]]
"""Renders a request for a server, and says whether its frames must be registered anew."""


class Courses:
    """The courses of one client's calls. Raises: TheirsError (`server`) if an address is none."""

    def __init__(
        self,
        server: str | Sequence[str],
        *,
        timeout_s: float,
        policy: Policy,
        fallback: Fallback | None,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self.servers = tuple(address(each) for each in ([server] if isinstance(server, str) else server))
        if not self.servers:
            raise TheirsError("server", "no server is given", remedy="write http://host:port or unix:/path")
        self._timeout_s = timeout_s
        self._policy = policy
        self._fallback = fallback
        self._clock = clock
        self._chance = chance
        self._preference = Preference()

    def ready(self) -> Course[bool]:
        """Ask each server once, until one takes requests."""
        failure: WorldError | None = None
        answers = 0
        for server in self.servers:
            try:
                reply: Reply = yield Exchange(server, asking.ready(), self._clock() + self._timeout_s)
            except WorldError as error:
                failure = error
                continue
            answers += 1
            if reply.status == results.OK:
                return True
        if failure is not None and not answers:
            raise failure
        return False

    def metadata(self, model: str) -> Course[dict[str, Any]]:
        """Ask for a model's metadata."""

        def render(_server: Address, _anew: bool) -> "Course[Asked]":  # quoted: a nested one is made anew at each call
            yield from ()
            return asking.metadata(model)

        return (yield from self._tried(render, results.metadata, self._timeout_s))

    def infer(self, model: str, inputs: Inputs, options: Options) -> Course[Result]:
        """Ask for an answer; where nobody gives one, take the caller's own fallback."""
        if options.get("tags", Tags()).accept_deferral:
            raise TheirsError("tags", "a promise is no answer", remedy="ask with `submit`, or do not accept deferral")
        into = {name: frame.array for name, frame in options.get("into", {}).items()}
        try:
            return (yield from self._inferred(model, inputs, options, lambda reply, where: results.answer(reply, into, where)))
        except WorldError as error:
            if self._fallback is None:
                raise
            arrays = {name: value.array if isinstance(value, Frame) else value for name, value in inputs.items()}
            return results.local((yield Compute(partial(self._fallback, model, arrays))), error)

    def submit(self, model: str, inputs: Inputs, options: Options) -> Course[Result | Deferred]:
        """Ask for an answer now, or for a promise of one; the request's id makes sure that it is promised once."""
        said: Options = {
            **options,
            "tags": replace(options.get("tags", Tags()), accept_deferral=True),
            "id": options.get("id") or secrets.token_hex(16),
        }
        into = {name: frame.array for name, frame in options.get("into", {}).items()}

        def read(reply: Reply, where: str) -> "Result | Deferred":
            return results.promise(reply, where) if reply.status == results.ACCEPTED else results.answer(reply, into, where)

        return (yield from self._inferred(model, inputs, said, read, once=True))

    def fetch(self, promise: Deferred | str, wait_s: float) -> Course[Result]:
        """Ask what became of a promise, again and again for `wait_s`; a server that is away meanwhile is waited for."""
        server = self.servers[0] if isinstance(promise, str) else address(promise.server)
        name = promise if isinstance(promise, str) else promise.id
        deadline, pauses = self._clock() + wait_s, 0
        while True:
            try:
                reply: Reply = yield Exchange(server, asking.deferred(name), self._clock() + self._timeout_s)
                found = results.promised(reply, name, server.text)
                if isinstance(found, Result):
                    return found
                error = WorldError("pending", f"{name} is not answered yet", where=server.text, retry_after_s=found.retry_after_s)
            except WorldError as fault:
                if fault.reason not in {"busy", "unreachable"}:
                    raise
                error = fault
            pause_s = (error.retry_after_s or 0.0) + self._policy.pause_s(pauses, self._chance())
            if self._clock() + pause_s >= deadline:
                raise error
            pauses += 1
            yield Pause(pause_s)

    def _inferred(self, model: str, inputs: Inputs, options: Options, read: Callable[[Reply, str], T], *, once: bool = False) -> Course[T]:
        timeout_s = options.get("timeout_s", self._timeout_s)
        patience_s = options.get("tags", Tags()).timeout_s
        frames = asking.frames_of(inputs, options)
        started = self._clock()

        def render(server: Address, anew: bool) -> "Course[Asked]":  # quoted: see above
            regions = {}
            for name, frame in frames.items():
                region: str | None = (yield Lend(server, frame, anew)) if server.frames else None
                anew = False  # one renewal forgets all
                if region is not None:
                    regions[name] = region
            left_s = None if patience_s is None else started + patience_s - self._clock()
            return asking.infer(model, inputs, options, regions, left_s)

        return (yield from self._tried(render, read, min(timeout_s, inf if patience_s is None else patience_s), once=once))

    def _tried(self, render: Render, read: Callable[[Reply, str], T], within_s: float, *, once: bool = False) -> Course[T]:
        """Ask until somebody answers, as the policy allows. `once`: what was perhaps promised may be asked of nobody else."""
        now = self._clock()
        attempts = Attempts(self._policy, len(self.servers), now + within_s, first=self._preference.first(now))
        anew, renewed = False, False
        while True:
            server = self.servers[attempts.server]
            try:
                asked = yield from render(server, anew)
                reply: Reply = yield Exchange(server, asked, attempts.until(self._clock()))
                if results.reason(reply) == "unknown_region" and not renewed:  # the daemon began anew, and so does this connection
                    anew = renewed = True
                    continue
                answer = read(reply, server.text)
            except WorldError as error:
                bound = once and isinstance(error, LostError)
                pause_s = attempts.failed(error, self._clock(), self._chance(), is_bound=bound)
                if pause_s is None:
                    raise
            else:
                self._preference.answered(attempts.server, self._clock())
                return answer
            anew = False
            if pause_s > 0:
                yield Pause(pause_s)
