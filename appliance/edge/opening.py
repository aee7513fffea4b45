"""Opening: every adapter of a device, made from its settings; the stack closes them in reverse. The other half of the composition root is `daemon`."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from appliance.adapters.board_generic import GenericBoard
from appliance.adapters.board_jetson import JetsonBoard
from appliance.adapters.board_jtop import open_jtop
from appliance.adapters.board_sim import ReplayBoard, SimBoard
from appliance.adapters.clock import SystemClock
from appliance.adapters.inference.backend import Options
from appliance.adapters.inference.changes import Change
from appliance.adapters.inference.workers import Workers
from appliance.adapters.ingress import Ingress
from appliance.adapters.metrics import Meter
from appliance.adapters.mqtt.link import LinkSettings, MqttLink
from appliance.adapters.mqtt.session import SessionSettings
from appliance.adapters.nvml import NvmlBoard, open_nvml
from appliance.adapters.spiffe import WorkloadIdentity
from appliance.adapters.store import Store
from appliance.contract import identities, topics
from appliance.contract.deferral import Bounds, Rules
from appliance.contract.errors import WorldError
from appliance.contract.vocabulary import Outcome
from appliance.core.reach import bounds
from appliance.core.reach.deferral import POLICIES
from appliance.core.serve import tegrastats
from appliance.core.serve.renewal import Holding
from appliance.daily import naming
from appliance.edge.settings import Edge
from appliance.ports import Board, Counter, Desk

IDENTITY_TIMEOUT_S = 20.0


def open_board(settings: Edge, clock: SystemClock, load: Callable[[], float], stack: contextlib.AsyncExitStack) -> Board:
    """The board that the settings name; `load` (0..1) is what heats a simulated one. Raises: WorldError (`sim.replay`, `jtop`)."""
    match settings.board.kind:
        case "jetson":
            return JetsonBoard(GenericBoard())
        case "jtop":
            board = open_jtop(JetsonBoard(GenericBoard()), settings.board.interval_s)
            stack.callback(board.close)
            return board
        case "sim" if settings.sim.replay:
            return ReplayBoard(tegrastats.readings(naming.read(Path(settings.sim.replay), "sim.replay").decode()), clock.monotonic)
        case "sim":
            return SimBoard.from_settings(settings.sim, clock.monotonic, load)
        case _:
            return NvmlBoard(GenericBoard(), open_nvml())


async def open_link(settings: Edge, stack: contextlib.AsyncExitStack) -> MqttLink:
    """The link, under the identity that the settings expect. Raises: WorldError (`identity`, `workload_api`)."""
    device, region, domain = settings.device.name, settings.device.region, settings.trust.trust_domain
    identity = await WorkloadIdentity.open(settings.trust.workload_api, timeout_s=IDENTITY_TIMEOUT_S)
    stack.push_async_callback(identity.close)
    expected = identities.device(region, device, trust_domain=domain)
    if identity.spiffe_id != expected:
        raise WorldError(
            "identity",
            f"the Workload API says that this is {identity.spiffe_id}, the settings say {expected}",
            remedy="correct the registration entry, or [device] in the settings",
        )
    session = SessionSettings(host=settings.reach.broker_host, port=settings.reach.broker_port)
    return MqttLink(
        identity,
        LinkSettings(session=session, backoff_cap_s=settings.reach.retry_cap_s),
        client_id=identities.device_user(device),
        peer=identities.broker(region, trust_domain=domain),
        answers=topics.answer(region, device),
    )


async def open_engine(settings: Edge, stack: contextlib.AsyncExitStack, told: Callable[[Change], None]) -> Workers:
    """The inference processes; `told` hears of every loss."""
    threads = settings.serve.threads or max(1, (os.cpu_count() or 1) // settings.serve.workers)
    options = Options(prepacking=settings.serve.prepacking)
    engine = Workers(
        size=settings.serve.workers,
        threads=threads,
        batch_deadline_s=settings.serve.batch_deadline_s,
        options=options,
        gpu_bytes=open_nvml(),
        on_change=told,
    )
    stack.push_async_callback(engine.close)
    return engine


async def open_store(settings: Edge, stack: contextlib.AsyncExitStack) -> Store:
    """The durable queue. Raises: WorldError (`disk`, `store_locked`, `format`)."""
    queue = settings.queue
    held = Bounds(max_bytes=queue.max_mib << 20, min_free_bytes=queue.free_mib << 20)
    store = Store(Path(settings.device.state_dir) / "queue", Rules(POLICIES, held), bounds.admit)
    return await stack.enter_async_context(store)


async def open_ingress(
    settings: Edge,
    desk: Desk,
    engine: Workers,
    *,
    metrics: Callable[[], bytes],
    status: Callable[[], object],
    counter: Counter,
    refused: Callable[[str, Outcome], None],
) -> Ingress:
    """The local API over HTTP, on TCP and on its Unix socket, with frames beside it. Raises: WorldError (`listen`)."""
    serve, folder = settings.serve, Path(settings.device.runtime_dir)
    ingress = Ingress(
        desk,
        metrics=metrics,
        status=status,
        body_limit_bytes=serve.body_limit_mib << 20,
        repository=serve.repository,
        share=engine.share,
        counter=counter,
        refused=refused,
    )
    socket = folder / serve.socket if serve.socket else None
    await ingress.start(serve.host, serve.port, socket, folder / serve.frames_socket if serve.frames_socket else None)
    return ingress


async def open_rpc(settings: Edge, desk: Desk, stack: contextlib.AsyncExitStack, refused: Callable[[str, Outcome], None]) -> int | None:
    """The local API over gRPC, if it is wanted; returns the port. Raises: WorldError (`listen`)."""
    serve = settings.serve
    if not serve.grpc:
        return None
    from appliance.adapters.rpc import Rpc  # noqa: PLC0415 - whoever does not serve gRPC need not load it

    rpc = Rpc(desk, body_limit_bytes=serve.body_limit_mib << 20, repository=serve.repository, refused=refused)
    port = await rpc.start(serve.host, serve.grpc_port)
    stack.push_async_callback(rpc.close)
    stack.push_async_callback(rpc.drain, serve.drain_s)
    return port


def holdings(engine: Workers) -> tuple[Holding, ...]:
    """What each inference process holds, in the words of `core.serve.renewal`."""
    return tuple(
        Holding(
            worker.worker,
            worker.pid,
            worker.held_bytes,
            worker.needed_bytes,
            worker.resting,
            worker.batches,
            worker.gpu_held_bytes,
            worker.gpu_needed_bytes,
        )
        for worker in engine.stats()
    )


def exposition(engine: Workers, meter: Meter) -> bytes:
    """The metrics, with what the inference processes hold now."""
    for worker in engine.stats():
        meter.worker(worker.worker, worker.pss_bytes, worker.arena_bytes)
    return meter.render()
