"""Settling: does to the durable queue what `core.reach.deferral.settle` decided of an item that was sent or computed, and failed."""

from typing import assert_never

import structlog

from appliance.contract.deferral import Dropped, Item
from appliance.contract.errors import ApplianceError
from appliance.core.reach.deferral import Bury, Retry
from appliance.ports import Outbox


async def obey(outbox: Outbox, item: Item, decided: Retry | Bury, error: ApplianceError, why: str) -> tuple[Dropped, ...]:
    """Keep the item for later, or bury it; `why` stands beside the reason in the dead letter, `error` in the log.

    Returns what had to go so that it could be buried. Raises: WorldError (`disk`); then the item's lease ends by itself.
    """
    match decided:
        case Retry(attempts=attempts, not_before_s=not_before_s):
            await outbox.retry(item.seq, attempts, not_before_s)
            return ()
        case Bury(reason=reason):
            dropped = await outbox.bury(item.seq, f"{reason}: {why}")
            log = structlog.get_logger()
            log.error("item_buried", seq=item.seq, kind=item.kind, idem=item.idem, reason=reason, what=str(error))
            return dropped
        case _:
            assert_never(decided)
