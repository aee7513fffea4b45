"""An operator revokes a device and takes it back: a file beside its record, that `regional.attesting` reads at the next proof."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from appliance.adapters.depot import Depot
from appliance.cli.devices import device
from appliance.contract.errors import TheirsError


def call(state: Path, *words: str) -> str:
    result = CliRunner().invoke(device, [*words, "--state-dir", str(state)], standalone_mode=False)
    if result.exception:
        raise result.exception
    return result.output


def test_a_device_is_revoked_with_a_reason_and_taken_back(tmp_path: Path) -> None:
    """Revoked shows in the list with its reason, and readmitted it is as before; nobody else is touched."""
    depot = Depot(tmp_path / "devices")
    depot.save("device-jetson-1.json", b"{}")
    depot.save("device-jetson-2.json", b"{}")
    assert "revoked (stolen)" in call(tmp_path, "revoke", "jetson-2", "--why", "stolen")
    assert depot.load("revoked-jetson-2") == b"stolen\n"
    assert call(tmp_path, "list").splitlines() == ["jetson-1  enrolled", "jetson-2  revoked: stolen"]
    call(tmp_path, "readmit", "jetson-2")
    assert call(tmp_path, "list").splitlines() == ["jetson-1  enrolled", "jetson-2  enrolled"]
    with pytest.raises(TheirsError, match="is not revoked"):
        call(tmp_path, "readmit", "jetson-2")


def test_a_name_that_is_none_never_becomes_a_file(tmp_path: Path) -> None:
    """Separators and wildcards are refused before anything is written."""
    with pytest.raises(TheirsError, match="is not a name"):
        call(tmp_path, "revoke", "../x", "--why", "y")
