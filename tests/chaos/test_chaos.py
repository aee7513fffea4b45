"""A short smoke of `make chaos`: one of two devices is cut off under load, and every promise is counted. And the wire does what a line says."""

import asyncio
import random
import shutil
import tempfile
from pathlib import Path

import pytest

from appliance.lab.network import CUT, QUEUE_S, Line, Way, why_not
from tests.chaos.experiments import EXPERIMENTS
from tests.chaos.judging import Outcome, judge
from tests.chaos.load import Sample
from tests.chaos.run import Scale, broken, run


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.skipif(bool(why_not()), reason=why_not())
async def test_one_of_two_devices_is_cut_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Callers notice nothing, the queue empties afterwards, nothing is lost and nothing is done twice."""
    monkeypatch.setattr("tests.chaos.report.FOLDER", tmp_path / "chaos")
    monkeypatch.setattr("tests.chaos.report.TABLE", tmp_path / "chaos.json")
    folder = Path(tempfile.mkdtemp(prefix="ap-", dir="/tmp"))
    try:
        scale = Scale(devices=2, baseline_s=10.0, pace=0.3)
        outcomes, whole = await run([EXPERIMENTS[0]], scale, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    [outcome] = outcomes
    assert outcome.partitioned_s > 0, "the cut was not noticed"
    assert outcome.depth_max > 10, "nothing waited: the device was not cut off"
    assert whole["events_promised"] > 50
    assert whole["requests_promised"] > 5
    timing = [each for each in broken(outcomes, whole) if "p99" in each]  # beside other tests, latency is judged by `make chaos` alone
    assert broken(outcomes, whole) == timing
    assert (tmp_path / "chaos" / "partition.png").stat().st_size > 10_000


async def test_a_way_delays_limits_and_drops() -> None:
    """A cut passes nothing; a slow way keeps the order, comes late, and drops what its queue cannot hold."""
    loop, arrived = asyncio.get_running_loop(), list[tuple[float, bytes]]()
    way = Way(lambda packet: arrived.append((loop.time(), packet)), random.Random(1))
    way.line = CUT
    way.carry(b"lost", loop)
    assert (arrived, way.lost) == ([], 1)

    way.line = Line(delay_s=0.02, jitter_s=0.02, bytes_per_s=10_000.0)
    began, sent = loop.time(), 120
    for number in range(sent):
        way.carry(number.to_bytes(1, "big") * 100, loop)
    await asyncio.sleep(QUEUE_S + 0.3)
    taken = int(QUEUE_S * 10_000 / 100)
    numbers = [packet[0] for _, packet in arrived]
    assert numbers == sorted(numbers)
    assert abs(len(arrived) - taken) <= 2, "a queue of half a second at 10 kB/s holds 50 packets of 100 bytes"
    assert min(at for at, _ in arrived) - began >= 0.02
    assert way.lost == 1 + sent - len(arrived)


async def test_half_of_what_a_lossy_way_takes_is_lost() -> None:
    """Loss is by chance and by seed: twice the same."""
    counts = []
    for _ in range(2):
        way = Way(lambda _packet: None, random.Random(5))
        way.line = Line(loss=0.5)
        for _ in range(1_000):
            way.carry(b"x", asyncio.get_running_loop())
        counts.append(way.lost)
    assert counts[0] == counts[1]
    assert 430 < counts[0] < 570


def sample(ms: float, reason: str = "") -> Sample:
    return Sample(0.0, "dev-001", ms, reason, is_own=True)


@pytest.mark.parametrize(
    ("samples", "settled_s", "lost", "words"),
    [
        ([sample(15)] * 100, 1.0, 0, []),
        ([sample(15)] * 94 + [sample(0, "busy")] * 6, 1.0, 0, ["success"]),
        ([sample(15)] * 97 + [sample(20)] * 3, 1.0, 0, ["p99"]),
        ([sample(15)] * 100, None, 0, ["settled"]),
        ([sample(15)] * 100, 1.0, 2, ["arrived"]),
        ([], 1.0, 0, ["success"]),
    ],
)
def test_each_promise_is_judged(samples: list[Sample], settled_s: float | None, lost: int, words: list[str]) -> None:
    """Just within is kept, just beyond is broken, and the verdict says which promise."""
    outcome = Outcome("x", "x", 0.0, settled_s=settled_s, lost=lost)
    judge(outcome, samples, [sample(10)] * 100)
    assert len(outcome.broken) == len(words), outcome.broken
    assert all(word in text for word, text in zip(words, outcome.broken, strict=True))
