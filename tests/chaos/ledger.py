"""What was promised against what came of it: events by key, requests by id, from the files that the processes leave themselves."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import apsw

from appliance.lab.daemon import Device, Lab
from appliance.lab.telling import PREFIX, PROMISED

Key = tuple[str, str]
"""A device and the idempotency key of one of its events."""
ZERO = (
    "events_lost", "events_accepted_twice", "events_out_of_order", "events_without_effect", "events_with_effect_twice", "requests_lost",
    "requests_computed_twice",
)  # fmt: skip
"""What has to be 0 in a reckoning."""
SHOWN = 10


@dataclass(frozen=True, slots=True)
class Account:
    """Events that were promised, and those that the region accepted."""

    promised: frozenset[Key]
    accepted: Counter[Key]

    @property
    def lost(self) -> frozenset[Key]:
        """Promised, and not (yet) at the region."""
        return self.promised - self.accepted.keys()

    @property
    def repeats(self) -> int:
        """Acceptances beyond the first of each key."""
        return sum(count - 1 for count in self.accepted.values())


def promised(devices: list[Device], lab: Lab) -> frozenset[Key]:
    """The events whose commit a device has noted so far."""
    found: set[Key] = set()
    for device in devices:
        with suppress(OSError):
            lines = (lab.site.path / device.name / PROMISED).read_text().split()
            found |= {(device.name, key) for key in lines}
    return frozenset(found)


@contextmanager
def _inbox(lab: Lab) -> Iterator[apsw.Connection]:
    """The region's inbox, as of its last commit."""
    path = lab.site.path / "region" / "state" / "inbox" / "queue.db"
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
    try:
        connection.set_busy_timeout(2_000)
        yield connection
    finally:
        connection.close()


def _told(lab: Lab) -> list[Key]:
    """The told events that the region accepted, in this order."""
    with _inbox(lab) as inbox:
        rows = inbox.execute("SELECT sender, idem FROM accepted WHERE idem LIKE ? ORDER BY n", (f"{PREFIX}%",))
        return [(str(sender), str(idem)) for sender, idem in rows]


def accepted(lab: Lab) -> Counter[Key]:
    """The told events in the region's inbox, as of its last commit."""
    return Counter(_told(lab))


def unordered(lab: Lab) -> int:
    """How many told events the region accepted after a later one of the same device."""
    return _backwards(_told(lab))


def newest(lab: Lab, device: str) -> str:
    """The key of a device's last told event in the region's inbox, empty if there is none; cheap however long the inbox is."""
    with _inbox(lab) as inbox:
        query = "SELECT max(idem) FROM accepted WHERE sender = ? AND idem >= ? AND idem < ?"
        row = inbox.execute(query, (device, PREFIX, PREFIX + "~")).fetchone()
    return str(row[0] or "") if row else ""


def _backwards(keys: Iterable[Key]) -> int:
    """How many come after a later one of the same device."""
    last: dict[str, str] = {}
    wrong = 0
    for device, key in keys:
        wrong += key < last.get(device, "")
        last[device] = key
    return wrong


def effects(lab: Lab) -> Counter[Key]:
    """The told events as the region's log has them: what an event is for. Lines of one number are one record (regional/receiving.py)."""
    records = {(str(line["device"]), str(line["data_key"]), str(line["number"])) for line in _lines(lab, "region", '"data_key"')}
    return Counter((device, key) for device, key, _ in records)


def effects_unordered(lab: Lab) -> int:
    """How many effects came after that of a later event of the same device; a record that was written again counts where it was first."""
    records = {(str(line["device"]), str(line["number"])): str(line["data_key"]) for line in _lines(lab, "region", '"data_key"')}
    return _backwards((device, key) for (device, _), key in records.items())


def kept(lab: Lab) -> Counter[str]:
    """How often a device's log says that a promised request was answered, by id."""
    return Counter(str(line["id"]) for device in lab.devices for line in _lines(lab, device.name, '"promise_kept"'))


def reckoning(lab: Lab, owed: frozenset[Key], held: int, missing: Mapping[str, str], refused: Mapping[str, int]) -> dict[str, Any]:
    """Everything that was promised in a run, against what came of it: `owed` events, and `held` promised requests of which some are `missing`."""
    account, happened = Account(owed, accepted(lab)), effects(lab)
    return {
        "events_promised": len(owed),
        "events_lost": len(account.lost),
        "events_accepted_twice": account.repeats,
        "events_out_of_order": unordered(lab),
        "events_without_effect": len(owed - happened.keys()),
        "events_with_effect_twice": sum(count - 1 for count in happened.values()),
        "requests_promised": held,
        "requests_lost": len(missing),
        "requests_computed_twice": sum(count - 1 for count in kept(lab).values()),
        "requests_not_promised": dict(refused),
        "missing": dict(list(missing.items())[:SHOWN]),
    }


def _lines(lab: Lab, name: str, word: str) -> list[dict[str, object]]:
    found = []
    for line in (lab.site.path / "log" / f"{name}.log").read_text(errors="replace").splitlines():
        if word in line:
            with suppress(ValueError):  # a process that was killed may leave half a line
                found.append(json.loads(line))
    return found
