"""Load for hours: one line for each minute is appended to a file as it goes, and drift of memory and latency is flagged.

1. The load is an open loop at a fixed rate, the same all the time; each minute has a seed of its own.
2. The first `SETTLE` samples are warm-up. The next `BASE` are what later ones are held against; no drift is told before as many again.
3. Drift compares medians of `BASE` samples, so that one bad minute is none: memory by 10 % and 16 MiB, p99 by half and 5 ms, success by 1 %.
4. Beside it stands the slope of memory (Theil-Sen over at most `SLOPE_SAMPLES` samples, spread evenly): a leak shows there long before rule 3.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from appliance.contract.errors import WorldError
from appliance.workshop.bench import Watch
from appliance.workshop.bench_tree import Tree
from appliance.workshop.load import Opens, open_loop
from appliance.workshop.summary import Summary

SETTLE, BASE = 1, 10
SLOPE_SAMPLES = 200
MEMORY_RATIO, MEMORY_MIB = 1.10, 16.0
LATENCY_RATIO, LATENCY_MS = 1.5, 5.0
SUCCESS_SHARE = 0.01


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One minute: `at_s` from the start of the run to its end."""

    at_s: float
    wall: float
    summary: Summary
    pss_mib: float | None = None
    cpu_us_per_answer: float | None = None
    drift: list[str] = []


def drift(samples: Sequence[Sample]) -> list[str]:
    """What has drifted by now, in words; empty: nothing has."""
    steady = samples[SETTLE:]
    if len(steady) < 2 * BASE:
        return []
    base, now = steady[:BASE], steady[-BASE:]
    found = []
    before, after = _median([each.pss_mib for each in base]), _median([each.pss_mib for each in now])
    if before is not None and after is not None and after > before * MEMORY_RATIO and after > before + MEMORY_MIB:
        found.append(f"memory grew from {before:.0f} to {after:.0f} MiB")
    before, after = _median([each.summary.p99_ms for each in base]), _median([each.summary.p99_ms for each in now])
    if before is not None and after is not None and after > before * LATENCY_RATIO and after > before + LATENCY_MS:
        found.append(f"p99 rose from {before:.1f} to {after:.1f} ms")
    before, after = _median([each.summary.success for each in base]), _median([each.summary.success for each in now])
    if before is not None and (after is None or after < before - SUCCESS_SHARE):
        found.append(f"answered share fell from {before:.3f} to {after or 0.0:.3f}")
    return found


def memory_mib_per_h(samples: Sequence[Sample]) -> float | None:
    """The slope of memory after the warm-up: the median of the slopes between any two samples (Theil-Sen)."""
    known = [(each.at_s / 3600, each.pss_mib) for each in samples[SETTLE:] if each.pss_mib is not None]
    few = known[:: max(1, -(-len(known) // SLOPE_SAMPLES))]
    slopes = [(late - early) / (then - at) for (at, early), (then, late) in itertools.combinations(few, 2) if then > at]
    return round(statistics.median(slopes), 2) if slopes else None


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


async def soak(
    opens: Opens,
    tree: Tree | None,
    file: Path,
    *,
    rate_per_s: float,
    duration_s: float,
    slo_s: float,
    say: Callable[[str], None],
    sample_s: float = 60.0,
    seed: int = 7,
) -> list[Sample]:
    """Load until the time is over; each sample is in the file before the next begins. Raises: WorldError (`disk`)."""
    samples: list[Sample] = []
    began = time.perf_counter()
    told: set[str] = set()
    for number in range(max(1, round(duration_s / sample_s))):
        watch = Watch(tree)
        async with watch.on():
            summary = await open_loop(opens, rate_per_s, duration_s=sample_s, slo_s=slo_s, seed=seed + number)
        sample = Sample(
            at_s=round(time.perf_counter() - began, 1),
            wall=round(time.time(), 1),
            summary=summary,
            pss_mib=watch.most,
            cpu_us_per_answer=watch.us_per(summary.answered),
        )
        found = drift([*samples, sample])
        samples.append(msgspec.structs.replace(sample, drift=found))
        _append(file, samples[-1])
        kinds = {text.split()[0] for text in found}
        if kinds != told:
            say("drift: " + "; ".join(found) if found else "no drift any more")
            told = kinds
    return samples


def _append(file: Path, sample: Sample) -> None:
    try:
        with file.open("ab") as stream:
            stream.write(msgspec.json.encode(sample) + b"\n")
    except OSError as error:
        raise WorldError("disk", f"cannot be written: {error.strerror}", where=str(file), remedy="choose another --out") from error
