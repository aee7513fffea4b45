"""Real parts for tests: one region's mosquitto with mTLS, an authority and a Workload API, in a temporary directory, torn down after."""

import asyncio
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Self

from appliance.adapters.mqtt import LinkSettings, MqttLink, SessionSettings
from appliance.adapters.spiffe import WorkloadIdentity
from appliance.contract import identities, topics
from appliance.lab.authority import Authority, Workload
from appliance.lab.broker import Broker
from appliance.lab.workload_api import WorkloadApi

REGION = "eu-1"
BROKER = Workload(identities.broker(REGION), identities.BROKER)
AGGREGATOR = Workload(identities.aggregator(REGION), identities.region_user(REGION))
CLOUD = Workload(identities.cloud(), identities.CLOUD)


def device(name: str, *, ttl_s: float | None = None) -> Workload:
    """Return a device's registration entry."""
    return Workload(identities.device(REGION, name), identities.device_user(name), ttl_s)


def answers(workload: Workload) -> str:
    """Return the topic on which a workload gets its answers."""
    return topics.upstream_answer(REGION) if workload is AGGREGATOR else topics.answer(REGION, workload.dns_name)


class PrivateRegion:
    """`state` holds what the broker writes; `process` is the running mosquitto."""

    def __init__(self, *, autosave_s: int = 5) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="ap-", dir="/tmp"))
        self.state = self.directory / "broker"
        self.authority = Authority()
        self.api = WorkloadApi(self.authority, self.directory / "spiffe")
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self.addresses: dict[str, str] = {}
        self.api.start()
        self.register(BROKER)
        root = self.authority.root_pem
        issue = lambda: self.api.svid(BROKER.spiffe_id)  # noqa: E731 - one expression
        self.broker = Broker(self.state, self.port, region=REGION, root_pem=root, issue=issue, autosave_s=autosave_s)
        self.broker.prepare()

    def __enter__(self) -> Self:
        """Start the broker."""
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop everything and remove the directory."""
        self.kill()
        self.api.stop()
        self.broker.close()
        shutil.rmtree(self.directory)

    def register(self, workload: Workload) -> str:
        """Serve a workload's SVID and return the address of its socket."""
        if workload.spiffe_id not in self.addresses:
            self.addresses[workload.spiffe_id] = self.api.register(workload)
        return self.addresses[workload.spiffe_id]

    def start(self) -> None:
        """Start mosquitto and wait until it listens; it dies with this process."""
        command = ["setpriv", "--pdeathsig", "KILL", "--", *self.broker.command()]
        with (self.directory / "broker.log").open("ab") as log:
            self.process = subprocess.Popen(command, pass_fds=self.broker.fds, stdout=log, stderr=log)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and self.process.poll() is None:
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return
            time.sleep(0.02)
        raise AssertionError(f"mosquitto does not listen:\n{self.log()}")

    def kill(self) -> None:
        """Kill -9, as a power cut would."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def terminate(self) -> None:
        """SIGTERM, as systemd would."""
        assert self.process is not None
        self.process.terminate()
        assert self.process.wait(10) == 0
        self.process = None

    def log(self) -> str:
        """Return what mosquitto said."""
        return (self.directory / "broker.log").read_text()

    def settings(self, **changes: object) -> LinkSettings:
        """Return link settings for this region with some fields changed."""
        return LinkSettings(session=SessionSettings(port=self.port, connect_timeout_s=3.0), **changes)  # type: ignore[arg-type]

    @asynccontextmanager
    async def identity(self, workload: Workload) -> AsyncIterator[WorkloadIdentity]:
        """Open a workload's identity for a while."""
        identity = await WorkloadIdentity.open(self.register(workload))
        try:
            yield identity
        finally:
            await identity.close()

    @asynccontextmanager
    async def link(
        self, workload: Workload, *routes: tuple[str, str, object], wait: bool = True, **changes: object
    ) -> AsyncIterator[MqttLink]:
        """Run a workload's link for a while; routes are (`on` or `serve`, pattern, handler)."""
        async with self.identity(workload) as identity:
            link = MqttLink(
                identity, self.settings(**changes), client_id=workload.dns_name, peer=BROKER.spiffe_id, answers=answers(workload)
            )
            for verb, pattern, handler in routes:
                getattr(link, verb)(pattern, handler)
            task = asyncio.create_task(link.run())
            try:
                if wait:
                    await until(lambda: link.connected)
                yield link
            finally:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task


def free_port() -> int:
    """Ask the kernel for a port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def until(condition: object, timeout_s: float = 10.0) -> None:
    """Return when `condition()` holds; fail after the time."""
    assert callable(condition)
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - what tests wait for has no event
            await asyncio.sleep(0.01)
