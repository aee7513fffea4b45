"""The card of a model folder: what is written is read again."""

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.cloud import cards
from appliance.cloud.cards import Measured, ModelCard, VariantCard
from appliance.contract.errors import WorldError
from appliance.contract.vocabulary import Mode

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
figures = {
    "accuracy": st.none() | st.floats(0, 1),
    "latency_ms": st.none() | st.floats(1e-9, 1e12),
    "memory_bytes": st.none() | st.integers(0, 2**50),
}
variant_cards = st.builds(VariantCard, files=st.just(["b.onnx"]), head=st.none(), how=texts, **figures)
model_cards = st.builds(
    ModelCard,
    model_id=st.from_regex(r"[a-z0-9][a-z0-9._-]{0,20}", fullmatch=True),
    version=st.just("1.0+x"),
    min_vram_gb=st.floats(1e-3, 100),
    max_batch_size=st.integers(1, 1024),
    target_latency_ms=st.floats(1e-3, 1e5),
    example_shapes=st.dictionaries(texts, st.lists(st.integers(1, 9), max_size=4), max_size=2),
    variants=st.dictionaries(st.sampled_from((Mode.CONSTRAINED, Mode.MINIMAL)), variant_cards, max_size=2),
    refused=st.dictionaries(st.sampled_from(Mode), texts, max_size=2),
    notes=st.dictionaries(st.sampled_from(Mode), texts, max_size=2),
    measured=st.none() | st.builds(Measured, metric=texts, samples=st.integers(0, 10), machine=texts, onnxruntime=texts),
    **figures,
)


@given(card=model_cards)
def test_a_card_that_is_written_is_read_again(card: ModelCard, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whatever its texts hold: quotes, line ends, control characters."""
    path = tmp_path_factory.getbasetemp() / "model.toml"
    path.write_text(cards.written(card), encoding="utf-8", newline="")
    assert cards.read(path) == card


def test_a_card_that_is_not_there_is_the_worlds_fault(tmp_path: Path) -> None:
    """Not the engineer's."""
    with pytest.raises(WorldError):
        cards.read(tmp_path / "model.toml")


def test_a_split_model_names_its_head(tmp_path: Path) -> None:
    """Beside it; a model without mode D has none."""
    split = VariantCard(files=["features.onnx"], head="head.onnx")
    card = ModelCard(model_id="m", version="1", min_vram_gb=1.0, max_batch_size=1, target_latency_ms=1.0, variants={Mode.CLOUD: split})
    assert cards.head_of(tmp_path, card) == tmp_path / "head.onnx"
    assert cards.head_of(tmp_path, msgspec.structs.replace(card, variants={})) is None
