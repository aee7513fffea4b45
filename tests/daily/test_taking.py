"""Taking from a queue whose disk fails for a while."""

from typing import Any

from structlog.testing import capture_logs

from appliance.contract.deferral import Kind, Taken
from appliance.contract.errors import WorldError
from appliance.daily.taking import Taking


class Outbox:
    """Gives nothing, or fails with `error`."""

    error: WorldError | None = None

    async def take(self, kinds: Any, *, items: int, lease_s: float) -> Taken:
        assert (kinds, items, lease_s) == ((Kind.EVENT,), 8, 2.0)
        if self.error is not None:
            raise self.error
        return Taken((), 0, None)


async def test_a_failing_disk_is_told_of_when_it_begins_and_when_it_ends() -> None:
    """Twice a second for an hour is no news: one line for each reason, and one for the end."""
    outbox = Outbox()
    taking = Taking(outbox, (Kind.EVENT,), items=8, lease_s=2.0)  # type: ignore[arg-type]  # the one method that is used
    with capture_logs() as lines:
        assert await taking.take() == Taken((), 0, None)
        for reason in ("disk", "disk", "disk_full"):
            outbox.error = WorldError(reason, "it does not read")
            assert await taking.take() is None
        outbox.error = None
        for _ in range(2):
            assert await taking.take() is not None
    assert [(line["event"], line.get("reason")) for line in lines] == [
        ("queue_not_read", "disk"),
        ("queue_not_read", "disk_full"),
        ("queue_read_again", None),
    ]
