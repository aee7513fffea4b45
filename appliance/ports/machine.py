"""The machine: time, sensors, the service manager."""

from typing import Protocol

from appliance.contract.vitals import BoardReading


class Clock(Protocol):
    """Time, so that a test can own it."""

    def monotonic(self) -> float:
        """Seconds that only grow and go on in suspend (CLOCK_BOOTTIME); the zero is arbitrary."""

    def wall(self) -> float:
        """Seconds since the epoch; may jump."""

    async def sleep_until(self, deadline: float) -> None:
        """Return when `monotonic()` has reached the deadline."""


class Board(Protocol):
    """The sensors of the machine."""

    def read(self) -> BoardReading:
        """Read all sensors now (well under 10 ms). Raises: WorldError if not even memory can be read."""


class Notifier(Protocol):
    """The service manager (sd_notify); silent where there is none."""

    def ready(self) -> None:
        """READY=1."""

    def status(self, text: str) -> None:
        """STATUS=text, one line for `systemctl status`."""

    def watchdog(self) -> None:
        """WATCHDOG=1."""

    def stopping(self) -> None:
        """STOPPING=1."""

    @property
    def watchdog_s(self) -> float | None:
        """How often `watchdog` must be called, already halved; None if no watchdog is set."""
