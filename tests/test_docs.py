"""The documents name what the code has, and nothing else."""

import re
from pathlib import Path

from appliance.adapters.metrics import METRICS

DOCS = Path(__file__).parent.parent / "docs"


def test_every_metric_is_documented_and_nothing_else() -> None:
    """docs/metrics.md lists each metric with its type, labels and meaning, in the order of the code."""
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (.*?) \| (.*?) \|$", (DOCS / "metrics.md").read_text(), re.MULTILINE)
    expected = [(each.name, each.kind, ", ".join(f"`{label}`" for label in each.labels) or "-", each.says) for each in METRICS]
    assert expected == rows
