"""The profile's promises: board data that load, a sane first guess, robust measurement, the right batch."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.contract.errors import TheirsError
from appliance.contract.vocabulary import Mode
from appliance.core.serve.board import BoardProfile, ModelCost, bound_by, parse_board, roofline_s
from appliance.core.serve.profile import AGAIN, TRIES, WEIGHT, Estimate, Profile, best_batch

BOARDS = sorted((Path(__file__).parents[3] / "bsp" / "jetson" / "profiles").glob("*.toml"))
COST = ModelCost(flops=1.2e9, weight_bytes=11e6, activation_bytes=4e6, precision="fp16")
LATENCY = st.floats(1e-6, 10.0)


def load(path: Path) -> BoardProfile:
    return parse_board(tomllib.loads(path.read_text()), path.name)


def generic() -> dict[str, Any]:
    return tomllib.loads((BOARDS[0].parent / "generic-x86.toml").read_text())


def fed(measured: dict[int, float], max_batch: int = 8, **words: Any) -> Profile:
    profile = Profile(max_batch, **words)
    for batch, seconds in measured.items():
        for _ in range(5):
            profile.observe(Mode.FULL, batch, seconds)
    return profile


@pytest.mark.parametrize("path", BOARDS, ids=lambda path: path.stem)
def test_every_shipped_board_loads_and_names_the_source_of_its_numbers(path: Path) -> None:
    """The file is valid, is called as the board is, and explains every number that it holds."""
    board = load(path)
    assert board.name == path.stem
    numbers = {"memory_total_bytes", "gpu_memory_fraction", "bandwidth_bytes_s", "peak_flops", "efficiency", "overhead_s"}
    assert set(board.sources) - {"power_modes"} == numbers
    assert bool(board.power_modes) == ("power_modes" in board.sources)


def test_the_promised_boards_are_there() -> None:
    """Five Orins, Thor, a plain PC, and a machine that was measured."""
    assert sorted(path.stem for path in BOARDS) == [
        "agx-orin-32gb", "agx-orin-64gb", "generic-x86", "measured-epyc-one-core", "orin-nano-8gb", "orin-nano-8gb-super", "orin-nx-16gb", "thor-t5000",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"efficiency": 1.5}, "efficiency"),
        ({"overhead_s": 0.0}, "overhead"),
        ({"peak_flops": {}}, "peak"),
        ({"memory_total_bytes": "8 GB"}, "memory_total_bytes"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_a_bad_board_file_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    """The error names file and field."""
    with pytest.raises(TheirsError, match=named) as caught:
        parse_board({**generic(), **change}, "mine.toml")
    assert caught.value.where == "mine.toml"


@given(st.sampled_from(BOARDS), st.floats(1e3, 1e12), st.floats(0, 1e9), st.floats(0, 1e9), st.integers(1, 31))
def test_a_guess_grows_with_the_batch_and_costs_less_per_sample(path: Path, flops: float, weights: float, moved: float, batch: int) -> None:
    """The roofline never falls with the batch, and never loses throughput by it."""
    board, cost = load(path), ModelCost(flops=flops, weight_bytes=weights, activation_bytes=moved)
    one, more = roofline_s(board, cost, batch), roofline_s(board, cost, batch + 1)
    assert one <= more
    assert more / (batch + 1) <= one / batch * (1 + 1e-12)


def test_a_faster_board_guesses_faster() -> None:
    """Nano, Nano Super, AGX 64 and Thor in this order, for a model that computes and for one that moves."""
    for cost in (
        ModelCost(flops=1e12, weight_bytes=0, activation_bytes=0, precision="fp16"),
        ModelCost(flops=0, weight_bytes=1e10, activation_bytes=0),
    ):
        names = ["orin-nano-8gb", "orin-nano-8gb-super", "agx-orin-64gb", "thor-t5000"]
        guesses = [roofline_s(load(BOARDS[0].parent / f"{name}.toml"), cost, 1) for name in names]
        assert guesses == sorted(guesses, reverse=True)
        assert len(set(guesses)) == 4


def test_the_guess_knows_its_roof() -> None:
    """A tiny model is bound by overhead, a dense one by computing, a wide one by memory."""
    board = load(BOARDS[0].parent / "generic-x86.toml")
    assert bound_by(board, ModelCost(flops=1e3, weight_bytes=1e2, activation_bytes=0), 1) == "overhead"
    assert bound_by(board, ModelCost(flops=1e10, weight_bytes=1e2, activation_bytes=0), 1) == "compute"
    assert bound_by(board, ModelCost(flops=1e3, weight_bytes=1e10, activation_bytes=0), 1) == "memory"


@given(st.lists(LATENCY, min_size=1, max_size=50))
def test_an_estimate_stays_within_what_was_seen(samples: list[float]) -> None:
    """Smoothing invents nothing."""
    estimate = Estimate()
    for sample in samples:
        estimate.observe(sample)
    assert min(samples) * (1 - 1e-9) <= estimate.value <= max(samples) * (1 + 1e-9)


@given(st.lists(LATENCY, min_size=5, max_size=50), st.floats(0, 1e6))
def test_one_wild_sample_moves_an_estimate_by_a_tenth_at_most(samples: list[float], wild: float) -> None:
    """Whatever it is, a single sample after the first five is worth `WEIGHT` of the estimate."""
    estimate = Estimate()
    for sample in samples:
        estimate.observe(sample)
    before = estimate.value
    estimate.observe(wild)
    assert abs(estimate.value - before) <= WEIGHT * before * (1 + 1e-9)


def test_a_slow_first_run_is_forgotten_and_a_real_change_is_followed() -> None:
    """A warm-up of 100x leaves no trace in five samples; a slowdown by three is followed in 22 batches."""
    estimate = Estimate()
    for sample in [1.0, 0.01, 0.01, 0.01, 0.01]:
        estimate.observe(sample)
    assert estimate.value == 0.01
    for _ in range(22):
        estimate.observe(0.03)
    assert estimate.value > 0.027


def test_a_new_pace_is_asked_for_only_when_the_estimate_moved() -> None:
    """Steady batches ask once; a change by 10 % asks again."""
    profile = Profile(8)
    assert [profile.observe(Mode.FULL, 1, 0.01) for _ in range(20)] == [True] + [False] * 19
    assert any(profile.observe(Mode.FULL, 1, 0.011) for _ in range(20))


@given(st.dictionaries(st.integers(1, 16), LATENCY, max_size=6), st.booleans())
def test_predictions_never_fall_with_the_batch(measured: dict[int, float], with_board: bool) -> None:
    """For any measurements, with and without a board."""
    board = load(BOARDS[0]) if with_board else None
    profile = fed(measured, 16, board=board, cost={Mode.FULL: COST})
    predictions = [profile.predict(Mode.FULL, batch) for batch in range(1, 17)]
    known = [seconds for seconds in predictions if seconds is not None]
    assert len(known) == (16 if measured or with_board else 0)
    assert known == sorted(known)


def test_measurement_replaces_the_guess_and_carries_its_shape_along() -> None:
    """Twice as slow as guessed at batch 1 means twice as slow at batch 8, until 8 is measured."""
    board = load(BOARDS[0])
    guess = Profile(8, board, {Mode.FULL: COST})
    one, eight = guess.predict(Mode.FULL, 1), guess.predict(Mode.FULL, 8)
    assert one is not None
    assert eight is not None
    measured = fed({1: 2 * one}, board=board, cost={Mode.FULL: COST})
    assert measured.predict(Mode.FULL, 8) == pytest.approx(2 * eight)
    assert fed({1: 2 * one, 8: 5 * eight}, board=board, cost={Mode.FULL: COST}).predict(Mode.FULL, 8) == pytest.approx(5 * eight)


def test_the_measured_models_get_the_batches_that_they_deserve() -> None:
    """PP-OCRv4 on one thread: 1; on two threads (+16 %): 4, the knee; the small network: 8 (the facts' table)."""
    one_thread = fed({1: 1 / 183, 4: 4 / 174, 8: 8 / 175})
    two_threads = fed({1: 1 / 289, 4: 4 / 331, 8: 8 / 335})
    small = fed({1: 1 / 139_700, 4: 4 / 509_000, 8: 8 / 629_000})
    assert [profile.batch_for(Mode.FULL, 0.075) for profile in (one_thread, two_threads, small)] == [1, 4, 8]
    assert [profile.pays(Mode.FULL, 8) for profile in (one_thread, two_threads, small)] == [False, True, True]
    pace = small.pace(Mode.FULL, 0.150)
    assert pace is not None
    assert (pace.batch, pace.measured) == (8, True)


@given(st.lists(LATENCY, min_size=1, max_size=16).map(sorted), LATENCY)
def test_the_batch_for_a_latency_keeps_it_or_is_one(latencies: list[float], target: float) -> None:
    """Within the target whenever any size is, and then within 5 % of the best throughput possible."""
    table, sizes = [0.0, *latencies], range(1, len(latencies) + 1)
    batch = best_batch(table, target, sizes)
    within = [size for size in sizes if table[size] <= target]
    if within:
        assert table[batch] <= target
        assert batch / table[batch] >= 0.95 * max(size / table[size] for size in within)
    else:
        assert batch == 1


def test_compiled_sizes_cost_what_the_next_larger_one_costs() -> None:
    """Where 1, 4 and 8 are compiled, a batch of 2 takes as long as one of 4, and warm-up measures exactly these."""
    profile = fed({1: 0.01, 4: 0.02, 8: 0.03}, compiled=(1, 4, 8))
    assert [profile.predict(Mode.FULL, batch) for batch in (1, 2, 4, 5)] == [0.01, 0.02, 0.02, 0.03]
    assert profile.warmup_batches() == [1, 4, 8]
    assert Profile(12).warmup_batches() == [1, 2, 4, 8, 12]


def test_nothing_known_is_said_so() -> None:
    """No measurement and no board: no prediction, no pace, batch 1, and nothing that pays."""
    profile = Profile(8)
    assert profile.predict(Mode.FULL, 1) is None
    assert profile.pace(Mode.FULL, 0.15) is None
    assert profile.batch_for(Mode.FULL, 1.0) == 1
    assert not profile.pays(Mode.FULL, 8)
    with pytest.raises(TheirsError, match="0 s for a batch of 1"):
        profile.observe(Mode.FULL, 1, 0)


def test_the_profile_explains_itself() -> None:
    """Each line says what is expected, whether it was measured, and what the roofline thinks."""
    lines = fed({1: 0.005}, board=load(BOARDS[0]), cost={Mode.FULL: COST}).explain()
    assert lines[0].startswith("board agx-orin-32gb: ")
    assert lines[1].startswith("mode A, batch 1: 5 ms, 200 samples/s, measured 5 times; roofline ")
    assert "guessed" in lines[2]
    assert len(lines) == 5


def test_a_size_that_never_ran_is_tried_before_it_is_ruled_out() -> None:
    """One fast measurement of size 1 must not keep a model at batches of one for ever: the largest untried size within the SLO is allowed."""
    profile = Profile(8)
    profile.observe(Mode.FULL, 1, 0.001)
    pace = profile.pace(Mode.FULL, 0.15)
    assert pace is not None
    assert (pace.batch, pace.measured) == (8, False)
    for size in (1, 2, 4, 8):
        for _ in range(TRIES):
            profile.observe(Mode.FULL, size, 0.001 * size)
    tried = profile.pace(Mode.FULL, 0.15)
    assert tried is not None
    assert (tried.batch, tried.measured) == (1, True)
    slow = Profile(8)
    slow.observe(Mode.FULL, 1, 0.030)
    assert getattr(slow.pace(Mode.FULL, 0.15), "batch", None) == 2, "a size that the guess puts beyond half of the SLO is not tried"


def test_a_size_that_was_measured_in_a_bad_moment_is_tried_anew() -> None:
    """Eight were once as slow as a storm made them: when the fours have run long enough, eights come back, and a good measurement frees them."""
    profile = fed({1: 1.0e-3, 4: 1.1e-3, 8: 9e-3})

    def aimed_at() -> int:
        pace = profile.pace(Mode.FULL, 0.15)
        assert pace is not None
        return pace.batch

    assert aimed_at() == 4
    asked = [profile.observe(Mode.FULL, 4, 1.1e-3) for _ in range(AGAIN + 10)]
    assert any(asked), "somebody must be told to look again"
    assert aimed_at() == 8
    for _ in range(TRIES):
        profile.observe(Mode.FULL, 8, 1.2e-3)
    assert aimed_at() == 8
    assert profile.predict(Mode.FULL, 8) == pytest.approx(1.2e-3)


def test_what_is_truly_slow_is_ruled_out_again() -> None:
    """A CPU that gains nothing by batches is asked three times, of the next size only, and left alone."""
    profile = fed({1: 5e-3, 2: 11e-3, 4: 22e-3, 8: 45e-3})
    for _ in range(AGAIN + 10):
        profile.observe(Mode.FULL, 1, 5e-3)
    tried = profile.pace(Mode.FULL, 0.15)
    assert tried is not None
    assert tried.batch == 2
    for _ in range(TRIES):
        profile.observe(Mode.FULL, 2, 11e-3)
    left = profile.pace(Mode.FULL, 0.15)
    assert left is not None
    assert left.batch == 1
