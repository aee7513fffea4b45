"""The machine's clocks (port `Clock`)."""

import asyncio
import time

LONGEST_NAP_S = 2.0
"""asyncio's own clock stands still in suspend; naps no longer than this bound how late a sleeper notices that it is over."""


class SystemClock:
    """CLOCK_BOOTTIME for intervals, the wall clock for certificates and logs."""

    def monotonic(self) -> float:
        """Seconds since boot, suspend included."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def wall(self) -> float:
        """Seconds since the epoch; may jump."""
        return time.time()

    async def sleep_until(self, deadline: float) -> None:
        """Return when `monotonic()` has reached the deadline; yields once even if it has passed.

        Sleeping to deadlines that are sums of a period never drifts: lateness of one nap is not carried into the next.
        """
        await asyncio.sleep(0)
        left = deadline - self.monotonic()
        while left > 0:
            await asyncio.sleep(min(left, LONGEST_NAP_S))
            left = deadline - self.monotonic()
