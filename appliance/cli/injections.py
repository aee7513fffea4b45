"""`appliancectl lab`: heats and squeezes the simulated boards of the lab that runs, so that one sees the modes change."""

import json
import time
from collections.abc import Mapping
from pathlib import Path

import click

from appliance.contract.errors import TheirsError
from appliance.contract.settings import parse
from appliance.edge.settings import Edge
from appliance.lab.daemon import CONTROL
from appliance.lab.site import running

STATE = click.option("--state", type=click.Path(file_okay=False, path_type=Path), help="The lab's directory, if not the default one.")
DEVICE = click.option("--device", help="One device, such as dev-001; default all.")
FOR = click.option(
    "--for", "for_s", type=click.FloatRange(min=0), default=0.0, help="End it after so many seconds; 0 leaves it until `calm`."
)


@click.group()
def lab() -> None:
    """Break the lab that runs, on purpose."""


@lab.command()
@click.option("--watts", type=click.FloatRange(-50, 200), default=120.0, show_default=True, help="Heat added to the board.")
@STATE
@DEVICE
@FOR
def heat(watts: float, state: Path | None, device: str | None, for_s: float) -> None:
    """Heat the board, as a blocked fan or the sun would: the clock falls, batches shrink, modes step down."""
    _inject(state, device, {"watts": watts}, for_s)


@lab.command()
@click.option("--to", "percent", type=click.FloatRange(0, 99.5), default=97.0, show_default=True, help="Memory in use, in percent.")
@STATE
@DEVICE
@FOR
def squeeze(percent: float, state: Path | None, device: str | None, for_s: float) -> None:
    """Take the board's memory, as another program would: modes step down A, B, C."""
    for folder in _devices(running(state), device):
        sim = parse((folder / "settings.toml").read_text(), str(folder / "settings.toml"), Edge).sim
        taken = max(0, int(sim.memory_mib * percent / 100) - sim.resting_mib) << 20
        _write(folder, {"memory_bytes": taken})
        click.echo(f"{folder.name}: {percent:g} % of its memory is in use")
    _end(state, device, ("memory_bytes",), for_s)


@lab.command()
@STATE
@DEVICE
def calm(state: Path | None, device: str | None) -> None:
    """End all heat and squeeze."""
    for folder in _devices(running(state), device):
        (folder / CONTROL).unlink(missing_ok=True)
        click.echo(f"{folder.name}: calm")


def _inject(state: Path | None, device: str | None, what: Mapping[str, float], for_s: float) -> None:
    for folder in _devices(running(state), device):
        _write(folder, what)
        click.echo(f"{folder.name}: {', '.join(f'{name} {value:g}' for name, value in what.items())}")
    _end(state, device, tuple(what), for_s)


def _end(state: Path | None, device: str | None, names: tuple[str, ...], for_s: float) -> None:
    """Wait, and take it back; an interruption takes it back at once."""
    if not for_s:
        return
    try:
        time.sleep(for_s)
    finally:
        for folder in _devices(running(state), device):
            _write(folder, dict.fromkeys(names, 0))
            click.echo(f"{folder.name}: over")


def _devices(site: Path, device: str | None) -> list[Path]:
    """The folders of the devices that are meant. Raises: TheirsError (`device`)."""
    folders = sorted(path.parent for path in site.glob("dev-*/settings.toml"))
    if device is None:
        return folders
    chosen = [folder for folder in folders if folder.name == device]
    if not chosen:
        raise TheirsError("device", f"no device is called {device!r}", remedy=f"devices here: {', '.join(each.name for each in folders)}")
    return chosen


def _write(folder: Path, changes: Mapping[str, float]) -> None:
    """Change the board's control file as a whole: a reader sees the old or the new one."""
    path = folder / CONTROL
    kept = json.loads(path.read_text()) if path.is_file() else {}
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps({**kept, **changes}))
    fresh.replace(path)
