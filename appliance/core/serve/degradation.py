"""Decides how much of a model the device runs: A full, B constrained, C minimal, D cloud.

API: `Degradation(modes)`; `.observe(severity, why, now, cloud=…) -> Shift(mode, why) | None`; `.deadline()`; `.mode`.

1. CRITICAL: one step down at once, and another every `critical_settle_s` while it lasts (the time that a step needs to take effect).
2. HIGH: one step down when it has lasted `settle_s` since it began and since the last shift.
3. CALM: one step up when it has lasted `calm_s` since it began and since the last shift. Between the bands of `pressure` nothing moves.
4. A step up that is followed by a step down within `relapse_s` was a mistake: the calm asked for next doubles, up to `calm_max_s`; a step up
   that lasted resets it. So even a load that B relieves and A cannot carry makes few shifts.
5. A mode that the model lacks, or that was withdrawn because it could not be loaded, is passed over. D is entered only while a cloud route is allowed, and left at once when it is not.
6. A way to the cloud that failed while it was needed is not trusted again for `relapse_s`, twice as long each time up to `calm_max_s`; D that lasted
   longer than that makes it short again. Else a route that comes and goes under pressure would carry the mode with it.
7. No randomness, no clock: equal inputs give equal shifts.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum
from math import inf

from appliance.contract.errors import OursError, TheirsError
from appliance.contract.vocabulary import Mode
from appliance.core.serve.pressure import Severity


class Push(StrEnum):
    """The direction into which pressure or calm pushes."""

    DOWN = "pressure"
    UP = "calm"


TRANSITIONS: Mapping[tuple[Mode, Push], Mode] = {
    (Mode.FULL, Push.DOWN): Mode.CONSTRAINED,
    (Mode.CONSTRAINED, Push.DOWN): Mode.MINIMAL,
    (Mode.MINIMAL, Push.DOWN): Mode.CLOUD,
    (Mode.CLOUD, Push.UP): Mode.MINIMAL,
    (Mode.MINIMAL, Push.UP): Mode.CONSTRAINED,
    (Mode.CONSTRAINED, Push.UP): Mode.FULL,
}


@dataclass(frozen=True, slots=True)
class DegradationSettings:
    """Times in seconds; see the rules above."""

    settle_s: float = 2.0
    critical_settle_s: float = 0.5
    calm_s: float = 10.0
    relapse_s: float = 30.0
    calm_max_s: float = 160.0


@dataclass(frozen=True, slots=True)
class Shift:
    """Serve in this mode from the next batch on."""

    mode: Mode
    why: str


class Degradation:
    """The mode of one model. `modes` are those that it has; it starts in the fullest. Raises: TheirsError (`modes`) if there is none."""

    def __init__(self, modes: Collection[Mode], settings: DegradationSettings | None = None) -> None:
        if not modes:
            raise TheirsError("modes", "a model needs at least one mode", remedy="name the variants in its manifest")
        self.mode = min(modes)
        self._modes = frozenset(modes)
        self._settings = settings or DegradationSettings()
        self._calm_s = self._settings.calm_s
        self._severity = Severity.CALM
        self._cloud = False
        self._shut_s = self._settings.relapse_s
        self._shut_until = -inf
        self._now = self._since = self._changed = self._raised = -inf

    def observe(self, severity: Severity, why: str, now: float, *, cloud: bool = False) -> Shift | None:
        """Take the present pressure in. Raises: OursError (`clock`) if time went back, and nothing changed."""
        if now < self._now:
            raise OursError("clock", f"time went from {self._now} to {now}")
        self._now, self._cloud = now, cloud
        if self._since == -inf or severity is not self._severity:
            self._severity, self._since = severity, now
        if self.mode is Mode.CLOUD and not cloud and (local := self._next(Push.UP)):
            lasted = now - self._changed >= self._shut_s
            self._shut_s = self._settings.relapse_s if lasted else min(2 * self._shut_s, self._settings.calm_max_s)
            self._shut_until = now + self._shut_s
            return self._shift(local, "no cloud route", now)
        due = self.deadline()
        if due is None or now < due:
            return None
        push = self._push()
        target = self._next(push)
        if target is None:
            return None
        self._learn(push, now)
        return self._shift(target, why if push is Push.DOWN else f"calm for {now - max(self._since, self._changed):.1f} s", now)

    def withdraw(self, mode: Mode, back: Mode) -> None:
        """The shift to `mode` could not be carried out: `back` goes on, and `mode` is not tried again (rule 5).

        Raises: OursError (`withdraw`) where `back` is no mode of the model, or it would be left without one.
        """
        if mode is back or back not in self._modes:
            raise OursError("withdraw", f"back from {mode} to {back}, the model has {sorted(self._modes)}")
        self._modes -= {mode}
        self.mode = back

    def deadline(self) -> float | None:
        """When to observe again even if the pressure does not change; None if nothing would happen."""
        if self._since == -inf:
            return None
        if self._next(self._push()) is None:
            waits = self._push() is Push.DOWN and Mode.CLOUD in self._modes and self.mode is not Mode.CLOUD
            return self._shut_until if waits and self._now < self._shut_until else None
        if self._severity is Severity.CRITICAL:
            return max(self._since, self._changed + self._settings.critical_settle_s)
        lasting = self._settings.settle_s if self._severity is Severity.HIGH else self._calm_s
        return max(self._since, self._changed) + lasting

    def _push(self) -> Push:
        return Push.UP if self._severity is Severity.CALM else Push.DOWN

    def _next(self, push: Push) -> Mode | None:
        """The nearest mode in that direction that the model has and the route allows."""
        mode = TRANSITIONS.get((self.mode, push))
        shut = not self._cloud or self._now < self._shut_until
        while mode is not None and (mode not in self._modes or (mode is Mode.CLOUD and shut)):
            mode = TRANSITIONS.get((mode, push))
        return mode

    def _learn(self, push: Push, now: float) -> None:
        """Ask for more calm after a step up that did not last (rule 4)."""
        if push is Push.UP:
            self._raised = now
        elif self._raised > -inf:
            relapsed = now - self._raised < self._settings.relapse_s
            self._calm_s = min(self._calm_s * 2, self._settings.calm_max_s) if relapsed else self._settings.calm_s
            self._raised = -inf

    def _shift(self, mode: Mode, why: str, now: float) -> Shift:
        self.mode, self._changed = mode, now
        return Shift(mode, why)
