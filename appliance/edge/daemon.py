"""The device's daemon: builds minds over what `opening` opened, starts the loops, and ends in order. This is the composition root."""

import asyncio
import contextlib
import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import structlog

from appliance.adapters.clock import SystemClock
from appliance.adapters.depot import Depot
from appliance.adapters.inference.changes import Change, Lost
from appliance.adapters.inference.workers import Workers
from appliance.adapters.ingress import Ingress
from appliance.adapters.metadata import TrustedMetadata
from appliance.adapters.metrics import Meter
from appliance.adapters.mqtt.link import MqttLink
from appliance.adapters.sealed import Sealed
from appliance.adapters.store import Store
from appliance.adapters.systemd import ServiceManager
from appliance.adapters.tpm import EsysTpm
from appliance.contract import topics
from appliance.contract.deferral import Dropped
from appliance.contract.inference import Answer, Request
from appliance.core.reach.deferral import POLICIES
from appliance.core.reach.partition import PartitionSettings
from appliance.core.serve.board import BoardProfile
from appliance.core.serve.degradation import DegradationSettings
from appliance.daily import naming
from appliance.daily.delivering import Delivering
from appliance.daily.hop import Hop
from appliance.daily.pulse import Loop, Pulse
from appliance.daily.service import serve
from appliance.edge import opening
from appliance.edge.changing import Changing, Corridor
from appliance.edge.deferring import Deferring
from appliance.edge.guarding import Guarding
from appliance.edge.lane import Hands, Pool
from appliance.edge.lending import Lending
from appliance.edge.reaching import Reaching
from appliance.edge.renewing import Renewing
from appliance.edge.routing import Routing
from appliance.edge.serving import Serving
from appliance.edge.settings import Edge
from appliance.edge.splitting import Splitting
from appliance.edge.stand import Policy
from appliance.edge.tally import Tally
from appliance.edge.trusting import Trusting
from appliance.edge.upstream import Calls, CloudRoute, NeighbourRoute
from appliance.ports import Board

More = Callable[[Delivering], Mapping[str, Loop]]
"""Loops that run beside the device's own, over its durable queue."""


async def run(settings: Edge, more: More = lambda _delivering: {}) -> None:
    """Serve until SIGTERM or SIGINT. Raises: ApplianceError if the device cannot even start."""
    await serve(settings.log, functools.partial(_serve, settings, more))


async def _serve(settings: Edge, more: More, stack: contextlib.AsyncExitStack, stop: asyncio.Event) -> None:
    notifier = ServiceManager()
    notifier.status("waiting for an identity")
    await _live(await _Device(settings, stack, more).open(), settings, notifier, stop)


@dataclass(frozen=True, slots=True)
class Life:
    """The named loops of one device, and what starts and ends apart from them."""

    clock: SystemClock
    loops: dict[str, Loop]
    link: MqttLink
    serving: Serving
    reaching: Reaching
    ingress: Ingress


class _Device:
    """Opens adapters and builds minds, one room after the other. Where two need each other, the earlier one asks the later one when it is used."""

    engine: Workers
    link: MqttLink
    store: Store
    serving: Serving
    guarding: Guarding
    hop: Hop
    reaching: Reaching
    deferring: Deferring
    upstream: CloudRoute | None
    neighbour: NeighbourRoute | None
    routing: Routing | None

    def __init__(self, settings: Edge, stack: contextlib.AsyncExitStack, more: More) -> None:
        self.settings = settings
        self.more = more
        self.stack = stack
        self.clock = SystemClock()
        self.meter = Meter(self.clock.wall)
        self.tally = Tally(self.meter, self.clock)
        self.device, self.region = settings.device.name, settings.device.region
        self.state = Path(settings.device.state_dir)

    async def open(self) -> Life:
        """Open everything; the stack closes it in reverse. Raises: ApplianceError."""
        settings, stack = self.settings, self.stack
        self.link = await opening.open_link(settings, stack)
        self.store = await opening.open_store(settings, stack)
        self.engine = await opening.open_engine(settings, stack, self._lost)
        delivering = self._reach()
        profile = await asyncio.to_thread(naming.read_profile, settings.board.profile)
        times = DegradationSettings(**msgspec.structs.asdict(settings.modes))
        self._serve(Policy(settings.serve.max_batch, times, settings.serve.standby, profile))
        board = self._watch(delivering, profile)
        trusting, changing = await self._trust(board)
        ingress = await self._api()
        loops: dict[str, Loop] = {
            "hop": self.hop,
            "serving": self.serving,
            "guarding": self.guarding,
            "renewing": self._renewing(),
            "trusting": trusting,
            "changing": changing,
            "reaching": self.reaching,
            "delivering": delivering,
            "deferring": self.deferring,
            **({"routing": self.routing} if self.routing else {}),
            **self.more(delivering),
        }
        return Life(self.clock, loops, self.link, self.serving, self.reaching, ingress)

    def _watch(self, delivering: Delivering, profile: BoardProfile | None) -> Board:
        """The board, what is said of it, and who guards it."""
        settings = self.settings
        board = opening.open_board(settings, self.clock, self.serving.utilisation, self.stack)
        self.reaching = Reaching(
            self.link,
            self.clock,
            self.serving,
            self.tally,
            board=board,
            delivering=delivering,
            region=self.region,
            device=self.device,
            heartbeat_s=settings.reach.heartbeat_s,
            state=lambda: self.hop.state,
        )
        self.guarding = Guarding(
            board,
            self.serving,
            self.clock,
            self.meter,
            tell=self.reaching.tell,
            interval_s=settings.board.interval_s,
            gpu_budget_bytes=profile.memory_budget_bytes if profile else None,
            upstream=self.upstream,
        )
        return board

    def _reach(self) -> Delivering:
        """The watched hop, the queue's way up, and the way to the cloud."""
        reach = self.settings.reach
        self.hop = Hop(
            self.link,
            self.clock,
            name="region",
            beat=topics.beat(self.region),
            ping=topics.ping(self.region, self.device),
            settings=PartitionSettings(interval_s=reach.heartbeat_s),
            changed=lambda state, _why: self.meter.link("region", state),
        )
        calls = functools.partial(
            Calls,
            self.link,
            self.clock,
            deadline_s=reach.cloud_deadline_ms / 1e3,
            version=lambda model: self.serving.versions().get(model, ""),
        )
        cloud = calls(topic=topics.infer(self.region, self.device), where="cloud", state=lambda: self.hop.whole)
        beside = calls(topic=topics.neighbour(self.region, self.device), where="neighbour", state=lambda: self.hop.state)
        self.upstream = CloudRoute(cloud) if reach.cloud else None
        self.neighbour = NeighbourRoute(beside) if reach.neighbours else None
        return Delivering(
            self.link,
            self.clock,
            self.store,
            topic=topics.deliver(self.region, self.device),
            policies=POLICIES,
            state=lambda: self.hop.state,
            told=self._dropped,
            ask_timeout_s=reach.ask_timeout_s,
        )

    def _serve(self, policy: Policy) -> None:
        """The desk, and what answers later."""
        settings = self.settings.serve
        hands = Hands(self.engine, self.clock, self.tally, Pool(settings.workers), settings.slo_ms / 1e3, settings.fill_wait_ms / 1e3)
        self.deferring = Deferring(
            self.store,
            POLICIES,
            compute=self._answer,
            calm=lambda: self.serving.ready() and self.serving.roomy(),
            told=self._dropped,
        )
        self.routing = self._route(hands)
        self.serving = Serving(
            hands,
            policy,
            timeout_s=settings.batch_deadline_s,
            stale_bytes=settings.stale_mib << 20,
            upstream=self.routing,
            routing=self.routing,
            neighbour=self.neighbour,
            promise=self.deferring.promise,
        )

    def _route(self, hands: Hands) -> Routing | None:
        """Who weighs the cloud against this device, and the window for neighbours."""
        reach, name = self.settings.reach, {"region": self.region, "device": self.device}
        if reach.neighbours:
            Lending(self.link, self.clock, self._answer, dollars_per_hour=reach.dollars_per_hour, **name)
        if self.upstream is None:
            return None
        return Routing(
            self.link,
            self.clock,
            self.upstream,
            Splitting(hands),
            lambda: self.serving.stands,
            region=self.region,
            device_per_h=reach.dollars_per_hour,
            slo_s=hands.slo_s,
            deadline_s=reach.cloud_deadline_ms / 1e3,
        )

    async def _trust(self, board: Board) -> tuple[Trusting, Changing]:
        """Attestation, and the corridor of releases. Raises: WorldError (`unreadable`)."""
        settings, reach = self.settings.trust, self.settings.reach
        depot, tpm = Depot(self.state / "depot"), EsysTpm(settings.tcti)
        self.stack.callback(depot.close)
        self.stack.push_async_callback(tpm.close)
        trusting = Trusting(
            tpm,
            self.link,
            depot,
            self.clock,
            region=self.region,
            device=self.device,
            ask_timeout_s=reach.ask_timeout_s,
            reattest_s=settings.reattest_s,
        )
        trusting.tell = self.reaching.tell
        self.serving.hint = lambda: trusting.hint
        root = await asyncio.to_thread(naming.read, Path(settings.tuf_root), "trust.tuf_root")
        corridor = Corridor(TrustedMetadata(self.state / "metadata", root), depot, Sealed(), board)
        changing = Changing(
            self.link,
            self.clock,
            corridor,
            trusting,
            self.serving,
            tell=self.reaching.tell,
            region=self.region,
            device=self.device,
            split=reach.cloud,
        )
        return trusting, changing

    async def _api(self) -> Ingress:
        """The local API. Raises: WorldError (`listen`)."""
        ingress = await opening.open_ingress(
            self.settings,
            self.serving,
            self.engine,
            metrics=functools.partial(opening.exposition, self.engine, self.meter),
            status=self._status,
            counter=self.deferring,
            refused=self.tally.failed,
        )
        self.stack.push_async_callback(ingress.close)
        port = await opening.open_rpc(self.settings, self.serving, self.stack, self.tally.failed)
        structlog.get_logger().info(
            "started", device=self.device, region=self.region, pid=os.getpid(), port=ingress.port, **({"grpc_port": port} if port else {})
        )
        return ingress

    async def _answer(self, request: Request) -> Answer:
        return await self.serving.answer(request)

    def _status(self) -> dict[str, object]:
        """What `GET /status` says: the vitals, how long batches take here, and for how long this device can still prove who it is."""
        left_s = self.link.identity_left_s
        identity = {"ready": left_s > 0, "left_s": round(left_s, 1)}
        vitals = msgspec.to_builtins(self.reaching.vitals())
        return {**vitals, "profile": self.serving.profiles(), "trust": self.serving.hint(), "identity": identity}

    def _renewing(self) -> Renewing:
        """The loop that replaces fragmented inference processes."""

        def room_bytes() -> int | None:
            reading = self.guarding.reading
            return reading.memory_available_bytes if reading else None

        return Renewing(
            self.clock,
            holdings=functools.partial(opening.holdings, self.engine),
            renew=self.engine.renew,
            calm=lambda: self.guarding.calm,
            room_bytes=room_bytes,
            fragmented=self.meter.fragmented,
        )

    def _lost(self, change: Change) -> None:
        if isinstance(change, Lost):
            self.meter.lost(change.cause)
            if change.delay_s:
                self.guarding.restarts_spent(change.delay_s)

    def _dropped(self, dropped: Dropped) -> None:
        self.meter.dropped(dropped.kind, dropped.reason)


async def _live(life: Life, settings: Edge, notifier: ServiceManager, stop: asyncio.Event) -> None:
    """Run the loops until told to stop; then answer what is in flight and end them."""
    log = structlog.get_logger()
    pulse = Pulse(life.clock, notifier, stalled_s=settings.watchdog.stalled_s)
    life.reaching.say = notifier.status
    life.reaching.expired = lambda: life.link.identity_left_s <= 0
    async with asyncio.TaskGroup() as group:
        tasks = [
            *(group.create_task(loop.run(functools.partial(pulse.moved, name)), name=name) for name, loop in life.loops.items()),
            group.create_task(life.link.run(), name="link"),
            group.create_task(pulse.run(), name="pulse"),
        ]
        notifier.ready()
        await stop.wait()
        notifier.stopping()
        log.info("stopping", drain_s=settings.serve.drain_s)
        await asyncio.gather(life.ingress.drain(settings.serve.drain_s), life.serving.drain(settings.serve.drain_s))
        for task in tasks:
            task.cancel()
    log.info("stopped")
