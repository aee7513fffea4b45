"""Cuts a model in two: the device computes features, the other side the rest; together they answer what the whole answers.

1. A cut is named by one tensor: the device's side is what that tensor needs, the head is the rest. What else the head needs crosses the cut too:
   tensors and inputs become further outputs of the features. Constants do not cross; the head has its own.
2. A cut is good when few bytes cross, the device is relieved, and the rest is cheap. Costs are counted, not timed, so that the same model gives the same
   cut: multiplications of products and convolutions, elements of everything else, from the shapes that a sample has.
3. Found cut: of those that spare the device `SPARED` of its operations or of its weights, and leave the head at most `HEAD_SHARE` of the
   operations, those with the fewest bytes across (within `ALIKE`), of which the one that spares the device most.
4. Everything that crosses has the batch as axis 0, so that the other side can put requests together.
5. The two halves are run one after the other and must give the whole's answers.

Where to cut between device and cloud: Kang et al. 2017, "Neurosurgeon", section 4.
"""

import functools
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from appliance.contract.errors import TheirsError
from appliance.contract.inference import Array
from appliance.workshop import graphs
from appliance.workshop.graphs import Links
from appliance.workshop.samples import Sample

SPARED = 0.10
HEAD_SHARE = 0.5
ALIKE = 1.1
_TWICE = 2
_AGREE = 1e-4
"""Greatest difference between whole and halves, of the answers' greatest value: other fusions sum in another order."""


@dataclass(frozen=True, slots=True)
class Cut:
    """A place to cut. `crossing`: names of what goes over the wire; shares of the whole's operations and weight bytes are the device's."""

    tensor: str
    crossing: tuple[str, ...]
    crossing_bytes: int
    operations: float
    weights: float


@dataclass(frozen=True, slots=True)
class Halves:
    """Both sides (`ModelProto`); the head's inputs are the features' outputs."""

    features: Any
    head: Any
    cut: Cut


def find(model: Any, sample: Sample) -> Cut:
    """Return the best cut. Raises: TheirsError (`no_cut`) if nothing spares the device enough."""
    plan = _Plan(model, sample)
    cuts = [cut for name in plan.tensors if (cut := plan.cut(name)) is not None and not plan.given <= set(cut.crossing)]
    fit = [cut for cut in cuts if _spares(cut)]
    if not fit:
        what = f"no tensor spares the device {SPARED:.0%} and leaves the other side at most {HEAD_SHARE:.0%} of the work"
        raise TheirsError("no_cut", what, where="ONNX graph", remedy="name a tensor with --features")
    least = min(cut.crossing_bytes for cut in fit)
    alike = [cut for cut in fit if cut.crossing_bytes <= ALIKE * least]
    return min(alike, key=lambda cut: (cut.operations, cut.weights, cut.crossing_bytes))


def at(model: Any, sample: Sample, tensor: str) -> Cut:
    """Return the cut at a named tensor. Raises: TheirsError (`no_cut`) if there is no such tensor or it cuts nothing off."""
    plan = _Plan(model, sample)
    if tensor not in plan.tensors:
        near = sorted(plan.tensors)[:8]
        raise TheirsError("no_cut", f"no tensor {tensor!r} that depends on the inputs and on which the outputs depend", where="ONNX graph",
                          remedy=f"look at the model with a viewer; some of its tensors are {', '.join(near)}")  # fmt: skip
    cut = plan.cut(tensor)
    if cut is None:
        raise TheirsError(
            "no_cut",
            f"beside {tensor!r} something without a batch axis would cross, or an output of the model lies before it",
            where="ONNX graph",
        )
    if plan.given <= set(cut.crossing):
        raise TheirsError("no_cut", f"{tensor!r} cuts nothing off: the head would need all inputs as well", where="ONNX graph")
    return cut


def halves(model: Any, sample: Sample, cut: Cut) -> Halves:
    """Cut a model in two and hold the halves against the whole.

    Raises: TheirsError (`no_cut`) if they answer differently.
    """
    plan = _Plan(model, sample)
    features, head = plan.features(cut), plan.head(cut)
    whole = graphs.answers(graphs.session(model), sample)
    between = graphs.answers(graphs.session(features), sample)
    names = [each.name for each in features.graph.output]
    rest = graphs.answers(graphs.session(head), dict(zip(names, between, strict=True)))
    for one, other in zip(whole, rest, strict=True):
        scale = float(np.abs(one.astype(np.float64)).max(initial=0.0)) or 1.0
        if one.shape != other.shape or not np.allclose(one, other, rtol=_AGREE, atol=_AGREE * scale):
            raise TheirsError("no_cut", f"cut at {cut.tensor!r}, the halves do not answer what the whole answers", where="ONNX graph")
    return Halves(features, head, cut)


def _spares(cut: Cut) -> bool:
    return min(cut.operations, cut.weights) <= 1 - SPARED and cut.operations >= 1 - HEAD_SHARE


class _Plan:
    """What each tensor needs and costs. Sets of nodes are bits of one integer, so that asking about every tensor stays quick."""

    def __init__(self, model: Any, sample: Sample) -> None:
        graph = model.graph
        self._model, self._links = model, Links(graph)
        self._nodes = list(graph.node)
        self._fixed = graphs.constants(model)
        self.given = self._links.given
        self._needs = self._ancestors()
        self._all = functools.reduce(operator.or_, (self._needs.get(name, 0) for name in self._links.wanted), 0)
        self._moving = self._moved()
        names = [name for name in self._moving if name in self._links.makers]
        self._seen = graphs.look_inside(model, sample, self._moving)
        self._batch = self._with_batch(sample)
        self._declared = {each.name: each.type.tensor_type for each in _inferred(model)}
        self._operations = [self._operations_of(node) for node in self._nodes]
        self._weights = [sum(self._fixed[name].ByteSize() for name in graphs.reads(node) if name in self._fixed) for node in self._nodes]
        self._total = (sum(self._operations) or 1, sum(self._weights) or 1)
        self.tensors = [name for name in names if name not in self._links.wanted]

    def cut(self, tensor: str) -> Cut | None:
        """Return the cut at a tensor; None if something crosses that has no batch axis, or an output of the model lies before it."""
        mine = self._needs[tensor]
        crossing = self._crossing(mine)
        if tensor not in crossing or not self._batch.issuperset(crossing) or self._links.wanted & self._made(mine):
            return None
        size = sum(self._seen[name].nbytes for name in crossing)
        operations, weights = (
            sum(cost for place, cost in enumerate(costs) if mine >> place & 1) / total
            for costs, total in ((self._operations, self._total[0]), (self._weights, self._total[1]))
        )
        return Cut(tensor, crossing, size, operations, weights)

    def features(self, cut: Cut) -> Any:
        """Return the device's side: `crossing` of the inputs' names, given out under a name of its own where it is an input."""
        helper = graphs.toolkit().helper
        twin = graphs.copied(self._model)
        passed = [name for name in cut.crossing if name in self.given]
        twin.graph.node.extend(helper.make_node("Identity", [name], [_passed(name)], name=_passed(name)) for name in passed)
        del twin.graph.output[:]
        twin.graph.output.extend(self._info(name, _passed(name) if name in passed else name) for name in cut.crossing)
        graphs.prune(twin)
        return twin

    def head(self, cut: Cut) -> Any:
        """Return the other side."""
        twin = graphs.copied(self._model)
        passed = {name: _passed(name) for name in cut.crossing if name in self.given}
        for node in twin.graph.node:
            for place, name in enumerate(node.input):
                node.input[place] = passed.get(name, name)
        nodes = [node for node in twin.graph.node if not set(cut.crossing).intersection(node.output)]
        graphs.renew(twin, nodes)
        graphs.prune(twin)
        del twin.graph.input[:]
        twin.graph.input.extend(self._info(name, passed.get(name, name)) for name in cut.crossing)
        return twin

    def _info(self, name: str, shown: str) -> Any:
        """Describe a tensor that crosses: axes that a longer or shorter input could change are free."""
        helper = graphs.toolkit().helper
        array = self._seen[name]
        declared = self._declared.get(name)
        axes: list[int | str] = ["batch", *(f"{shown}_{axis}" for axis in range(1, array.ndim))]
        if declared is not None and len(declared.shape.dim) == array.ndim:
            axes[1:] = [dim.dim_value or axes[place] for place, dim in enumerate(declared.shape.dim) if place]
        return helper.make_tensor_value_info(shown, helper.np_dtype_to_tensor_dtype(array.dtype), axes)

    def _with_batch(self, sample: Sample) -> set[str]:
        """Return the tensors whose axis 0 is the batch: it doubles with the inputs'; where the model allows no batch of 2, it is 1."""
        once = {name for name, array in self._seen.items() if array.ndim and len(array) == 1}
        try:
            twice = graphs.look_inside(self._model, {name: np.concatenate([array, array]) for name, array in sample.items()}, once)
        except TheirsError:
            return once
        return {name for name, array in twice.items() if array.ndim and len(array) == _TWICE}

    def _ancestors(self) -> dict[str, int]:
        needs: dict[str, int] = {}
        for place, node in enumerate(self._nodes):
            mine = 1 << place
            for name in graphs.reads(node):
                mine |= needs.get(name, 0)
            needs.update(dict.fromkeys(node.output, mine))
        return needs

    def _moved(self) -> list[str]:
        """Return the tensors that depend on an input, in the graph's order, inputs first; what depends on none is a constant."""
        moved = dict.fromkeys(sorted(self.given))
        for place, node in enumerate(self._nodes):
            if self._all >> place & 1 and any(name in moved for name in graphs.reads(node)):
                moved.update(dict.fromkeys(name for name in node.output if name))
        return list(moved)

    def _crossing(self, mine: int) -> tuple[str, ...]:
        """Return, sorted, what nodes beyond `mine` read of it or of the inputs."""
        moving = set(self._moving)
        made = self._made(mine) | self.given
        rest = self._all & ~mine
        read = {name for place, node in enumerate(self._nodes) if rest >> place & 1 for name in graphs.reads(node)}
        return tuple(sorted(read & made & moving))

    def _made(self, nodes: int) -> set[str]:
        return {name for place, node in enumerate(self._nodes) if nodes >> place & 1 for name in node.output}

    def _operations_of(self, node: Any) -> float:
        shapes = [self._shape(name) for name in node.input]
        made = sum(math.prod(self._shape(name)) for name in node.output)
        if node.op_type in {"MatMul", "Gemm"} and shapes[0]:
            return float(made * shapes[0][-1])
        if node.op_type == "Conv":
            return float(made * math.prod(shapes[1][1:]))
        return float(made)

    def _shape(self, name: str) -> Sequence[int]:
        if name in self._fixed:
            return tuple(self._fixed[name].dims)
        return self._seen[name].shape if name in self._seen else (0,)


def _inferred(model: Any) -> list[Any]:
    graph = graphs.toolkit().shape_inference.infer_shapes(model).graph
    return [*graph.value_info, *graph.input]


def _passed(name: str) -> str:
    return f"{name}_passed"


def answers(opened: Mapping[str, Any], sample: Sample) -> list[Array]:
    """Run `features` and then `head` (sessions) on one sample. Raises: TheirsError (`samples`)."""
    names = [each.name for each in opened["features"].get_outputs()]
    between = graphs.answers(opened["features"], sample)
    return graphs.answers(opened["head"], dict(zip(names, between, strict=True)))
