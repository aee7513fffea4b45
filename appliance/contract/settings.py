"""The grammar of settings: one TOML file becomes one tree of frozen structs, or an error that names the file and the line.

1. Every key is declared: an unknown one is refused, with the nearest known key as the remedy.
2. Every value has a type and a range (`msgspec.Meta`); nothing is converted silently: no text to number, no bool to int, no NaN.
3. A section that is left out has its defaults; a key without default must be given.
4. `parse(render(x)) == x` for every tree x whose values are in range.
"""

import difflib
import math
import re
import tomllib
from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import msgspec
from msgspec import inspect

from appliance.contract.errors import TheirsError


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The base of a section and of a whole file; a rule between fields is a `__post_init__` that raises ValueError."""


LABEL = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\Z"
"""The names of devices and regions (`topics.name`)."""

PATH = "^/"
"""Absolute paths only: a daemon's working directory is nobody's promise."""


class Log(Section, frozen=True, kw_only=True):
    """How a daemon writes its log; the same in all rooms."""

    level: Annotated[Literal["debug", "info", "warning", "error"], msgspec.Meta(description="Least level that is written")] = "info"
    format: Annotated[Literal["auto", "json", "console"], msgspec.Meta(description="auto: coloured on a terminal, JSON otherwise")] = "auto"


class Watchdog(Section, frozen=True, kw_only=True):
    """When a daemon counts as stuck; the same in all rooms."""

    stalled_s: Annotated[
        float, msgspec.Meta(ge=1, le=600, description="A loop that has not moved for so long stops the watchdog's food, in seconds")
    ] = 20.0


T = TypeVar("T", bound=Section)


class Setting(NamedTuple):
    """One documented setting; `default` is as written in TOML, empty if the key must be given."""

    section: str
    key: str
    type: str
    default: str
    range: str
    description: str


def parse(text: str, file: str, root: type[T]) -> T:
    """Read TOML into `root`; `file` is only for messages.

    Raises: TheirsError (`settings`), `where` is "file:line" and `remedy` the nearest known key or the allowed range.
    """
    try:
        tables = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise _syntax(str(error), text, file) from error
    return _Reader(file, _line_numbers(text), document(root)).build(root, tables, ())


def render(settings: Section) -> str:
    """Write the effective configuration as TOML: descriptions as comments, the default beside each value that differs from it."""
    lines: list[str] = []
    for path, struct in _sections(settings, ()):
        plain = [field for field in msgspec.structs.fields(struct) if not _is_section(field.type)]
        if path:
            lines += ["", f"[{'.'.join(path)}]"]
        for field in plain:
            value = getattr(struct, field.name)
            setting = _setting(path, field)
            lines.append(f"# {setting.description}" + (f" ({setting.range})" if setting.range else ""))
            mark = f"  # default: {setting.default}" if setting.default and _toml(value) != setting.default else ""
            lines.append(f"{field.name} = {_toml(value)}{mark}")
    return "\n".join(lines).lstrip("\n") + "\n"


def document(root: type[Section]) -> list[Setting]:
    """List every setting of a file in its order, for the docs, for `appliance check` and for tests."""
    found: list[Setting] = []
    _document(root, (), found)
    return found


def _document(root: type[Section], path: tuple[str, ...], found: list[Setting]) -> None:
    for field in msgspec.structs.fields(root):
        if _is_section(field.type):
            _document(field.type, (*path, field.name), found)
        else:
            found.append(_setting(path, field))


class _Reader:
    """Builds one tree and knows where each key stands in the file."""

    def __init__(self, file: str, lines: dict[tuple[str, ...], int], known: list[Setting]) -> None:
        self._file = file
        self._lines = lines
        self._known = known

    def build(self, root: type[T], table: dict[str, Any], path: tuple[str, ...]) -> T:
        fields = {field.name: field for field in msgspec.structs.fields(root)}
        for key in table:
            if key not in fields:
                raise self._unknown(key, list(fields), path)
        values: dict[str, object] = {}
        for name, field in fields.items():
            if _is_section(field.type):
                values[name] = self._section(field, table.get(name, {}), (*path, name))
            elif name in table:
                values[name] = self._value(field, table[name], path)
            elif field.required:
                raise self._error(path, f"{_dotted(path, name)} must be given", f"add `{name} = …`: {_setting(path, field).description}")
        try:
            return root(**values)
        except ValueError as error:
            raise self._error(path, f"[{'.'.join(path)}] {error}", "") from error

    def _section(self, field: msgspec.structs.FieldInfo, table: object, path: tuple[str, ...]) -> Section:
        if not isinstance(table, dict):
            raise self._error(path, f"{_dotted(path)} is a section, got {_kind(table)}", f"write `[{_dotted(path)}]` on a line of its own")
        section: Section = self.build(field.type, table, path)
        return section

    def _value(self, field: msgspec.structs.FieldInfo, raw: object, path: tuple[str, ...]) -> object:
        try:
            return _converted(raw, field.type)
        except (ValueError, OverflowError) as error:
            setting = _setting(path, field)
            shown = _toml(raw) if isinstance(raw, bool | int | float | str) else _kind(raw)
            remedy = f"give {setting.type}" + (f": {setting.range}" if setting.range else "")
            raise self._error((*path, field.name), f"{_dotted(path, field.name)} = {_short(shown)} is not allowed", remedy) from error

    def _unknown(self, key: str, fields: list[str], path: tuple[str, ...]) -> TheirsError:
        near = difflib.get_close_matches(key, fields, n=1)
        elsewhere = [setting.section for setting in self._known if setting.key == key]
        if elsewhere:
            remedy = f"it belongs under [{elsewhere[0]}]"
        elif near:
            remedy = f"did you mean `{near[0]}`?"
        else:
            remedy = f"known here: {', '.join(fields)}"
        return self._error((*path, key), f"{_dotted(path, key)} is not a setting", remedy)

    def _error(self, path: tuple[str, ...], what: str, remedy: str) -> TheirsError:
        prefixes = (path[:length] for length in range(len(path), 0, -1))
        line = next((self._lines[prefix] for prefix in prefixes if prefix in self._lines), 1)
        return TheirsError("settings", what, where=f"{self._file}:{line}", remedy=remedy)


_SHOWN = 60  # letters of a wrong value that a message repeats
_POSITION = re.compile(r" \(at (?:line (\d+), column \d+|end of document)\)")


def _syntax(message: str, text: str, file: str) -> TheirsError:
    position = _POSITION.search(message)
    line = int(position[1]) if position and position[1] else text.rstrip("\n").count("\n") + 1
    plain = _POSITION.sub("", message)
    if plain.startswith(("Cannot overwrite", "Cannot declare", "Cannot mutate")):
        return TheirsError("settings", "given twice in this file", where=f"{file}:{line}", remedy="keep one of the two")
    return TheirsError("settings", f"not TOML: {plain}", where=f"{file}:{line}", remedy="texts need quotes, keys are `name = value`")


_HEADER = re.compile(r"\s*\[\[?([^\]=]+)\]\]?\s*(?:#.*)?$")
_KEY = re.compile(r"\s*([^=#\[\]{},]+?)\s*=")
_PART = re.compile(r"""\s*(?:"([^"]*)"|'([^']*)'|([^.\s"']+))\s*\.?""")


def _line_numbers(text: str) -> dict[tuple[str, ...], int]:
    """Find the line of each key and section; tolerant, for messages only (keys inside inline tables are not seen)."""
    found: dict[tuple[str, ...], int] = {}
    section: tuple[str, ...] = ()
    quoted = False
    for number, line in enumerate(text.split("\n"), start=1):
        fences = line.count('"""') + line.count("'''")
        if quoted:
            quoted = fences % 2 == 0
            continue
        quoted = fences % 2 == 1
        if header := _HEADER.match(line):
            section = _parts(header[1])
            found.setdefault(section, number)
        elif key := _KEY.match(line):
            found.setdefault((*section, *_parts(key[1])), number)
    return found


def _parts(dotted: str) -> tuple[str, ...]:
    return tuple("".join(part) for part in _PART.findall(dotted))


def _sections(struct: Section, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Section]]:
    yield path, struct
    for field in msgspec.structs.fields(struct):
        if _is_section(field.type):
            yield from _sections(getattr(struct, field.name), (*path, field.name))


def _converted(raw: object, annotation: Any) -> object:
    value: object = msgspec.convert(raw, type=annotation, strict=True)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("not a finite number")
    return value


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _setting(path: tuple[str, ...], field: msgspec.structs.FieldInfo) -> Setting:
    known = inspect.type_info(field.type)
    description = ""
    if isinstance(known, inspect.Metadata):
        description = str((known.extra_json_schema or {}).get("description", ""))
        known = known.type
    if field.default is not msgspec.NODEFAULT:
        default = _toml(field.default)
    elif field.default_factory is not msgspec.NODEFAULT:
        default = _toml(field.default_factory())
    else:
        default = ""
    kind, allowed = _allowed(known)
    return Setting(_dotted(path), field.name, kind, default, allowed, description)


def _allowed(known: inspect.Type) -> tuple[str, str]:
    """Say a type and its range in an operator's words."""
    match known:
        case inspect.BoolType():
            return "true or false", ""
        case inspect.IntType() | inspect.FloatType():
            kind = "a whole number" if isinstance(known, inspect.IntType) else "a number"
            return kind, f"{known.ge} to {known.le}"
        case inspect.LiteralType():
            return "one of", " | ".join(str(value) for value in known.values)
        case inspect.VarTupleType():
            return "a list of texts", ""
        case inspect.StrType():
            return "a text", _allowed_text(known)
        case _:
            return "a text", ""


def _allowed_text(known: inspect.StrType) -> str:
    if known.pattern == PATH:
        return "an absolute path"
    if known.pattern:
        return f"matching {known.pattern}"
    return "not empty" if known.min_length else ""


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, tuple | list):
        return f"[{', '.join(_toml(item) for item in value)}]"
    return '"' + "".join(_escaped(letter) for letter in str(value)) + '"'


def _escaped(letter: str) -> str:
    if letter in '\\"':
        return f"\\{letter}"
    return letter if letter.isprintable() else f"\\U{ord(letter):08x}"


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _kind(value: object) -> str:
    return {"dict": "a section", "list": "a list", "str": "a text"}.get(type(value).__name__, type(value).__name__)


def _dotted(path: tuple[str, ...], *names: str) -> str:
    return ".".join((*path, *names))
