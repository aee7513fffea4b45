"""Remembers who was asked to come back later, so that coming back at once wins nothing.

1. A refused caller is held until its retry hint has passed; asking again meanwhile neither shortens nor lengthens the hold.
2. One that came back too early `STRIKES` times in a row is deaf to refusals: its next one should be kept back until the hint has passed, since each
   answer makes it ask again. (3,100 refusals a second left 6 % of a core for answers; measured.) Each admission forgives half of its strikes.
3. While somebody waits its hint out, the places above half are for those who waited theirs: a caller who was just answered would else always
   find the place that its own answer left, and those outside would starve. A hint that passed `GRACE_S` ago keeps no place any more.
4. Turns lie one service time apart. With one hint for all, those who come a network's delay after it find the few places taken by callers that
   were kept here until that very moment: 17 against 75 answers a second, simulated with room for 12; with turns 46 against 46.
5. The memory is bounded: beyond `most` holds the oldest is forgotten. A hold costs O(1) to make and to look up.

Why: closed-loop callers that repeat a refused request at once take every place that becomes free and halve the goodput of
all peers that were measured (169 to 85 answers/s, 98,000 refusals in 10 s).
"""

from collections import OrderedDict, deque
from collections.abc import Hashable

MOST_HOLDS = 1_024
GRACE_S = 0.02
STRIKES = 16
"""Callers behind pooled connections also come back early: with 40 % refused, one request in two million finds sixteen in a row."""


class Patience:
    """The holds of one backlog. `most` bounds how many are remembered."""

    def __init__(self, most: int = MOST_HOLDS) -> None:
        self._most = most
        self._until: OrderedDict[Hashable, float] = OrderedDict()
        self._strikes: dict[Hashable, int] = {}
        self._hints: deque[float] = deque(maxlen=most)
        self._turns: dict[int, float] = {}

    def turn(self, level: int, earliest: float, each_s: float) -> float:
        """When the next one of a priority level may come back: not before `earliest`, and `each_s` after the one before (rule 4)."""
        return max(earliest, self._turns.get(level, earliest) + each_s)

    def hold(self, who: tuple[Hashable, int], until: float) -> float:
        """Hold `who`, a caller with a priority level, until that time or, if it is held already, as long as it was told; say when."""
        told = self._until.setdefault(who, until)
        self._hints.append(told)
        self._turns[who[1]] = max(told, self._turns.get(who[1], told))
        if len(self._until) > self._most:
            self._strikes.pop(self._until.popitem(last=False)[0], None)
        return told

    def remaining_s(self, who: Hashable, now: float) -> float:
        """Seconds for which `who` is still held; 0 if it is free."""
        until = self._until.get(who)
        if until is None:
            return 0.0
        if until > now:
            self._strikes[who] = min(self._strikes.get(who, 0) + 1, 2 * STRIKES)
            return until - now
        del self._until[who]
        return 0.0

    def waited(self, who: Hashable) -> bool:
        """Whether `who` has a hold; ask before `remaining_s`, which ends one that has passed."""
        return who in self._until

    def others_wait(self, now: float) -> bool:
        """Whether somebody waits a hint out, or may be back from it any moment (rule 3)."""
        hints = self._hints
        while hints and hints[0] < now - GRACE_S:
            hints.popleft()
        return bool(hints)

    def deaf(self, who: Hashable) -> bool:
        """Whether `who` should wait for its next refusal (rule 2)."""
        return self._strikes.get(who, 0) >= STRIKES

    def admitted(self, who: Hashable) -> None:
        """Forget half of how `who` behaved."""
        if self._strikes and (left := self._strikes.pop(who, 0) // 2):
            self._strikes[who] = left
