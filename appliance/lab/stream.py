"""The main job: a stream of shelf labels is sent to one device, and every reading is held against the truth and against onnxruntime in-process."""

import asyncio
import random
import threading
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from appliance.client.images import tensor_of
from appliance.client.labels import LabelReader
from appliance.client.retrying import ONCE
from appliance.client.sync import Appliance
from appliance.contract.errors import ApplianceError
from appliance.contract.vocabulary import Mode
from appliance.lab.labels import draw
from appliance.lab.reference import Reference

WINDOW_S = 10.0
ATTEMPTS = 40
ATTEMPT_PAUSE_S = 0.1
EXAMPLES = 5


@dataclass(slots=True)
class Score:
    """What became of the labels so far. Latencies in milliseconds, of requests that were answered; `exact` and `differing` of mode A."""

    labels: int = 0
    exact: int = 0
    lesser_exact: int = 0
    modes: Counter[str] = field(default_factory=Counter)
    differing: int = 0
    failed: int = 0
    retried: int = 0
    latencies_ms: list[float] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    examples: list[tuple[str, str]] = field(default_factory=list)
    recent: deque[tuple[float, float, bool]] = field(default_factory=deque)

    @property
    def full(self) -> int:
        """How many labels mode A read."""
        return self.modes[Mode.FULL]

    def window(self) -> tuple[float, float | None, float | None, float | None]:
        """Labels per second, p50 ms, p99 ms and success rate of the last `WINDOW_S` seconds."""
        now = time.monotonic()
        while self.recent and now - self.recent[0][0] > WINDOW_S:
            self.recent.popleft()
        answered = sorted(ms for _, ms, ok in self.recent if ok)
        if not self.recent:
            return 0.0, None, None, None
        rate = len(answered) / WINDOW_S
        success = len(answered) / len(self.recent)
        return rate, percentile(answered, 0.5), percentile(answered, 0.99), success


def percentile(ordered: list[float], share: float) -> float | None:
    """The value below which `share` of the sorted values lie; None of nothing."""
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else None


class Stream:
    """Draws labels at `rate_per_s` and reads them through the device's Unix socket with `callers` at once."""

    def __init__(self, socket: str, model: str, reference: Reference | None, *, rate_per_s: float, callers: int, seed: int) -> None:
        self.score = Score()
        self._socket = socket
        self._model = model
        self._reference = reference
        self._rate_per_s = rate_per_s
        self._callers = callers
        self._own = threading.local()
        self._clients: list[Appliance] = []
        self._rng = random.Random(seed)  # noqa: S311 - labels must be the same at each run, secrecy is no concern

    async def run(self) -> None:
        """Send labels at the rate until cancelled; a slow device is not asked faster than it answers."""
        loop = asyncio.get_running_loop()
        places = asyncio.Semaphore(self._callers)
        try:
            with ThreadPoolExecutor(self._callers, thread_name_prefix="caller") as pool:
                async with asyncio.TaskGroup() as group:
                    due = loop.time()
                    while True:
                        await places.acquire()
                        seed = self._rng.random()
                        work = loop.run_in_executor(pool, self._read, seed)
                        group.create_task(self._settle(work, places))
                        due = max(due + 1 / self._rate_per_s, loop.time())
                        await asyncio.sleep(due - loop.time())
        finally:
            for client in self._clients:
                client.close()

    async def _settle(self, work: "asyncio.Future[None]", places: asyncio.Semaphore) -> None:
        try:
            await work
        finally:
            places.release()

    def _reader(self) -> LabelReader:
        """This thread's reader; its connection stays open."""
        reader: LabelReader | None = getattr(self._own, "reader", None)
        if reader is None:
            client = Appliance(self._socket, policy=ONCE)
            self._clients.append(client)
            reader = self._own.reader = LabelReader(client, self._model)
        return reader

    def _read(self, seed: float) -> None:
        """Draw, ask (again where the device says so), compare; in a caller's thread."""
        label = draw(random.Random(seed))  # noqa: S311 - see above
        started = time.monotonic()
        score = self.score
        for attempt in range(ATTEMPTS):
            try:
                reader = self._reader()  # fetches the dictionary at a thread's first label, which is no inference
                started = time.monotonic()
                reading = reader.read(label.image)
                break
            except ApplianceError as error:
                score.reasons[error.reason] += 1
                if error.reason not in {"busy", "unreachable"} or attempt == ATTEMPTS - 1:
                    score.failed += 1
                    score.recent.append((time.monotonic(), 0.0, False))
                    return
                score.retried += 1
                time.sleep(error.retry_after_s or ATTEMPT_PAUSE_S)
        spent_ms = (time.monotonic() - started) * 1e3
        text, expected = reading.text.strip(), label.text.strip()
        score.labels += 1
        score.latencies_ms.append(spent_ms)
        score.recent.append((time.monotonic(), spent_ms, True))
        score.modes[reading.mode] += 1
        if reading.mode != Mode.FULL:  # a lesser mode reads what it can: it is counted, and held against nothing
            score.lesser_exact += text == expected
            return
        if text == expected:
            score.exact += 1
        elif len(score.examples) < EXAMPLES:
            score.examples.append((expected, text))
        if self._reference is not None and reading.text != self._reference.read(tensor_of(label.image)):
            score.differing += 1
