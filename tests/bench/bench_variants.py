"""Bundles of the label reader and of MiniLM: what each variant costs and how often it is right, those that are refused included.

Run: `python tests/bench/bench_variants.py`; writes build/reports/variants.json and .md. Takes some minutes: every candidate is judged on all samples.
- Label reader: labels of the lab's stream (`random.Random(2027)`, a seed not used while tuning); right is the exact text, ends trimmed.
- MiniLM: docstrings of numpy and of the standard library, 256 wordpieces without their first line; right is the docstring whose name and
  first line, encoded by the full model, are nearest among all of them. Hard on purpose: many docstrings are alike.
Windowed attention pays by length, so the share of time is also given for other lengths of MiniLM, on random words.
"""

import importlib
import inspect
import json
import random
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from appliance.client.images import tensor_of
from appliance.lab import labels
from appliance.workshop import bundle, graphs, samples, variants, weighing, windowed
from appliance.workshop.minilm import Wordpieces
from appliance.workshop.variants import Case, Order, Report
from appliance.workshop.windowed import Window

ROOT = Path(__file__).parents[2]
MODELS, REPORTS = ROOT / "build" / "models", ROOT / "build" / "reports"
LABELS, DOCSTRINGS = 400, 250
TOKENS, QUERY_TOKENS = 256, 64
LENGTHS = (64, 128, 256, 512)
MODULES = (
    "numpy", "numpy.linalg", "numpy.random", "numpy.fft", "argparse", "asyncio", "collections", "csv", "datetime", "decimal", "difflib", "functools",
    "itertools", "json", "logging", "random", "re", "shutil", "statistics", "subprocess", "tarfile", "tempfile", "zipfile",
)  # fmt: skip


def drawn_labels() -> Iterator[Case]:
    """Labels as the client prepares them."""
    rng = random.Random(2027)
    for _ in range(LABELS):
        label = labels.draw(rng)
        yield {"x": tensor_of(label.image)}, label.text


def docstrings(words: Wordpieces) -> list[tuple[str, str]]:
    """Return pairs of (name and first paragraph, the rest), long enough to fill the window, each once, in a fixed random order."""
    found: dict[str, tuple[str, str]] = {}
    for module in map(importlib.import_module, MODULES):
        for name in sorted(dir(module)):
            paragraphs = [" ".join(each.split()) for each in re.split(r"\n\s*\n", inspect.getdoc(getattr(module, name)) or "")]
            paragraphs = paragraphs[1:] if re.match(r"^\w+\(.*\)", paragraphs[0]) else paragraphs  # a signature
            if name.startswith("_") or len(paragraphs) < 2 or not 20 <= len(paragraphs[0]) <= 300:
                continue
            rest = " ".join(paragraphs[1:])
            if len(words.numbers(rest)) >= TOKENS - 2:
                found.setdefault(paragraphs[0], (f"{name.replace('_', ' ')}: {paragraphs[0]}", rest))
    pairs = [found[key] for key in sorted(found)]
    random.Random(7).shuffle(pairs)
    return pairs[:DOCSTRINGS]


def save_docstrings(model: Path, folder: Path) -> None:
    """Write the sample set of MiniLM: the texts, and the gallery of all first lines as the full model encodes them."""
    words = Wordpieces((MODELS / "minilm-vocab.txt").read_text())
    pairs = docstrings(words)
    opened = graphs.session(model)
    gallery = [graphs.answers(opened, words.encode([query], QUERY_TOKENS))[0] for query, _ in pairs]
    arrays: dict[str, Any] = words.encode([text for _, text in pairs], TOKENS)
    np.savez(folder / "docstrings.npz", **arrays, expected=np.arange(len(pairs)), gallery=np.concatenate(gallery))


def by_length(model: Path) -> dict[str, dict[str, float]]:
    """Return the share of full attention's time by length and window."""
    full, rng = graphs.read(model), np.random.default_rng(7)
    opened, shares = graphs.session(model), {}
    for length in LENGTHS:
        sample = {"input_ids": rng.integers(1_000, 20_000, (1, length)), "attention_mask": np.ones((1, length), dtype=np.int64)}
        found = {}
        for window in (Window(64, 0), Window(32, 0), Window(16, 1)):
            if window.size < length:
                share = weighing.pairs_ms(opened, graphs.session(windowed.windowed(full, sample, window)), sample, 21)[1]
                found[window.name] = round(share, 3)
        shares[str(length)] = found
    return shares


def by_sinks(model: Path, sample_set: Path) -> dict[str, dict[str, float]]:
    """Return what the first position is worth: accuracy, and mean cosine with full attention's answer, with and without it as a sink."""
    full, opened = graphs.read(model), graphs.session(model)
    taken = samples.read(sample_set, opened.get_inputs(), most=100)
    rows, wanted = taken.gallery, np.array(taken.expected)
    whole = np.concatenate([graphs.answers(opened, sample)[0] for sample in taken.judged])
    found = {"full": {"accuracy": float(((whole @ rows.T).argmax(axis=1) == wanted).mean()), "cosine": 1.0}}
    for window in (Window(64, 0, 1), Window(64, 0, 0), Window(32, 1, 1), Window(32, 1, 0)):
        cut = graphs.session(windowed.windowed(full, taken.typical, window))
        answers = np.concatenate([graphs.answers(cut, sample)[0] for sample in taken.judged])
        accuracy, cosine = ((answers @ rows.T).argmax(axis=1) == wanted).mean(), (answers * whole).sum(axis=1).mean()
        found[f"{window.name}, {window.sinks} sinks"] = {"accuracy": round(float(accuracy), 4), "cosine": round(float(cosine), 4)}
    return found


def told(report: Report, folder: Path) -> dict[str, Any]:
    """Return a report as plain values, checked against what was written."""
    names = sorted(path.name for path in folder.iterdir())
    return {
        "metric": report.card.measured.metric if report.card.measured else "",
        "samples": report.card.measured.samples if report.card.measured else 0,
        "rows": [{key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()} for row in report.rows()],
        "refused": {mode.value: reason for mode, reason in report.card.refused.items()},
        "notes": {mode.value: note for mode, note in report.card.notes.items()},
        "files": names,
    }


def markdown(figures: dict[str, Any]) -> str:
    """Return the tables for people."""
    lines = [f"# Variants\n\nMachine: {figures['machine']}, one thread. x: share of A's.\n"]
    for name in ("label-reader", "minilm"):
        model = figures[name]
        lines.append(f"\n## {name} ({model['samples']} samples, {model['metric']})\n")
        lines.append("| mode | candidate | accuracy | ms | x | MB | x | file MB | |\n|---|---|---|---|---|---|---|---|---|")
        for row in model["rows"]:
            verdict = "**in the bundle**" if row["chosen"] else row["refused"] or "another was better"
            lines.append(
                f"| {row['mode']} | {row['name']}: {row['how']} | {row['accuracy']:.3f} | {row['latency_ms']:.1f} | {row['latency']:.2f} "
                f"| {row['memory_bytes'] / 1e6:.1f} | {row['memory']:.2f} | {row['file_bytes'] / 1e6:.1f} | {verdict} |"
            )
        lines += [f"\nMode {mode}: {note}." for mode, note in model["notes"].items()]
    lines.append("\n## MiniLM: time of windowed attention by length, share of full attention's\n")
    shares = figures["windowed_by_length"]
    columns = list(shares[str(LENGTHS[-1])])
    lines.append(f"| length | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    lines += [f"| {length} | {' | '.join(str(found.get(column, '-')) for column in columns)} |" for length, found in shares.items()]
    lines.append("\n## MiniLM: what the first position is worth as a sink\n")
    lines.append("| attention | accuracy | cosine with full attention |\n|---|---|---|")
    lines += [f"| {name} | {each['accuracy']:.2f} | {each['cosine']:.3f} |" for name, each in figures["windowed_by_sinks"].items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Build both bundles, print and write the report."""
    figures: dict[str, Any] = {"machine": bundle.machine(), "onnxruntime": graphs.runtime().__version__}

    def say(line: str) -> None:
        sys.stderr.write(f"{line}\n")

    with tempfile.TemporaryDirectory(prefix="ap-", dir="/var/tmp") as scratch:
        for name in ("labels", "docstrings"):
            (Path(scratch) / name).mkdir()
        samples.save(Path(scratch) / "labels", drawn_labels())
        order = Order(model_id="label-reader", version="4.0.0", mild="int8-dynamic", most=300)
        out = Path(scratch) / "label-reader"
        figures["label-reader"] = told(variants.build(MODELS / "label-reader.onnx", Path(scratch) / "labels", out, order, say), out)
        model = MODELS / "minilm.onnx"
        save_docstrings(model, Path(scratch) / "docstrings")
        out = Path(scratch) / "minilm"
        figures["minilm"] = told(variants.build(model, Path(scratch) / "docstrings", out, Order(rounds=15), say), out)
        figures["windowed_by_length"] = by_length(model)
        figures["windowed_by_sinks"] = by_sinks(model, Path(scratch) / "docstrings")
    REPORTS.mkdir(parents=True, exist_ok=True)
    (REPORTS / "variants.json").write_text(json.dumps(figures, indent=2) + "\n")
    (REPORTS / "variants.md").write_text(markdown(figures))
    sys.stdout.write((REPORTS / "variants.md").read_text())


if __name__ == "__main__":
    main()
