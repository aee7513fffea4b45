"""What was promised against what came of it: events by key, requests by id, from the files that the processes leave themselves."""

import json
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass

import apsw

from appliance.lab.daemon import Device, Lab
from appliance.lab.telling import PREFIX, PROMISED

Key = tuple[str, str]
"""A device and the idempotency key of one of its events."""


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


def accepted(lab: Lab) -> Counter[Key]:
    """The told events in the region's inbox, as of its last commit."""
    path = lab.site.path / "region" / "state" / "inbox" / "queue.db"
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
    try:
        connection.set_busy_timeout(2_000)
        rows = connection.execute("SELECT sender, idem FROM accepted WHERE idem LIKE ? ORDER BY n", (f"{PREFIX}%",))
        return Counter((str(sender), str(idem)) for sender, idem in rows)
    finally:
        connection.close()


def unordered(lab: Lab) -> int:
    """How many told events the region accepted after a later one of the same device."""
    path = lab.site.path / "region" / "state" / "inbox" / "queue.db"
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
    last: dict[str, str] = {}
    wrong = 0
    try:
        for sender, idem in connection.execute("SELECT sender, idem FROM accepted WHERE idem LIKE ? ORDER BY n", (f"{PREFIX}%",)):
            wrong += idem < last.get(sender, "")
            last[sender] = idem
    finally:
        connection.close()
    return wrong


def effects(lab: Lab) -> Counter[Key]:
    """The told events as the region's log has them: what an event is for. Lines of one number are one record (regional/receiving.py)."""
    records = {(str(line["device"]), str(line["data_key"]), str(line["number"])) for line in _lines(lab, "region", '"data_key"')}
    return Counter((device, key) for device, key, _ in records)


def effects_unordered(lab: Lab) -> int:
    """How many effects came after that of a later event of the same device; a record that was written again counts where it was first."""
    records = {(str(line["device"]), str(line["number"])): str(line["data_key"]) for line in _lines(lab, "region", '"data_key"')}
    last: dict[str, str] = {}
    wrong = 0
    for (device, _), key in records.items():
        wrong += key < last.get(device, "")
        last[device] = key
    return wrong


def kept(lab: Lab) -> Counter[str]:
    """How often a device's log says that a promised request was answered, by id."""
    return Counter(str(line["id"]) for device in lab.devices for line in _lines(lab, device.name, '"promise_kept"'))


def _lines(lab: Lab, name: str, word: str) -> list[dict[str, object]]:
    found = []
    for line in (lab.site.path / "log" / f"{name}.log").read_text(errors="replace").splitlines():
        if word in line:
            with suppress(ValueError):  # a process that was killed may leave half a line
                found.append(json.loads(line))
    return found
