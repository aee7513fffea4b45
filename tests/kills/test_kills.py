"""A short smoke of `make kills`: nine rounds of kill -9 of device, broker and region, and every promise has its one effect. And the judge convicts."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.kills.run import ZERO, broken, run, write


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_nine_rounds_of_kill_9() -> None:
    """Each of the three is killed; nothing that was promised is lost, applied twice or out of order, and every round ends with new arrivals."""
    folder = Path(tempfile.mkdtemp(prefix="ap-", dir="/tmp"))
    try:
        whole = await run(9, 3, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    assert broken(whole) == []
    assert whole["victims"].keys() == {"broker", "device", "region"}
    assert whole["events_promised"] > 100
    assert whole["requests_promised"] > 10


def account(**wrong: int) -> dict[str, Any]:
    return dict.fromkeys(ZERO, 0) | {"stuck": [], "rounds": 3, "victims": {"broker": 3}} | wrong


@pytest.mark.parametrize("name", ZERO)
def test_each_broken_promise_is_told(name: str) -> None:
    """One event or request too few, too many or too early is enough to fail the run."""
    assert broken(account()) == []
    assert broken(account(**{name: 1})) == [f"{name}: 1"]


def test_the_summary_joins_the_queues_report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What was lost and what was done twice stands beside the benchmark's figures, which stay."""
    queue = tmp_path / "queue.json"
    queue.write_text('{"over_best_durable_peer_64": 12.0}')
    monkeypatch.setattr("tests.kills.run.QUEUE", queue)
    monkeypatch.setattr("tests.kills.run.REPORT", tmp_path / "kills.json")
    write(account(events_lost=2, requests_lost=1, events_with_effect_twice=4))
    assert '"lost": 3' in queue.read_text()
    assert '"twice": 4' in queue.read_text()
    assert "12.0" in queue.read_text()
