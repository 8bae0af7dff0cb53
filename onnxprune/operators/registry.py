"""The table of rules: one rule object per operator, by domain, name and opset range."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from enum import Enum, EnumMeta
from importlib import import_module
from math import prod
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from warnings import warn

import numpy as np
from numpy.typing import NDArray

from onnxprune.plugins import announced

if TYPE_CHECKING:
    from onnxprune.gradients.tape import Reverse
    from onnxprune.graph.view import Node
    from onnxprune.labels.algebra import Shape
    from onnxprune.operators.context import Cut, Step
    from onnxprune.operators.contractions import Form
    from onnxprune.operators.factoring import Factoring


Array = NDArray[Any]
Read = Callable[[int], "NDArray[Any] | None"]
"""Position of an input -> its value where that is a constant, else None; None for absent ones too."""

FOREVER = 1 << 30


class Elements(tuple["Shape | None", ...]):
    """Shapes of the tensors in a sequence: argument and result of ``infer`` in place of a shape."""

    __slots__ = ()


BUILT_IN, GRADIENTS = "onnxprune.operators.built_in", "onnxprune.gradients.built_in"
ENTRY_POINT = "onnxprune.rules"


class _Renamed(EnumMeta):
    """Enumeration with a former name of a member, which warns."""

    def __getattr__(cls, name: str) -> Any:
        if name == "SOME":
            warn("Move.SOME is called Move.SELECT now.", DeprecationWarning, stacklevel=2)
            return cls["SELECT"]
        raise AttributeError(f"type object {cls.__name__!r} has no attribute {name!r}")


class Move(Enum, metaclass=_Renamed):
    """Effect on values of an operator that computes nothing: the location of input 0's values in its outputs."""

    SAME = "every value where it was"
    CAST = "every value where it was, in another type"
    SHAPE = "every value, in the same order, under another shape"
    ORDER = "every value, in another order"
    SELECT = "some of the values"
    REPEAT = "every value, some several times"
    JOIN = "every value of all inputs, one input behind the other"

    @property
    def keeps_all(self) -> bool:
        """Return whether every value occurs exactly once, so that the operator is invertible."""
        return self in (Move.SAME, Move.CAST, Move.SHAPE, Move.ORDER)


class Inverse(NamedTuple):
    """Inverse of an operator with respect to one input.

    Attributes:
        undo: (value of the output, [value of ``addend``], shape of the input) -> value of the input.
        addend: position of another input whose value is required; None where none is.
    """

    undo: Callable[[Array, Sequence[Array], Sequence[int]], Array]
    addend: int | None = None


class Scaling(NamedTuple):
    """Effect of a positive factor on one input of an operator: f(c x) = factor * f(x), with constants adapted.

    Attributes:
        factor: factor of output 0; 1 where the constants take it up.
        constants: {position of a constant input: function from its value to the value that takes its place}.
    """

    factor: float
    constants: Mapping[int, Callable[[Array], Array]] = MappingProxyType({})


class Rule:
    """Definition of one operator: propagation of labels, rewriting of its node, shapes, values, cost.

    Subclass and override; the base rule freezes every input, which is always correct and never prunes.
    """

    data: int = 0
    """Position of the activation input; the other inputs may be weights."""

    weights: tuple[int, ...] = ()
    """Inputs that multiply the data: where one of them is a weight of the model, the node is a layer."""

    settings: tuple[int, ...] = ()
    """Inputs that parametrise the reading of others (scales, zero points): they are not scored by themselves."""

    operands: tuple[int, ...] = ()
    """Inputs that hold sizes, bounds or indices, checked by ``rewrite``; other sizes used as data keep their value."""

    several_directions: bool = False
    """Whether operands and outputs hold several directions that lose different units."""

    shapeless: bool = False
    """Whether ``propagate`` supports tensors of unknown rank; the engine does not call other rules on them."""

    routes: int | None = None
    """Position of the scores by which the operator chooses ``k`` experts for every token; None for other operators."""
    moves: Move | None = None
    """Effect on values of an operator that only moves them; None for one that computes."""

    pointwise: bool = False
    """Whether every element of an output is computed from the input elements at the same position."""

    encodes: bool = False
    """Whether output 0 holds input 0 as codes: activations are captured in front of the node."""

    decodes: bool = False
    """Whether output 0 holds the dequantised codes of input 0."""

    targets: tuple[int, ...] = ()
    """Inputs that determine the shape of a result, but none of its values."""

    chooses: bool = False
    """Whether every result is a value of one of the inputs, or a constant, so that no result is rounded."""

    averages: bool = False
    """Whether results are means of values of input 0 over some of its axes."""

    clamps: bool = False
    """Whether results equal the values of input 0 except where the operator is flat, see ``saturation``."""

    jumps: bool = False
    """Whether a small difference of an input may become a large one of a result: the operator selects or rounds."""

    sized_by_values: bool = False
    """Whether the number of results depends on values: of detections, or of elements that are not 0."""

    unrounded: bool = False
    """Whether no result is rounded by more than the type that stores it, though the operator computes."""

    quantized: bool = False
    """Whether the operator reads or writes codes of 8 bits or fewer."""

    integer: bool = False
    """Whether the operator computes in integers of 8 bits or fewer."""

    slides: bool = False
    """Whether the operator is a convolution: it slides a kernel over its data, in ``group`` parts."""

    reads_sizes: bool = False
    """Whether the results are sizes of input 0, see ``size_values``: its values do not matter."""

    infers_size: bool = False
    """Whether -1 in the operand of ``targets`` stands for the size that the other entries leave."""

    random: bool = False
    """Whether results are drawn at random."""

    draws_by: int | None = None
    """Input that holds the probabilities to draw by."""

    training: int | None = None
    """Input with a flag under which positions are dropped at random; their share is the input in front of it."""

    statistics: tuple[int, ...] = ()
    """Inputs that hold the mean and the variance of every channel of input 0, on its axis 1."""

    bounded: bool = False
    """Whether every result is a probability by itself, between 0 and 1."""

    logistic: bool = False
    """Whether the results are probabilities whose logits are the values of input 0."""

    factoring: Factoring | None = None
    """Weight as a kernel, and the nodes that take the operator's place; None where it cannot be factorized."""

    multiplies: bool = False
    """Whether the contracted axes are those of the factors of one product, which is 0 where any of them is."""

    caches: tuple[tuple[int, int], ...] = ()
    """Pairs of an input and an output that is its next value: positions are appended, or overwritten."""

    makes_labels: bool = False
    """Whether the operator creates channels, so that it is called also without labelled inputs."""

    def propagate(self, step: Step) -> None:
        """Read ``step.labels(i)``, unite and freeze, and set the outputs with ``step.set(o, labels)``.

        An input whose labels are never read is frozen by the engine.
        """

    def rewrite(self, cut: Cut) -> None:
        """Adapt attributes and shape operands of the node to the new sizes; most operators need no change."""

    def contracted_axes(self, step: Step) -> list[tuple[int, tuple[int, ...]]]:
        """Return (input, axes) pairs that the operator sums over: there the proof multiplies removed channels by 0."""
        if type(self).reads is not Rule.reads:
            warn(f"{type(self).__name__}.reads is called contracted_axes now.", DeprecationWarning, stacklevel=2)
            return self.reads(step)
        return []

    def reads(self, step: Step) -> list[tuple[int, tuple[int, ...]]]:
        """Return :meth:`contracted_axes` (old name)."""
        warn("Rule.reads is called contracted_axes now.", DeprecationWarning, stacklevel=2)
        return self.contracted_axes(step)

    def infer(self, node: Node, shapes: list[Any], values: Any) -> list[Any] | None:
        """Infer the shapes of the outputs; None where unknown, and onnx's own inference is used where it applies.

        Args:
            node: the node.
            shapes: shapes of its inputs, None where unknown or absent; None within one is a size that depends on data.
            values: values of its inputs, None where unknown.
        """
        return None

    def evaluate(self, node: Node, values: Sequence[Array | None]) -> Any:
        """Compute the output (an array, or a list of several) of small inputs; None to use onnx's reference evaluator.

        Args:
            node: the node.
            values: values of its inputs, None for an absent optional one.

        Raises:
            Exception: of any kind, for an invalid node; its outputs are then unknown.
        """
        return None

    def size_values(self, node: Node, shape: Sequence[int | None]) -> Array | None:
        """Return output 0 of an operator that ``reads_sizes``; None where a size is not known.

        Args:
            node: the node.
            shape: shape of input 0; None within it is an unknown size.
        """
        return None

    def fits(self, node: Node, shapes: Sequence[Any], out: Sequence[int], read: Read) -> bool:
        """Return whether the node runs at these sizes, as far as ``agreements`` do not say.

        Args:
            node: the node.
            shapes: shapes of its inputs, None where unknown or absent; None within one is an unknown size.
            out: shape of output 0, known.
            read: function from the position of an input to its value.
        """
        return True

    def target_entries(self, node: Node, old: Sequence[int], target: Sequence[int], source: Sequence[int]) -> list[int]:
        """Return the entries of an operand that holds the shape of the result, with special ones where they hold.

        Args:
            node: the node.
            old: entries before, such as 0 and -1.
            target: new shape of the result.
            source: new shape of input 0.
        """
        return list(target)

    def lookups(self, node: Node) -> Sequence[tuple[int, int]]:
        """Return pairs of positions: an input of indices, and that of the table whose rows it picks."""
        return ()

    def picks(self, node: Node, rank: int) -> tuple[int, int, int] | None:
        """Return the positions of an index and of the data that it picks from, or writes into, and the data's axis.

        Args:
            node: the node.
            rank: rank of the data.
        """
        return None

    def index_limit(self, node: Node, i: int, shapes: Sequence[Any], read: Read) -> int | None:
        """Return the number of positions that the integers of input ``i`` select from; None where they are no indices.

        Args:
            node: the node.
            i: position of the input.
            shapes: shapes of the inputs, None where unknown or absent; None within one is an unknown size.
            read: function from the position of an input to its value.
        """
        return None

    def index_shift(self, node: Node, i: int, read: Read) -> int | None:
        """Return the most that results exceed the integers of input ``i`` by; None where that is not known.

        Args:
            node: the node.
            i: position of the input.
            read: function from the position of an input to its value.
        """
        ordered = self.chooses or self.moves is not None
        return 0 if ordered and (i == 0 or self.moves is Move.JOIN or self.pointwise) else None

    def gives_codes(self, node: Node) -> bool:
        """Return whether the results are codes, of the type of the first input of codes."""
        return self.encodes

    def score_axis(self, node: Node, rank: int) -> int | None:
        """Return the axis of input 0 whose values are scores; the results are probabilities or their logarithms.

        Args:
            node: the node.
            rank: rank of input 0.
        """
        return None

    def form(self, node: Node, shapes: list[Shape | None], data: int) -> Form | None:
        """Return the operator as a product of its input ``data`` with one constant weight; None where it is none.

        Args:
            node: the node.
            shapes: shapes of its inputs, None where unknown or absent.
            data: position of the operand that is not constant.
        """
        return None

    def agreements(self, node: Node, shapes: Sequence[Any], read: Read) -> Iterable[tuple[Any, Any]]:
        """Return pairs of sizes that have to be equal for the node to run, always in one order.

        Open dimensions of the model's inputs are chosen so that they are. A size of 1 that broadcasts is paired with
        itself.

        Args:
            node: the node.
            shapes: shapes of its inputs, None where unknown or absent; None within one is an unknown size.
            read: function from the position of an input to its value.

        Raises:
            LookupError, TypeError, ValueError, ArithmeticError, AttributeError: sizes are unknown, or of another form.
        """
        return ()

    def macs(self, node: Node, shapes: Sequence[Any], out: Any) -> Any:
        """Return the multiply-accumulates of one run; by default those of the matrix form.

        Args:
            node: the node.
            shapes: shapes of its inputs, None where unknown or absent; sizes may be arrays, for many prunings at once,
                and the result is then an array as well.
            out: shape of the first output, likewise.
        """
        if not self.weights or out is None or shapes[self.data] is None:
            return 0
        # The summed axes do not depend on their sizes.
        plain: list[Shape | None] = [None if s is None else tuple(int(np.ravel(n)[0]) for n in s) for s in shapes]
        form = self.form(node, plain, self.data)
        if form is None:
            return 0
        return prod(out) * prod(shapes[self.data][a] for a in form.axes) * form.taps // form.parts

    def output_axis(self, node: Node, shapes: Sequence[Any], rank: int, weight: int) -> int | None:
        """Return the axis of the first output along which a layer's channels lie; None for a layer with one channel.

        Args:
            node: the layer.
            shapes: shapes of its inputs, None where unknown or absent.
            rank: rank of the output.
            weight: position of the weight.
        """
        return rank - 1

    def channels(self, node: Node, shapes: Sequence[Any], out: Any, weight: int) -> Any:
        """Return the number of channels of a layer; 0 where unknown."""
        if not out:
            return 0
        axis = self.output_axis(node, shapes, len(out), weight)
        return 1 if axis is None else out[axis] or 0

    def numbers(self, node: Node, i: int, codes: NDArray[Any], read: Read) -> NDArray[Any] | None:
        """Dequantise the codes at input ``i``; None where that input is not quantised, or the result is unknown.

        Args:
            node: the node.
            i: position of the input.
            codes: value of the input, integers.
            read: function from the position of another input to its value.

        Returns:
            float32 of the codes' shape; packed codes may have more positions along an axis without channels, or an
            additional last axis.
        """
        return None

    def encode(self, node: Node, i: int, numbers: NDArray[Any], read: Read) -> Mapping[int, Array] | None:
        """Quantise other numbers for input ``i``: the inverse of ``numbers``; None where the operator decodes nothing.

        Args:
            node: the node.
            i: position of the input.
            numbers: the numbers, of the shape that :meth:`numbers` returns.
            read: function from the position of an input to its present value.

        Returns:
            {position of an input: its new value}: codes, and scales and zero points where they change.
        """
        return None

    def code(self, node: Node, read: Read) -> Code | None:
        """Return the code of the weight that the operator decodes; None where it is not stored as codes of 8 bits.

        Args:
            node: the node.
            read: function from the position of an input to its value; None where it is no constant.
        """
        return None

    def in_floats(self, node: Node, surroundings: Surroundings) -> InFloats | None:
        """Return an operator on codes as decoders, a floating-point operator and an encoder; None where it is not one.

        Args:
            node: the node.
            surroundings: the graph around it.
        """
        return None

    def inverse(self, node: Node, i: int, constant: Read) -> Inverse | None:
        """Return the inverse with respect to input ``i``, from output 0; None where it is unknown.

        Args:
            node: the node.
            i: position of the input.
            constant: function from the position of another input to its floating-point value.
        """
        if i or any(node.outputs[1:]):
            return None
        if self.moves is Move.SAME:
            return Inverse(lambda value, _addends, _shape: value)
        if self.moves is Move.SHAPE:
            return Inverse(lambda value, _addends, shape: value.reshape(shape))
        return None

    def scaling(self, node: Node, i: int, factor: float, constant: Read) -> Scaling | None:
        """Return the effect of a factor on input ``i``; None where it cannot be passed on.

        Args:
            node: the node.
            i: position of the input that is ``factor`` times the tensor that the node will read.
            factor: the factor, more than 0.
            constant: function from the position of another input to its value, None where that is no small constant.
        """
        moved = self.moves not in (None, Move.JOIN) and i == 0 and not any(node.outputs[1:])
        return Scaling(factor) if moved else None

    def saturation(self, node: Node, constant: Read) -> list[tuple[float, bool]]:
        """Return the saturation levels in input 0: (level, True if the operator is flat below it, False if above)."""
        return []

    def gradient(self, reverse: Reverse) -> None:
        """Emit the gradients of the inputs as nodes, and hand them over by ``reverse.send(i, tensor)``.

        Where a rule has none, that of :func:`register_gradient` counts; weights behind an operator without either
        are not trained. An input that gets no gradient is one that the outputs do not depend on, or only in steps.
        """
        raise NotImplementedError

    def neutral(self, step: Step, i: int) -> str | None:
        """Return the name of the tensor that represents 0 in input ``i`` (a zero point); None where 0 itself does."""
        return None

    def addends(self, node: Node) -> Sequence[int]:
        """Return the positions of the inputs that enter the results by their sum alone; none by default."""
        return ()

    def factors(self, node: Node) -> Sequence[int]:
        """Return the positions of the inputs whose product is one more addend, made by the node; none by default."""
        return ()

    def addend_zero(self, node: Node, i: int) -> str:
        """Return the name of the code that stands for 0 in an addend (a zero point); empty where 0 itself does."""
        return ""

    def total(self, node: Node) -> str:
        """Return the output that is the sum of the addends, or that is computed from it where none is."""
        return node.outputs[0]

    def without(self, node: Node, positions: Collection[int], opset: int) -> WithoutAddends | None:
        """Return a simpler node with the same results where some addends are 0; None where there is none.

        Args:
            node: the node.
            positions: of the addends that are 0; at least one other remains.
            opset: version of ONNX's own operators in the model.
        """
        return None


class NewNode(NamedTuple):
    """A node to be made."""

    op: str
    inputs: Sequence[str]
    outputs: Sequence[str]
    name: str = ""
    domain: str = ""
    attributes: Mapping[str, Any] = MappingProxyType({})


class Surroundings(NamedTuple):
    """The graph around a node.

    Attributes:
        weights: the constants by name.
        producer: the node that computes a tensor, by name.
        only_reader: function from a tensor to the only node that reads it; None for outputs, and for several readers.
    """

    weights: Mapping[str, Any]
    producer: Mapping[str, Node]
    only_reader: Callable[[str], Node | None]


class Code(NamedTuple):
    """The code in which an operator stores a weight, for other weights in the same code.

    Attributes:
        operator: the operator that reads codes, scales and zero points: type, domain, and attributes beside sizes.
        kind: type of the stored codes; bytes hold several where ``bits`` are fewer than 8.
        bits: bits per code, 8 or fewer.
        scale: type of scales.
        per_channel: whether every output has a scale of its own.
        block: number of contracted positions that share a scale; 0: all.
        zeros: ``codes``: zero points are codes; ``numbers``: they are of the type of scales; empty: there are none, and
            the middle code is 0.
        moves_zero: whether zero points vary.
        flat: whether scales and zero points have one axis.
        numeric: the operator on numbers in the place of one that computes with codes itself; empty for a decoder.
        codes: position of the codes.
        looks_up: whether the operator looks up rows of the codes, input 0; others multiply input 0 by them.
        bias: position of a bias of such an operator; None where there is none.
    """

    operator: tuple[str, str, Mapping[str, Any]]
    kind: np.dtype[Any]
    bits: int
    scale: np.dtype[Any]
    per_channel: bool = True
    block: int = 0
    zeros: str = ""
    moves_zero: bool = False
    flat: bool = False
    numeric: str = ""
    codes: int = 0
    looks_up: bool = False
    bias: int | None = None


class InFloats(NamedTuple):
    """An operator on codes, written with numbers between decoders and an encoder.

    Attributes:
        nodes: the nodes that take the place of those in ``replaced``; the last one computes ``replaced``'s last output.
        replaced: the nodes on codes, in execution order.
        constants: new constants by name.
        same: {new tensor: tensor of the model with the same channels}.
        operands: (first output of a replaced node, position of its input, first output of a decoder, position there) of
            constants that both read.
    """

    nodes: list[NewNode]
    replaced: list[Node]
    constants: Mapping[str, Array]
    same: Mapping[str, str]
    operands: list[tuple[str, int, str, int]]


class WithoutAddends(NamedTuple):
    """The replacement of a node without some of its addends.

    Attributes:
        nodes: new nodes, none where a remaining input is the result.
        same: {output: input that it equals}.
    """

    nodes: list[NewNode]
    same: dict[str, str]


class NoRule(Rule):
    """Operators whose channels are not followed: any without a rule, and those of which only facts are known."""


NO_RULE = NoRule()
Gradient = Callable[["Reverse"], None]
_gradients: dict[tuple[str, str], Gradient] = {}
_table: dict[tuple[str, str], list[tuple[int, int, Rule]]] = {}
_loaded = False
T = TypeVar("T", bound=type[Rule])
R = TypeVar("R", bound=Rule)


def register(
    domain: str, *ops: str, since: int = 1, until: int = FOREVER, rule: Rule | None = None
) -> Callable[[T], T]:
    """Register a rule for operators of ``domain`` ("" is ONNX's own) from opset ``since`` to ``until``, exclusive.

    Use it as a class decorator, or pass an instance as ``rule``.

    Raises:
        ValueError: the range overlaps one that is already registered.
    """

    def enter(instance: Rule) -> None:
        for op in ops:
            ranges = _table.setdefault((domain, op), [])
            for low, high, other in ranges:
                if since < high and low < until:
                    raise ValueError(
                        f"{domain or 'ai.onnx'}.{op}: opsets {since}..{until} overlap those of "
                        f"{type(other).__name__} ({low}..{high})"
                    )
            ranges.append((since, until, instance))

    if rule is not None:
        enter(rule)

    def decorate(cls: T) -> T:
        enter(cls())
        return cls

    return decorate


def with_facts(rule: R, **facts: Any) -> R:
    """Return a rule with facts of its own, for operators that share a class: ``with_facts(Pick(), jumps=True)``.

    Args:
        rule: the rule, changed.
        facts: attributes of :class:`Rule`.

    Raises:
        AttributeError: a rule has no such attribute.
    """
    for name, value in facts.items():
        getattr(rule, name)
        setattr(rule, name, value)
    return rule


def unregister(domain: str, op: str) -> None:
    """Unregister every rule of an operator, so that another can replace it."""
    _table.pop((domain, op), None)


def lookup(domain: str, op: str, version: int | None = None) -> Rule:
    """Return the rule for an operator at an opset version, or the rule that freezes; None: at the newest."""
    if not _loaded:
        _load()
    if version is None:
        entries = _table.get(("" if domain == "ai.onnx" else domain, op), ())
        return max(entries, key=lambda entry: entry[0])[2] if entries else NO_RULE
    for low, high, rule in _table.get((domain, op), ()):
        if low <= version < high:
            return rule
    return NO_RULE


def rule_of(node: Node) -> Rule:
    """Return the rule of a node."""
    return lookup(node.domain, node.op, node.version)


def register_gradient(domain: str, *ops: str) -> Callable[[Gradient], Gradient]:
    """Register, as a decorator, a function that emits the gradient of operators of ``domain``.

    A method ``gradient`` of a rule comes first, so that a rule of another package can bring its own.

    Raises:
        ValueError: an operator has a gradient already.
    """

    def decorate(gradient: Gradient) -> Gradient:
        for op in ops:
            if (domain, op) in _gradients:
                raise ValueError(f"{domain or 'ai.onnx'}.{op} has a gradient already")
            _gradients[domain, op] = gradient
        return gradient

    return decorate


def gradient_of(domain: str, op: str, version: int) -> Gradient | None:
    """Return the emitter of an operator's gradient; None where nothing is registered."""
    import_module(GRADIENTS)
    rule = lookup(domain, op, version)
    return rule.gradient if type(rule).gradient is not Rule.gradient else _gradients.get((domain, op))


def known() -> list[tuple[str, str]]:
    """Return (domain, operator) of every registered rule that follows channels, sorted."""
    return sorted(key for key, entries in _table.items() if any(not isinstance(rule, NoRule) for *_, rule in entries))


def _load() -> None:
    """Import the rules of this package, and those registered under the entry point ``onnxprune.rules``."""
    global _loaded
    import_module(BUILT_IN)
    announced(ENTRY_POINT)
    _loaded = True
