"""What becomes of a loaded model when its key may be held no longer: by its release's word, `keep` or `stop`."""

import asyncio
import os
from types import SimpleNamespace
from typing import Any

import pytest

from appliance.contract.errors import WorldError
from appliance.contract.models import CompiledArtifact, EdgeConstraints, Manifest
from appliance.contract.vocabulary import Platform
from appliance.edge import changing
from appliance.edge.changing import Changing, Corridor

ARTIFACT = CompiledArtifact(size=1, sha256="aa" * 32, container_size=1, container_sha256="bb" * 32, root="cc" * 32)


class Stage:
    """Serving, trust and disk as far as a release touches them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.held = True
        self.mounted: dict[str, str] = {}
        self.files: dict[str, bytes] = {}
        self.events: list[str] = []
        depot = SimpleNamespace(load=self.files.get, save=self.files.__setitem__)
        corridor = Corridor(
            metadata=SimpleNamespace(),  # type: ignore[arg-type]
            depot=depot,  # type: ignore[arg-type]
            weights=SimpleNamespace(open=lambda *_: os.memfd_create("w")),  # type: ignore[arg-type]
            board=SimpleNamespace(read=lambda: SimpleNamespace(memory_total_bytes=1 << 33)),  # type: ignore[arg-type]
        )

        async def pulled(_pull: Any) -> str:
            return "container"

        monkeypatch.setattr(changing, "Pull", lambda *_args, **_more: SimpleNamespace(run=lambda: pulled(None)))
        link: Any = SimpleNamespace(on=lambda *_: None)
        self.changing = Changing(link, link, corridor, self, self, tell=self.tell, region="eu-1", device="dev-1")  # type: ignore[arg-type]

    async def tell(self, what: str, _data: dict[str, str]) -> None:
        self.events.append(what)

    def holds(self, offline: str) -> bool:
        assert offline == "lease"
        return self.held

    async def data_key(self, _artifact: str) -> bytes:
        return self.kept_key("")

    def kept_key(self, _artifact: str) -> bytes:
        if not self.held:
            raise WorldError("not_attested", "not now")
        return b"k"

    def versions(self) -> dict[str, str]:
        return dict(self.mounted)

    async def mount(self, manifest: Manifest, _forms: object) -> None:
        self.mounted[manifest.model_id] = manifest.version

    async def unload(self, model: str) -> None:
        del self.mounted[model]

    async def turn(self, wanted: list[Manifest]) -> list[Manifest]:
        """One turn of the loop."""
        return await self.changing._work(wanted + await self.changing._lapsed(), lambda: None)


def release(at_term: Any) -> Manifest:
    return Manifest(
        model_id="m",
        version="1",
        sha256="aa" * 32,
        token=1,
        compiled_artifacts={Platform.ONNX: ARTIFACT},
        edge_constraints=EdgeConstraints(min_vram_gb=1.0, max_batch_size=1, target_latency_ms=1.0),
        released_at=0.0,
        at_term=at_term,
    )


@pytest.mark.parametrize(("at_term", "after"), [("stop", {}), ("keep", {"m": "1"})])
def test_a_models_release_says_what_the_end_of_the_term_means(at_term: str, after: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`stop` unloads at the term's end, tells it, and loads again when the key may be held; `keep` serves on what is open."""

    async def run() -> None:
        stage = Stage(monkeypatch)
        assert await stage.turn([release(at_term)]) == []
        assert stage.mounted == {"m": "1"}
        stage.held = False
        wanted = await stage.turn([])
        assert stage.mounted == after
        assert ("model_stopped_at_term" in stage.events) == (at_term == "stop")
        stage.held = True
        assert await stage.turn(wanted) == []
        assert stage.mounted == {"m": "1"}

    asyncio.run(run())
