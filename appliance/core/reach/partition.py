"""Gives the verdict on one hop (device to region, region to cloud): HEALTHY, DEGRADED or PARTITIONED. Phi suspects, probes decide.

API: `Partition(settings, now)`; each of `.heard(now, seq=…)` (any packet of the peer; `seq` if it is a heartbeat), `.answered(probe, now)`,
`.measured(rtt_s, now)`, `.missed(now)`, `.session(up, now)` and `.tick(now)` at `.deadline()` returns a tuple of commands: `Probe(id)`,
`Verdict(state, why)`. Feed what the *peer* sent: an acknowledgement of a broker between says nothing of a peer behind it.

1. Silence up to phi 3 (`suspicion`) is a suspicion, seen by nobody outside: probes go out, one a second. Any packet ends it.
2. `verdict_s` without an answer convict: `OWN_PATH_S` where probes have a connection of their own, `SHARED_S` where they may queue behind a late heartbeat
   in one ordered stream (there 4 s would give 16 wrong verdicts a day; measured). A closed session is a suspicion at once; no probe can go, and
   the time of a verdict runs all the same. When it is open again the probes get a full round.
3. Whatever phi says, silence of `cap_s` (three heartbeats and 5 s) convicts, closed session or not.
4. Quality (`quality`) makes HEALTHY into DEGRADED, never one gap; `clean_s` without suspicion or fault makes it HEALTHY again. What is asked and not
   answered while the peer is silent is part of the silence, not loss: recovery is not slower for it.
5. PARTITIONED ends after `RETURN_BEATS` heartbeats, as DEGRADED, so that what replays on return starts on a link that holds.
6. A stalled detector convicts nobody: an event later than its deadline by more than `stall_s` was a stall of this process (suspend, SIGSTOP, thermal);
   all times here are of the time awake, so whatever was pending gets its whole time again, and the interval is not learned.
7. It starts DEGRADED, nothing being known; the first `RETURN_BEATS` heartbeats make it HEALTHY.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from math import inf, nextafter

from appliance.contract.errors import OursError
from appliance.contract.vocabulary import LinkState
from appliance.core.reach.quality import Quality
from appliance.core.reach.suspicion import THRESHOLD, Suspicion

OWN_PATH_S = 4.0
SHARED_S = 6.9
"""A heartbeat that is 8 s late (the worst seen on a bursty link) comes 6.5 s after the suspicion; the rest is margin."""
RETURN_BEATS = 2


class Sign(StrEnum):
    """What was seen of the link."""

    SILENT = "silent"
    FAULTY = "faulty"
    RETURNED = "returned"
    CLEAN = "clean"


TRANSITIONS: Mapping[tuple[LinkState, Sign], LinkState] = {
    (LinkState.HEALTHY, Sign.FAULTY): LinkState.DEGRADED,
    (LinkState.HEALTHY, Sign.SILENT): LinkState.PARTITIONED,
    (LinkState.DEGRADED, Sign.SILENT): LinkState.PARTITIONED,
    (LinkState.DEGRADED, Sign.CLEAN): LinkState.HEALTHY,
    (LinkState.PARTITIONED, Sign.RETURNED): LinkState.DEGRADED,
}


@dataclass(frozen=True, slots=True)
class PartitionSettings:
    """Times in seconds; see the rules above. `phi` is the score that suspects."""

    interval_s: float = 5.0
    verdict_s: float = SHARED_S
    probe_s: float = 1.0
    cap_s: float = 20.0
    clean_s: float = 60.0
    stall_s: float = 1.0
    phi: float = THRESHOLD


@dataclass(frozen=True, slots=True)
class Probe:
    """Ask the peer now, and give its answer with this id to `answered`."""

    id: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """The state of the hop from now on."""

    state: LinkState
    why: str


Commands = tuple[Probe | Verdict, ...]


class Partition:
    """One hop, seen from one end. Every event raises OursError (`clock`) if time went back, and nothing changed."""

    def __init__(self, settings: PartitionSettings | None = None, now: float = 0.0) -> None:
        self.state = LinkState.DEGRADED
        self.quality = Quality()
        self._settings = settings or PartitionSettings()
        self._now, self._stalled_s, self._stall_at = now, 0.0, -inf
        self._suspicion = Suspicion(self._settings.interval_s, now, threshold=self._settings.phi)
        self._met, self._up, self._beats = False, True, 0
        self._round_at: float | None = None
        self._probe_at = inf
        self._clean_at = now
        self._asked: dict[int, float] = {}
        self._id = 0

    @property
    def suspecting(self) -> bool:
        """Whether probes are out, or the session is closed, and no verdict is given yet."""
        return self._round_at is not None

    def phi(self, now: float) -> float:
        """The present score, for people to look at."""
        return self._suspicion.phi(max(now, self._now) - self._stalled_s)

    def heard(self, now: float, *, seq: int | None = None) -> Commands:
        """Take any packet of the peer in."""
        at = self._wake(now)
        gone = self.state is LinkState.PARTITIONED
        silent_s = at - self._suspicion.last_at
        usual = self._round_at is None and not gone and self._stall_at <= self._suspicion.last_at
        self._suspicion.heard(at, heartbeat=seq is not None, learn=usual)
        if self._up:
            self._round_at, self._probe_at = None, inf
        if seq is not None:
            self.quality.received(seq)
            self._beats = 1 if gone and silent_s > self._settings.cap_s else self._beats + 1
        if gone and self._beats >= RETURN_BEATS:
            return self._turn(Sign.RETURNED, f"{RETURN_BEATS} heartbeats", at)
        return self._judge(at)

    def answered(self, probe: int, now: float) -> Commands:
        """Take the answer to a probe in; an unknown or repeated one is still a packet."""
        at = self._wake(now)
        asked = self._asked.pop(probe, None)
        if asked is not None:
            self.quality.answered(at - asked, at)
        return self.heard(now)

    def measured(self, rtt_s: float, now: float) -> Commands:
        """Take the round trip of any other answered question in."""
        at = self._wake(now)
        self.quality.answered(rtt_s, at)
        return self.heard(now)

    def missed(self, now: float) -> Commands:
        """Take in that a question got no answer in its time."""
        at = self._wake(now)
        if self.state is not LinkState.PARTITIONED and self._round_at is None:
            self.quality.missed()
        return self._judge(at)

    def session(self, *, up: bool, now: float) -> Commands:
        """Take in that the local end of the connection opened or closed (rule 2)."""
        at = self._wake(now)
        if up is self._up:
            return ()
        self._up = up
        if self.state is LinkState.PARTITIONED:
            return ()
        if not up and self._round_at is None:
            self._suspect(at)
        elif up:
            self._round_at = self._probe_at = at
        return self._due(at)

    def tick(self, now: float) -> Commands:
        """Do what is due."""
        return self._due(self._wake(now))

    def deadline(self) -> float | None:
        """When to call `tick` even if nothing happens; None while PARTITIONED."""
        due = self._deadline()
        if due == inf:
            return None
        wake = due + self._stalled_s
        while wake - self._stalled_s < due:  # a rounding, and the loop would be woken too early for ever
            wake = nextafter(wake, inf)
        return wake

    def _deadline(self) -> float:
        if self.state is LinkState.PARTITIONED:
            return inf
        cap = self._suspicion.last_at + self._settings.cap_s
        if self._round_at is not None:
            probe = self._probe_at if self._up else inf
            return min(probe, self._round_at + self._settings.verdict_s, cap)
        clean = self._clean_at + self._settings.clean_s if self.state is LinkState.DEGRADED and self._met else inf
        return min(self._suspicion.crosses_at, cap, clean)

    def _wake(self, now: float) -> float:
        """The time awake (rule 6)."""
        if now < self._now:
            raise OursError("clock", f"time went from {self._now} to {now}")
        late_s = now - self._stalled_s - self._deadline()
        if late_s > self._settings.stall_s:
            self._stalled_s += late_s
            self._stall_at = now - self._stalled_s
        self._now = now
        return now - self._stalled_s

    def _due(self, at: float) -> Commands:
        if self.state is LinkState.PARTITIONED:
            return ()
        silent_s = at - self._suspicion.last_at
        if self._round_at is None and at >= self._suspicion.crosses_at:
            self._suspect(at)
        if silent_s >= self._settings.cap_s or (self._round_at is not None and at >= self._round_at + self._settings.verdict_s):
            asked = f"{len(self._asked)} probes unanswered" if self._up else "session closed"
            return self._turn(Sign.SILENT, f"silent for {silent_s:.1f} s, {asked}", at)
        probes: tuple[Probe, ...] = ()
        if self._up and at >= self._probe_at:
            self._id += 1
            self._asked[self._id] = at
            self._probe_at = at + self._settings.probe_s
            probes = (Probe(self._id),)
        return (*probes, *self._judge(at))

    def _suspect(self, at: float) -> None:
        self._round_at = self._probe_at = self._clean_at = at
        self._asked.clear()
        self.quality.suspected(at)

    def _judge(self, at: float) -> Commands:
        """What quality says, and the first meeting (rules 4 and 7)."""
        if not self._met and self._beats >= RETURN_BEATS and self.state is LinkState.DEGRADED:
            return self._turn(Sign.CLEAN, f"{RETURN_BEATS} heartbeats", at)
        if self.state is LinkState.HEALTHY and (fault := self.quality.fault(at)):
            return self._turn(Sign.FAULTY, fault, at)
        if self.state is not LinkState.DEGRADED:
            return ()
        if not self.quality.clean(at):
            self._clean_at = at
        if self._met and self._round_at is None and at >= self._clean_at + self._settings.clean_s:
            return self._turn(Sign.CLEAN, f"clean for {at - self._clean_at:.0f} s", at)
        return ()

    def _turn(self, sign: Sign, why: str, at: float) -> Commands:
        state = TRANSITIONS.get((self.state, sign))
        if state is None:
            raise OursError("partition", f"{sign.name} is no event of state {self.state}")
        self.state, self._clean_at, self._beats = state, at, 0
        self._met = self._met or state is not LinkState.DEGRADED
        self.quality.forgive()
        if state is LinkState.PARTITIONED:
            self._round_at, self._probe_at = None, inf
            self._asked.clear()
        return (Verdict(state, why),)
