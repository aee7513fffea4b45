"""`appliancectl queue`: what waits on this device for the region, what was set aside, and an operator's say in both.

Reading works beside a running device, on a connection that only reads. Changing needs the one connection that writes: while the device runs, it has
that, so `retry` and `drop` then name the device's own API instead.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import apsw
import click

from appliance.adapters.store import Inspection, Store
from appliance.contract.deferral import Fate, Item, Rules
from appliance.contract.errors import TheirsError, WorldError
from appliance.core.reach.bounds import admit
from appliance.core.reach.deferral import POLICIES

SHOWN_BYTES = 256


@click.group()
@click.option(
    "--state-dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("/var/lib/appliance"),
    show_default=True,
    help="The device's state_dir; the queue is in its folder `queue`.",
)
@click.pass_context
def queue(context: click.Context, state_dir: Path) -> None:
    """Look into the durable queue of a device, and repair it."""
    context.obj = state_dir / "queue"


@queue.command("list")
@click.option("--dead", is_flag=True, help="The dead letters instead of what waits.")
@click.option("--class", "kind", default="", help="Only this class: request, result, event or telemetry.")
@click.option("--after", type=click.IntRange(min=0), default=0, help="Only items with a higher number; for the next page.")
@click.option("--limit", type=click.IntRange(1, 1_000), default=100, show_default=True, help="At most so many.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on each line.")
@click.pass_obj
def list_(folder: Path, kind: str, after: int, limit: int, *, dead: bool, as_json: bool) -> None:
    """List what waits, oldest first, and count it by class."""
    with reading(folder) as inspection:
        items = inspection.list(dead=dead, kind=kind, after=after, limit=limit)
        counters = inspection.counters()
    for item in items:
        click.echo(json.dumps(asdict(item)) if as_json else line(item))
    if as_json:
        return
    waiting = ", ".join(f"{count} {name}" for name, (count, _) in sorted(counters["usage"].items()) if count)
    click.echo(f"waiting: {waiting or 'nothing'}; dead letters: {counters['dead'][0]}; dropped so far: {counters['drops'] or 'nothing'}")


@queue.command()
@click.argument("ident")
@click.option("--payload", type=click.Path(dir_okay=False, path_type=Path), help="Write the whole payload to this file.")
@click.pass_obj
def inspect(folder: Path, ident: str, payload: Path | None) -> None:
    """Tell all that is known of one item, by its id (the idempotency key)."""
    with reading(folder) as inspection:
        fate = inspection.fate(ident)
        if fate is None:
            raise unknown(ident, folder)
        content = inspection.payload(ident)
    for name, value in told(fate):
        click.echo(f"{name:>12}  {value}")
    if content is not None:
        click.echo(f"{'payload':>12}  {len(content)} bytes: {content[:SHOWN_BYTES]!r}{'…' if len(content) > SHOWN_BYTES else ''}")
    if payload is not None:
        payload.write_bytes(content or b"")
        click.echo(f"{'written':>12}  {payload}")


@queue.command()
@click.argument("ident")
@click.pass_obj
def retry(folder: Path, ident: str) -> None:
    """Send one item again as soon as possible; a dead letter waits again, at its old place in its key."""
    if not change(folder, ident, "retry", lambda store: store.revive(ident)):
        raise unknown(ident, folder)
    click.echo(f"{ident} is sent when the device runs and its region is reached")


@queue.command()
@click.argument("ident")
@click.confirmation_option(prompt="It will never be delivered. Drop it?")
@click.pass_obj
def drop(folder: Path, ident: str) -> None:
    """Delete one item or dead letter for good; counted as dropped by an operator."""
    if not change(folder, ident, "drop", lambda store: store.drop(ident)):
        raise unknown(ident, folder)
    click.echo(f"{ident} is dropped")


def change(folder: Path, ident: str, verb: str, what: Callable[[Store], Awaitable[Any]]) -> Any:
    """Do it on the store's own writer. Raises: WorldError (`store_locked`) with the way over the API, (`no_store`), (`disk`)."""
    if not (folder / "queue.db").exists():
        raise WorldError("no_store", "there is no queue here", where=str(folder), remedy="give --state-dir")

    async def within() -> Any:
        async with Store(folder, Rules(POLICIES), admit) as store:
            return await what(store)

    try:
        return asyncio.run(within())
    except WorldError as error:
        if error.reason != "store_locked":
            raise
        raise WorldError(
            "store_locked",
            "the device runs and is the only one that may write its queue",
            where=str(folder),
            remedy=f"ask it: POST /v2/deferred/{ident}/{verb} on its local API; or stop it first",
        ) from error


@contextmanager
def reading(folder: Path) -> Iterator[Inspection]:
    """A reader beside the device. Raises: WorldError."""
    inspection = Inspection.open(folder)
    try:
        yield inspection
    except apsw.Error as error:
        raise WorldError("disk", str(error), where=str(folder), remedy="check the disk") from error
    finally:
        inspection.close()


def line(item: Item) -> str:
    """One item for a person."""
    put = datetime.fromtimestamp(item.put.wall_s, UTC).strftime("%Y-%m-%d %H:%M:%S")
    tries = f", tried {item.attempts} times" if item.attempts else ""
    key = f", key {item.key}" if item.key else ""
    doubt = "" if item.put.trusted else "?"
    return f"{item.seq:>8}  {put}Z{doubt}  {item.kind} p{item.priority}  {item.size_bytes} bytes  {item.idem}{key}{tries}"


def told(fate: Fate) -> Iterator[tuple[str, object]]:
    """Names and values for `inspect`."""
    yield "state", fate.state
    if fate.reason:
        yield "reason", fate.reason
    if fate.result is not None:
        yield "result", f"{len(fate.result)} bytes: {fate.result[:SHOWN_BYTES]!r}"
    if fate.item is not None:
        yield "item", line(fate.item)
        yield "ttl", "never too old" if fate.item.ttl_s is None else f"{fate.item.ttl_s:g} s"


def unknown(ident: str, folder: Path) -> TheirsError:
    """Nothing is known of this id."""
    return TheirsError("unknown_id", f"no item has the id {ident[:80]!r}", where=str(folder), remedy="appliancectl queue list")
