"""The bundle as a folder and as a table: which candidates were taken, why a mode is missing, and `model.toml` for the cloud."""

import contextlib
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec

from appliance.cloud import cards
from appliance.cloud.cards import CARD, Measured, ModelCard, VariantCard
from appliance.contract.errors import TheirsError, WorldError
from appliance.contract.vocabulary import Mode
from appliance.workshop import counting, graphs, judging
from appliance.workshop.candidates import HEAD, Order
from appliance.workshop.judging import Judged
from appliance.workshop.jury import Candidate

FULL = "model.onnx"
NAMES: Mapping[Mode, str] = {Mode.CONSTRAINED: "constrained.onnx", Mode.MINIMAL: "minimal.onnx", Mode.CLOUD: "features.onnx"}
_GIB = 1 << 30
_ROOM = 1.5
"""`min_vram_gb` unless given: the measured growth and half of it again, for batches."""
_LEAST_GIB = 0.05
_PATIENCE = 3.0
"""`target_latency_ms` unless given: three times what one thread of the builder's machine took."""


@dataclass(frozen=True, slots=True)
class Report:
    """What came of a build. `judged`: every candidate with its figures, A first; `chosen`: names by mode; `sizes`: file bytes by name."""

    card: ModelCard
    judged: Sequence[Judged]
    chosen: Mapping[Mode, str]
    sizes: Mapping[str, int]

    def rows(self) -> list[dict[str, Any]]:
        """Return one row of plain values for each candidate; `latency` and `memory` are shares of A's."""
        chosen = {Mode.FULL: "full", **self.chosen}
        return [
            {**asdict(each), "mode": each.mode.value, "file_bytes": self.sizes[each.name], "chosen": chosen.get(each.mode) == each.name}
            for each in self.judged
        ]


def composed(
    order: Order, judged: Sequence[Judged], missing: Mapping[Mode, str], facts: Measured, shapes: dict[str, list[int]]
) -> ModelCard:
    """Return the card. `judged`: A first; `missing`: why a mode has no candidate; `shapes`: of the typical sample."""
    full = judged[0]
    found = chosen(judged)
    refused = {mode: missing[mode] if mode in missing else _reasons(mode, judged) for mode in NAMES if mode not in found}
    notes = {}
    if Mode.CONSTRAINED in found and Mode.MINIMAL in found:
        notes = {Mode.CONSTRAINED: judging.doubt(found[Mode.CONSTRAINED], found[Mode.MINIMAL])}
    return ModelCard(
        model_id=order.model_id,
        version=order.version,
        min_vram_gb=order.min_vram_gb or max(_LEAST_GIB, round(full.memory_bytes * _ROOM / _GIB, 2)),
        max_batch_size=order.max_batch_size,
        target_latency_ms=order.target_latency_ms or round(full.latency_ms * _PATIENCE, 1),
        accuracy=round(full.accuracy, 4),
        latency_ms=round(full.latency_ms, 3),
        memory_bytes=full.memory_bytes,
        example_shapes=shapes,
        variants={mode: _variant(each) for mode, each in found.items()},
        refused=refused,
        notes={mode: note for mode, note in notes.items() if note},
        measured=facts,
    )


def id_of(model: Path) -> str:
    """Return a model id made of a file's name."""
    return re.sub(r"[^a-z0-9._-]+", "-", model.stem.lower()).strip("-._")[:63] or "model"


def chosen(judged: Sequence[Judged]) -> dict[Mode, Judged]:
    """Return the candidate taken for each mode that has one."""
    best = {mode: judging.best([each for each in judged if each.mode is mode]) for mode in NAMES}
    return {mode: each for mode, each in best.items() if each is not None}


def machine() -> str:
    """Name this machine's processor, for the figures."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return f"{platform.machine()}, {next(line.split(':', 1)[1].strip() for line in lines if line.startswith('model name'))}"
    return platform.machine()


def settle(scratch: Path, card: ModelCard, taken: Mapping[Mode, Candidate]) -> ModelCard:
    """Give the chosen files their names in the bundle, drop the others, write the card and return it as written. Raises: WorldError (`disk`)."""
    kept = {FULL, CARD}
    try:
        for mode, candidate in taken.items():
            candidate.path.rename(scratch / NAMES[mode])
            kept |= {NAMES[mode], HEAD} if candidate.head else {NAMES[mode]}
        for path in scratch.iterdir():
            if path.name not in kept:
                path.unlink()
    except OSError as error:
        raise _disk(scratch, error) from error
    counted = _counted(scratch, card)
    graphs.write_bytes(scratch / CARD, cards.written(counted).encode())
    cards.read(scratch / CARD)
    return counted


def _counted(scratch: Path, card: ModelCard) -> ModelCard:
    """The card with the work of one sample in each form."""
    flops, moved = counting.count(scratch / FULL, card.example_shapes)
    variants = {}
    for mode, variant in card.variants.items():
        ours, bytes_moved = counting.count(scratch / variant.files[0], card.example_shapes)
        variants[mode] = msgspec.structs.replace(variant, flops=ours, activation_bytes=bytes_moved)
    return msgspec.structs.replace(card, flops=flops, activation_bytes=moved, variants=variants)


@contextlib.contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """Give a folder beside `out` to build in; if all goes well it takes the place of `out`, which must be new, empty or an earlier bundle.

    Raises: TheirsError (`bundle`), WorldError (`disk`).
    """
    try:
        strangers = out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / CARD).is_file()))
        if strangers:
            raise TheirsError("bundle", "is there already and is no bundle", where=str(out), remedy="name a new folder")
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise _disk(out, error) from error
    try:
        yield scratch
        _exchange(scratch, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def table(card: ModelCard) -> list[tuple[str, ...]]:
    """Return a bundle's table: a heading, then a row for each mode: mode, accuracy, ms, x, MB, x, how or why not."""
    rows: list[tuple[str, ...]] = [("mode", "accuracy", "ms", "x A", "MB", "x A", "how")]
    full = VariantCard(
        files=[FULL], accuracy=card.accuracy, latency_ms=card.latency_ms, memory_bytes=card.memory_bytes, how="the model as it is"
    )
    for mode in Mode:
        each = full if mode is Mode.FULL else card.variants.get(mode)
        if each is None:
            rows.append((mode.value, "-", "-", "-", "-", "-", card.refused.get(mode, "not in this bundle")))
            continue
        note = f"; but {card.notes[mode]}" if mode in card.notes else ""
        milliseconds = (_number(each.latency_ms, 1.0, ".2f"), _number(each.latency_ms, card.latency_ms, ".2f"))
        megabytes = (_number(each.memory_bytes, 1e6, ".1f"), _number(each.memory_bytes, card.memory_bytes, ".2f"))
        rows.append((mode.value, _number(each.accuracy, 1.0, ".4f"), *milliseconds, *megabytes, each.how + note))
    return rows


def _number(value: float | None, unit: float | None, form: str) -> str:
    return "-" if value is None or not unit else format(value / unit, form)


def _variant(judged: Judged) -> VariantCard:
    return VariantCard(
        files=[NAMES[judged.mode]],
        head=HEAD if judged.mode is Mode.CLOUD else None,
        accuracy=round(judged.accuracy, 4),
        latency_ms=round(judged.latency_ms, 3),
        memory_bytes=judged.memory_bytes,
        how=judged.how,
    )


def _reasons(mode: Mode, judged: Sequence[Judged]) -> str:
    return "; ".join(f"{each.name}: {each.refused}" for each in judged if each.mode is mode) or "nothing was tried"


def _exchange(fresh: Path, out: Path) -> None:
    try:
        fresh.chmod(0o755)
        if out.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
            out.replace(old)
            fresh.replace(out)
            shutil.rmtree(old)
        else:
            fresh.replace(out)
    except OSError as error:
        raise _disk(out, error) from error


def _disk(path: Path, error: OSError) -> WorldError:
    return WorldError("disk", f"cannot be written: {error.strerror}", where=str(path), remedy="free space there, or name another folder")
