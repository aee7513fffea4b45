"""The house rules that the import linter cannot see: purity, size, docstrings, names."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PRODUCT = sorted((ROOT / "appliance").rglob("*.py"))
PURE = [path for path in PRODUCT if path.relative_to(ROOT).parts[1] in {"core", "contract"}]

ALLOWED = {
    "appliance", "base64", "binascii", "bisect", "collections", "cryptography", "dataclasses", "datetime", "difflib", "enum", "functools",
    "hashlib", "heapq", "hmac", "itertools", "json", "math", "msgspec", "numpy", "operator", "re", "struct", "tomllib", "types", "typing",
    "statistics", "textwrap", "string", "zlib",
}  # fmt: skip
FORBIDDEN_CALLS = {"open", "print", "input", "now", "utcnow", "time", "monotonic", "urandom", "token_bytes", "sleep"}
VAGUE = {"utils", "util", "helpers", "helper", "common", "manager", "handler", "handlers", "misc", "base"}
MAX_LINES = 400
MAX_FUNCTION_LINES = 50


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture(params=PRODUCT, ids=named)
def module(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


def test_module_is_short_and_says_what_it_is_for(module: Path) -> None:
    """Every module has a docstring, at most 400 lines, and no function above 50 lines."""
    source = module.read_text()
    tree = ast.parse(source)
    assert ast.get_docstring(tree), f"{named(module)} has no docstring"
    assert len(source.splitlines()) <= MAX_LINES
    long = [
        f"{node.name} ({node.end_lineno - node.lineno + 1} lines)"
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno
        and node.end_lineno - node.lineno >= MAX_FUNCTION_LINES
    ]
    assert long == []


def test_module_has_a_name_of_its_own(module: Path) -> None:
    """File names are nouns of at most two words, never vague; two rooms may share a noun, a top-level module never shadows the library."""
    stem = module.stem
    assert stem not in VAGUE
    assert stem.count("_") <= 1 or stem.startswith("__")
    if module.parent.name == "appliance":
        assert stem not in sys.stdlib_module_names


def imported(tree: ast.AST) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found


@pytest.mark.parametrize("path", PURE, ids=named)
def test_pure_floor_imports_only_what_is_pure(path: Path) -> None:
    """Core and contract import from an allow-list, so no decision can depend on the outside."""
    roots = imported(ast.parse(path.read_text()))
    assert roots - ALLOWED - {"collections", "__future__"} == set()


@pytest.mark.parametrize("path", PURE, ids=named)
def test_pure_floor_never_waits_nor_looks_at_a_clock(path: Path) -> None:
    """Core and contract have no async code and call nothing that reads the outside."""
    for node in ast.walk(ast.parse(path.read_text())):
        assert not isinstance(node, ast.AsyncFunctionDef | ast.Await | ast.AsyncFor | ast.AsyncWith), f"line {node.lineno} is async"
        if isinstance(node, ast.Call):
            called = node.func.id if isinstance(node.func, ast.Name) else ""
            assert called not in FORBIDDEN_CALLS, f"line {node.lineno} calls {called}()"
            if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
                assert (node.func.value.id, node.func.attr) not in {("datetime", "now"), ("datetime", "utcnow"), ("date", "today")}


def test_no_silenced_type_errors() -> None:
    """Mypy is strict for every file: no per-file `ignore_errors`."""
    assert "ignore_errors" not in (ROOT / "pyproject.toml").read_text()


def test_every_lint_ignore_has_its_reason() -> None:
    """A rule is switched off only with a reason beside it."""
    text = (ROOT / "pyproject.toml").read_text()
    block = text[text.index("ignore = [") : text.index("[tool.ruff.lint.mccabe]")]
    rules = [line for line in block.splitlines() if line.strip().startswith('"') and "#" not in line and "=" not in line]
    assert rules == []


def test_nothing_waits_by_wait_for(module: Path) -> None:
    """`asyncio.wait_for` drops a cancellation on Python 3.11 that comes as its future completes; `asyncio.timeout` does not."""
    calls = [
        node for node in ast.walk(ast.parse(module.read_text())) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    ]
    names = [(ast.unparse(call.func.value), call.func.attr) for call in calls if isinstance(call.func, ast.Attribute)]
    assert ("asyncio", "wait_for") not in names
