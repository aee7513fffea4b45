"""Promises over a disk that does not answer."""

import asyncio
from typing import Any

import numpy as np
import pytest

from appliance.contract.deferral import Stored
from appliance.contract.errors import WorldError
from appliance.contract.inference import Request
from appliance.core.reach.deferral import POLICIES
from appliance.edge.deferring import COMMIT_S, Deferring
from appliance.lab.virtual import run


class StuckOutbox:
    """A disk that answers a put when `gate` opens."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()

    async def put(self, _parcel: Any) -> Stored:
        await self.gate.wait()
        return Stored(1)


async def _never(_request: Request) -> Any:
    raise NotImplementedError


def test_a_disk_that_hangs_does_not_hang_the_caller() -> None:
    """No commit within 4 s: the caller is told so, and that the same id finds what the disk may still have kept; later it does."""

    async def body() -> None:
        outbox = StuckOutbox()
        deferring = Deferring(outbox, POLICIES, compute=_never, calm=lambda: True, told=lambda _: None)  # type: ignore[arg-type]  # one method of it
        request = Request("order-1", "m", {"x": np.ones((1, 2), np.float32)})
        busy = WorldError("backlog_full", "no room")
        began = asyncio.get_running_loop().time()
        with pytest.raises(WorldError, match=r"order-1: .*same id") as caught:
            await deferring.promise(request, busy)
        assert caught.value.reason == "disk"
        assert asyncio.get_running_loop().time() - began == pytest.approx(COMMIT_S, abs=0.01)
        outbox.gate.set()
        assert (await deferring.promise(request, busy)).id == "order-1"

    run(body())
