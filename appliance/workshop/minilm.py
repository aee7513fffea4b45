"""The MiniLM sentence encoder as an ONNX graph, and the wordpieces that it reads: a real transformer for the workshop's tables.

1. The graph is BERT with six layers (Devlin et al. 2019) from the weights' own names, then the mean over the tokens and length one, as the
   model's card asks (`1_Pooling`, `2_Normalize`). Inputs `input_ids` and `attention_mask`, int64 [N, L], L at most 512; output `embedding` [N, 384].
2. Weights come as a `safetensors` file: eight bytes of length, a JSON header, then the tensors (format of huggingface/safetensors).
3. Text is lower-cased, stripped of accents, split at spaces and punctuation, then into the longest known wordpieces (`BertTokenizer`, uncased).
4. The same weights give the same bytes.

Proof that it is this model: the three similarities that the sentence-transformers documentation prints (tests/workshop/test_minilm.py).
"""

import json
import math
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from appliance.contract.errors import TheirsError
from appliance.contract.inference import Array
from appliance.workshop import graphs
from appliance.workshop.graphs import Emitter

LAYERS, WIDTH, HEADS = 6, 384, 12  # config.json of all-MiniLM-L6-v2
OPSET = 17
_EPSILON = 1e-12
_LONGEST_WORD = 100
_DTYPES: Mapping[str, np.dtype[Any]] = {"F32": np.dtype(np.float32), "I64": np.dtype(np.int64)}
_ASCII_MARKS = ((33, 47), (58, 64), (91, 96), (123, 126))
"""Code points that BERT counts as punctuation beside Unicode's own."""


def tensors(payload: bytes) -> dict[str, Array]:
    """Return the tensors of a safetensors file by name, as views. Raises: TheirsError (`malformed`)."""
    try:
        start = 8 + int.from_bytes(payload[:8], "little")
        header = json.loads(payload[8:start])
        return {name: _tensor(payload, start, each) for name, each in header.items() if name != "__metadata__"}
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise TheirsError("malformed", f"not a safetensors file: {error}") from error


def _tensor(payload: bytes, start: int, entry: Mapping[str, Any]) -> Array:
    first, last = entry["data_offsets"]
    flat: Array = np.frombuffer(payload[start + first : start + last], _DTYPES[entry["dtype"]])
    return flat.reshape(entry["shape"])


def encoder(weights: Mapping[str, Array]) -> Any:
    """Return the encoder (a `ModelProto`) for these weights. Raises: TheirsError (`malformed`) if one is missing, WorldError (`missing`)."""
    try:
        return _Encoder(weights).model()
    except KeyError as error:
        raise TheirsError("malformed", f"no tensor {error} among the weights", remedy="use those of all-MiniLM-L6-v2") from error


class _Encoder:
    """Writes the graph, layer by layer."""

    def __init__(self, weights: Mapping[str, Array]) -> None:
        self._weights = weights
        self._emit = Emitter("bert")

    def model(self) -> Any:
        helper, kinds = graphs.toolkit().helper, graphs.toolkit().TensorProto
        emit = self._emit
        mask = self._mask()
        hidden = self._embedded()
        for number in range(LAYERS):
            hidden = self._layer(hidden, mask, f"encoder.layer.{number}.")
        weights = emit.op("Unsqueeze", emit.op("Cast", "attention_mask", to=kinds.FLOAT), emit.constant([-1]))
        total = emit.op("ReduceSum", emit.op("Mul", hidden, weights), emit.constant([1]), keepdims=0)
        mean = emit.op("Div", total, emit.op("ReduceSum", weights, emit.constant([1]), keepdims=0))
        emit.op("Div", mean, emit.op("ReduceL2", mean, axes=[-1], keepdims=1), out="embedding")
        inputs = [helper.make_tensor_value_info(name, kinds.INT64, ["batch", "length"]) for name in ("input_ids", "attention_mask")]
        outputs = [helper.make_tensor_value_info("embedding", kinds.FLOAT, ["batch", WIDTH])]
        graph = helper.make_graph(emit.nodes, "minilm", inputs, outputs, emit.tensors)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9, producer_name="appliance")

    def _mask(self) -> str:
        """What is added to the scores [N, 1, 1, L]: 0 for a token, -10000 for padding (as the model was trained)."""
        emit, kinds = self._emit, graphs.toolkit().TensorProto
        seen = emit.op("Cast", emit.op("Unsqueeze", "attention_mask", emit.constant([1, 2])), to=kinds.FLOAT)
        return emit.op("Mul", emit.op("Sub", self._number(1.0), seen), self._number(-10_000.0))

    def _embedded(self) -> str:
        emit = self._emit
        words = emit.op("Gather", self._weight("embeddings.word_embeddings.weight"), "input_ids")
        length = emit.op("Gather", emit.op("Shape", "input_ids"), emit.constant([1]))
        zero = emit.constant([0])
        positions = emit.op("Slice", self._weight("embeddings.position_embeddings.weight"), zero, length, zero)
        kind = emit.constant(self._weights["embeddings.token_type_embeddings.weight"][0], np.float32)
        return self._normal(emit.op("Add", emit.op("Add", words, kind), positions), "embeddings.LayerNorm")

    def _layer(self, hidden: str, mask: str, name: str) -> str:
        emit = self._emit
        queries, keys, values = (
            self._heads(self._dense(hidden, f"{name}attention.self.{part}"), order)
            for part, order in (("query", [0, 2, 1, 3]), ("key", [0, 2, 3, 1]), ("value", [0, 2, 1, 3]))
        )
        scores = emit.op("Div", emit.op("MatMul", queries, keys), self._number(math.sqrt(WIDTH // HEADS)))
        weights = emit.op("Softmax", emit.op("Add", scores, mask), axis=-1)
        mixed = emit.op("Transpose", emit.op("MatMul", weights, values), perm=[0, 2, 1, 3])
        seen = self._dense(emit.op("Reshape", mixed, emit.constant([0, 0, WIDTH])), f"{name}attention.output.dense")
        seen = self._normal(emit.op("Add", seen, hidden), f"{name}attention.output.LayerNorm")
        wide = self._dense(seen, f"{name}intermediate.dense")
        gate = emit.op("Add", emit.op("Erf", emit.op("Div", wide, self._number(math.sqrt(2)))), self._number(1.0))
        active = emit.op("Mul", emit.op("Mul", wide, gate), self._number(0.5))  # GELU, spelled as onnxruntime knows to fuse it
        return self._normal(emit.op("Add", self._dense(active, f"{name}output.dense"), seen), f"{name}output.LayerNorm")

    def _heads(self, name: str, order: Sequence[int]) -> str:
        split = self._emit.op("Reshape", name, self._emit.constant([0, 0, HEADS, WIDTH // HEADS]))
        return self._emit.op("Transpose", split, perm=list(order))

    def _dense(self, name: str, layer: str) -> str:
        weight = self._emit.constant(self._weights[f"{layer}.weight"].T, np.float32)
        return self._emit.op("Add", self._emit.op("MatMul", name, weight), self._weight(f"{layer}.bias"))

    def _normal(self, name: str, layer: str) -> str:
        scale, shift = self._weight(f"{layer}.weight"), self._weight(f"{layer}.bias")
        return self._emit.op("LayerNormalization", name, scale, shift, axis=-1, epsilon=_EPSILON)

    def _weight(self, name: str) -> str:
        return self._emit.constant(self._weights[name], np.float32)

    def _number(self, value: float) -> str:
        return self._emit.constant(value, np.float32)


class Wordpieces:
    """Text to token numbers. `vocabulary`: one wordpiece a line, the number is the line's."""

    def __init__(self, vocabulary: str) -> None:
        self._numbers = {piece: number for number, piece in enumerate(vocabulary.split("\n")) if piece}
        self._unknown, self._begin, self._end = (self._numbers[name] for name in ("[UNK]", "[CLS]", "[SEP]"))

    def encode(self, texts: Sequence[str], length: int) -> dict[str, Array]:
        """Return `input_ids` and `attention_mask` [N, length], cut or filled up with zeros."""
        ids, mask = (np.zeros((len(texts), length), dtype=np.int64) for _ in range(2))
        for row, text in enumerate(texts):
            numbers = [self._begin, *self.numbers(text)[: length - 2], self._end]
            ids[row, : len(numbers)] = numbers
            mask[row, : len(numbers)] = 1
        return {"input_ids": ids, "attention_mask": mask}

    def numbers(self, text: str) -> list[int]:
        """Return the token numbers of a text, without the marks at its ends."""
        return [number for word in _words(text) for number in self._pieces(word)]

    def _pieces(self, word: str) -> list[int]:
        if len(word) > _LONGEST_WORD:
            return [self._unknown]
        numbers, start = [], 0
        while start < len(word):
            mark = "##" if start else ""
            end = next((end for end in range(len(word), start, -1) if mark + word[start:end] in self._numbers), 0)
            if not end:
                return [self._unknown]
            numbers.append(self._numbers[mark + word[start:end]])
            start = end
        return numbers


def _words(text: str) -> Iterator[str]:
    plain = (sign for sign in unicodedata.normalize("NFD", text.lower()) if unicodedata.category(sign) != "Mn")
    word = ""
    for sign in plain:
        mark = _is_mark(sign)
        if (sign.isspace() or mark) and word:
            yield word
            word = ""
        if mark:
            yield sign
        elif not sign.isspace() and unicodedata.category(sign) not in {"Cc", "Cf"}:
            word += sign
    if word:
        yield word


def _is_mark(sign: str) -> bool:
    return unicodedata.category(sign).startswith("P") or any(first <= ord(sign) <= last for first, last in _ASCII_MARKS)
