"""The durable queue on disk (SQLite through apsw): one folder because one file could not hold it.

`store` is the asyncio face (`ports.Outbox`, `ports.Inbox`), `writer` the one thread that owns the one connection and commits in groups, `ledger` what a
transaction does, `room` who may enter a full store, `receiving` the receiver's side, `inspection` what operators may ask, `payloads` and `segments`
how bytes are kept, `database` opening, checking, setting aside and rescuing, `disk` lock, ballast and free space, `clocks` the readings behind TTLs.
"""

from appliance.adapters.store.clocks import read_clocks
from appliance.adapters.store.inspection import Inspection
from appliance.adapters.store.room import Admission
from appliance.adapters.store.store import Store

__all__ = ["Admission", "Inspection", "Store", "read_clocks"]
