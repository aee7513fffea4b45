"""What a load's figures say: sums that close, percentiles, drift over hours, and what a process tree costs."""

import math
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.workshop.bench import Findings, Row, dollars_per_million
from appliance.workshop.bench_soak import BASE, SETTLE, Sample, drift, memory_mib_per_h
from appliance.workshop.bench_tree import Tree
from appliance.workshop.load_http import Reply
from appliance.workshop.report import device_page, device_picture, soak_picture
from appliance.workshop.summary import Summary, Tally, percentile

REPLIES = [
    Reply(200, mode="A"),
    Reply(200),
    Reply(429, 0.1, reason="429"),
    Reply(504, reason="504"),
    Reply(500, reason="500"),
    Reply(0, reason="lost"),
]
HEARD = st.tuples(st.floats(0, 10), st.floats(0, 5), st.sampled_from(REPLIES))


@given(st.lists(HEARD), st.integers(0, 20))
def test_the_account_closes(heard: list[tuple[float, float, Reply]], forgotten: int) -> None:
    """Every offered request is in exactly one column, and goodput never exceeds what was answered in the window."""
    tally = Tally(1.0, until=8.0, offered=len(heard) + forgotten)
    for due, took, reply in heard:
        tally.heard(due, due + took, reply)
    it = tally.summary(10.0)
    assert it.offered == it.answered + it.refused + it.failed + it.unfinished
    assert it.unfinished == forgotten
    assert it.goodput_per_s <= it.answered_per_s
    assert it.answered_per_s * 10 <= it.answered + 0.06
    inside = sum(due + took <= 8.0 for due, took, reply in heard if reply.status == 200)
    assert it.answered_per_s == pytest.approx(inside / 10, abs=0.006)
    assert sum(it.reasons.values()) == it.refused + it.failed


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0.001, 1))
def test_a_percentile_is_a_value_with_that_share_at_or_below(values: list[float], share: float) -> None:
    """Nearest rank: at least the share lies at or below it, and it is one of the values."""
    found = percentile(sorted(values), share)
    assert found in values
    assert found is not None
    assert sum(value <= found for value in values) >= math.floor(len(values) * share)


def test_percentiles_of_nothing_are_nothing() -> None:
    """No answers: no latency, no share, and no division by zero."""
    it = Tally(0.1).summary(1.0)
    assert (it.p50_ms, it.p99_ms, it.success, it.hinted, it.answered_per_s) == (None, None, None, None, 0)
    assert percentile([], 0.5) is None


def sample(number: int, *, pss: float | None = 200.0, p99: float = 20.0, answered: int = 100) -> Sample:
    tally = Tally(0.15, offered=100)
    for _ in range(answered):
        tally.heard(0.0, p99 / 1e3, Reply(200))
    return Sample(at_s=60.0 * (number + 1), wall=0.0, summary=tally.summary(60.0), pss_mib=pss)


LONG = range(SETTLE + 3 * BASE)


def test_a_steady_run_has_no_drift() -> None:
    """Nothing is flagged of a device that stays as it is, whatever its first minute was like, nor of one bad minute."""
    samples = [sample(number, pss=900.0 if number < SETTLE else 200.0, p99=500.0 if number in {0, 25} else 20.0) for number in LONG]
    assert [drift(samples[:end]) for end in range(len(samples) + 1)] == [[]] * (len(samples) + 1)
    assert memory_mib_per_h(samples) == 0


def test_a_leak_and_a_slowdown_and_lost_answers_are_flagged() -> None:
    """Each of the three is named with what it was and what it is."""
    leak = [sample(number, pss=200.0 + 2 * number) for number in LONG]
    slow = [sample(number, p99=20.0 + number) for number in LONG]
    lossy = [sample(number, answered=100 if number < 15 else 90) for number in LONG]
    assert [text.split()[0] for samples in (leak, slow, lossy) for text in drift(samples)] == ["memory", "p99", "answered"]
    assert memory_mib_per_h(leak) == pytest.approx(120)


def test_memory_that_cannot_be_read_is_no_drift() -> None:
    """Without figures nothing is claimed."""
    samples = [sample(number, pss=None) for number in LONG]
    assert drift(samples) == []
    assert memory_mib_per_h(samples) is None


def test_a_tree_counts_its_children() -> None:
    """CPU and memory of a child's child are in the figures, and a tree that ended costs nothing."""
    spin = "import time\nblock = bytearray(40 << 20)\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass\nprint('done', flush=True)\ntime.sleep(60)"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {spin!r}])"
    with subprocess.Popen([sys.executable, "-c", outer], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        tree = Tree(process.pid)
        usage, pids = tree.usage(), tree.pids()
        assert usage.processes == len(pids) == 2
        assert usage.cpu_s >= 0.25
        assert usage.pss_mib is not None
        assert usage.rss_mib is not None
        assert 40 < usage.pss_mib <= usage.rss_mib
        subprocess.run(["kill", "-KILL", *map(str, reversed(pids))], check=True)
    while Path(f"/proc/{pids[-1]}").exists():
        time.sleep(0.01)
    assert Tree(process.pid).usage().processes == 0


def test_memory_that_may_not_be_read_is_unknown(tmp_path: Path) -> None:
    """A process whose memory is closed to us makes the sum unknown, never smaller."""
    for pid, parent in ((7, 1), (8, 7)):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "stat").write_text(f"{pid} (a (b) c) S {parent} " + " ".join(["0"] * 9) + " 100 50 0 0 0\n")
    (tmp_path / "7" / "smaps_rollup").write_text("0-1 ---p\nRss: 2048 kB\nPss: 1024 kB\n")
    (tmp_path / "8" / "smaps_rollup").mkdir()  # reading it fails, as it does without permission
    usage = Tree(7, tmp_path).usage()
    assert (usage.processes, usage.cpu_s, usage.pss_mib) == (2, 3.0, None)


def summary() -> Summary:
    tally = Tally(0.15, offered=10)
    for _ in range(10):
        tally.heard(0.0, 0.01, Reply(200))
    return tally.summary(1.0)


def test_a_page_and_pictures_are_made(tmp_path: Path) -> None:
    """The page names loads and prices; the pictures are files."""
    findings = Findings(capacity_per_s=10.0, rows=[Row(callers=1, summary=summary()), Row(load=0.8, rate_per_s=8.0, summary=summary())])
    page = device_page("Benchmark of m", {"machine": "here"}, findings, 0.36)
    assert "| 1 callers |" in page
    assert "80 % load, within SLO | 10.0 | 10.000 |" in page
    assert "were not read" in page
    assert device_picture(tmp_path / "a.png", findings)
    assert soak_picture(tmp_path / "b.png", [sample(number) for number in range(3)])
    assert {path.read_bytes()[:4] for path in tmp_path.iterdir()} == {b"\x89PNG"}


def test_a_price_is_per_million_answers() -> None:
    """At 3.6 dollars an hour and a thousand answers a second a million costs a dollar; at no rate there is no price."""
    assert dollars_per_million(3.6, 1_000) == 1
    assert dollars_per_million(3.6, 0) is None


def test_samples_survive_their_file() -> None:
    """A line of the 24-hour file is the sample again."""
    assert msgspec.json.decode(msgspec.json.encode(sample(1)), type=Sample) == sample(1)
