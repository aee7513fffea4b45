"""`appliance bench` against a real ingress in front of a desk that doubles."""

import asyncio
import json
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from appliance.adapters.ingress import Ingress
from appliance.cli.bench import bench
from appliance.contract.errors import TheirsError
from appliance.workshop import bench_soak, report
from tests.fakes.desk import DoublingDesk

pytestmark = pytest.mark.slow  # real parts and real faults: seconds in all, too long for `make check`


@pytest.fixture
def server() -> Iterator[str]:
    """A running ingress on a Unix socket, in a thread of its own."""
    folder = Path(tempfile.mkdtemp(prefix="ap-", dir="/tmp"))
    ready, loop = threading.Event(), asyncio.new_event_loop()

    async def serve() -> None:
        ingress = Ingress(DoublingDesk(), metrics=lambda: b"", status=lambda: None)
        await ingress.start("127.0.0.1", 0, folder / "s")
        ready.set()
        await stop.wait()
        await ingress.close()

    stop = asyncio.Event()
    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    assert ready.wait(10)
    yield f"unix:{folder / 's'}"
    loop.call_soon_threadsafe(stop.set)
    thread.join()
    loop.close()
    shutil.rmtree(folder)


def run(server: str, out: Path, *more: str) -> Result:
    asked = ["--server", server, "--model", "double", "--duration", "0.1", "--out", str(out), *more]
    return CliRunner().invoke(bench, asked, catch_exceptions=False)


def test_a_device_is_measured(server: str, tmp_path: Path) -> None:
    """All six loads are run; JSON, page and picture are written; mode, memory, CPU and cost are in them."""
    result = run(server, tmp_path / "out", "--dollars-per-hour", "0.5")
    assert result.exit_code == 0
    figures = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert [row["callers"] or row["load"] for row in figures["rows"]] == [1, 8, 32, 0.5, 0.8, 1.2]
    assert figures["capacity_per_s"] > 10
    assert all(row["summary"]["modes"] == {"A": row["summary"]["answered"]} for row in figures["rows"])
    assert figures["idle_pss_mib"] > 10  # this very process
    assert figures["rows"][0]["cpu_us_per_answer"] > 0
    page = (tmp_path / "out" / "bench.md").read_text()
    assert "dollars per million at $0.5/h" in page
    assert page.strip() in result.stdout
    assert (tmp_path / "out" / "bench.png").exists()


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device without matplotlib."""
    monkeypatch.setattr(report, "_pyplot", lambda: None)


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_hours_are_sampled_as_they_go(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sample is a line of the file; an earlier run's file is kept; a drift at the end is exit code 1."""
    (tmp_path / "bench-hours.jsonl").write_text("earlier\n")
    result = run(server, tmp_path, "--hours", "0.0001", "--sample-s", "0.12")
    assert result.exit_code == 0
    assert len((tmp_path / "bench-hours.jsonl").read_text().splitlines()) == 3
    assert [path.read_text() for path in tmp_path.glob("bench-hours-until-*.jsonl")] == ["earlier\n"]
    assert "3 samples" in result.stdout
    monkeypatch.setattr(bench_soak, "drift", lambda _samples: ["memory grew from 1 to 2 MiB"])
    result = run(server, tmp_path, "--hours", "0.0001", "--sample-s", "0.12")
    assert result.exit_code == 1
    assert "drift at the end: memory grew" in result.stdout
    assert result.stderr.count("drift: memory grew") == 1


@pytest.mark.usefixtures("undrawn")
def test_without_matplotlib_there_is_a_page_and_no_picture(server: str, tmp_path: Path) -> None:
    """It says so, and goes on."""
    result = run(server, tmp_path)
    assert result.exit_code == 0
    assert "matplotlib is not installed" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench.json", "bench.md"]


@pytest.mark.usefixtures("undrawn")
def test_inputs_come_from_a_file_or_a_shape(server: str, tmp_path: Path) -> None:
    """A file is sent as it is; a shape that does not fit is refused with the model's own; what the server refuses is told before any load."""
    file = tmp_path / "x.npy"
    np.save(file, np.ones((2, 4), np.float32))
    run(server, tmp_path, "--input", str(file))
    assert "x float32 [2, 4]" in (tmp_path / "bench.md").read_text()
    run(server, tmp_path, "--shape", "3,4")
    assert "x float32 [3, 4]" in (tmp_path / "bench.md").read_text()
    for wrong in ("x=1,5", "1,4,4", "z=1,4", "x=1,a"):
        with pytest.raises(TheirsError) as told:
            run(server, tmp_path, "--shape", wrong)
        assert "--shape" in str(told.value)
    np.save(file, np.ones((1, 4), np.float64))
    with pytest.raises(TheirsError, match="FP64"):
        run(server, tmp_path, "--input", str(file))
