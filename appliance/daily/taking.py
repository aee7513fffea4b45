"""Takes from the durable queue what is due; a disk that does not give it is told of once when that begins and once when it ends."""

from collections.abc import Collection

import structlog

from appliance.contract.deferral import Taken
from appliance.contract.errors import WorldError
from appliance.ports import Outbox


class Taking:
    """What is due of some kinds, at most `items` at a time, leased for `lease_s` seconds."""

    def __init__(self, outbox: Outbox, kinds: Collection[str], *, items: int, lease_s: float) -> None:
        self._outbox = outbox
        self._kinds = kinds
        self._items = items
        self._lease_s = lease_s
        self._trouble = ""
        self._log = structlog.get_logger()

    async def take(self) -> Taken | None:
        """Take; None while the disk fails, and then nothing is lost: it is there when the disk is."""
        try:
            taken = await self._outbox.take(self._kinds, items=self._items, lease_s=self._lease_s)
        except WorldError as error:
            if error.reason != self._trouble:
                self._log.warning("queue_not_read", kinds=list(self._kinds), reason=error.reason, what=str(error))
            self._trouble = error.reason
            return None
        if self._trouble:
            self._log.info("queue_read_again", kinds=list(self._kinds))
        self._trouble = ""
        return taken
