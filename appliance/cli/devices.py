"""`appliancectl device`: whom a region has enrolled, and whom it has revoked. Run it where the region runs, as the region's user."""

from pathlib import Path

import click

from appliance.adapters.depot import Depot
from appliance.contract import topics
from appliance.contract.errors import TheirsError

RECORD, REVOKED = "device-", "revoked-"
STATE = click.option(
    "--state-dir",
    type=click.Path(file_okay=False, exists=True, path_type=Path),
    default=Path("/var/lib/appliance-region"),
    show_default=True,
    help="The region's state_dir.",
)


@click.group()
def device() -> None:
    """Enrolled and revoked devices of a region."""


@device.command("list")
@STATE
def list_(state_dir: Path) -> None:
    """List every device that the region knows, and why it was revoked."""
    depot = _depot(state_dir)
    names = {name.removeprefix(RECORD).removesuffix(".json") for name in depot.names(RECORD)}
    revoked = {name.removeprefix(REVOKED) for name in depot.names(REVOKED)}
    for name in sorted(names | revoked):
        why = (depot.load(f"{REVOKED}{name}") or b"").decode(errors="replace").partition("\n")[0]
        click.echo(f"{name}  {'revoked: ' + (why or 'no reason was written down') if name in revoked else 'enrolled'}")


@device.command()
@click.argument("name")
@click.option("--why", required=True, help="One line; the device and its log are told.")
@STATE
def revoke(name: str, why: str, state_dir: Path) -> None:
    """Take from a device the right to open models: at its next proof, and as the broker cuts it off."""
    _depot(state_dir).save(f"{REVOKED}{topics.name(name)}", f"{why}\n".encode())
    click.echo(f"{name}: revoked ({why}); `appliancectl device readmit {name}` takes it back")


@device.command()
@click.argument("name")
@STATE
def readmit(name: str, state_dir: Path) -> None:
    """Let a revoked device prove itself again. Raises: TheirsError (`device`)."""
    depot = _depot(state_dir)
    if depot.load(f"{REVOKED}{topics.name(name)}") is None:
        raise TheirsError("device", "is not revoked", where=name, remedy="`appliancectl device list` shows who is")
    depot.forget(f"{REVOKED}{name}")
    click.echo(f"{name}: may prove itself again")


def _depot(state_dir: Path) -> Depot:
    return Depot(state_dir / "devices")
