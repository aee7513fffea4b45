"""From one model to a bundle of four: the folder, the card, what is refused and why, and the command."""

import errno
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, numpy_helper

from appliance.cli.appliancectl import group
from appliance.cloud import cards
from appliance.contract.errors import ApplianceError, TheirsError, WorldError
from appliance.contract.vocabulary import Mode, Platform
from appliance.workshop import bundle, cutting, graphs, samples, variants, weighing
from appliance.workshop.variants import Case, Order
from tests.workshop.small_models import DEPTH, Net, attention, reader, saved

QUICK = Order(rounds=3, most_loss=1.0)


@pytest.fixture(autouse=True)
def _no_children(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Memory by file size, time by fixed shares: what is tested here is what is done with figures, but for the slow tests."""
    if "slow" not in request.keywords:
        monkeypatch.setattr(weighing, "growth_bytes", lambda path, _: path.stat().st_size)
        monkeypatch.setattr(weighing, "pairs_ms", lambda *_: ([10.0], 0.9))


def reader_cases(count: int = 24) -> Iterator[Case]:
    """Noise, and what the small reader reads in it."""
    rng, opened = np.random.default_rng(9), graphs.session(reader())
    for _ in range(count):
        picture = {"x": rng.standard_normal((1, 3, 8, 24)).astype(np.float32)}
        yield picture, graphs.answers(opened, picture)[0][0].argmax(axis=-1)


@pytest.fixture
def ready(tmp_path: Path) -> tuple[Path, Path, Path]:
    """The small reader, its samples, and where the bundle goes."""
    (tmp_path / "samples").mkdir()
    samples.save(tmp_path / "samples", reader_cases())
    return saved(reader(), tmp_path / "Small Reader.onnx"), tmp_path / "samples", tmp_path / "bundle"


def test_a_bundle_is_a_model_folder(ready: tuple[Path, Path, Path]) -> None:
    """Every file is there, the card is read by the cloud's reader, and A is the model byte by byte."""
    model, sample_set, out = ready
    report = variants.build(model, sample_set, out, QUICK)
    card = cards.read(out / "model.toml")
    assert card == report.card
    assert card.model_id == "small-reader"
    assert card.example_shapes == {"x": [3, 8, 24]}
    assert card.accuracy == 1.0
    assert card.variants[Mode.CLOUD].accuracy == 1.0
    assert set(card.variants) == {Mode.MINIMAL, Mode.CLOUD}
    assert {path.name for path in out.iterdir()} == {"model.onnx", "model.toml", "minimal.onnx", "features.onnx", "head.onnx"}
    assert (out / "model.onnx").read_bytes() == model.read_bytes()
    files = cards.files_of(out, card)
    assert files[Mode.FULL] == {Platform.ONNX: out / "model.onnx"}
    assert cards.head_of(out, card) == out / "head.onnx"
    assert "no softmax between two products" in card.refused[Mode.CONSTRAINED] or "no product of two" in card.refused[Mode.CONSTRAINED]


def test_features_and_head_answer_what_the_model_answers(ready: tuple[Path, Path, Path]) -> None:
    """Across the wire: the features' outputs are the head's inputs by name, and both carry the model's dictionary."""
    model, sample_set, out = ready
    variants.build(model, sample_set, out, QUICK)
    sides = {side: graphs.session(out / f"{side}.onnx") for side in ("features", "head")}
    for picture, _ in itertools.islice(reader_cases(), 4):
        whole = graphs.answers(graphs.session(model), picture)[0]
        assert np.allclose(cutting.answers(sides, picture)[0], whole, atol=1e-6)
    for name in ("minimal", "features", "head"):
        assert graphs.session(out / f"{name}.onnx").get_modelmeta().custom_metadata_map == {"character": "a\nb\nc\nd"}


def test_the_same_input_gives_the_same_files(ready: tuple[Path, Path, Path]) -> None:
    """Built again over the first bundle: not a byte differs, the old one is gone, nothing lies beside it."""
    model, sample_set, out = ready
    variants.build(model, sample_set, out, QUICK)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    (out / "leftover.onnx").write_bytes(b"old")
    variants.build(model, sample_set, out, QUICK)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert {path.name for path in out.parent.iterdir()} == {"Small Reader.onnx", "samples", "bundle"}


def test_attention_gives_mode_b(tmp_path: Path) -> None:
    """Judged by agreement with the full model where nothing is expected; what was tried is in the report with its figures."""
    rng = np.random.default_rng(2)
    x = rng.standard_normal((12, 40, DEPTH)).astype(np.float32)
    np.savez(tmp_path / "samples.npz", x=x, mask=np.ones((12, 40), dtype=np.int64))
    model = saved(attention("key_mask"), tmp_path / "model.onnx")
    report = variants.build(model, tmp_path / "samples.npz", tmp_path / "out", Order(rounds=3, window=8, threshold=0.5, most_loss=1.0))
    assert report.chosen[Mode.CONSTRAINED] == "window-8x3"
    assert "blocks of 8 positions" in report.card.variants[Mode.CONSTRAINED].how
    assert report.card.measured is not None
    assert report.card.measured.metric == "cosine: agreement with A"
    rows = report.rows()
    assert {row["mode"] for row in rows} >= {"A", "B", "C"}
    assert sum(row["chosen"] for row in rows) == 1 + len(report.chosen)


def test_what_is_not_cheaper_is_left_out_and_says_so(ready: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A bundle may lack every mode but A; the files of refused candidates are not in it."""
    monkeypatch.setattr(weighing, "growth_bytes", lambda *_: 1_000)
    monkeypatch.setattr(weighing, "pairs_ms", lambda *_: ([10.0], 1.01))
    model, sample_set, out = ready
    report = variants.build(model, sample_set, out, QUICK)
    assert report.chosen == {}
    assert {path.name for path in out.iterdir()} == {"model.onnx", "model.toml"}
    assert "not cheaper (1.01x the time, 1.00x the memory" in report.card.refused[Mode.MINIMAL]
    assert "features: not cheaper" in report.card.refused[Mode.CLOUD]


def test_a_student_takes_the_place_of_smaller_weights(ready: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """If it asks and answers in the same words; else the build fails and leaves nothing."""
    model, sample_set, out = ready
    stranger = saved(attention(), tmp_path / "stranger.onnx")
    with pytest.raises(TheirsError, match="its inputs are image; the full model's are x") as caught:
        variants.build(model, sample_set, out, Order(rounds=3, student=saved(renamed(), tmp_path / "renamed.onnx")))
    assert caught.value.reason == "model"
    with pytest.raises(TheirsError):
        variants.build(model, sample_set, out, Order(rounds=3, student=stranger))
    assert not out.exists()
    report = variants.build(model, sample_set, out, Order(rounds=3, student=model))
    assert report.chosen[Mode.MINIMAL] == "student"


def renamed() -> Any:
    """The reader with another name for its input."""
    model = reader()
    model.graph.input[0].name = "image"
    model.graph.node[0].input[0] = "image"
    return model


def test_what_was_asked_for_must_work(ready: tuple[Path, Path, Path]) -> None:
    """A window without attention, a tensor that is not there, an output that is not there: refused, and nothing is left behind."""
    model, sample_set, out = ready
    for order, reason in (
        (Order(rounds=3, window=8), "no_attention"),
        (Order(rounds=3, features="nowhere"), "no_cut"),
        (Order(rounds=3, output="nowhere"), "model"),
        (Order(rounds=3, model_id="Mine, all mine"), "malformed"),
        (Order(rounds=3, version=""), "malformed"),
    ):
        with pytest.raises(TheirsError) as caught:
            variants.build(model, sample_set, out, order)
        assert caught.value.reason == reason
    assert {path.name for path in out.parent.iterdir()} == {"Small Reader.onnx", "samples"}


def damaged(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """Files that are no models, and a word that their refusal must hold."""
    (tmp_path / "text.onnx").write_text("hello")
    yield tmp_path / "text.onnx", "not an ONNX model"
    (tmp_path / "empty.onnx").write_bytes(b"")
    yield tmp_path / "empty.onnx", "not an ONNX model"
    whole = reader().SerializeToString()
    (tmp_path / "cut.onnx").write_bytes(whole[: len(whole) // 2])
    yield tmp_path / "cut.onnx", "not an ONNX model"
    yield saved(old(), tmp_path / "old.onnx"), "is of opset 9"
    onnx.save(reader(), tmp_path / "apart.onnx", save_as_external_data=True, location="apart.data", size_threshold=0)
    yield tmp_path / "apart.onnx", "its weights lie in other files"


def old() -> Any:
    model = reader()
    model.opset_import[0].version = 9
    return model


def test_files_that_are_no_models_are_named(ready: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """Text, nothing, half a model, an old one, one with its weights elsewhere."""
    _, sample_set, out = ready
    for path, what in damaged(tmp_path):
        with pytest.raises(TheirsError) as caught:
            variants.build(path, sample_set, out, QUICK)
        assert caught.value.reason == "model", path.name
        assert what in str(caught.value), path.name
        assert str(path) in str(caught.value)
    with pytest.raises(WorldError):
        variants.build(tmp_path / "nowhere.onnx", sample_set, out, QUICK)
    assert not out.exists()


def test_folders_of_others_are_not_replaced(ready: tuple[Path, Path, Path]) -> None:
    """A folder with something else in it, or a file, is no place for a bundle."""
    model, sample_set, out = ready
    out.mkdir()
    (out / "holiday.jpg").write_bytes(b"x")
    for place in (out, model):
        with pytest.raises(TheirsError) as caught:
            variants.build(model, sample_set, place, QUICK)
        assert caught.value.reason == "bundle"
    assert (out / "holiday.jpg").exists()


def test_a_full_disk_leaves_the_earlier_bundle(ready: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever write fails: the error says where and what to do, and what was there is still there."""
    model, sample_set, out = ready
    variants.build(model, sample_set, out, QUICK)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    real = Path.write_bytes
    for failing in range(5):
        writes = itertools.count()

        def full(path: Path, payload: bytes, writes: Iterator[int] = writes, failing: int = failing) -> int:
            if path.parent.name.startswith(".bundle") and next(writes) == failing:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(path, payload)

        monkeypatch.setattr(Path, "write_bytes", full)
        with pytest.raises(WorldError) as caught:
            variants.build(model, sample_set, out, QUICK)
        assert (caught.value.reason, caught.value.remedy) == ("disk", "free space there")
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before
        assert len(list(out.parent.iterdir())) == 3


def test_a_cached_bundle_is_built_once(ready: tuple[Path, Path, Path]) -> None:
    """Again only when the model, the order or the samples are others."""
    model, _, out = ready
    said: list[str] = []
    for _ in range(2):
        assert variants.cached(model, out, reader_cases, drawn="noise 9", order=QUICK, say=said.append) == out
    built = len(said)
    assert built > 0
    variants.cached(model, out, reader_cases, drawn="noise 9", order=Order(rounds=4), say=said.append)
    assert len(said) == 2 * built
    changed = reader()
    changed.graph.initializer[0].CopyFrom(
        numpy_helper.from_array(np.ones((16, 3, 3, 3), dtype=np.float32), changed.graph.initializer[0].name)
    )
    variants.cached(saved(changed, model), out, reader_cases, drawn="noise 9", order=Order(rounds=4), say=said.append)
    assert len(said) == 3 * built
    variants.cached(model, out, reader_cases, drawn="other noise", order=Order(rounds=4), say=said.append)
    assert len(said) == 4 * built


def run(*arguments: str) -> Any:
    return CliRunner().invoke(group, ["model", "variants", *arguments], catch_exceptions=True)


def test_the_command_builds_and_shows(ready: tuple[Path, Path, Path]) -> None:
    """The table has a row for each mode, with figures or with the reason."""
    model, sample_set, out = ready
    made = run("build", str(model), "--samples", str(sample_set), "--out", str(out), "--rounds", "3", "--version", "2.0")
    assert made.exit_code == 0, made.output
    shown = run("show", str(out))
    assert shown.exit_code == 0
    assert "small-reader 2.0 (18 samples, class" in shown.stdout
    assert [line.split("│")[1].strip() for line in shown.stdout.splitlines() if line.startswith("│ ") and line[2] != " "] == [
        "A",
        "B",
        "C",
        "D",
    ]


def test_the_command_refuses_in_one_line(ready: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """An error on purpose, for the command's guard to print."""
    _, sample_set, out = ready
    (tmp_path / "text.onnx").write_text("hello")
    refused = run("build", str(tmp_path / "text.onnx"), "--samples", str(sample_set), "--out", str(out))
    assert isinstance(refused.exception, ApplianceError)
    assert "\n" not in str(refused.exception)


def test_without_onnx_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An engineer's package, never a device's."""
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(WorldError) as caught:
        graphs.read(tmp_path / "model.onnx")
    assert (caught.value.reason, caught.value.remedy) == ("missing", "pip install appliance[workshop]")


@pytest.mark.slow
def test_real_measures(ready: tuple[Path, Path, Path]) -> None:
    """With real clocks and real processes: a model with 16 MB of weights grows a process by about that, one of nothing hardly."""
    big, small = (saved(wide(width), ready[2].parent / f"{width}.onnx") for width in (2_000, 2))
    sample = {"x": np.ones((1, 2_000), dtype=np.float32)}
    grown = weighing.growth_bytes(big, sample) - weighing.growth_bytes(small, sample)
    assert 14e6 < grown < 45e6  # the weights, and onnxruntime's packed copy of them
    times, share = weighing.pairs_ms(graphs.session(big), graphs.session(small), sample, 9)
    assert len(times) == 9
    assert share < 0.5
    model, sample_set, out = ready
    report = variants.build(model, sample_set, out, Order(rounds=5))
    assert bundle.table(report.card)[1][3] == "1.00"


def wide(width: int) -> Any:
    net = Net()
    net.op("MatMul", "x", net.weight(2_000, width), out="y")
    return net.model({"x": (TensorProto.FLOAT, ["batch", 2_000])}, {"y": ["batch", width]})
