"""The region's daemon: attests devices, relays releases, takes in what they promised, gathers vitals. This is its composition root."""

import asyncio
import contextlib
import functools
import secrets
from collections.abc import Callable
from pathlib import Path

import structlog

from appliance.adapters.clock import SystemClock
from appliance.adapters.depot import Depot
from appliance.adapters.metadata import TrustedMetadata
from appliance.adapters.mqtt.link import MqttLink
from appliance.adapters.store import Store
from appliance.adapters.systemd import ServiceManager
from appliance.contract import topics
from appliance.contract.deferral import Rules
from appliance.core.reach import bounds
from appliance.core.reach.deferral import POLICIES
from appliance.core.reach.partition import PartitionSettings
from appliance.daily import naming
from appliance.daily.hop import Hop, beat, pong
from appliance.daily.pulse import Loop, Pulse
from appliance.daily.service import serve
from appliance.regional import opening
from appliance.regional.attesting import Attesting, Authorities
from appliance.regional.cutting import Cutting
from appliance.regional.gathering import Gathering
from appliance.regional.placing import Placing
from appliance.regional.receiving import Receiving
from appliance.regional.relaying import Relaying
from appliance.regional.settings import Region


async def run(settings: Region) -> None:
    """Serve a region until SIGTERM or SIGINT. Raises: ApplianceError if it cannot even start."""
    await serve(settings.log, functools.partial(_serve, settings))


async def _serve(settings: Region, stack: contextlib.AsyncExitStack, stop: asyncio.Event) -> None:
    clock, notifier = SystemClock(), ServiceManager()
    authorities = await asyncio.to_thread(opening.open_authorities, settings.trust)
    link = await opening.open_link(settings, stack)
    hop, loops = await _loops(settings, link, clock, stack, authorities=authorities, say=notifier.status)
    name, interval_s = settings.region.name, settings.reach.heartbeat_s
    link.serve(f"v1/{name}/d/+/up/ask/ping", pong)
    pulse = Pulse(clock, notifier, stalled_s=settings.watchdog.stalled_s)
    structlog.get_logger().info("started", region=name, ek_roots=len(authorities.ek_roots))
    async with asyncio.TaskGroup() as group:
        tasks = [
            *(group.create_task(loop.run(functools.partial(pulse.moved, each)), name=each) for each, loop in loops.items()),
            group.create_task(link.run(), name="link"),
            group.create_task(beat(link, topics.beat(name), interval_s, lambda: hop.state, lambda: pulse.moved("beat")), name="beat"),
            group.create_task(pulse.run(), name="pulse"),
        ]
        notifier.ready()
        notifier.status("attesting and relaying")
        await stop.wait()
        notifier.stopping()
        for task in tasks:
            task.cancel()


async def _loops(
    settings: Region,
    link: MqttLink,
    clock: SystemClock,
    stack: contextlib.AsyncExitStack,
    *,
    authorities: Authorities,
    say: Callable[[str], None],
) -> tuple[Hop, dict[str, Loop]]:
    """The hop to the cloud, and all loops by name. Raises: WorldError (`disk`, `unreadable`)."""
    name, state, reach = settings.region.name, Path(settings.region.state_dir), settings.reach
    root = await asyncio.to_thread(naming.read, Path(settings.trust.tuf_root), "trust.tuf_root")
    metadata, secret = TrustedMetadata(state / "metadata", root), secrets.token_bytes(opening.SECRET_BYTES)
    relaying = Relaying(link, clock, Depot(state / "depot"), metadata, region=name, secret=secret, ask_timeout_s=reach.ask_timeout_s)
    records = Depot(state / "devices")
    cutting = Cutting(link, clock, records)
    Attesting(
        link,
        clock,
        records,
        authorities,
        relaying.keys,
        chance=secrets.token_bytes,
        region=name,
        online_only=relaying.online_only,
        judged=cutting.judged,
    )
    hop = Hop(
        link,
        clock,
        name="cloud",
        beat=topics.upstream_beat(name),
        ping=topics.upstream_ping(name),
        settings=PartitionSettings(interval_s=reach.heartbeat_s),
        changed=lambda state, why: say(f"attesting and relaying; cloud {state} ({why})"),
    )
    inbox = await stack.enter_async_context(Store(state / "inbox", Rules(POLICIES), bounds.admit))
    receiving = Receiving(link, inbox, region=name)
    gathering = Gathering(link, clock, region=name)
    placing = Placing(link, lambda: gathering.present, region=name)
    loops: dict[str, Loop] = {"relaying": relaying, "gathering": gathering, "placing": placing, "receiving": receiving, "cutting": cutting}
    return hop, {**loops, "hop": hop}
