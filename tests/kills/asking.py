"""Callers who take promises all the while: each asks a device for more than it can do, is promised the answer, and fetches it when all is over."""

import asyncio
import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from appliance.client.aio import AsyncAppliance
from appliance.client.results import Deferred, Result
from appliance.contract.errors import ApplianceError
from appliance.contract.inference import Tags
from appliance.lab.daemon import MODEL, Lab

WIDTH = 8
IMPOSSIBLE_SLO_S = 1e-6
"""Nobody answers so soon: the device promises instead."""
SUBMIT_TIMEOUT_S = 2.0
FETCH_AT_ONCE = 8


def small_model(path: Path) -> Path:
    """One matrix that doubles its input: what is computed costs nothing, and can be checked."""
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", WIDTH]) for name in ("x", "y")]
    weight = numpy_helper.from_array(2 * np.eye(WIDTH, dtype=np.float32), "w")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "double", infos[:1], infos[1:], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    return path


class Asking:
    """One caller for each device. `run` until cancelled; `held` are the promises, by id."""

    def __init__(self, lab: Lab, every_s: float) -> None:
        self.held: dict[str, Deferred] = {}
        self.refused: Counter[str] = Counter()
        self._every_s = every_s
        self._clients = {device.name: AsyncAppliance(f"unix:{device.socket}", timeout_s=SUBMIT_TIMEOUT_S) for device in lab.devices}

    async def run(self) -> None:
        """Ask; ends only by cancellation."""
        async with asyncio.TaskGroup() as group:
            for name in self._clients:
                group.create_task(self._ask(name))

    async def close(self) -> None:
        """Close all connections."""
        for client in self._clients.values():
            await client.close()

    async def _ask(self, name: str) -> None:
        tags = Tags(slo_s=IMPOSSIBLE_SLO_S, data_residency="device")
        for number in itertools.count():
            await asyncio.sleep(self._every_s)
            ident = f"{name}-later-{number:05d}"
            try:
                got = await self._clients[name].submit(MODEL, {"x": _asked(ident)}, tags=tags, id=ident)
            except ApplianceError as error:
                self.refused[error.reason] += 1
            else:
                if isinstance(got, Deferred):
                    self.held[ident] = got

    async def missing(self, within_s: float) -> dict[str, str]:
        """Fetch every promised answer; returns those that did not come or are wrong, and why."""
        places, found = asyncio.Semaphore(FETCH_AT_ONCE), dict[str, str]()

        async def fetch(ident: str) -> None:
            async with places:
                try:
                    client = self._clients[ident.partition("-later-")[0]]
                    answer: Result = await client.fetch(self.held[ident], wait_s=within_s)
                except ApplianceError as error:
                    found[ident] = str(error)
                else:
                    if not np.array_equal(answer.outputs.get("y", 0), 2 * _asked(ident)):
                        found[ident] = f"another answer: {answer.outputs}"

        async with asyncio.TaskGroup() as group:
            for ident in self.held:
                group.create_task(fetch(ident))
        return found


def _asked(ident: str) -> Any:
    """The input of a request: its number, so that an answer tells whose it is."""
    return np.full((1, WIDTH), float(ident.rpartition("-")[2]), np.float32)
