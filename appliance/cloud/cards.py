"""The card of a model folder, `model.toml`: what the model needs, what was measured of it, and which files are its variants.

1. A folder holds `model.toml` and one file of the full model for each platform, told by its suffix (.onnx, .tflite).
2. Files of variants lie beside it and are named in `[variants.MODE]`; what is named there is no file of the full model.
3. The variant for mode D is a feature extractor and names its `head`, which is not published: it stays for the side that answers.
4. `[refused]`, `[notes]` and `[measured]` are for people: why a mode is missing or of doubtful use, and how the figures came about.
5. Everything wrong is said with file, line and field.
"""

import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from appliance.contract.errors import TheirsError, WorldError
from appliance.contract.vocabulary import Mode, Platform

CARD = "model.toml"
SUFFIXES = {".onnx": Platform.ONNX, ".tflite": Platform.LITERT}

Positive = Annotated[float, Meta(gt=0)]
Share = Annotated[float, Meta(ge=0, le=1)]
ModelId = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]
Version = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,62}$")]
FileName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,126}$")]


class _Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A table of the card; an unknown key is an error."""


class VariantCard(_Table, frozen=True, kw_only=True):
    """One mode's variant. `files`: one for each platform; `head`: for mode D, the other side's file. Figures as in `contract.models.Variant`."""

    files: Annotated[list[FileName], Meta(min_length=1)]
    head: FileName | None = None
    accuracy: Share | None = None
    latency_ms: Positive | None = None
    memory_bytes: Annotated[int, Meta(ge=0)] | None = None
    flops: Annotated[float, Meta(ge=0)] | None = None
    activation_bytes: Annotated[float, Meta(ge=0)] | None = None
    how: Annotated[str, Meta(max_length=500)] = ""


class Measured(_Table, frozen=True, kw_only=True):
    """How the figures came about: on how many samples, by which metric, on which machine, with which onnxruntime."""

    metric: str
    samples: int
    machine: str
    onnxruntime: str


class ModelCard(_Table, frozen=True, kw_only=True):
    """`model.toml`. `min_vram_gb` in GiB; `target_latency_ms` is for one request at batch 1; the rest as in `contract.models.Manifest`."""

    model_id: ModelId
    version: Version
    min_vram_gb: Positive
    max_batch_size: Annotated[int, Meta(ge=1, le=1024)]
    target_latency_ms: Positive
    accuracy: Share | None = None
    latency_ms: Positive | None = None
    memory_bytes: Annotated[int, Meta(ge=0)] | None = None
    flops: Annotated[float, Meta(ge=0)] | None = None
    activation_bytes: Annotated[float, Meta(ge=0)] | None = None
    offline: Literal["lease", "never"] = "lease"
    at_term: Literal["keep", "stop"] = "keep"
    example_shapes: dict[str, list[Annotated[int, Meta(ge=1)]]] = {}
    variants: dict[Mode, VariantCard] = {}
    refused: dict[Mode, str] = {}
    notes: dict[Mode, str] = {}
    measured: Measured | None = None

    def __post_init__(self) -> None:
        """Hold the variants against their modes."""
        for mode, variant in self.variants.items():
            if mode is Mode.FULL:
                raise ValueError("mode A is the model itself, not a variant of it - at `$.variants`")
            if (variant.head is not None) != (mode is Mode.CLOUD):
                raise ValueError(
                    f"mode {mode} {'names no' if mode is Mode.CLOUD else 'has a'} head; only mode D has one - at `$.variants.{mode}`"
                )


def read(path: Path) -> ModelCard:
    """Read a card. Raises: TheirsError (`malformed`) with file, line and field; WorldError (`disk`)."""
    try:
        text = path.read_text("utf-8")
        return msgspec.convert(tomllib.loads(text), ModelCard)
    except OSError as error:
        raise WorldError("disk", str(error), where=str(path)) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:  # the text names line and column
        raise TheirsError("malformed", f"not TOML: {error}", where=str(path)) from error
    except msgspec.ValidationError as error:
        raise TheirsError("malformed", str(error), where=f"{path}{_line(text, str(error))}") from error


def check_names(model_id: str, version: str) -> None:
    """Hold a name and a version against what a card may hold. Raises: TheirsError (`malformed`)."""
    for name, value in (("model_id", model_id), ("version", version)):
        try:
            msgspec.convert(value, ModelId if name == "model_id" else Version)
        except msgspec.ValidationError as error:
            raise TheirsError("malformed", f"{value!r}: {error}", where=name) from error


def written(card: ModelCard) -> str:
    """Return the text of a card; `read` gives the same card back."""
    return "".join(_table((), msgspec.to_builtins(card)))


def files_of(folder: Path, card: ModelCard) -> dict[Mode, dict[Platform, Path]]:
    """Return the files that are published, by mode and platform; A is the full model.

    Raises: TheirsError (`model`) if one is missing or there are two for one platform; OSError if the folder cannot be read.
    """
    named = {name for variant in card.variants.values() for name in (*variant.files, variant.head) if name}
    full = [path for path in sorted(folder.iterdir()) if path.suffix in SUFFIXES and path.is_file() and path.name not in named]
    if not full:
        raise TheirsError(
            "model", "there is no model file beside it", where=str(folder / CARD), remedy=f"add one of {', '.join(sorted(SUFFIXES))}"
        )
    found = {Mode.FULL: _by_platform(folder, full, "keep one, or name it under the variant that it belongs to")}
    for mode, variant in sorted(card.variants.items()):
        paths = [folder / name for name in variant.files]
        for path in [*paths, *([folder / variant.head] if variant.head else [])]:
            if not path.is_file() or path.suffix not in SUFFIXES:
                what = f"mode {mode} names {path.name}, which is no model file of this folder"
                raise TheirsError("model", what, where=str(folder / CARD), remedy="build the variants again, or take the mode out")
        found[mode] = _by_platform(folder, paths, f"keep one for mode {mode}")
    return found


def head_of(folder: Path, card: ModelCard) -> Path | None:
    """Return the file that finishes what mode D's features began; None if the model has no mode D."""
    split = card.variants.get(Mode.CLOUD)
    return folder / split.head if split is not None and split.head is not None else None


def _by_platform(folder: Path, paths: list[Path], remedy: str) -> dict[Platform, Path]:
    files: dict[Platform, Path] = {}
    for path in paths:
        platform = SUFFIXES[path.suffix]
        if platform in files:
            raise TheirsError("model", f"{files[platform].name} and {path.name} are both for {platform}", where=str(folder), remedy=remedy)
        files[platform] = path
    return files


def _line(text: str, error: str) -> str:
    """Return `:N` for the line of the field or table that a validation error names, if it is in the text."""
    path = re.search(r"at `\$([^`]*)`", error)
    unknown = re.search(r"unknown field `([\w-]+)`", error)
    steps = re.sub(r"\[\d+\]", "", path[1] if path else "").replace("[...]", ".*").strip(".").split(".")  # a key of a map is not told
    steps += [unknown[1]] if unknown else []
    *table, field = [step for step in steps if step] or [""]
    inside: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        header = re.match(r"\s*\[([\w.-]+)\]", line)
        if header:
            inside = header[1].split(".")
            if _alike(inside, [*table, field]):
                return f":{number}"
        elif field and _alike(inside, table) and re.match(rf"\s*{re.escape(field)}\s*=", line):
            return f":{number}"
    return ""


def _alike(names: list[str], steps: list[str]) -> bool:
    return len(names) == len(steps) and all(step in {"*", name} for name, step in zip(names, steps, strict=True))


def _table(name: tuple[str, ...], values: Mapping[str, Any]) -> list[str]:
    """Return a table's lines, its plain values first, then the tables in it."""
    plain = [f"{_key(key)} = {_value(value)}\n" for key, value in values.items() if not isinstance(value, dict) and value is not None]
    inner = [line for key, value in values.items() if isinstance(value, dict) for line in _table((*name, key), value)]
    head = [f"\n[{'.'.join(map(_key, name))}]\n"] if name and plain else []
    return head + plain + inner


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _value(key)


def _value(value: Any) -> str:
    """A JSON value is a TOML value, but for a float's exponent form, which both know, and the delete sign."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
