"""The device's daemon: opens adapters, builds minds, starts the loops, and ends in order. This is the composition root."""

import asyncio
import contextlib
import functools
import os
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import structlog

from appliance.adapters.board_generic import GenericBoard
from appliance.adapters.board_jetson import JetsonBoard
from appliance.adapters.board_sim import ReplayBoard, SimBoard
from appliance.adapters.clock import SystemClock
from appliance.adapters.depot import Depot
from appliance.adapters.inference.changes import Change, Lost
from appliance.adapters.inference.workers import Workers
from appliance.adapters.ingress import Ingress
from appliance.adapters.metadata import TrustedMetadata
from appliance.adapters.metrics import Meter
from appliance.adapters.mqtt.link import LinkSettings, MqttLink
from appliance.adapters.mqtt.session import SessionSettings
from appliance.adapters.sealed import Sealed
from appliance.adapters.spiffe import WorkloadIdentity
from appliance.adapters.systemd import ServiceManager
from appliance.adapters.tpm import EsysTpm
from appliance.contract import identities, topics
from appliance.contract.errors import WorldError
from appliance.core.reach.partition import PartitionSettings
from appliance.core.serve import tegrastats
from appliance.core.serve.board import parse_board
from appliance.core.serve.degradation import DegradationSettings
from appliance.daily.hop import Hop
from appliance.daily.pulse import Pulse
from appliance.daily.service import serve
from appliance.edge.changing import Changing, Corridor
from appliance.edge.guarding import Guarding
from appliance.edge.lane import Hands, Pool
from appliance.edge.reaching import Reaching
from appliance.edge.serving import Serving
from appliance.edge.settings import Edge
from appliance.edge.stand import Policy
from appliance.edge.tally import Tally
from appliance.edge.trusting import Trusting
from appliance.edge.upstream import CloudRoute
from appliance.ports import Board

IDENTITY_TIMEOUT_S = 20.0


def open_board(settings: Edge, clock: SystemClock, load: Callable[[], float]) -> Board:
    """The board that the settings name; `load` (0..1) is what heats a simulated one. Raises: WorldError (`sim.replay`)."""
    match settings.board.kind:
        case "jetson":
            return JetsonBoard(GenericBoard())
        case "sim" if settings.sim.replay:
            return ReplayBoard(tegrastats.readings(_read(Path(settings.sim.replay), "sim.replay").decode()), clock.monotonic)
        case "sim":
            return SimBoard.from_settings(settings.sim, clock.monotonic, load)
        case _:
            return GenericBoard()


async def run(settings: Edge) -> None:
    """Serve until SIGTERM or SIGINT. Raises: ApplianceError if the device cannot even start."""
    await serve(settings.log, functools.partial(_serve, settings))


async def _serve(settings: Edge, stack: contextlib.AsyncExitStack, stop: asyncio.Event) -> None:
    notifier = ServiceManager()
    notifier.status("waiting for an identity")
    await _live(await _open(settings, stack), settings, notifier, stop)


@dataclass(frozen=True, slots=True)
class Life:
    """The loops of one device, and what they share."""

    clock: SystemClock
    link: MqttLink
    hop: Hop
    serving: Serving
    guarding: Guarding
    trusting: Trusting
    changing: Changing
    reaching: Reaching
    ingress: Ingress


async def _open(settings: Edge, stack: contextlib.AsyncExitStack) -> Life:
    """Open every adapter and build every mind; the stack closes them in reverse."""
    clock = SystemClock()
    meter = Meter(clock.wall)
    device, region, state = settings.device.name, settings.device.region, Path(settings.device.state_dir)
    tally = Tally(meter, clock)

    def told(change: Change) -> None:
        if isinstance(change, Lost):
            meter.lost(change.cause)
            if change.delay_s:
                guarding.restarts_spent(change.delay_s)

    engine = await _engine(settings, stack, told)
    link = await _link(settings, stack)
    upstream = CloudRoute(
        link,
        clock,
        region=region,
        device=device,
        deadline_s=settings.reach.cloud_deadline_ms / 1e3,
        state=lambda: hop.whole,
        version=lambda model: serving.versions().get(model, ""),
    )
    serving, policy = await _serving(settings, engine, (clock, tally), upstream if settings.reach.cloud else None)
    board = open_board(settings, clock, serving.utilisation)
    depot, tpm = Depot(state / "depot"), EsysTpm(settings.trust.tcti)
    stack.callback(depot.close)
    stack.push_async_callback(tpm.close)
    reach = settings.reach
    trusting = Trusting(
        tpm, link, depot, clock, region=region, device=device, ask_timeout_s=reach.ask_timeout_s, reattest_s=settings.trust.reattest_s
    )
    hop = Hop(
        link,
        clock,
        name="region",
        beat=topics.beat(region),
        ping=topics.ping(region, device),
        settings=PartitionSettings(interval_s=reach.heartbeat_s),
        changed=lambda state, _why: meter.link("region", state),
    )
    reaching = Reaching(
        link, clock, board, serving, tally, region=region, device=device, heartbeat_s=reach.heartbeat_s, state=lambda: hop.state
    )
    root = await asyncio.to_thread(_read, Path(settings.trust.tuf_root), "trust.tuf_root")
    corridor = Corridor(TrustedMetadata(state / "metadata", root), depot, Sealed(), board)
    changing = Changing(link, clock, corridor, trusting, serving, tell=reaching.tell, region=region, device=device)
    guarding = Guarding(
        board,
        serving,
        clock,
        meter,
        tell=reaching.tell,
        interval_s=settings.board.interval_s,
        gpu_budget_bytes=policy.board.memory_budget_bytes if policy.board else None,
        upstream=upstream if settings.reach.cloud else None,
    )
    ingress = await _ingress(settings, serving, functools.partial(_exposition, engine, meter), (reaching, tally))
    stack.push_async_callback(ingress.close)
    return Life(clock, link, hop, serving, guarding, trusting, changing, reaching, ingress)


async def _live(life: Life, settings: Edge, notifier: ServiceManager, stop: asyncio.Event) -> None:
    """Run the loops until told to stop; then answer what is in flight and end them."""
    log = structlog.get_logger()
    pulse = Pulse(life.clock, notifier, stalled_s=settings.watchdog.stalled_s)
    log.info("started", device=settings.device.name, region=settings.device.region, pid=os.getpid(), port=life.ingress.port)
    async with asyncio.TaskGroup() as group:
        loops = [
            group.create_task(loop.run(functools.partial(pulse.moved, name)), name=name)
            for name, loop in (
                ("hop", life.hop),
                ("serving", life.serving),
                ("guarding", life.guarding),
                ("trusting", life.trusting),
                ("changing", life.changing),
                ("reaching", life.reaching),
            )
        ]
        life.reaching.say = notifier.status
        loops += [group.create_task(life.link.run(), name="link"), group.create_task(pulse.run(), name="pulse")]
        notifier.ready()
        await stop.wait()
        notifier.stopping()
        log.info("stopping", drain_s=settings.serve.drain_s)
        await asyncio.gather(life.ingress.drain(settings.serve.drain_s), life.serving.drain(settings.serve.drain_s))
        for loop in loops:
            loop.cancel()
    log.info("stopped")


def _read(path: Path, setting: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise WorldError(
            "unreadable", f"cannot be read: {error.strerror}", where=str(path), remedy=f"put the file there, or correct {setting}"
        ) from error


async def _link(settings: Edge, stack: contextlib.AsyncExitStack) -> MqttLink:
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


async def _engine(settings: Edge, stack: contextlib.AsyncExitStack, told: Callable[[Change], None]) -> Workers:
    threads = settings.serve.threads or max(1, (os.cpu_count() or 1) // settings.serve.workers)
    engine = Workers(size=settings.serve.workers, threads=threads, batch_deadline_s=settings.serve.batch_deadline_s, on_change=told)
    stack.push_async_callback(engine.close)
    return engine


async def _serving(
    settings: Edge, engine: Workers, counted: tuple[SystemClock, Tally], upstream: CloudRoute | None
) -> tuple[Serving, Policy]:
    """The desk, and the policy of its stands. Raises: WorldError (`unreadable`), TheirsError (`board_profile`)."""
    serve, path = settings.serve, settings.board.profile
    board = parse_board(tomllib.loads((await asyncio.to_thread(_read, Path(path), "board.profile")).decode()), path) if path else None
    times = DegradationSettings(**msgspec.structs.asdict(settings.modes))
    policy = Policy(serve.max_batch, times, serve.standby, board)
    hands = Hands(engine, *counted, Pool(serve.workers), serve.slo_ms / 1e3, serve.fill_wait_ms / 1e3)
    return Serving(hands, policy, timeout_s=serve.batch_deadline_s, stale_bytes=serve.stale_mib << 20, upstream=upstream), policy


def _exposition(engine: Workers, meter: Meter) -> bytes:
    """The metrics, with what the inference processes hold now."""
    for worker in engine.stats():
        meter.worker(worker.worker, worker.pss_bytes, worker.arena_bytes)
    return meter.render()


async def _ingress(settings: Edge, serving: Serving, metrics: Callable[[], bytes], counted: tuple[Reaching, Tally]) -> Ingress:
    reaching, tally = counted
    socket = Path(settings.device.runtime_dir) / settings.serve.socket if settings.serve.socket else None
    limit = settings.serve.body_limit_mib << 20
    ingress = Ingress(serving, metrics=metrics, status=reaching.vitals, body_limit_bytes=limit, refused=tally.failed)
    await ingress.start(settings.serve.host, settings.serve.port, socket)
    return ingress
