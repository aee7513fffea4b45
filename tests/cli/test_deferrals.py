"""`appliancectl queue` on a real store, beside a running one and alone."""

import asyncio
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from appliance.adapters.store import Store
from appliance.cli.appliancectl import group
from appliance.contract.deferral import Bounds, Parcel, Rules
from appliance.contract.errors import TheirsError, WorldError
from appliance.core.reach.bounds import admit
from appliance.core.reach.deferral import POLICIES


@pytest.fixture
def state() -> Iterator[Path]:
    """A state directory with a queue: one request that waits, one with a key that was tried, one dead letter, one delivered."""
    with tempfile.TemporaryDirectory(prefix="ap-", dir="/tmp") as folder:
        asyncio.run(filled(Path(folder) / "queue"))
        yield Path(folder)


def opened(folder: Path) -> Store:
    return Store(folder, Rules(POLICIES, Bounds(min_free_bytes=0)), admit)


async def filled(folder: Path) -> None:
    async with opened(folder) as store:
        await store.put(Parcel(kind="event", idem="waits", payload=b"content of the first"))
        tried = await store.put(Parcel(kind="request", idem="tried", payload=b"2", key="lane"))
        dead = await store.put(Parcel(kind="request", idem="refused-one", payload=b"3"))
        done = await store.put(Parcel(kind="request", idem="delivered", payload=b"4"))
        await store.retry(tried.seq, 2, store.now_s() + 1_000)
        await store.bury(dead.seq, "the region said no")
        await store.acknowledge({done.seq: b"its answer"})


def run(state: Path, *words: str, text: str | None = None) -> Result:
    return CliRunner().invoke(group, ["queue", "--state-dir", str(state), *words], input=text)


def test_list_shows_what_waits_and_counts_the_rest(state: Path) -> None:
    """Waiting items and dead letters are apart; a class, a page and JSON can be asked for."""
    shown = run(state, "list")
    assert shown.exit_code == 0
    assert "waits" in shown.output
    assert "tried, key lane, tried 2 times" in shown.output
    assert "refused-one" not in shown.output
    assert "waiting: 1 event, 1 request; dead letters: 1" in shown.output
    assert "refused-one" in run(state, "list", "--dead").output
    assert "waits" not in run(state, "list", "--class", "request").output
    rows = [json.loads(line) for line in run(state, "list", "--json", "--after", "1").output.splitlines()]
    assert [row["idem"] for row in rows] == ["tried"]


def test_inspect_tells_state_reason_result_and_payload(state: Path, tmp_path: Path) -> None:
    """Each fate is told, the payload is shown, and can be written to a file."""
    waits = run(state, "inspect", "waits", "--payload", str(tmp_path / "out"))
    assert "waiting" in waits.output
    assert "content of the first" in waits.output
    assert (tmp_path / "out").read_bytes() == b"content of the first"
    assert "the region said no" in run(state, "inspect", "refused-one").output
    assert "its answer" in run(state, "inspect", "delivered").output
    assert isinstance(run(state, "inspect", "nobody").exception, TheirsError)


def test_retry_and_drop_change_a_queue_at_rest(state: Path) -> None:
    """A dead letter waits again, a dropped item is gone after a confirmation, and both are told once done."""
    assert run(state, "retry", "refused-one").exit_code == 0
    assert "refused-one" in run(state, "list").output
    assert run(state, "drop", "waits", text="n\n").exit_code == 1
    assert "waits" in run(state, "list").output
    assert run(state, "drop", "waits", "--yes").exit_code == 0
    assert "event:operator" in run(state, "list").output
    assert isinstance(run(state, "retry", "nobody").exception, TheirsError)


async def test_beside_a_running_device_one_reads_and_is_told_the_way_to_change(state: Path) -> None:
    """While another process holds the store, listing works, and a change names the API route instead of waiting."""
    async with opened(state / "queue") as store:
        await store.put(Parcel(kind="event", idem="fresh", payload=b"5"))
        shown = await asyncio.to_thread(run, state, "list")
        assert "fresh" in shown.output
        refused = await asyncio.to_thread(run, state, "retry", "refused-one")
        assert isinstance(refused.exception, WorldError)
        assert "POST /v2/deferred/refused-one/retry" in str(refused.exception)
        assert "refused-one" in [item.idem for item in await store.listing(dead=True)]


@pytest.mark.parametrize("verb", ["list", "retry"])
def test_a_folder_without_a_queue_is_told(tmp_path: Path, verb: str) -> None:
    """A wrong directory is one sentence with a remedy, and nothing is created there."""
    failed = run(tmp_path, verb, *(["one"] if verb == "retry" else []))
    assert isinstance(failed.exception, WorldError)
    assert failed.exception.reason == "no_store"
    assert list(tmp_path.iterdir()) == []
