"""`appliance check`: the effective configuration, and what is missing on this machine with the command that mends it.

Run it as the daemon's user (`sudo -u appliance appliance check …`): what root may open says nothing about what the daemon may.
"""

import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import click
import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from appliance.adapters.board_generic import GenericBoard
from appliance.cli import boards, probes
from appliance.cli.probes import Finding, Machine
from appliance.cloud.settings import Cloud
from appliance.contract.errors import ApplianceError, TheirsError, WorldError
from appliance.contract.settings import Section, parse, render
from appliance.edge.settings import Edge
from appliance.regional.settings import Region

ROOMS: dict[str, type[Section]] = {"device": Edge, "region": Region, "cloud": Cloud}

T = TypeVar("T", bound=Section)


def load(file: Path, root: type[T]) -> T:
    """Read a settings file. Raises: TheirsError (`settings`)."""
    try:
        return parse(file.read_text(encoding="utf-8"), str(file), root)
    except OSError as error:
        raise TheirsError("settings", error.strerror or str(error), where=str(file), remedy="give the file with --config") from error
    except UnicodeDecodeError as error:
        raise TheirsError(
            "settings", f"not UTF-8: {error.reason} at byte {error.start}", where=str(file), remedy="save it as UTF-8"
        ) from error


def findings(settings: Section, machine: Machine) -> Iterator[Finding]:
    """Look at everything that these settings need of this machine."""
    yield probes.python(machine)
    match settings:
        case Edge():
            yield from _device(settings, machine)
        case Region():
            yield from _region(settings, machine)
        case Cloud():
            yield from _cloud(settings, machine)
    yield probes.clock(machine)


def _device(settings: Edge, machine: Machine) -> Iterator[Finding]:
    user = "appliance"
    yield probes.engine(machine)
    yield probes.memory(machine)
    yield probes.folder(machine, "state directory", settings.device.state_dir, user)
    yield probes.tpm(machine, settings.trust.tcti, user)
    yield probes.workload_api(machine, settings.trust.workload_api)
    yield _metadata_root(settings.trust.tuf_root, machine)
    yield probes.broker(machine, settings.reach.broker_host, settings.reach.broker_port)


def _region(settings: Region, machine: Machine) -> Iterator[Finding]:
    user = "appliance-region"
    yield probes.folder(machine, "state directory", settings.region.state_dir, user)
    yield probes.folder(machine, "keys directory", settings.trust.keys_dir, user)
    yield probes.workload_api(machine, settings.trust.workload_api)
    yield _metadata_root(settings.trust.tuf_root, machine)
    if settings.trust.ek_roots:
        remedy = f"sudo install -d {settings.trust.ek_roots}  # and put the TPM makers' CA certificates there"
        yield probes.present(machine, "TPM makers' roots", settings.trust.ek_roots, remedy)
    yield probes.broker(machine, settings.reach.broker_host, settings.reach.broker_port)


def _cloud(settings: Cloud, machine: Machine) -> Iterator[Finding]:
    user = "appliance-cloud"
    yield probes.folder(machine, "state directory", settings.cloud.state_dir, user)
    yield probes.folder(machine, "keys directory", settings.trust.keys_dir, user)
    yield probes.folder(machine, "models directory", settings.cloud.models_dir, user)
    yield probes.workload_api(machine, settings.trust.workload_api)
    yield probes.broker(machine, settings.reach.broker_host, settings.reach.broker_port)


def _profile(settings: Edge, measure: Path | None) -> None:
    """Print the profile; measure the board first if that is asked. Raises: ApplianceError."""
    if measure is not None:
        from appliance.workshop import boards as workshop  # noqa: PLC0415 - numpy is not needed for anything else here

        board = workshop.measure(GenericBoard().read().memory_total_bytes, measure.stem)
        text = workshop.toml(board, datetime.now(tz=UTC).date().isoformat())
        try:
            measure.write_text(text)
        except OSError as error:
            raise WorldError(
                "disk", f"cannot be written: {error.strerror}", where=str(measure), remedy="choose another --measure"
            ) from error
        click.echo(f"{measure}: written; name it in board.profile")
        settings = msgspec.structs.replace(settings, board=msgspec.structs.replace(settings.board, profile=str(measure)))
    for line in boards.explain(settings):
        click.echo(line)


def _metadata_root(path: str, machine: Machine) -> Finding:
    return probes.present(
        machine, "root of signed metadata", path, f"sudo install -m 0644 root.json {path}  # from whoever publishes the models"
    )


def table(found: list[Finding]) -> Table:
    """Lay the findings out: ok, missing (stops the daemon) or advised."""
    columns = Table(box=None, pad_edge=False, show_edge=False)
    for heading in ("", "what", "seen"):
        columns.add_column(heading, overflow="fold")
    for finding in found:
        word, style = ("ok", "green") if finding.ok else ("missing", "red") if finding.needed else ("advised", "yellow")
        columns.add_row(Text(word, style=style), Text(finding.what), Text(finding.seen))
    return columns


@click.command()
@click.option("--config", "file", type=click.Path(path_type=Path, dir_okay=False), required=True, help="The settings file, TOML.")
@click.option("--kind", type=click.Choice(list(ROOMS)), default="device", show_default=True, help="Which daemon the file is for.")
@click.option("--profile", is_flag=True, help="Explain how long batches take on this device, and why it believes so; nothing else.")
@click.option(
    "--measure",
    type=click.Path(dir_okay=False, path_type=Path),
    help="With --profile: measure this machine and write its board data there.",
)
@click.pass_context
def check(context: click.Context, file: Path, kind: str, measure: Path | None, *, profile: bool) -> None:
    """Print the effective configuration and what is missing on this machine, with the command that mends it."""
    if profile or measure:
        _profile(load(file, Edge), measure)
        return
    machine = context.find_object(Machine) or Machine()
    try:
        settings = load(file, ROOMS[kind])
    except ApplianceError as error:
        raise click.ClickException(str(error)) from error
    click.echo(render(settings))
    found = list(findings(settings, machine))
    Console().print(table(found))
    for finding in found:
        if not finding.ok:
            click.echo(f"\n{finding.what}:\n  {finding.remedy}")
    if any(finding.needed and not finding.ok for finding in found):
        sys.exit(1)  # and not context.exit: it is swallowed when the group does not run stand-alone
