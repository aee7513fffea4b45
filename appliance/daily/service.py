"""The frame around every daemon's life: a journal, a signal that ends it, and a stack that closes what was opened."""

import asyncio
import contextlib
import signal
from collections.abc import Awaitable, Callable

from appliance.contract.settings import Log
from appliance.daily.journal import open_journal


async def serve(log: Log, body: Callable[[contextlib.AsyncExitStack, asyncio.Event], Awaitable[None]]) -> None:
    """Run `body(stack, stop)` until it returns; SIGTERM and SIGINT set `stop`. Raises what the body raises."""
    open_journal(log.level, log.format)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with contextlib.AsyncExitStack() as stack:
        await body(stack, stop)
