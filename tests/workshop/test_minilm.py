"""The MiniLM encoder is the published one, and its wordpieces are BERT's."""

from pathlib import Path

import numpy as np
import pytest

from appliance.contract.errors import TheirsError
from appliance.workshop import graphs, minilm
from appliance.workshop.minilm import Wordpieces

MODELS = Path(__file__).parents[2] / "build" / "models"
needs_model = pytest.mark.skipif(not (MODELS / "minilm.onnx").is_file(), reason="scripts/fetch-models has not run")
PIECES = "[PAD]\n[UNK]\n[CLS]\n[SEP]\nun\n##aff\n##able\ncafe\n,\n!\n##s\nit\n'\n$\n"


@needs_model
def test_similarities_are_those_of_the_documentation() -> None:
    """The three sentences and the three numbers of sentence-transformers' quickstart for all-MiniLM-L6-v2."""
    words = Wordpieces((MODELS / "minilm-vocab.txt").read_text())
    texts = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
    found = graphs.answers(graphs.session(MODELS / "minilm.onnx"), words.encode(texts, 20))[0]
    assert np.allclose(found @ found.T, [[1.0, 0.6660, 0.1046], [0.6660, 1.0, 0.1411], [0.1046, 0.1411, 1.0]], atol=5e-5)


@needs_model
def test_padding_changes_nothing() -> None:
    """A longer frame gives the same embedding."""
    words = Wordpieces((MODELS / "minilm-vocab.txt").read_text())
    opened = graphs.session(MODELS / "minilm.onnx")
    short, long = (graphs.answers(opened, words.encode(["A shelf label."], length))[0] for length in (8, 64))
    assert np.allclose(short, long, atol=1e-5)
    assert np.allclose(np.linalg.norm(short), 1, atol=1e-5)


def test_wordpieces() -> None:
    """Lower case, no accents, punctuation apart, the longest piece first, and one unknown for a word with no pieces."""
    words = Wordpieces(PIECES)
    assert words.numbers("Unaffable  Café, it's!\n$") == [4, 5, 6, 7, 8, 11, 12, 1, 9, 13]
    assert words.numbers("unz " + "un" * 60) == [1, 1]
    encoded = words.encode(["un un un", "un"], 4)
    assert encoded["input_ids"].tolist() == [[2, 4, 4, 3], [2, 4, 3, 0]]
    assert encoded["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]


def test_files_that_are_no_weights_are_refused() -> None:
    """Neither safetensors nor the right ones."""
    for payload in (b"", b"\x08" + bytes(7) + b"not json", b"\x02" + bytes(7) + b"[]"):
        with pytest.raises(TheirsError) as caught:
            minilm.tensors(payload) or minilm.encoder({})
        assert caught.value.reason == "malformed"
    with pytest.raises(TheirsError, match="no tensor 'embeddings"):
        minilm.encoder({})
