"""The cloud's daemon: seals and signs the models of a folder, offers them to its regions, and serves their chunks and keys."""

import asyncio
import contextlib
import functools
from collections.abc import Callable
from pathlib import Path

import structlog

from appliance.adapters.clock import SystemClock
from appliance.adapters.depot import Depot
from appliance.adapters.mqtt.link import LinkSettings, MqttLink
from appliance.adapters.mqtt.session import SessionSettings
from appliance.adapters.sealed import seal
from appliance.adapters.signing import Repository, Terms, file_signers
from appliance.adapters.spiffe import WorkloadIdentity
from appliance.adapters.systemd import ServiceManager
from appliance.cloud.publishing import Publisher
from appliance.cloud.settings import Cloud
from appliance.contract import identities, topics
from appliance.contract.codec import decode, encode
from appliance.contract.errors import ApplianceError
from appliance.contract.models import ChunkAsk, RegionKeyAsk, Release
from appliance.contract.vocabulary import LinkState
from appliance.daily.hop import beat, pong
from appliance.daily.pulse import Pulse
from appliance.daily.service import serve
from appliance.ports import Inbound, Link

IDENTITY_TIMEOUT_S = 20.0
OFFER_EVERY_S = 3600.0
RETRY_S = 1.0
TICK_S = 1.0


async def run(settings: Cloud) -> None:
    """Publish until SIGTERM or SIGINT. Raises: ApplianceError if it cannot even start."""
    await serve(settings.log, functools.partial(_publish, settings))


async def _publish(settings: Cloud, stack: contextlib.AsyncExitStack, stop: asyncio.Event) -> None:
    clock, notifier = SystemClock(), ServiceManager()
    publisher, release = await asyncio.to_thread(_open, settings, clock)
    identity = await WorkloadIdentity.open(settings.trust.workload_api, timeout_s=IDENTITY_TIMEOUT_S)
    stack.push_async_callback(identity.close)
    first = settings.cloud.regions[0]  # one broker each; more than one region on one broker is the lab's and the small fleet's case
    link = MqttLink(
        identity,
        LinkSettings(
            session=SessionSettings(host=settings.reach.broker_host, port=settings.reach.broker_port),
            backoff_cap_s=settings.reach.retry_cap_s,
        ),
        client_id=identities.CLOUD,
        peer=identities.broker(first, trust_domain=settings.trust.trust_domain),
    )

    async def chunk(inbound: Inbound) -> bytes:
        ask = decode(inbound.payload, ChunkAsk)
        return await asyncio.to_thread(publisher.chunk, ask.artifact, ask.index)

    async def key(inbound: Inbound) -> bytes:
        return encode(publisher.region_key(decode(inbound.payload, RegionKeyAsk)))

    for region in settings.cloud.regions:
        link.serve(topics.upstream_chunk(region), chunk)
        link.serve(topics.upstream_key(region), key)
        link.serve(topics.upstream_ping(region), pong)
    pulse = Pulse(clock, notifier, stalled_s=settings.watchdog.stalled_s)
    async with asyncio.TaskGroup() as group:
        loops = [
            group.create_task(link.run(), name="link"),
            group.create_task(_offer(link, publisher, release, settings.cloud.regions, lambda: pulse.moved("offering")), name="offering"),
            group.create_task(pulse.run(), name="pulse"),
            *(
                group.create_task(
                    beat(
                        link,
                        topics.upstream_beat(region),
                        settings.reach.heartbeat_s,
                        lambda: LinkState.HEALTHY,
                        functools.partial(pulse.moved, f"beat {region}"),
                    ),
                    name=f"beat {region}",
                )
                for region in settings.cloud.regions
            ),
        ]
        notifier.ready()
        notifier.status("publishing")
        await stop.wait()
        notifier.stopping()
        for loop in loops:
            loop.cancel()


def _open(settings: Cloud, clock: SystemClock) -> tuple[Publisher, Release]:
    """Open the repository and publish what lies in the folder. Raises: ApplianceError."""
    state = Path(settings.cloud.state_dir)
    days = float(settings.trust.metadata_days)
    keys = Path(settings.trust.keys_dir)
    repository = Repository.open_or_create(state / "repository", file_signers(keys), clock.wall, Terms(timestamp=days))
    (state / "root.json").write_bytes(repository.anchor)
    containers = state / "containers"
    containers.mkdir(mode=0o700, exist_ok=True)
    book = Depot(keys / "published")  # data keys are as secret as signing keys
    publisher = Publisher(
        models=Path(settings.cloud.models_dir), containers=containers, state=book, repository=repository, seal=seal, wall=clock.wall
    )
    return publisher, publisher.publish_all()


async def _offer(link: Link, publisher: Publisher, release: Release, regions: tuple[str, ...], moved: Callable[[], None]) -> None:
    """Offer the release to every region, again when its metadata was renewed; ends only by cancellation."""
    log = structlog.get_logger()
    pending = list(regions)
    waited_s = 0.0
    while True:
        moved()
        if waited_s >= OFFER_EVERY_S:
            release = await asyncio.to_thread(publisher.refresh)
            pending, waited_s = list(regions), 0.0
        for region in tuple(pending):
            try:
                await link.publish(topics.upstream_release(region), encode(release), retain=True)
            except ApplianceError as error:
                log.debug("offer_deferred", region=region, reason=error.reason)
            else:
                pending.remove(region)
                log.info("release_offered", region=region)
        await asyncio.sleep(TICK_S)
        waited_s += TICK_S
