"""Windowed attention by graph surgery: each block of positions looks only at its neighbourhood, so scores far away are never computed.

1. An attention is `MatMul(Q, K^T)`, then scales and masks, then `Softmax` over the keys, then `MatMul(., V)`, where the sequence looks at itself.
   Nothing else may read what lies between. What is found but cannot be windowed is named with the reason.
2. The sequence is cut into blocks of `window`; block i sees the blocks i - reach to i + reach, and the first `sinks` positions, where trained
   heads put the weight that they do not need (Xiao et al. 2023, "attention sinks"). Sliding chunks as in Longformer (Beltagy et al. 2020), section 3.1.
3. Keys beyond the ends, and a sink that the neighbourhood already holds, get a bias so low that they weigh nothing: with a window as long as the
   sequence the result is that of full attention.
4. Work and memory fall from length x length to length x ((2 reach + 1) window + sinks): positions are gathered into blocks, not masked.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from appliance.contract.errors import TheirsError
from appliance.contract.inference import Array
from appliance.workshop import graphs
from appliance.workshop.graphs import Emitter, Links

_SCALES = {"Mul", "Div"}
_PLAIN = {"Identity", "Cast", "Dropout"}
_LOW = {np.dtype(np.float16): -3e4, np.dtype(np.float32): -1e9, np.dtype(np.float64): -1e9}
"""A bias under which a key weighs nothing; finite, so that a block of nothing but padding gives numbers and not NaN."""
_LEAST_RANK = 2
_LAST_AXIS_OPSET = 13
"""From here on a softmax that names no axis is over the last; before, it was over all from axis 1 on (ONNX changelog)."""


@dataclass(frozen=True, slots=True)
class Window:
    """How far a position sees. `size`: positions in a block; `reach`: neighbouring blocks seen on each side; `sinks`: first positions seen by all.

    Raises: TheirsError (`window`) if the sinks do not all lie in the first block.
    """

    size: int
    reach: int = 1
    sinks: int = 1

    def __post_init__(self) -> None:
        """A sink beyond the first block could be seen twice."""
        if self.sinks > self.size:
            raise TheirsError("window", f"{self.sinks} sinks do not fit into the first block of {self.size}", remedy="a longer window")

    @property
    def keys(self) -> int:
        """How many keys each position looks at."""
        return (2 * self.reach + 1) * self.size + self.sinks

    @property
    def name(self) -> str:
        """A short name: block size x blocks seen."""
        return f"window-{self.size}x{2 * self.reach + 1}"

    @property
    def how(self) -> str:
        """What it does, in words."""
        seen = f"its own and {self.reach} on each side" if self.reach else "its own"
        sinks = f" and the first {'position' if self.sinks == 1 else f'{self.sinks} positions'}" if self.sinks else ""
        return f"attention in blocks of {self.size} positions; each sees {seen}{sinks}"


@dataclass(frozen=True, slots=True)
class Attention:
    """One attention of a graph. `axis`: what the softmax is over; `after`: casts and the like between softmax and the product with V.

    `steps`: what lies between scores and softmax, first to last, as (node, the index of the scores among its inputs).
    """

    scores: Any
    steps: tuple[tuple[Any, int], ...]
    softmax: Any
    mixing: Any
    after: tuple[Any, ...]
    axis: int

    @property
    def nodes(self) -> tuple[Any, ...]:
        """All nodes that a windowed attention takes the place of."""
        return (self.scores, *(node for node, _ in self.steps), self.softmax, *self.after, self.mixing)

    @property
    def operands(self) -> tuple[str, ...]:
        """The names of Q, K^T, V, and of what scales and masks."""
        others = [name for node, index in self.steps for place, name in enumerate(node.input) if place != index and name]
        return (*self.scores.input, self.mixing.input[1], *others)


def find(model: Any) -> tuple[list[Attention], list[str]]:
    """Return the attentions of a graph, and what looked like one but was not, each with the reason."""
    links, fixed = Links(model.graph), graphs.constants(model)
    over = -1 if graphs.opset(model) >= _LAST_AXIS_OPSET else 1
    found, others = [], []
    for node in model.graph.node:
        if node.op_type != "Softmax":
            continue
        matched = _match(node, links, fixed, over)
        if isinstance(matched, str):
            others.append(f"{_named(node)}: {matched}")
        else:
            found.append(matched)
    return found, others


def longest(model: Any, sample: Mapping[str, Array]) -> int:
    """Return the length of the longest sequence that looks at itself on this sample; 0 if there is no attention. Raises: TheirsError."""
    found, _ = find(model)
    if not found:
        return 0
    seen = graphs.look_inside(model, sample, [name for each in found for name in each.operands])
    return max((seen[each.scores.input[0]].shape[-2] for each in found if _refusal(each, seen) is None), default=0)


def windowed(model: Any, sample: Mapping[str, Array], window: Window) -> Any:
    """Return a copy of a model whose attentions are windowed. `sample`: one input, from which ranks and lengths are taken.

    Raises: TheirsError (`no_attention`) if there is none that can be, with what was found instead.
    """
    twin = graphs.copied(model)
    found, others = find(twin)
    seen = graphs.look_inside(twin, sample, [name for each in found for name in each.operands]) if found else {}
    surgery = _Surgery(seen, window, Links(twin.graph))
    replaced: dict[str, list[Any]] = {}
    gone: set[str] = set()
    for attention in found:
        reason = _refusal(attention, seen)
        if reason:
            others.append(f"{_named(attention.softmax)}: {reason}")
            continue
        replaced[attention.mixing.output[0]] = surgery.replace(attention)
        gone.update(node.output[0] for node in attention.nodes)
    if not replaced:
        what = "no attention that can be windowed: " + ("; ".join(others) or "it has no softmax between two products")
        raise TheirsError("no_attention", what, where="ONNX graph", remedy="export the model without fused attention operators")
    _put_in(twin, replaced, gone, surgery.emit.tensors)
    return twin


def _named(node: Any) -> str:
    return str(node.name or node.output[0])


def _put_in(model: Any, replaced: Mapping[str, list[Any]], gone: set[str], tensors: list[Any]) -> None:
    nodes: list[Any] = []
    for node in model.graph.node:
        name = node.output[0]
        nodes.extend(replaced.get(name, [] if name in gone else [node]))
    graphs.renew(model, nodes, tensors)
    graphs.prune(model)


def _match(softmax: Any, links: Links, fixed: Mapping[str, Any], over: int) -> Attention | str:
    """Return the attention around a softmax, or why it is none. `over`: the softmax's axis where it names none."""
    behind = _descend(softmax.input[0], links, fixed, softmax)
    if behind is None:
        return "no product of two activations stands before it"
    scores, steps = behind
    name, after = softmax.output[0], []
    while True:
        reader = links.only_reader(name)
        if reader is None:
            return "its weights are read in more than one place"
        if reader.op_type not in _PLAIN:
            break
        after.append(reader)
        name = reader.output[0]
    if reader.op_type != "MatMul" or reader.input[0] != name or reader.input[1] in fixed:
        return "no product with values stands behind it"
    axis = next((each.i for each in softmax.attribute if each.name == "axis"), over)
    return Attention(scores, steps, softmax, reader, tuple(after), axis)


def _descend(name: str, links: Links, fixed: Mapping[str, Any], reader: Any) -> tuple[Any, tuple[tuple[Any, int], ...]] | None:
    """Walk from the softmax back to the product of two activations, over scales and masks; None if there is no such way."""
    node = links.makers.get(name)
    if node is None or links.only_reader(name) is not reader:
        return None
    if node.op_type == "MatMul":
        return None if fixed.keys() & set(node.input) else (node, ())
    ways = {"Add": (0, 1), "Mul": (0, 1), "Div": (0,), "Where": (1, 2), **dict.fromkeys(_PLAIN, (0,))}.get(node.op_type, ())
    for index in ways:
        behind = _descend(node.input[index], links, fixed, node)
        if behind is not None:
            return behind[0], (*behind[1], (node, index))
    return None


def _refusal(attention: Attention, seen: Mapping[str, Array]) -> str | None:
    """Return why an attention cannot be windowed, from what its operands are on a sample; None if it can."""
    queries, keys, values = (seen[name] for name in attention.operands[:3])
    rank, length = queries.ndim, queries.shape[-2] if queries.ndim >= _LEAST_RANK else 0
    if rank < _LEAST_RANK or keys.ndim != rank or values.ndim != rank:
        return "queries, keys and values differ in rank"
    if attention.axis not in {-1, rank - 1}:
        return f"the softmax is over axis {attention.axis}, not over the keys"
    if keys.shape[-1] != length or values.shape[-2] != length:
        return f"{length} queries look at {keys.shape[-1]} keys: not a sequence that looks at itself"
    for node, index in attention.steps:
        for other in (seen[name] for place, name in enumerate(node.input) if place != index and name):
            if node.op_type in _SCALES and other.size != 1:
                return f"{_named(node)} scales by a tensor {list(other.shape)}; only a scale of one number is known here"
            if other.size != 1 and (other.ndim > rank or other.shape[-1] != length):
                return f"{_named(node)} masks by a tensor {list(other.shape)}, not by one number for each key"
    return None


@dataclass(frozen=True, slots=True)
class _Blocks:
    """Names of int64 tensors: `queries` [blocks, window] and `keys` [blocks, keys] are positions, `bias` [blocks, 1, keys] is 0 or low."""

    length: str
    queries: str
    keys: str
    bias: str


class _Surgery:
    """Writes windowed attentions in the place of full ones; what two of them have in common (lengths, masks) is written once."""

    def __init__(self, seen: Mapping[str, Array], window: Window, links: Links) -> None:
        self.emit = Emitter("window")
        self._seen, self._window, self._links = seen, window, links
        self._blocks: dict[str, _Blocks] = {}
        self._masks: dict[tuple[str, ...], str] = {}

    def replace(self, attention: Attention) -> list[Any]:
        """Return the nodes that make what the attention made."""
        emit, first = self.emit, len(self.emit.nodes)
        queries = attention.scores.input[0]
        axis, dtype = self._seen[queries].ndim - 2, self._seen[queries].dtype
        blocks = self._blocks_of(attention, dtype)
        near = emit.op("Gather", self._keys(attention, axis + 2), blocks.keys, axis=axis)
        swap = [*range(axis + 1), axis + 2, axis + 1]
        weights = emit.op("MatMul", emit.op("Gather", queries, blocks.queries, axis=axis), emit.op("Transpose", near, perm=swap))
        biased = False
        for node, index in attention.steps:
            weights, masked = self._step(node, index, weights, blocks)
            biased |= masked
        weights = emit.op("Softmax", weights if biased else emit.op("Add", weights, blocks.bias), axis=-1)
        for node in attention.after:
            weights = self._again(node, weights)
        values = attention.mixing.input[1]
        mixed = emit.op("MatMul", weights, emit.op("Gather", values, blocks.keys, axis=axis))
        joined = emit.op("Reshape", mixed, emit.constant([0] * axis + [-1, self._seen[values].shape[-1]]))
        emit.op("Slice", joined, emit.constant([0]), blocks.length, emit.constant([axis]), out=attention.mixing.output[0])
        return emit.nodes[first:]

    def _keys(self, attention: Attention, rank: int) -> str:
        """Return K [.., length, depth], taken from before its transposition if there is one."""
        name = attention.scores.input[1]
        maker = self._links.makers.get(name)
        if maker is not None and maker.op_type == "Transpose":
            order = list(next((each.ints for each in maker.attribute if each.name == "perm"), range(rank)[::-1]))
            order[-2:] = order[:-3:-1]
            return str(maker.input[0]) if order == sorted(order) else self.emit.op("Transpose", maker.input[0], perm=order)
        return self.emit.op("Transpose", name, perm=[*range(rank - 2), rank - 1, rank - 2])

    def _blocks_of(self, attention: Attention, dtype: "np.dtype[np.generic]") -> _Blocks:
        """Return the blocks for this attention's length; those with the same mask share them."""
        masks = [node.input[1 - index] for node, index in attention.steps if node.op_type == "Add"]
        mask = next((name for name in masks if self._seen[name].size > 1), None)
        source = mask or attention.scores.input[0]
        if source not in self._blocks:
            rank = self._seen[source].ndim
            axis = rank - 1 if mask else rank - 2
            length = self.emit.op("Gather", self.emit.op("Shape", source), self.emit.constant([axis]), axis=0)
            self._blocks[source] = self._cut(length, dtype)
        return self._blocks[source]

    def _cut(self, length: str, dtype: "np.dtype[np.generic]") -> _Blocks:
        """Emit which positions each block holds and which it sees, from a length that is known only at run time."""
        emit, window = self.emit, self._window
        size, reach = emit.constant([window.size]), window.reach * window.size
        last = emit.op("Sub", length, emit.constant([1]))
        count = emit.op("Div", emit.op("Add", last, size), size)
        numbers = emit.op("Range", emit.constant(0), emit.op("Reshape", count, emit.constant([])), emit.constant(1))
        starts = emit.op("Mul", emit.op("Reshape", numbers, emit.constant([-1, 1])), size)  # [blocks, 1]
        queries = emit.op("Min", emit.op("Add", starts, emit.constant([[*range(window.size)]])), last)
        around = emit.op("Add", starts, emit.constant([[*range(-reach, reach + window.size)]]))
        keys = emit.op("Max", emit.op("Min", around, last), emit.constant([0]))
        good = emit.op("Equal", keys, around)  # not beyond an end
        if window.sinks:
            sinks = emit.constant([[*range(window.sinks)]])
            unseen = emit.op("Less", sinks, emit.op("Sub", starts, emit.constant([reach])))  # not in the neighbourhood already
            every = emit.op("Add", emit.op("Mul", starts, emit.constant([0])), sinks)
            keys = emit.op("Concat", keys, emit.op("Min", every, last), axis=1)
            good = emit.op("Concat", good, unseen, axis=1)
        bias = emit.op("Where", good, emit.constant(0, dtype), emit.constant(_LOW[dtype], dtype))
        return _Blocks(length, queries, keys, emit.op("Reshape", bias, emit.constant([-1, 1, window.keys])))

    def _step(self, node: Any, index: int, scores: str, blocks: _Blocks) -> tuple[str, bool]:
        """Emit a scale or mask on blocked scores; say whether the blocks' own bias is in it."""
        if node.op_type == "Add" and self._seen[node.input[1 - index]].size > 1:
            return self.emit.op("Add", scores, self._mask((node.input[1 - index],), blocks)), True
        if node.op_type == "Where" and self._seen[node.input[0]].size > 1:
            return self.emit.op("Add", scores, self._mask((node.input[0], node.input[3 - index], str(index)), blocks)), True
        return self._again(node, scores, index), False

    def _mask(self, key: tuple[str, ...], blocks: _Blocks) -> str:
        """Return a mask and the blocks' bias, together, by blocks. `key`: the mask, or a `Where`: condition, replacement, the scores' place."""
        if key not in self._masks:
            emit, dtype = self.emit, self._dtype(key)
            name, like = key[0], self._seen[key[0]].shape
            if len(key) > 1:  # scores that were replaced by something low become scores with something low added: both weigh nothing
                sides = (emit.constant(0, dtype), key[1])
                name = emit.op("Where", name, *(sides if key[2] == "1" else sides[::-1]))
            both = emit.op("Add", self._by_blocks(name, like, blocks), blocks.bias)
            self._masks[key] = emit.op("Max", both, emit.constant(_LOW[dtype], dtype))
        return self._masks[key]

    def _dtype(self, key: tuple[str, ...]) -> "np.dtype[np.generic]":
        return self._seen[key[0] if len(key) == 1 else key[1]].dtype

    def _by_blocks(self, name: str, shape: tuple[int, ...], blocks: _Blocks) -> str:
        """Gather a mask [.., length or 1, length] into [.., blocks, window or 1, keys]."""
        emit, rank = self.emit, len(shape)
        columns = emit.constant([-1, 1, self._window.keys])
        if rank < _LEAST_RANK:
            return emit.op("Reshape", emit.op("Gather", name, blocks.keys, axis=0), columns)
        if shape[-2] == 1:
            seen = emit.op("Gather", name, blocks.keys, axis=rank - 1)  # [.., 1, blocks, keys]
            return emit.op("Transpose", seen, perm=[*range(rank - 2), rank - 1, rank - 2, rank])
        rows = emit.op("Gather", name, blocks.queries, axis=rank - 2)  # [.., blocks, window, length]
        front = emit.op("Slice", emit.op("Shape", rows), emit.constant([0]), emit.constant([-1]))
        target = emit.op("Concat", front, emit.constant([self._window.keys]), axis=0)
        return emit.op("GatherElements", rows, emit.op("Expand", emit.op("Reshape", blocks.keys, columns), target), axis=rank)

    def _again(self, node: Any, name: str, index: int = 0) -> str:
        """Emit the same node on blocked scores."""
        if node.op_type == "Dropout":
            return name
        inputs = [name if place == index else other for place, other in enumerate(node.input)]
        attributes = {each.name: graphs.toolkit().helper.get_attribute_value(each) for each in node.attribute}
        return self.emit.op(node.op_type, *inputs, **attributes)
