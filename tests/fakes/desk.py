"""A desk that doubles: what the ingress talks to in its tests, with errors on demand."""

import asyncio
from collections.abc import Sequence

import numpy as np

from appliance.contract.admission import check
from appliance.contract.errors import ApplianceError, TheirsError, WorldError
from appliance.contract.inference import Answer, Promise, Request, Signature, TensorSpec
from appliance.contract.vocabulary import Datatype, Mode, Platform
from appliance.ports import ModelCard

SIGNATURE = Signature(
    Platform.ONNX,
    (TensorSpec("x", Datatype.FP32, (-1, 4)),),
    (TensorSpec("y", Datatype.FP32, (-1, 4)),),
    {"character": "a\nb"},
)


class DoublingDesk:
    """Answers y = 2x, raises `error` if set, waits for `gate` if set, sets `left` when a caller has left, and notes `changes`."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.gate: asyncio.Event | None = None
        self.left = asyncio.Event()
        self.is_ready = True
        self.operated: list[tuple[str, str]] = []
        self.is_loaded = True
        self.changes: list[tuple[str, str]] = []
        self.asked: list[Request] = []
        self.promise: Promise | None = None

    def live(self) -> bool:
        return True

    def ready(self) -> bool:
        return self.is_ready

    def why_not_ready(self) -> str:
        return "" if self.is_ready else "no model yet"

    def models(self) -> Sequence[str]:
        return ["double"]

    def describe(self, model: str, version: str) -> ModelCard:
        if model != "double" or version not in {"", "1"}:
            raise TheirsError("unknown_model", f"no model is called {model!r}", remedy="models here: double")
        return ModelCard(model, ("1",), SIGNATURE, ready=self.is_loaded, max_batch=8)

    async def load(self, model: str) -> None:
        await self._change("load", model)

    async def unload(self, model: str) -> None:
        await self._change("unload", model)

    async def _change(self, change: str, model: str) -> None:
        self.describe(model, "")
        if self.error is not None:
            raise self.error
        self.changes.append((change, model))
        self.is_loaded = change == "load"

    async def revive(self, promise: str) -> None:
        self.operated.append(("retry", promise))

    async def drop(self, promise: str) -> None:
        self.operated.append(("drop", promise))

    async def fetch(self, promise: str) -> Answer | Promise:
        if self.error is not None:
            raise self.error
        return self.promise or Answer(promise, "double", "1", {"y": np.ones((1, 4), np.float16)}, Mode.FULL)

    async def infer(self, request: Request) -> Answer | Promise:
        self.describe(request.model, request.version)
        self.asked.append(request)
        if not self.is_loaded:
            raise WorldError("not_ready", "it is not loaded", where=request.model)
        check(request, SIGNATURE, 8)
        if self.gate is not None:
            try:
                await self.gate.wait()
            except asyncio.CancelledError:
                self.left.set()
                raise
        if isinstance(self.error, ApplianceError | RuntimeError):
            raise self.error
        if self.promise is not None and request.tags.accept_deferral:
            return self.promise
        return Answer(request.id, request.model, "1", {"y": np.asarray(request.inputs["x"]) * np.float32(2)}, Mode.FULL)
