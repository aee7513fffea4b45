"""The service manager (port `Notifier`): sd_notify messages by the library `sdnotify`; silent where there is no manager."""

import os
import weakref
from collections.abc import Mapping

import sdnotify


class ServiceManager:
    """Tells systemd how the daemon is. Sending never blocks and never raises: a daemon must not die of its manager.

    `environ` carries WATCHDOG_USEC and WATCHDOG_PID (sd_watchdog_enabled(3)); the library itself reads NOTIFY_SOCKET of the process.
    """

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        # Without a socket's name the library opens one and leaks it.
        self._manager = sdnotify.SystemdNotifier() if os.environ.get("NOTIFY_SOCKET") else None
        if self._manager and self._manager.socket:
            weakref.finalize(self, self._manager.socket.close)  # the library never closes it
        self._watchdog_s = _half_interval(environ)

    def ready(self) -> None:
        """READY=1."""
        self._send("READY=1")

    def status(self, text: str) -> None:
        """STATUS=text, one line for `systemctl status`."""
        self._send(f"STATUS={' '.join(text.split())}")

    def watchdog(self) -> None:
        """WATCHDOG=1."""
        self._send("WATCHDOG=1")

    def stopping(self) -> None:
        """STOPPING=1."""
        self._send("STOPPING=1")

    @property
    def watchdog_s(self) -> float | None:
        """How often `watchdog` must be called, already halved; None if no watchdog is set."""
        return self._watchdog_s

    def _send(self, state: str) -> None:
        if self._manager:
            # The library encodes as Latin-1; systemd wants UTF-8. The detour puts UTF-8 on the wire.
            self._manager.notify(state.encode().decode("latin-1"))


def _half_interval(environ: Mapping[str, str]) -> float | None:
    """Half of WATCHDOG_USEC in seconds, if it is meant for this process."""
    interval_us, pid = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", "")
    if not interval_us.isascii() or not interval_us.isdigit() or int(interval_us) == 0:
        return None
    if pid and pid != str(os.getpid()):
        return None
    return int(interval_us) / 2e6
