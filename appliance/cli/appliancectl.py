"""The command `appliancectl`: what operators and engineers do to a fleet, its models and the lab."""

import click

from appliance.cli.appliance import guarded
from appliance.cli.deferrals import queue
from appliance.cli.devices import device
from appliance.cli.injections import lab
from appliance.cli.variants import variants


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def group() -> None:
    """Operate appliances: prepare models, look into devices, break the lab on purpose."""


@group.group()
def model() -> None:
    """Prepare a model for the fleet."""


group.add_command(device)
group.add_command(lab)
group.add_command(queue)
model.add_command(variants)


def main() -> None:
    """Run the command; an error on purpose becomes one line and exit code 1, never a traceback."""
    guarded(group, "appliancectl")
