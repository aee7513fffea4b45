"""The cloud's daemon: seals and signs the models of a folder, offers them to its regions, and computes what their devices cannot."""

import asyncio
import contextlib
import functools
import os
from pathlib import Path

from appliance.adapters.clock import SystemClock
from appliance.adapters.depot import Depot
from appliance.adapters.inference.workers import Workers
from appliance.adapters.mqtt.link import LinkSettings, MqttLink
from appliance.adapters.mqtt.session import SessionSettings
from appliance.adapters.sealed import seal
from appliance.adapters.signing import Repository, Terms, file_signers
from appliance.adapters.spiffe import WorkloadIdentity
from appliance.adapters.systemd import ServiceManager
from appliance.cloud.answering import Answering, served_from
from appliance.cloud.offering import Offering
from appliance.cloud.prices import Pricing, read_series
from appliance.cloud.publishing import Publisher
from appliance.cloud.settings import Cloud
from appliance.contract import identities, topics
from appliance.contract.models import Release
from appliance.contract.vocabulary import LinkState
from appliance.daily.hop import beat, pong
from appliance.daily.pulse import Loop, Pulse
from appliance.daily.service import serve

IDENTITY_TIMEOUT_S = 20.0


async def run(settings: Cloud) -> None:
    """Publish until SIGTERM or SIGINT. Raises: ApplianceError if it cannot even start."""
    await serve(settings.log, functools.partial(_publish, settings))


async def _publish(settings: Cloud, stack: contextlib.AsyncExitStack, stop: asyncio.Event) -> None:
    clock, notifier = SystemClock(), ServiceManager()
    publisher, release = await asyncio.to_thread(_open, settings, clock)
    link = await _link(settings, stack)
    loops: dict[str, Loop] = {"offering": Offering(link, publisher, release, settings.cloud.regions)}
    if settings.answer.workers:
        loops["answering"] = answering = await _answering(settings, link, stack)
        loops["pricing"] = await _pricing(settings, link, clock, answering)
    for region in settings.cloud.regions:
        link.serve(topics.upstream_ping(region), pong)
    pulse = Pulse(clock, notifier, stalled_s=settings.watchdog.stalled_s)
    async with asyncio.TaskGroup() as group:
        tasks = [
            *(group.create_task(loop.run(functools.partial(pulse.moved, name)), name=name) for name, loop in loops.items()),
            *(group.create_task(_beat(settings, link, region, pulse), name=f"beat {region}") for region in settings.cloud.regions),
            group.create_task(link.run(), name="link"),
            group.create_task(pulse.run(), name="pulse"),
        ]
        notifier.ready()
        notifier.status("publishing")
        await stop.wait()
        notifier.stopping()
        for task in tasks:
            task.cancel()


async def _beat(settings: Cloud, link: MqttLink, region: str, pulse: Pulse) -> None:
    """The cloud's signs of life for one region; nobody stands above the cloud."""
    moved = functools.partial(pulse.moved, f"beat {region}")
    await beat(link, topics.upstream_beat(region), settings.reach.heartbeat_s, lambda: LinkState.HEALTHY, moved)


async def _link(settings: Cloud, stack: contextlib.AsyncExitStack) -> MqttLink:
    """The link to the broker of the first region: one broker each; more than one region on one broker is the lab's and the small fleet's case."""
    identity = await WorkloadIdentity.open(settings.trust.workload_api, timeout_s=IDENTITY_TIMEOUT_S)
    stack.push_async_callback(identity.close)
    return MqttLink(
        identity,
        LinkSettings(
            session=SessionSettings(host=settings.reach.broker_host, port=settings.reach.broker_port),
            backoff_cap_s=settings.reach.retry_cap_s,
        ),
        client_id=identities.CLOUD,
        peer=identities.broker(settings.cloud.regions[0], trust_domain=settings.trust.trust_domain),
    )


async def _answering(settings: Cloud, link: MqttLink, stack: contextlib.AsyncExitStack) -> Answering:
    """The full models, computed here. Raises: ApplianceError if a model's card cannot be read."""
    asked = settings.answer
    engine = Workers(size=asked.workers, threads=asked.threads or max(1, (os.cpu_count() or 1) // asked.workers))
    stack.push_async_callback(engine.close)
    served = await asyncio.to_thread(served_from, Path(settings.cloud.models_dir))
    answering = Answering(engine, served, workers=asked.workers, waiting=asked.waiting, dollars_per_hour=asked.dollars_per_hour)
    for region in settings.cloud.regions:
        link.serve(topics.upstream_infer(region), answering.infer)
    return answering


async def _pricing(settings: Cloud, link: MqttLink, clock: SystemClock, answering: Answering) -> Pricing:
    """What computing here costs, told to the regions. Raises: WorldError (`unreadable`), TheirsError (`prices`)."""
    asked = settings.answer
    series = await asyncio.to_thread(read_series, Path(asked.prices)) if asked.prices else (asked.dollars_per_hour,)
    return Pricing(
        link,
        clock,
        series,
        regions=settings.cloud.regions,
        every_s=asked.price_every_s,
        on_demand_per_h=asked.dollars_per_hour,
        egress_per_gb=asked.egress_per_gb,
        priced=answering.priced,
    )


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
