"""Builds a bundle of four from one model: A as it is, B with windowed attention, C with smaller weights, D its features without the head.

1. The bundle is a model folder as the cloud publishes it: the files and `model.toml`, complete or not there at all.
2. Candidates for a mode are built, measured beside A (`jury`), and judged (`judging`); the best that is not refused is taken.
3. A mode without a candidate that may serve is left out, and `[refused]` in `model.toml` says why, so that nobody has to guess.
4. What an engineer names (a tensor, a window, a student) must work: if it cannot be built, the build fails and says why.
5. The same model, samples and choice of candidates give the same files; only the figures differ from build to build.
"""

import contextlib
import hashlib
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from appliance.cloud import cards
from appliance.cloud.cards import Measured
from appliance.contract.errors import TheirsError, WorldError
from appliance.contract.vocabulary import Mode
from appliance.workshop import bundle, graphs, samples
from appliance.workshop.bundle import FULL, Report
from appliance.workshop.candidates import Ideas, Order
from appliance.workshop.judging import Judged
from appliance.workshop.jury import Candidate, Jury
from appliance.workshop.samples import Case

__all__ = ["Case", "Order", "Report", "build", "cached"]

KEY = "bundle.key"
"""Beside a cached bundle: what it was built from."""

_CODE = (
    "bundle",
    "candidates",
    "counting",
    "cutting",
    "graphs",
    "judging",
    "jury",
    "quantised",
    "samples",
    "variants",
    "weighing",
    "windowed",
)

Say = Callable[[str], None]


def _silent(_: str) -> None:
    """Say nothing."""


def build(model: Path, sample_set: Path, out: Path, order: Order | None = None, say: Say = _silent) -> Report:
    """Build the bundle in the folder `out`, which is new, empty, or an earlier bundle, and then replaced as a whole.

    Raises: TheirsError (`malformed`, `model`, `samples`, `no_attention`, `no_cut`, `bundle`), WorldError (`disk`, `missing`, `child`).
    """
    asked = order or Order()
    asked = replace(asked, model_id=asked.model_id or bundle.id_of(model))
    cards.check_names(asked.model_id, asked.version)
    say(f"reading {model}")
    full = graphs.read(model)
    with bundle.replacing(out) as scratch:
        path = scratch / FULL
        graphs.write_bytes(path, model.read_bytes())
        taken = samples.read(sample_set, graphs.session(path).get_inputs(), most=asked.most)
        say(f"mode A: measuring on {len(taken.judged)} samples")
        jury = Jury(path, taken, metric=asked.metric, output=asked.output, threshold=asked.threshold, rounds=asked.rounds)
        built, judged, missing = _tried(Ideas(full, taken, asked, scratch), jury, asked, say)
        everything = [jury.full, *map(jury.scaled, judged)]
        facts = Measured(
            metric=jury.metric if taken.expected is not None else f"{jury.metric}: agreement with A",
            samples=len(taken.judged),
            machine=f"{bundle.machine()}, 1 thread",
            onnxruntime=str(graphs.runtime().__version__),
        )
        card = bundle.composed(asked, everything, missing, facts, taken.example_shapes)
        chosen = {mode: each.name for mode, each in bundle.chosen(everything).items()}
        sizes = {name: each.path.stat().st_size for name, each in built.items()} | {"full": path.stat().st_size}
        card = bundle.settle(scratch, card, {mode: built[name] for mode, name in chosen.items()})
    return Report(card, everything, chosen, sizes)


def cached(model: Path, out: Path, cases: Callable[[], Iterable[Case]], *, drawn: str, order: Order, say: Say = _silent) -> Path:
    """Return the bundle in `out`, built anew only if the model, the order, the samples or this code changed since.

    `cases` draws the samples when they are needed; `drawn` says what they are, and must change when they do. Raises: as `build`.
    """
    key = _key(model, drawn, order)
    with contextlib.suppress(OSError):
        if (out / KEY).read_text(encoding="ascii") == key:
            return out
    with tempfile.TemporaryDirectory(prefix="ap-") as scratch:
        samples.save(Path(scratch), cases())
        build(model, Path(scratch), out, order, say)
    graphs.write_bytes(out / KEY, key.encode("ascii"))
    return out


def _tried(ideas: Ideas, jury: Jury, order: Order, say: Say) -> tuple[dict[str, Candidate], list[Judged], dict[Mode, str]]:
    """Build and measure all ideas; an idea that does not work is a reason, unless it was asked for. Raises: TheirsError, WorldError."""
    built: dict[str, Candidate] = {}
    judged: list[Judged] = []
    failed: dict[Mode, dict[str, str]] = {}
    for idea in ideas.all():
        say(f"mode {idea.mode}: {idea.name}")
        try:
            candidate = idea.build()
            judged.append(jury.judge(candidate, order.most_loss))
        except TheirsError as error:
            if idea.asked:
                raise
            say(f"mode {idea.mode}: {idea.name} is left out: {error}")
            failed.setdefault(idea.mode, {})[idea.name] = str(error)
        else:
            built[idea.name] = candidate
    tried = {each.mode for each in judged}
    missing = {mode: "; ".join(dict.fromkeys(reasons.values())) for mode, reasons in failed.items() if mode not in tried}
    return built, judged, missing


def _key(model: Path, drawn: str, order: Order) -> str:
    digest = hashlib.sha256(f"{order!r} {drawn}".encode())
    try:
        for path in (model, *(Path(__file__).with_name(f"{name}.py") for name in _CODE)):
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    except OSError as error:
        raise WorldError("disk", f"cannot be read: {error.strerror}", where=str(error.filename)) from error
    return digest.hexdigest()
