"""Who gives the lab's processes their identities: an authority in this process by default, real SPIRE on request (`appliance.lab.spire`).

No process can tell which: each is given the address of a Workload API, and its code path is the same.
"""

from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Protocol

from appliance.contract import identities
from appliance.lab.authority import Authority, Workload
from appliance.lab.workload_api import WorkloadApi


class Credential(Protocol):
    """An SVID with its key as one PEM text. Times are seconds since the epoch."""

    @property
    def pem(self) -> bytes:
        """Chain, leaf first, and key."""

    @property
    def not_after(self) -> float:
        """When it expires."""

    @property
    def renew_at(self) -> float:
        """When a newer one is due."""


class Issuer(Protocol):
    """Gives identities to the lab's processes."""

    @property
    def ttl_s(self) -> float:
        """The life of an SVID."""

    @property
    def root_pem(self) -> bytes:
        """The trust bundle; from `open` on."""

    async def open(self, stack: AsyncExitStack) -> None:
        """Start; the stack stops it."""

    async def admit(self, workload: Workload) -> str:
        """Register a workload of a machine of its own and return its Workload API's address. Raises: WorldError."""

    async def admit_device(self, workload: Workload, host: str, port: int) -> tuple[str, int]:
        """Register a device by its software TPM; return the Workload API's address, and the port where the daemon finds the TPM. Raises: WorldError."""

    async def broker(self, workload: Workload) -> Callable[[], Credential]:
        """Register the broker and return what fetches its present SVID: blocking, raises WorldError."""


class OwnAuthority:
    """An authority in memory, and a Workload API socket for each process."""

    def __init__(self, folder: Path, ttl_s: float) -> None:
        self.ttl_s = ttl_s
        self._authority = Authority(trust_domain=identities.TRUST_DOMAIN, ttl_s=ttl_s)
        self._api = WorkloadApi(self._authority, folder)

    @property
    def root_pem(self) -> bytes:
        """The trust bundle."""
        return self._authority.root_pem

    async def open(self, stack: AsyncExitStack) -> None:
        """Make the directory for the sockets."""
        self._api.start()
        stack.callback(self._api.stop)

    async def admit(self, workload: Workload) -> str:
        """Serve a workload."""
        return self._api.register(workload)

    async def admit_device(self, workload: Workload, host: str, port: int) -> tuple[str, int]:  # noqa: ARG002 - its TPM has no part in it here
        """Serve a device; its TPM has no part in its identity here."""
        return self._api.register(workload), port

    async def broker(self, workload: Workload) -> Callable[[], Credential]:
        """Issue to the broker directly."""
        return lambda: self._authority.issue(workload)
