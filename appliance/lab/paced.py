"""An engine that only takes time (port `Engine`): what the serving loops are driven with in virtual time."""

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from appliance.contract.errors import TheirsError, WorldError
from appliance.contract.inference import Array, Signature, TensorSpec
from appliance.contract.vocabulary import Datatype, Mode, Platform
from appliance.ports import LoadedModel, Share

SIGNATURE = Signature(Platform.ONNX, (TensorSpec("x", Datatype.FP32, (-1, 2)),), (TensorSpec("y", Datatype.FP32, (-1, 2)),))


class PacedEngine:
    """Gives back what it is given, after `latency_s(mode, samples)`, one batch after the other on each of `workers`.

    Attributes:
        load_s: seconds that a load takes.
        broken: modes whose form does not load.
        ran: batches by mode and size.
    """

    def __init__(self, latency_s: Callable[[Mode, int], float], *, workers: int = 1, load_s: float = 0.1) -> None:
        self.load_s = load_s
        self.broken: set[Mode] = set()
        self.loaded: dict[str, Mode] = {}
        self.ran: Counter[tuple[Mode, int]] = Counter()
        self.busy_s = 0.0
        self._latency_s = latency_s
        self._free = asyncio.Semaphore(workers)

    def share(self, fd: int, size: int) -> Share:
        """Raises: TheirsError (`shared_memory`), always."""
        raise TheirsError("shared_memory", f"descriptor {fd} of {size} bytes: virtual engines share nothing")

    async def load(self, key: str, _platform: Platform, _weights: Callable[[], int]) -> LoadedModel:
        """Load after `load_s`; the key's second part is the mode. Raises: WorldError (`memory`) for a broken one."""
        await asyncio.sleep(self.load_s)
        mode = Mode(key.split(":")[1])
        if mode in self.broken:
            raise WorldError("memory", "no memory for this form", where=key)
        self.loaded[key] = mode
        return LoadedModel(key, SIGNATURE)

    async def run(self, key: str, inputs: Mapping[str, Array], _outputs: Sequence[str]) -> dict[str, Array]:
        """Take the time of a batch. Raises: TheirsError (`unknown_model`)."""
        mode = self.loaded.get(key)
        if mode is None:
            raise TheirsError("unknown_model", "is not loaded", where=key)
        samples = len(inputs["x"])
        async with self._free:
            took_s = self._latency_s(mode, samples)
            await asyncio.sleep(took_s)
            self.busy_s += took_s
        self.ran[mode, samples] += 1
        return {"y": np.array(inputs["x"])}

    async def unload(self, key: str) -> None:
        """Forget a model."""
        self.loaded.pop(key, None)
