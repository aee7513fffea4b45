"""What the daemon tells systemd, seen from the other end of a real NOTIFY_SOCKET."""

import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.adapters.systemd import ServiceManager


@pytest.fixture
def manager(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A datagram socket as systemd opens it."""
    # Unix paths are limited to 107 bytes, so not in pytest's own folder.
    with tempfile.TemporaryDirectory(prefix="ap-", dir="/tmp") as folder, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(f"{folder}/notify")
        listener.settimeout(2)
        monkeypatch.setenv("NOTIFY_SOCKET", str(Path(folder) / "notify"))
        yield listener


def test_each_call_is_one_datagram(manager: socket.socket) -> None:
    """Ready, status, watchdog and stopping reach systemd in their documented spelling."""
    notifier = ServiceManager()
    notifier.ready()
    notifier.status("serving labels,\n41 °C")
    notifier.watchdog()
    notifier.stopping()
    assert [manager.recv(4096).decode() for _ in range(4)] == ["READY=1", "STATUS=serving labels, 41 °C", "WATCHDOG=1", "STOPPING=1"]


def test_a_manager_that_went_away_does_not_hurt(manager: socket.socket) -> None:
    """Sending into a closed socket is silent."""
    notifier = ServiceManager()
    manager.close()
    notifier.watchdog()


def test_no_manager_no_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """Started by hand, all calls are silent and no watchdog is due."""
    for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"):
        monkeypatch.delenv(name, raising=False)
    notifier = ServiceManager()
    notifier.ready()
    notifier.status("by hand")
    assert notifier.watchdog_s is None


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"WATCHDOG_USEC": "30000000"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "often"}, None),
        ({}, None),
    ],
)
def test_the_watchdog_is_fed_at_half_its_time(environ: dict[str, str], expected: float | None) -> None:
    """sd_watchdog_enabled(3): half of WATCHDOG_USEC, and only in the process that it names."""
    assert ServiceManager(environ).watchdog_s == expected
