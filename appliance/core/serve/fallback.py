"""Old answers for callers who would rather have one than none: bounded in bytes, and never passed off as fresh.

API: `Fallback[T](max_bytes)`; `.keep(key, answer, size_bytes, confidence, now)`; `.find(key, now) -> Stale(answer, age_s, confidence) | None`.

1. The key is the SHA-256 of model name and inputs, made by the caller: an answer is found for exactly these inputs or not at all.
2. Confidence halves every `half_life_s`, from what the model said; an answer older than `max_age_s` is gone.
3. At most `max_bytes` of answers; the least recently used go first. What alone is larger is not kept.
4. An answer of another time than `now`, later by clock error, has age 0 and is still a `Stale`.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from appliance.contract.errors import OursError

T = TypeVar("T")

KEY_BYTES = 32
ENTRY_BYTES = 512
"""What an entry costs beside its answer (key, record, dictionary slot): counted, so that many empty answers are bounded too."""


@dataclass(frozen=True, slots=True)
class Stale(Generic[T]):
    """An old answer: `age_s` seconds old, worth `confidence` (0 to 1) now."""

    answer: T
    age_s: float
    confidence: float


class _Kept(NamedTuple, Generic[T]):
    answer: T
    size_bytes: int
    confidence: float
    at: float


class Fallback(Generic[T]):
    """An empty store of at most `max_bytes`, whose answers lose half of their worth in `half_life_s` and all in `max_age_s`."""

    def __init__(self, max_bytes: int, *, half_life_s: float = 60.0, max_age_s: float = 600.0) -> None:
        self.held_bytes = 0
        self._max_bytes = max_bytes
        self._half_life_s = half_life_s
        self._max_age_s = max_age_s
        self._kept: OrderedDict[bytes, _Kept[T]] = OrderedDict()

    def __len__(self) -> int:
        """How many answers are held."""
        return len(self._kept)

    def keep(self, key: bytes, answer: T, size_bytes: int, confidence: float, now: float) -> None:
        """Keep an answer, replacing an older one. Raises: OursError (`key`, `confidence`), and nothing changed."""
        if len(key) != KEY_BYTES:
            raise OursError("key", f"{len(key)} bytes, a SHA-256 has {KEY_BYTES}")
        if not (0 <= confidence <= 1 and size_bytes >= 0):
            raise OursError("confidence", f"confidence {confidence}, size {size_bytes}")
        self.drop(key)
        if size_bytes + ENTRY_BYTES > self._max_bytes:
            return
        self._kept[key] = _Kept(answer, size_bytes + ENTRY_BYTES, confidence, now)
        self.held_bytes += size_bytes + ENTRY_BYTES
        while self.held_bytes > self._max_bytes:
            self.held_bytes -= self._kept.popitem(last=False)[1].size_bytes

    def find(self, key: bytes, now: float) -> Stale[T] | None:
        """The kept answer for these inputs, with what it is still worth; None if there is none or it is too old."""
        kept = self._kept.get(key)
        if kept is None:
            return None
        age = max(0.0, now - kept.at)
        if age > self._max_age_s:
            self.drop(key)
            return None
        self._kept.move_to_end(key)
        return Stale(kept.answer, age, kept.confidence * 0.5 ** (age / self._half_life_s))

    def drop(self, key: bytes) -> None:
        """Forget one answer; not an error if there is none."""
        kept = self._kept.pop(key, None)
        if kept is not None:
            self.held_bytes -= kept.size_bytes

    def clear(self) -> None:
        """Forget everything, as when the model is replaced."""
        self._kept.clear()
        self.held_bytes = 0
