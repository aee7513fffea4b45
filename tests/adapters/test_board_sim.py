"""The simulated board: physics that can be checked by hand, on a clock that the test owns."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.adapters.board_sim import HYSTERESIS_C, LADDER, ReplayBoard, SimBoard
from appliance.contract.errors import OursError
from appliance.contract.vitals import BoardReading
from appliance.edge.settings import Sim


class Hand:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def run(board: SimBoard, hand: Hand, seconds: float, every_s: float = 1.0) -> list[BoardReading]:
    found = []
    for _ in range(round(seconds / every_s)):
        hand.now += every_s
        found.append(board.read())
    return found


def hot(reading: BoardReading) -> float:
    assert reading.hottest_c is not None
    return reading.hottest_c


def made(hand: Hand, **parameters: Any) -> SimBoard:
    return SimBoard(hand, **parameters)


def test_at_rest_it_stays_at_the_resting_temperature() -> None:
    """25 degrees and 5 W through 1.4 K/W are 32 degrees, for ever, at full clock."""
    hand = Hand()
    board = made(hand)
    assert all(abs(hot(reading) - 32.0) < 1e-9 and not reading.throttle_causes for reading in run(board, hand, 600))


def test_full_load_follows_the_exponential() -> None:
    """After one time constant (84 s) it is 63 % of the way to the settled 55.1 degrees."""
    hand = Hand()
    board = made(hand, load=lambda: 1.0)
    at_tau = run(board, hand, 84)[-1]
    assert hot(at_tau) == pytest.approx(32.0 + (55.1 - 32.0) * (1 - math.exp(-1)), abs=1e-6)
    assert at_tau.gpu_load == 1.0
    assert hot(run(board, hand, 1000)[-1]) == pytest.approx(55.1, abs=0.01)


def test_how_often_it_is_read_does_not_matter() -> None:
    """Ten readings a second and one a minute see the same warming."""
    often, seldom = Hand(), Hand()
    one, other = made(often, load=lambda: 0.5), made(seldom, load=lambda: 0.5)
    assert hot(run(one, often, 60, 0.1)[-1]) == pytest.approx(hot(run(other, seldom, 60, 60)[-1]), abs=1e-3)


def test_reported_work_heats_like_a_load() -> None:
    """Half a second of work in each second is a load of one half, also when a batch of 2 s is reported at its end."""
    hand, other = Hand(), Hand()
    board, reference = made(hand), made(other, load=lambda: 0.5)
    for second in range(400):
        if second % 4 == 0:
            board.busy(2.0)
        run(board, hand, 1)
    assert hot(board.read()) == pytest.approx(hot(run(reference, other, 400)[-1]), abs=1.0)


def test_heat_clamps_the_clock_and_cooling_gives_it_back() -> None:
    """Under injected heat the clock steps down until the temperature holds near the trip; without it all of it comes back."""
    hand = Hand()
    board = made(hand, load=lambda: 1.0)
    board.inject(45.0)
    ramp = run(board, hand, 900)
    throttled = ramp[-200:]
    assert all("devfreq-17000000.gpu" in reading.throttle_causes for reading in throttled)
    assert all((reading.gpu_clock_hz or 0) < 1.02e9 for reading in throttled)
    assert max(map(hot, throttled)) < 99.0 + HYSTERESIS_C
    assert board.slowdown > 1.2
    board.inject(0.0)
    cooled = run(board, hand, 600)[-1]
    assert (cooled.throttle_causes, cooled.gpu_clock_hz, board.slowdown) == ((), 1.02e9, 1.0)


def test_an_alert_stands_while_it_is_above_the_trip() -> None:
    """The alert has the kernel's name, and the trip point is told as a real board tells it."""
    hand = Hand()
    board = made(hand, throttle_c=40.0)
    board.inject(100.0)
    reading = run(board, hand, 60)[-1]
    assert "gpu-throttle-alert" in reading.throttle_causes
    assert reading.passive_trip_c == 40.0


def test_memory_can_be_squeezed_and_given_back() -> None:
    """Injected bytes are missing from what is available, never below 0."""
    hand = Hand()
    board = made(hand)
    free = board.read().memory_available_bytes
    board.inject_memory(1_000_000)
    assert board.read().memory_available_bytes == free - 1_000_000
    board.inject_memory(1 << 60)
    assert board.read().memory_available_bytes == 0
    board.inject_memory(0)
    assert board.read().memory_available_bytes == free


def test_the_control_file_injects_and_its_removal_ends_it(tmp_path: Path) -> None:
    """Another process can heat and squeeze; a half-written file changes nothing, a removed one ends it."""
    control, hand = tmp_path / "control.json", Hand()
    board = made(hand, control=str(control))
    free, cool = board.read().memory_available_bytes, hot(board.read())
    control.write_text(json.dumps({"watts": 20.0, "memory_bytes": 5_000_000, "ambient_c": 45.0}))
    warm = run(board, hand, 600)[-1]
    assert warm.memory_available_bytes == free - 5_000_000
    assert hot(warm) == pytest.approx(45.0 + (5 + 20) * 1.4, abs=0.1)
    control.write_text('{"watts": 2')
    assert run(board, hand, 1)[-1].memory_available_bytes == free - 5_000_000
    control.unlink()
    assert hot(run(board, hand, 900)[-1]) == pytest.approx(cool, abs=0.1)


@given(st.lists(st.tuples(st.floats(0.01, 500.0), st.floats(0, 1), st.floats(-20, 200)), max_size=10))
def test_it_is_always_a_possible_board(story: list[tuple[float, float, float]]) -> None:
    """Whatever happens, temperature stays between ambient and what the power allows, and the clock on its ladder."""
    hand, load = Hand(), [0.0]
    board = made(hand, load=lambda: load[0])
    for seconds, fraction, watts in story:
        load[0] = fraction
        board.inject(watts)
        hand.now += seconds
        reading = board.read()
        assert 25.0 + (5 - 20) * 1.4 <= hot(reading) <= 25.0 + (5 + 16.5 + 200) * 1.4
        assert round(1.0 / board.slowdown, 3) in LADDER


def test_the_settings_are_its_parameters() -> None:
    """Every key of [sim] but `replay` is taken, under the same name and with the same default."""
    hand = Hand()
    by_settings = SimBoard.from_settings(Sim(), hand)
    assert by_settings.read() == made(hand).read()
    squeezed = SimBoard.from_settings(Sim(memory_mib=1024, resting_mib=24), hand).read()
    assert (squeezed.memory_total_bytes, squeezed.memory_available_bytes) == (1024 << 20, 1000 << 20)


def test_a_recording_is_played_in_its_time_and_again() -> None:
    """One reading per interval, and from the start after the last."""
    hand = Hand()
    recorded = [BoardReading(temperatures_c={"tj": float(value)}, memory_total_bytes=8, memory_available_bytes=4) for value in (40, 50, 60)]
    board = ReplayBoard(recorded, hand, interval_s=0.5)
    seen = []
    for _ in range(8):
        seen.append(hot(board.read()))
        hand.now += 0.25
    assert seen == [40, 40, 50, 50, 60, 60, 40, 40]


def test_an_empty_recording_is_our_mistake() -> None:
    """It is refused at once, not at the first reading."""
    with pytest.raises(OursError, match="needs readings"):
        ReplayBoard([], Hand())
