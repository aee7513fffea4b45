"""docs/threat-model.md claims nothing that no test shows."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/threat-model.md").read_text()
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)))
ATTACKERS = ("Stolen device", "The network", "Compromised region", "Compromised registry", "Malicious neighbour", "Root on the device")


@pytest.mark.parametrize(("file", "name"), NAMED, ids=lambda value: Path(value).stem)
def test_each_named_test_exists(file: str, name: str) -> None:
    """The file is there and defines a test of that name, which is not skipped for good."""
    functions = [node for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    [found] = [function for function in functions if function.name == name]
    assert not any("skip(" in ast.unparse(decorator) for decorator in found.decorator_list)


def test_each_attacker_says_what_does_not_stop_him() -> None:
    """Every chapter on an attacker has a table whose rows each name a test, and then what is not stopped."""
    chapters = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
    for attacker in ATTACKERS:
        [text] = [text for title, text in chapters.items() if title.startswith(attacker)]
        rows = [line for line in text.splitlines() if line.startswith("|")][2:]
        assert rows
        assert [row for row in rows if "::" not in row] == []
        assert "**Not stopped" in text
