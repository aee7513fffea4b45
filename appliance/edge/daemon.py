"""The device's daemon: opens adapters, builds minds, starts the loops, and ends in order. This is the composition root."""

import asyncio
import contextlib
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import structlog

from appliance.adapters.board_generic import GenericBoard
from appliance.adapters.board_jetson import JetsonBoard
from appliance.adapters.board_sim import ReplayBoard, SimBoard
from appliance.adapters.clock import SystemClock
from appliance.adapters.depot import Depot
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
from appliance.core.serve import tegrastats
from appliance.daily.pulse import Pulse
from appliance.daily.service import serve
from appliance.edge.changing import Changing, Corridor
from appliance.edge.reaching import Reaching
from appliance.edge.serving import Serving
from appliance.edge.settings import Edge
from appliance.edge.tally import Tally
from appliance.edge.trusting import Trusting
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
    serving: Serving
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
    serving = Serving(
        await _engine(settings, stack),
        clock,
        tally,
        workers=settings.serve.workers,
        max_batch=settings.serve.max_batch,
        fill_wait_s=settings.serve.fill_wait_ms / 1e3,
        timeout_s=settings.serve.batch_deadline_s,
    )
    board = open_board(settings, clock, serving.busy)
    link = await _link(settings, stack)
    depot, tpm = Depot(state / "depot"), EsysTpm(settings.trust.tcti)
    stack.callback(depot.close)
    stack.push_async_callback(tpm.close)
    reach = settings.reach
    trusting = Trusting(
        tpm, link, depot, clock, region=region, device=device, ask_timeout_s=reach.ask_timeout_s, reattest_s=settings.trust.reattest_s
    )
    changed = functools.partial(meter.link, "region")
    reaching = Reaching(link, clock, board, serving, tally, region=region, device=device, heartbeat_s=reach.heartbeat_s, changed=changed)
    root = await asyncio.to_thread(_read, Path(settings.trust.tuf_root), "trust.tuf_root")
    corridor = Corridor(TrustedMetadata(state / "metadata", root), depot, Sealed(), board)
    changing = Changing(link, clock, corridor, trusting, serving, tell=reaching.tell, region=region, device=device)
    ingress = await _ingress(settings, serving, meter, (reaching, tally))
    stack.push_async_callback(ingress.close)
    return Life(clock, link, serving, trusting, changing, reaching, ingress)


async def _live(life: Life, settings: Edge, notifier: ServiceManager, stop: asyncio.Event) -> None:
    """Run the loops until told to stop; then answer what is in flight and end them."""
    log = structlog.get_logger()
    pulse = Pulse(life.clock, notifier, stalled_s=settings.watchdog.stalled_s)
    log.info("started", device=settings.device.name, region=settings.device.region, pid=os.getpid(), port=life.ingress.port)
    async with asyncio.TaskGroup() as group:
        loops = [
            group.create_task(loop.run(functools.partial(pulse.moved, name)), name=name)
            for name, loop in (
                ("serving", life.serving),
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


async def _engine(settings: Edge, stack: contextlib.AsyncExitStack) -> Workers:
    threads = settings.serve.threads or max(1, (os.cpu_count() or 1) // settings.serve.workers)
    engine = Workers(size=settings.serve.workers, threads=threads, batch_deadline_s=settings.serve.batch_deadline_s)
    stack.push_async_callback(engine.close)
    return engine


async def _ingress(settings: Edge, serving: Serving, meter: Meter, counted: tuple[Reaching, Tally]) -> Ingress:
    reaching, tally = counted
    socket = Path(settings.device.runtime_dir) / settings.serve.socket if settings.serve.socket else None
    limit = settings.serve.body_limit_mib << 20
    ingress = Ingress(serving, metrics=meter.render, status=reaching.vitals, body_limit_bytes=limit, refused=tally.failed)
    await ingress.start(settings.serve.host, settings.serve.port, socket)
    return ingress
