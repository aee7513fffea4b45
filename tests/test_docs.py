"""The documents name what the code has, and nothing else."""

import os
import re
import subprocess
import sys
from pathlib import Path

from appliance.adapters.metrics import METRICS
from appliance.cli.appliance import group
from appliance.cloud.settings import Cloud
from appliance.contract.settings import Section, document
from appliance.edge.settings import Edge
from appliance.regional.settings import Region

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
FILES: tuple[tuple[str, type[Section]], ...] = (("device.toml", Edge), ("region.toml", Region), ("cloud.toml", Cloud))


def test_every_metric_is_documented_and_nothing_else() -> None:
    """docs/metrics.md lists each metric with its type, labels and meaning, in the order of the code."""
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (.*?) \| (.*?) \|$", (DOCS / "metrics.md").read_text(), re.MULTILINE)
    expected = [(each.name, each.kind, ", ".join(f"`{label}`" for label in each.labels) or "-", each.says) for each in METRICS]
    assert expected == rows


def settings_text() -> str:
    """The page as the code would write it."""
    lines = [
        "# Settings",
        "",
        "Written from the code by `UPDATE_DOCS=1 pytest tests/test_docs.py`; a test compares. `appliance check` prints what is in force.",
    ]
    for file, root in FILES:
        lines += ["", f"## {file}", "", "| setting | default | allowed | what it is |", "|---|---|---|---|"]
        for each in document(root):
            default = f"`{each.default}`" if each.default else "must be given"
            lines.append(f"| `{each.section}.{each.key}` | {default} | {each.range.replace('|', chr(92) + '|')} | {each.description} |")
    return "\n".join(lines) + "\n"


def test_every_setting_is_documented_and_nothing_else() -> None:
    """docs/settings.md has each setting of each file, with default, range and meaning."""
    page = DOCS / "settings.md"
    if os.environ.get("UPDATE_DOCS"):
        page.write_text(settings_text())
    assert page.read_text() == settings_text()


def test_settings_modules_are_the_documented_ones() -> None:
    """There is no settings module that the page does not know."""
    modules = {path for path in (ROOT / "appliance").rglob("settings.py") if path.parent.name != "contract"}
    assert {".".join(path.with_suffix("").relative_to(ROOT).parts) for path in modules} == {root.__module__ for _, root in FILES}


def test_every_setting_is_read_by_somebody() -> None:
    """A setting that no code reads is a promise that nobody keeps."""
    code = "\n".join(path.read_text() for path in (ROOT / "appliance").rglob("*.py") if path.name != "settings.py")
    by_name = {f"sim.{each.key}" for each in document(Edge) if each.section == "sim"}  # passed on as a whole to the simulated board
    unread = [f"{each.section}.{each.key}" for _, root in FILES for each in document(root) if not re.search(rf"\.{each.key}\b", code)]
    assert set(unread) - by_name == set()


def test_the_readmes_commands_exist() -> None:
    """Every `make` target and `appliance` command that README names is there."""
    readme = (ROOT / "README.md").read_text()
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"make ([a-z]+)", readme)) <= targets
    assert set(re.findall(r"bin/appliance ([a-z]+)", readme)) <= set(group.commands)


def test_an_unknown_command_is_told_without_a_traceback() -> None:
    """An operator's slip is one message and a non-zero exit."""
    ran = subprocess.run([sys.executable, "-m", "appliance", "serv"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert "No such command" in ran.stderr
    assert "Traceback" not in ran.stderr
