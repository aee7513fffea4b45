"""`appliancectl model variants`: makes a bundle of four from one ONNX model, and shows what a bundle holds."""

from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from appliance.cloud import cards
from appliance.cloud.cards import CARD, ModelCard

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_METRICS = ("text", "class", "nearest", "cosine")
_QUANTISERS = ("", "int8", "int8-dynamic", "int8-weights", "int4-weights")


@click.group()
def variants() -> None:
    """Cheaper forms of a model for the modes B, C and D."""


@variants.command()
@click.argument("model", type=_FILE)
@click.option(
    "--samples",
    "sample_set",
    required=True,
    type=click.Path(exists=True, path_type=Path),
    help="An .npz, or a folder of them: docs/variants.md.",
)
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="The bundle: new, empty, or an earlier one.")
@click.option("--student", type=_FILE, help="A distilled model for mode C, instead of smaller weights.")
@click.option("--features", default="", help="The tensor to cut at for mode D; found unless named.")
@click.option("--window", type=click.IntRange(1), help="Positions in a block of mode B's attention; several are tried unless given.")
@click.option("--reach", type=click.IntRange(0), default=1, show_default=True, help="With --window: blocks seen on each side.")
@click.option("--sinks", type=click.IntRange(0), default=1, show_default=True, help="First positions that all others see.")
@click.option("--mild", type=click.Choice(_QUANTISERS), default="", help="Try this for mode B as well, where attention costs little.")
@click.option("--metric", type=click.Choice(_METRICS), help="How an answer is judged; what fits the samples unless given.")
@click.option("--output", default="", help="The output that is judged; the first unless named.")
@click.option("--threshold", type=click.FloatRange(0, 1), default=0.98, show_default=True, help="Metric cosine: what counts as right.")
@click.option("--most-loss", type=click.FloatRange(0, 1), default=0.05, show_default=True, help="Accuracy that a variant may lose.")
@click.option("--most-samples", "most", type=click.IntRange(1), default=200, show_default=True, help="How many samples are judged at most.")
@click.option("--rounds", type=click.IntRange(3), default=31, show_default=True, help="Pairs of runs that are timed for each candidate.")
@click.option("--model-id", default="", help="Made of the file's name unless given.")
@click.option("--version", default="1.0.0", show_default=True, help="A version names one content: a new build needs a new one.")
@click.option("--min-vram-gb", type=click.FloatRange(0, min_open=True), help="1.5 times what loading it took unless given.")
@click.option("--max-batch-size", type=click.IntRange(1, 1024), default=8, show_default=True, help="The largest batch that devices form.")
@click.option("--target-latency-ms", type=click.FloatRange(0, min_open=True), help="Three times what it took here unless given.")
def build(model: Path, sample_set: Path, out: Path, metric: str | None, **options: Any) -> None:
    """Build the bundle of MODEL and measure every candidate beside it."""
    from appliance.workshop.judging import Metric  # noqa: PLC0415 - the workshop loads numpy and onnxruntime
    from appliance.workshop.variants import Order, build  # noqa: PLC0415

    order = Order(metric=Metric(metric) if metric else None, **options)
    report = build(model, sample_set, out, order, lambda line: click.echo(f"variants: {line}", err=True))
    _print(report.card)


@variants.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
def show(folder: Path) -> None:
    """Print the table of the bundle in FOLDER."""
    _print(cards.read(folder / CARD))


def _print(card: ModelCard) -> None:
    from appliance.workshop import bundle  # noqa: PLC0415 - the workshop loads numpy

    heading, *rows = bundle.table(card)
    facts = card.measured
    measured = f"{facts.samples} samples, {facts.metric}; {facts.machine}" if facts else "not measured"
    shown = Table(title=f"{card.model_id} {card.version} ({measured})", title_justify="left")
    for name in heading:
        shown.add_column(name, justify="left" if name in {"mode", "how"} else "right", overflow="fold")
    for row in rows:
        shown.add_row(*row)
    Console().print(shown)
