"""The promises of degradation: down at once when critical, up slowly, never restless, always in a mode that exists."""

from math import inf, log2

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.contract.errors import OursError, TheirsError
from appliance.contract.vocabulary import Mode
from appliance.core.serve.degradation import Degradation, DegradationSettings, Shift
from appliance.core.serve.pressure import BANDS, Gauges, Level, Severity

ALL = list(Mode)
TIMES = DegradationSettings()
SEVERITIES = st.sampled_from(Severity)
STEPS = st.lists(st.tuples(st.floats(0, 20), SEVERITIES, st.booleans()), max_size=80)


def walk(machine: Degradation, severity: Severity, start: float, seconds: float, *, cloud: bool = True) -> list[tuple[float, Mode]]:
    """Hold one severity and wake the machine at its deadlines; return the shifts with their times."""
    shifts, now = [], start
    shift = machine.observe(severity, "test", now, cloud=cloud)
    while True:
        if shift:
            shifts.append((now - start, shift.mode))
        due = machine.deadline()
        if due is None or due > start + seconds:
            return shifts
        now = max(now, due)
        shift = machine.observe(severity, "test", now, cloud=cloud)


def test_critical_goes_down_at_once_and_step_by_step() -> None:
    """A to B in the same instant, C and D half a second apart."""
    assert walk(Degradation(ALL), Severity.CRITICAL, 5.0, 60) == [(0.0, Mode.CONSTRAINED), (0.5, Mode.MINIMAL), (1.0, Mode.CLOUD)]


def test_high_has_to_last_before_each_step_down() -> None:
    """One step for each settle time."""
    assert walk(Degradation(ALL), Severity.HIGH, 5.0, 60, cloud=False) == [(2.0, Mode.CONSTRAINED), (4.0, Mode.MINIMAL)]


def test_calm_goes_up_one_step_at_a_time() -> None:
    """From D to A in thirty seconds of calm."""
    machine = Degradation(ALL)
    walk(machine, Severity.CRITICAL, 0.0, 10)
    steps = walk(machine, Severity.CALM, 20.0, 100)
    assert steps == [(10.0, Mode.MINIMAL), (20.0, Mode.CONSTRAINED), (30.0, Mode.FULL)]


def test_missing_variants_are_passed_over() -> None:
    """A model with A and C only goes from A to C and back; one with A alone never moves."""
    machine = Degradation([Mode.FULL, Mode.MINIMAL])
    assert walk(machine, Severity.CRITICAL, 0.0, 10) == [(0.0, Mode.MINIMAL)]
    assert walk(machine, Severity.CALM, 10.0, 60) == [(10.0, Mode.FULL)]
    assert walk(Degradation([Mode.FULL]), Severity.CRITICAL, 0.0, 100) == []
    with pytest.raises(TheirsError, match="at least one mode"):
        Degradation([])


def test_the_cloud_needs_a_route_and_is_left_when_it_goes() -> None:
    """Without a route C is the bottom; losing it in D brings C back at once, whatever the pressure."""
    machine = Degradation(ALL)
    walk(machine, Severity.CRITICAL, 0.0, 10, cloud=False)
    assert machine.mode is Mode.MINIMAL
    assert machine.observe(Severity.CRITICAL, "hot", 11.0, cloud=True) == Shift(Mode.CLOUD, "hot")
    assert machine.observe(Severity.CRITICAL, "hot", 11.1, cloud=False) == Shift(Mode.MINIMAL, "no cloud route")


def test_a_short_spike_of_high_changes_nothing() -> None:
    """1.9 s of HIGH is not two seconds."""
    machine = Degradation(ALL)
    assert machine.observe(Severity.HIGH, "", 0.0) is None
    assert machine.observe(Severity.CALM, "", 1.9) is None
    assert machine.observe(Severity.HIGH, "", 2.0) is None


def test_time_does_not_go_back() -> None:
    """An earlier time raises and changes nothing."""
    machine = Degradation(ALL)
    machine.observe(Severity.HIGH, "", 5.0)
    with pytest.raises(OursError, match=r"time went from 5\.0 to 4\.0"):
        machine.observe(Severity.CRITICAL, "", 4.0)
    assert machine.mode is Mode.FULL
    assert machine.deadline() == 7.0


@given(st.sets(st.sampled_from(Mode), min_size=1), STEPS)
def test_the_mode_always_exists_and_shifts_say_the_truth(modes: set[Mode], steps: list[tuple[float, Severity, bool]]) -> None:
    """For any input: the mode is one of the model's; D only with a route (if there is any other); a shift changes the mode and says why."""
    machine, now = Degradation(modes), 0.0
    for wait, severity, cloud in steps:
        now += wait
        before = machine.mode
        shift = machine.observe(severity, "why", now, cloud=cloud)
        assert machine.mode in modes
        assert machine.mode is not Mode.CLOUD or cloud or modes == {Mode.CLOUD}
        assert (shift is not None) == (machine.mode is not before)
        if shift:
            assert shift.mode is machine.mode
            assert shift.why
            assert shift.mode > before or severity is Severity.CALM or not cloud


@given(STEPS)
def test_equal_inputs_give_equal_shifts(steps: list[tuple[float, Severity, bool]]) -> None:
    """Two machines that see the same do the same."""
    one, other, now = Degradation(ALL), Degradation(ALL), 0.0
    for wait, severity, cloud in steps:
        now += wait
        assert one.observe(severity, "", now, cloud=cloud) == other.observe(severity, "", now, cloud=cloud)
        assert one.deadline() == other.deadline()


@given(STEPS, SEVERITIES)
def test_the_deadline_is_kept_exactly(steps: list[tuple[float, Severity, bool]], severity: Severity) -> None:
    """If nothing changes, there is no shift before the deadline and one at it; without a deadline there is none ever."""
    machine, now = Degradation(ALL), 0.0
    for wait, earlier, cloud in steps:
        now += wait
        machine.observe(earlier, "", now, cloud=cloud)
    machine.observe(severity, "", now, cloud=True)
    due = machine.deadline()
    if due is None:
        assert machine.observe(severity, "", now + 1e6, cloud=True) is None
    elif due > now:
        assert machine.observe(severity, "", now + (due - now) / 2, cloud=True) is None or now + (due - now) / 2 == due
        assert machine.observe(severity, "", due, cloud=True) is not None


@given(st.lists(st.tuples(st.floats(0, 30), st.floats(0, 1)), max_size=120))
def test_shifts_are_bounded_by_the_variation_of_the_pressure(steps: list[tuple[float, float]]) -> None:
    """Whatever the pressure does: with total variation V and a HIGH band b, at most 3 x (V / b + 2) shifts.

    Up and down take turns only when the severity crosses between HIGH and CALM, which costs b each time, and one direction has three steps.
    """
    machine, gauges, now, shifts, variation, last = Degradation(ALL), Gauges(), 0.0, 0, 0.0, 0.0
    for wait, value in steps:
        now += wait
        variation, last = variation + abs(value - last), value
        shifts += machine.observe(gauges.observe({"any": Level(value, "")}).severity, "", now, cloud=True) is not None
    band = BANDS[Severity.HIGH].enter - BANDS[Severity.HIGH].leave
    assert shifts <= 3 * (variation / band + 2)


@given(st.sampled_from([Severity.HIGH, Severity.CRITICAL]), st.floats(600, 20_000))
def test_a_load_that_b_relieves_and_a_cannot_carry_makes_few_shifts(pressed: Severity, seconds: float) -> None:
    """The worst feedback: always pressed in A, always calm in B. Calm doubles to its cap: a few shifts, then two in every 160 s."""
    machine, now, shifts = Degradation(ALL), 0.0, 0
    while now < seconds:
        severity = pressed if machine.mode is Mode.FULL else Severity.CALM
        shifts += machine.observe(severity, "", now) is not None
        now = max(now, machine.deadline() or inf) if severity is not Severity.CALM or machine.deadline() else now + 1
        now += 0.001
    doublings = log2(TIMES.calm_max_s / TIMES.calm_s)
    assert shifts <= 2 * (doublings + 1) + 2 * seconds / TIMES.calm_max_s + 2


def test_calm_that_lasted_is_trusted_again() -> None:
    """After a step up that held, the next recovery takes the usual ten seconds."""
    machine = Degradation(ALL)
    machine.observe(Severity.CRITICAL, "", 0.0)
    assert walk(machine, Severity.CALM, 1.0, 10) == [(10.0, Mode.FULL)]
    machine.observe(Severity.CRITICAL, "", 12.0)
    assert walk(machine, Severity.CALM, 13.0, 20) == [(20.0, Mode.FULL)]
    machine.observe(Severity.CRITICAL, "", 100.0)
    assert walk(machine, Severity.CALM, 101.0, 20) == [(10.0, Mode.FULL)]


def test_a_mode_that_could_not_be_loaded_is_withdrawn() -> None:
    """The present mode goes on, and the failed one is passed over from then on."""
    machine = Degradation([Mode.FULL, Mode.CONSTRAINED, Mode.MINIMAL])
    assert machine.observe(Severity.CRITICAL, "test", 0.0) == Shift(Mode.CONSTRAINED, "test")
    machine.withdraw(Mode.CONSTRAINED, Mode.FULL)
    assert machine.mode is Mode.FULL
    assert machine.observe(Severity.CRITICAL, "test", 1.0) == Shift(Mode.MINIMAL, "test")
    with pytest.raises(OursError, match="back from C to D"):
        machine.withdraw(Mode.MINIMAL, Mode.CLOUD)


def test_a_way_to_the_cloud_that_comes_and_goes_does_not_carry_the_mode_with_it() -> None:
    """Under lasting critical pressure a route that flaps every second makes a handful of shifts in ten minutes, not hundreds."""
    machine = Degradation([Mode.FULL, Mode.CLOUD])
    shifts = [machine.observe(Severity.CRITICAL, "test", 0.5 * step, cloud=step % 4 < 2) for step in range(1_200)]
    assert len([shift for shift in shifts if shift]) <= 2 * (2 + 600 / TIMES.calm_max_s + log2(TIMES.calm_max_s / TIMES.relapse_s))


def test_after_the_way_was_shut_critical_pressure_enters_the_cloud_again_at_a_deadline() -> None:
    """The machine says itself when it is worth looking again."""
    machine = Degradation([Mode.MINIMAL, Mode.CLOUD])
    assert machine.observe(Severity.CRITICAL, "test", 0.0, cloud=True) == Shift(Mode.CLOUD, "test")
    assert machine.observe(Severity.CRITICAL, "test", 1.0, cloud=False) == Shift(Mode.MINIMAL, "no cloud route")
    assert machine.observe(Severity.CRITICAL, "test", 2.0, cloud=True) is None
    due = machine.deadline()
    assert due == 1.0 + 2 * TIMES.relapse_s
    assert machine.observe(Severity.CRITICAL, "test", due, cloud=True) == Shift(Mode.CLOUD, "test")
