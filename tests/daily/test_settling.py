"""What was decided of a failed item is what the queue is told."""

from typing import Any, cast

import pytest

from appliance.contract.deferral import Dropped, Instant, Item, Kind
from appliance.contract.errors import TheirsError, WorldError
from appliance.core.reach.deferral import Bury, Retry
from appliance.daily.settling import obey
from appliance.lab.virtual import run
from appliance.ports import Outbox

ITEM = Item(7, "", Kind.EVENT, 5, "idem-7", 10, Instant("boot", 0.0, 0.0, trusted=True), 0.0)
ERROR = TheirsError("oversized", "too many bytes")
OLDEST = Dropped(1, Kind.EVENT, "idem-1", "too many dead letters")


class Told:
    """An outbox that notes what it is told, or whose disk fails."""

    def __init__(self, *, broken: bool = False) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self._broken = broken

    async def retry(self, *words: Any) -> bool:
        return bool(self._note("retry", *words))

    async def bury(self, *words: Any) -> tuple[Dropped, ...]:
        return self._note("bury", *words)

    def _note(self, *words: Any) -> tuple[Dropped, ...]:
        if self._broken:
            raise WorldError("disk", "full")
        self.calls.append(words)
        return (OLDEST,)


@pytest.mark.parametrize(
    ("decided", "told", "dropped"),
    [
        (Retry(2, 31.5), ("retry", 7, 2, 31.5), ()),
        (Bury("refused"), ("bury", 7, "refused: too many bytes"), (OLDEST,)),
    ],
    ids=["kept for later", "buried with its reason"],
)
def test_the_queue_is_told_what_was_decided(decided: Retry | Bury, told: tuple[Any, ...], dropped: tuple[Dropped, ...]) -> None:
    """A retry with its values, a burial with both reasons, whose victims come back; a disk that fails is the caller's to hear of."""
    outbox = Told()
    assert run(obey(cast("Outbox", outbox), ITEM, decided, ERROR, ERROR.what)) == dropped
    assert outbox.calls == [told]
    with pytest.raises(WorldError, match="full"):
        run(obey(cast("Outbox", Told(broken=True)), ITEM, decided, ERROR, ERROR.what))
