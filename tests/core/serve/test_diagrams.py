"""The diagrams in docs/rooms/serve.md are drawn from the tables; run with UPDATE_DOCS=1 to redraw them."""

import os
import re
from pathlib import Path

import pytest

from appliance.contract.vocabulary import Mode
from appliance.core.serve import degradation, thermal
from appliance.core.serve.diagram import mermaid

PAGE = Path(__file__).parents[3] / "docs" / "rooms" / "serve.md"
DIAGRAMS = {
    "degradation": mermaid(degradation.TRANSITIONS, Mode.FULL),
    "thermal": mermaid(thermal.TRANSITIONS, thermal.State.NOMINAL),
}


@pytest.mark.parametrize("name", DIAGRAMS)
def test_diagram_is_current(name: str) -> None:
    """What the page shows between the markers is the table of the code."""
    page = PAGE.read_text()
    place = re.compile(rf"(<!-- begin {name} -->\n)(.*?)(<!-- end {name} -->)", re.DOTALL)
    found = place.search(page)
    assert found, f"docs/rooms/serve.md lacks the markers of {name}"
    if os.environ.get("UPDATE_DOCS"):
        PAGE.write_text(place.sub(lambda match: f"{match[1]}{DIAGRAMS[name]}\n{match[3]}", page))
    else:
        assert found[2] == DIAGRAMS[name] + "\n"


def test_every_arrow_of_a_table_is_drawn_once() -> None:
    """A line for each row, and the start."""
    lines = DIAGRAMS["degradation"].splitlines()
    assert lines[:3] == ["```mermaid", "stateDiagram-v2", "    [*] --> FULL"]
    assert len(lines) == len(degradation.TRANSITIONS) + 4
    assert "    FULL --> CONSTRAINED: pressure" in lines


@pytest.mark.parametrize("table", [degradation.TRANSITIONS, thermal.TRANSITIONS])
def test_every_state_can_be_reached_and_left(table: dict[tuple[str, str], str]) -> None:
    """No state of a table is a dead end or an orphan."""
    assert {before for before, _ in table} == set(table.values())
