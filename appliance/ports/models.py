"""Models at work: the engine that runs them, the desk that callers ask, the counter where promises are fetched."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from appliance.contract.inference import Answer, Array, Promise, Request, Signature
from appliance.contract.vocabulary import Platform


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that a worker holds: `key` is the name by which `run` and `unload` mean it."""

    key: str
    signature: Signature


class Share(Protocol):
    """Memory that a caller gave by descriptor, mapped here and known to every child."""

    @property
    def memory(self) -> memoryview:
        """The shared bytes, writable; arrays made over it travel to a child without a copy."""

    def close(self) -> None:
        """Forget it here and in the children; arrays over it must be gone. Idempotent."""


class Engine(Protocol):
    """Child processes that run models; a crash costs a process, not the daemon."""

    def share(self, fd: int, size: int) -> Share:
        """Map a memfd of a caller; the descriptor stays the caller's.

        Raises: TheirsError (`shared_memory`) if it is not sealed against shrinking (else its owner could fault this process), or shorter.
        """

    async def load(self, key: str, platform: Platform, weights: Callable[[], int]) -> LoadedModel:
        """Load a model from the descriptor that `weights()` returns; it is called again when a child is replaced.

        The engine closes each descriptor. Raises: TheirsError (`model`: the file is not loadable), WorldError (`worker_lost`).
        """

    def run(self, key: str, inputs: Mapping[str, Array], outputs: Sequence[str]) -> Awaitable[dict[str, Array]]:
        """Run one batch; empty `outputs` means all. What can run now is on its way before anybody awaits it.

        Raises, itself or what it returns: WorldError (`worker_lost`), TheirsError (`model`).
        """

    async def unload(self, key: str) -> None:
        """Forget a model and return its memory."""


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What a caller may know of a served model. `versions` has the newest first; `max_batch` is in rows of axis 0 and at least 1."""

    name: str
    versions: tuple[str, ...]
    signature: Signature
    ready: bool
    max_batch: int


class Desk(Protocol):
    """What the ingress asks of the serving loop; only `infer` may wait."""

    def live(self) -> bool:
        """Whether the loops of this process move."""

    def ready(self) -> bool:
        """Whether a request that comes now would be served."""

    def why_not_ready(self) -> str:
        """One sentence for a person; empty when ready."""

    def models(self) -> Sequence[str]:
        """Names of all models that are known here, ready or not."""

    def describe(self, model: str, version: str) -> ModelCard:
        """Describe a model; an empty version means the served one. Raises: TheirsError (`unknown_model`)."""

    async def load(self, model: str) -> None:
        """Serve a model that is known here but was unloaded; return when it serves.

        Raises: TheirsError (`unknown_model`: it was never released to this device, `model`), WorldError (`worker_lost`, `memory`).
        """

    async def unload(self, model: str) -> None:
        """Stop serving a model until `load` or the next release; requests that wait are answered. Raises: TheirsError (`unknown_model`)."""

    async def infer(self, request: Request) -> Answer | Promise:
        """Answer one request, or promise to (only where its tags accept that); its arrays may be read-only and unaligned.

        Cancellation means that the caller is gone.

        Raises: TheirsError (`unknown_model`, or a fault that `contract.admission.check` found),
        WorldError (`backlog_full`, `deadline`, `worker_lost`, `not_ready`, `draining`), with `retry_after_s` where it is known.
        """


class Counter(Protocol):
    """What the ingress asks about promises."""

    async def fetch(self, promise: str) -> Answer | Promise:
        """The promised answer, or the promise again while it is not there yet.

        Raises: TheirsError (`unknown_promise`), WorldError (`dropped`: it will never be answered, and why).
        """

    async def revive(self, promise: str) -> None:
        """An operator's retry, now. Raises: TheirsError (`unknown_promise`)."""

    async def drop(self, promise: str) -> None:
        """An operator's drop. Raises: TheirsError (`unknown_promise`)."""
