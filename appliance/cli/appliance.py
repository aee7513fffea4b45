"""The command `appliance`: everything that runs on a device, in a region, in the cloud, or in the lab."""

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import click

from appliance.cli.bench import bench
from appliance.cli.check import check
from appliance.cli.infer import infer
from appliance.cli.lab import lab
from appliance.cli.provision import escrow, provision
from appliance.contract.errors import ApplianceError
from appliance.contract.settings import parse


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def group() -> None:
    """Serve inference on the edge, whatever happens to network, heat and memory."""


def main() -> None:
    """Run the command; an error on purpose becomes one line and exit code 1, never a traceback."""
    guarded(group, "appliance")


def guarded(command: click.Group, name: str) -> None:
    """Run a command and exit; an error on purpose becomes one line that begins with `name`."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # on by default, and read at import: `check` and `lab` import onnxruntime too
    try:
        command(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except ApplianceError as error:
        click.echo(f"{name}: {error}", err=True)
        sys.exit(1)
    except BaseExceptionGroup as error:
        known = first_known(error)
        if known is None:
            raise
        click.echo(f"{name}: {known}", err=True)
        sys.exit(1)


def first_known(group_error: BaseExceptionGroup[BaseException]) -> ApplianceError | None:
    """The first error on purpose in a task group's bundle, if all of it is on purpose."""
    known, unknown = group_error.split(ApplianceError)
    if unknown is not None or known is None:
        return None
    found: BaseException = known
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    return found if isinstance(found, ApplianceError) else None


def start(config: Path, root: type[Any], run: Callable[[Any], Awaitable[None]]) -> None:
    """Read the settings and run a daemon in uvloop. Raises: TheirsError (`settings`)."""
    import uvloop  # noqa: PLC0415 - only daemons need it

    try:
        text = config.read_text()
    except OSError as error:
        raise click.ClickException(f"{config}: cannot be read: {error.strerror}") from error

    async def body() -> None:
        await run(parse(text, str(config), root))

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(body())


_CONFIG = click.Path(dir_okay=False, path_type=Path)


@group.command()
@click.option("--config", type=_CONFIG, default=Path("/etc/appliance/device.toml"), show_default=True)
def run(config: Path) -> None:
    """Run the device's daemon."""
    from appliance.edge import daemon  # noqa: PLC0415 - a region has no TPM library, a device no broker: each loads its own
    from appliance.edge.settings import Edge  # noqa: PLC0415

    start(config, Edge, daemon.run)


@group.command()
@click.option("--config", type=_CONFIG, default=Path("/etc/appliance/region.toml"), show_default=True)
def region(config: Path) -> None:
    """Run the region's daemon."""
    from appliance.regional import daemon  # noqa: PLC0415
    from appliance.regional.settings import Region  # noqa: PLC0415

    start(config, Region, daemon.run)


@group.command()
@click.option("--config", type=_CONFIG, default=Path("/etc/appliance/cloud.toml"), show_default=True)
def cloud(config: Path) -> None:
    """Run the cloud's publisher."""
    from appliance.cloud import daemon  # noqa: PLC0415
    from appliance.cloud.settings import Cloud  # noqa: PLC0415

    start(config, Cloud, daemon.run)


for command in (bench, check, escrow, infer, lab, provision):
    group.add_command(command)
