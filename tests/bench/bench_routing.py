"""What a routing decision costs a request, and what the router decides over one day of prices, load, heat and outages.

Run: `python tests/bench/bench_routing.py`; writes build/reports/routing.json and routing.md, and docs/img/routing-day.png. With `--make-prices` it first
writes bsp/prices/spot-day-synthetic.csv anew: that series is SYNTHETIC (seed 5: a daily shape, noise that returns to it, three spikes), not of any provider.
"""

import csv
import json
import platform
import sys
import time
from collections import Counter
from dataclasses import dataclass
from math import cos, pi
from pathlib import Path

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import Patch

from appliance.contract.inference import Tags
from appliance.contract.vocabulary import LinkState, Mode
from appliance.core.reach.pricing import Prices
from appliance.core.reach.routing import Cloud, Decision, Edge, Prospect, Route, Router, Uplink

ROOT = Path(__file__).parents[2]
REPORT = ROOT / "build" / "reports" / "routing.json"
PICTURE = ROOT / "docs" / "img" / "routing-day.png"
SERIES = ROOT / "bsp" / "prices" / "spot-day-synthetic.csv"
ROUNDS, CALLS = 9, 20_000
STEP_MIN = 5
INPUT_BYTES = 92_160  # one label crop, 3 x 48 x 160 in FP32

# The scenario: all of it assumed, plausible for an AGX-class box, and the same in every run.
DEVICE_PER_H = 0.10  # 2000 dollars over three years, and 60 W
EGRESS_PER_GB = 0.02
ON_DEMAND_PER_H = 3.0
ALONE_S, PER_S = 0.040, 10.0
CLOUD = Cloud("1", duration_s=0.005, features_s=0.005, head_s=0.003, feature_bytes=20_000)
OUTAGES = ((190, 220), (620, 650), (1_065, 1_085))  # minutes of the day
SLOW = (1_230, 1_260)
HOT = (790, 880)
CLASSES = {
    "anything goes": Tags(slo_s=0.150),
    "full answers only": Tags(slo_s=0.150, accept_degradation=False),
    "stays on the device": Tags(slo_s=0.150, data_residency="device"),
    "at most $2.5 a million": Tags(slo_s=0.150, max_cost=2.5e-6, accept_deferral=True),
}
COLOURS = {
    Route.EDGE_FULL: "#2a9d8f",
    Route.EDGE_CONSTRAINED: "#e9c46a",
    Route.SPLIT: "#8ab6f9",
    Route.CLOUD_FULL: "#2f6bd0",
    Route.DEFERRED: "#b0b0b0",
    Route.REFUSED: "#d1495b",
}


def make_prices() -> None:
    """Write the synthetic series."""
    rng, noise = np.random.default_rng(5), 0.0
    spikes = ((455, 40, 1.9), (855, 65, 1.2), (1_300, 25, 2.6))
    SERIES.parent.mkdir(parents=True, exist_ok=True)
    with SERIES.open("w") as file:
        file.write("# SYNTHETIC spot price of one GPU worker, dollars an hour, by tests/bench/bench_routing.py --make-prices (seed 5)\n")
        file.write("minute,spot_per_h\n")
        for minute in range(0, 1_440, STEP_MIN):
            noise += -0.1 * noise + 0.03 * float(rng.standard_normal())
            shape = 0.65 - 0.30 * cos(2 * pi * (minute - 180) / 1_440)
            spike = sum(height for begin, lasts, height in spikes if begin <= minute < begin + lasts)
            file.write(f"{minute},{max(0.15, shape + noise + spike):.4f}\n")


def prices() -> list[tuple[int, float]]:
    """The series: minute of the day, dollars an hour."""
    lines = [line for line in SERIES.read_text().splitlines() if not line.startswith("#")]
    return [(int(row["minute"]), float(row["spot_per_h"])) for row in csv.DictReader(lines)]


def within(minute: int, span: tuple[int, int]) -> bool:
    """Whether a minute is in a span."""
    return span[0] <= minute < span[1]


def load(minute: int) -> float:
    """Requests a second: a shop's day with two peaks."""
    hour = minute / 60
    return 1.5 + 6.5 * (max(0.0, 1 - abs(hour - 12) / 3) + max(0.0, 1 - abs(hour - 18) / 2.5))


def edge(minute: int) -> Edge | None:
    """What the device can do: queueing as M/D/1, a cheaper mode while it is hot, nothing to spare above 97 %."""
    alone_s, per_s, mode = (0.020, 20.0, Mode.CONSTRAINED) if within(minute, HOT) else (ALONE_S, PER_S, Mode.FULL)
    busy = min(load(minute) / per_s, 0.97)
    return Edge(mode, "1", alone_s * (1 + busy / (2 * (1 - busy))), per_s)


def uplink(minute: int) -> Uplink:
    """The link: three outages, and half an hour of slow round trips."""
    if any(within(minute, outage) for outage in OUTAGES):
        return Uplink(LinkState.PARTITIONED)
    if within(minute, SLOW):
        return Uplink(LinkState.DEGRADED, 0.135, 2e6)
    return Uplink(LinkState.HEALTHY, 0.030, 4e6)


@dataclass(frozen=True, slots=True)
class Moment:
    """One minute: the price, and what was decided for each class."""

    minute: int
    spot_per_h: float
    decisions: dict[str, Decision]


def replay() -> list[Moment]:
    """Ask the router once a minute for each class of tags."""
    router, day, series = Router(), list[Moment](), dict(prices())
    for minute in range(1_440):
        now = 60.0 * minute
        spot_per_h = series[minute - minute % STEP_MIN]
        router.priced(Prices(spot_per_h, ON_DEMAND_PER_H, EGRESS_PER_GB, DEVICE_PER_H, at=now))
        router.linked(uplink(minute))
        router.able("labels", Prospect(INPUT_BYTES, 0.150, edge(minute), CLOUD))
        decisions = {name: router.route("labels", "", tags, INPUT_BYTES, now) for name, tags in CLASSES.items()}
        day.append(Moment(minute, spot_per_h, decisions))
    return day


def routes(day: list[Moment], name: str) -> dict[str, float]:
    """The share of requests (not of minutes) that took each route."""
    count: Counter[Route] = Counter()
    for moment in day:
        count[moment.decisions[name].route] += load(moment.minute)  # type: ignore[assignment]  # a weight, not a count
    return {route: round(count[route] / sum(count.values()), 4) for route in Route if count[route]}


def per_million(day: list[Moment], name: str) -> float:
    """Dollars for a million answers of this class, over the day's load."""
    answered = [
        (load(moment.minute), moment.decisions[name].cost)
        for moment in day
        if moment.decisions[name].route not in {Route.DEFERRED, Route.REFUSED}
    ]
    return round(1e6 * sum(weight * cost for weight, cost in answered) / sum(weight for weight, _ in answered), 3)


def draw(day: list[Moment]) -> None:
    """The picture: price above, one strip of routes for each class below."""
    figure, axes = plt.subplots(
        len(CLASSES) + 1, 1, figsize=(10, 5.2), sharex=True, height_ratios=[3] + [0.7] * len(CLASSES), constrained_layout=True
    )
    hours = [moment.minute / 60 for moment in day]
    axes[0].plot(hours, [moment.spot_per_h for moment in day], color="#333333", lw=1.2)
    axes[0].set_ylabel("spot $/h (synthetic)")
    axes[0].set_title("Routes of one device over a day, by class of tags")
    for axis in axes:
        for begin, end in OUTAGES:
            axis.axvspan(begin / 60, end / 60, color="#d1495b", alpha=0.18, lw=0)
    for span, text in ((OUTAGES[1], "partitioned"), (SLOW, "slow link"), (HOT, "hot: mode B")):
        axes[0].annotate(text, (sum(span) / 120, 0.08), ha="center", fontsize=7, xycoords=("data", "axes fraction"))
    load_axis = axes[0].twinx()
    load_axis.plot(hours, [load(moment.minute) for moment in day], color="#c08040", lw=0.9, ls="--")
    load_axis.set_ylabel("requests/s (dashed)")
    for axis, name in zip(axes[1:], CLASSES, strict=True):
        for moment in day:
            axis.axvspan(moment.minute / 60, (moment.minute + 1) / 60, color=COLOURS[moment.decisions[name].route], lw=0)
        axis.set_yticks([])
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    axes[-1].set_xlim(0, 24)
    axes[-1].set_xticks(range(0, 25, 3))
    axes[-1].set_xlabel("hour")
    figure.legend(
        handles=[Patch(color=colour, label=route) for route, colour in COLOURS.items()], ncols=6, loc="outside lower center", fontsize=8
    )
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=110)


def timed() -> dict[str, float]:
    """Microseconds for a cached decision, with tags made anew as a request brings them, and for a fresh one; the best of several rounds."""
    router = Router()
    router.priced(Prices(0.5, ON_DEMAND_PER_H, EGRESS_PER_GB, DEVICE_PER_H))
    router.linked(uplink(0))
    router.able("labels", Prospect(INPUT_BYTES, 0.150, edge(0), CLOUD))
    for name in range(500):
        router.route("labels", "", Tags(slo_s=0.150 + name), INPUT_BYTES, 0.0)
    requests = [Tags(slo_s=0.150 + number % 500) for number in range(CALLS)]

    def cached() -> float:
        started = time.perf_counter()
        for tags in requests:
            router.route("labels", "", tags, INPUT_BYTES, 1.0)
        return (time.perf_counter() - started) / CALLS

    def fresh(begin: float) -> float:
        started = time.perf_counter()
        for number in range(CALLS // 10):
            router.route("labels", "", requests[0], INPUT_BYTES, begin + 100.0 * number)
        return (time.perf_counter() - started) / (CALLS // 10)

    decided = router.decided
    best = min(cached() for _ in range(ROUNDS))
    if router.decided != decided:
        raise AssertionError("the cache was not used")
    return {"cached_us": round(best * 1e6, 2), "fresh_us": round(min(fresh(1e6 * number) for number in range(1, 4)) * 1e6, 1)}


def main() -> None:
    """Measure, replay, draw, write the reports."""
    if "--make-prices" in sys.argv:
        make_prices()
    day = replay()
    report: dict[str, object] = {**timed(), "machine": f"{platform.machine()}, Python {platform.python_version()}"}
    lines = [
        "| class of tags | " + " | ".join(Route) + " | $ per million answers |",
        "|---|" + "---|" * (len(Route) + 1),
    ]
    for name in CLASSES:
        shares, cost = routes(day, name), per_million(day, name)
        report[name] = {"routes": shares, "dollars_per_million": cost}
        lines.append(f"| {name} | " + " | ".join(f"{shares[route]:.1%}" if route in shares else "" for route in Route) + f" | {cost:.2f} |")
    broken = [
        moment.minute
        for moment in day
        for name, tags in CLASSES.items()
        if tags.data_residency == "device" and moment.decisions[name].route in {Route.SPLIT, Route.CLOUD_FULL}
    ]
    report["residency_violations"] = len(broken)
    draw(day)
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.write_text(json.dumps(report, indent=2) + "\n")
    REPORT.with_suffix(".md").write_text("\n".join(lines) + "\n")
    sys.stdout.write("\n".join(lines) + "\n" + json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
