"""The table of rules: one rule object per operator, by domain, name and opset range."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from importlib import import_module
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from warnings import warn

import numpy as np
from numpy.typing import NDArray

from onnxprune.plugins import announced

if TYPE_CHECKING:
    from onnxprune.graph.view import Node
    from onnxprune.labels.algebra import Shape
    from onnxprune.operators.context import Cut, Step
    from onnxprune.operators.contractions import Form


Array = NDArray[Any]
Read = Callable[[int], "NDArray[Any] | None"]
"""Position of an input -> its value where that is a constant, else None; None for absent ones too."""

FOREVER = 1 << 30


class Elements(tuple["Shape | None", ...]):
    """Shapes of the tensors in a sequence: what ``infer`` is given and gives in place of a shape."""

    __slots__ = ()


BUILT_IN = "onnxprune.operators.built_in"
ENTRY_POINT = "onnxprune.rules"


class Move(Enum):
    """What becomes of the values of an operator that computes nothing: where its outputs hold those of its input 0."""

    SAME = "every value where it was"
    CAST = "every value where it was, in another type"
    SHAPE = "every value, in the same order, under another shape"
    ORDER = "every value, in another order"
    SOME = "some of the values"
    REPEAT = "every value, some several times"
    JOIN = "every value of all inputs, one input behind the other"

    @property
    def keeps_all(self) -> bool:
        """Whether every value is there once, so that the operator can be undone."""
        return self in (Move.SAME, Move.CAST, Move.SHAPE, Move.ORDER)


class Inverse(NamedTuple):
    """How the value at one input of an operator is had from its output.

    Attributes:
        undo: (value of the output, [value of ``addend``], shape of the input) -> value of the input.
        addend: position of another input that has to be known for it; None where none has.
    """

    undo: Callable[[Array, Sequence[Array], Sequence[int]], Array]
    addend: int | None = None


class Rule:
    """Everything that is known of one operator: how labels pass, how its node is rewritten, what it costs.

    Subclass and override; the base rule freezes every input, which is always right and never cuts.
    """

    data: int = 0
    """The input that comes from the rest of the model, where others are weights."""

    weights: tuple[int, ...] = ()
    """Inputs that data are multiplied with: where one of them is a weight of the model, the node is a layer."""

    settings: tuple[int, ...] = ()
    """Inputs that only say how others are read (scales, zero points): they are not scored by themselves."""

    operands: tuple[int, ...] = ()
    """Inputs that carry sizes, bounds or indices, checked by ``rewrite``; other sizes used as data keep their value."""

    several_directions: bool = False
    """Whether operands and outputs hold directions side by side that lose different units."""

    shapeless: bool = False
    """Whether ``propagate`` copes with tensors whose rank is not known; other rules are then not asked."""

    moves: Move | None = None
    """What the operator does to values where it only moves them; None where it computes."""

    pointwise: bool = False
    """Whether every number of an output is computed from the numbers at its own place."""

    encodes: bool = False
    """Whether output 0 holds input 0 as codes: what flows there is looked at in front of the node."""

    decodes: bool = False
    """Whether output 0 holds what the codes of input 0 stand for."""

    targets: tuple[int, ...] = ()
    """Inputs that say what shape a result has, and nothing of what it holds."""

    chooses: bool = False
    """Whether every result is a value of one of the inputs, or a constant: nothing is computed that could round."""

    averages: bool = False
    """Whether results are means of values of input 0 over some of its axes."""

    clamps: bool = False
    """Whether results are the values of input 0 but where the operator is flat, see ``saturation``."""

    makes_labels: bool = False
    """Whether channels are born at this operator, so that it is asked where none of its inputs has any."""

    def propagate(self, step: Step) -> None:
        """Read ``step.labels(i)``, unite and freeze, and state the outputs with ``step.set(o, labels)``.

        An input whose labels are never read is frozen by the engine.
        """

    def rewrite(self, cut: Cut) -> None:
        """Adapt attributes and shape operands of the node to the new sizes; most operators need nothing."""

    def contracted_axes(self, step: Step) -> list[tuple[int, tuple[int, ...]]]:
        """(input, axes) pairs that this operator sums over: where the proof multiplies removed channels by 0."""
        if type(self).reads is not Rule.reads:
            warn(f"{type(self).__name__}.reads is called contracted_axes now.", DeprecationWarning, stacklevel=2)
            return self.reads(step)
        return []

    def reads(self, step: Step) -> list[tuple[int, tuple[int, ...]]]:
        """The old name of :meth:`contracted_axes`."""
        warn("Rule.reads is called contracted_axes now.", DeprecationWarning, stacklevel=2)
        return self.contracted_axes(step)

    def infer(self, node: Node, shapes: list[Any], values: Any) -> list[Any] | None:
        """Shapes of the outputs; None where they cannot be told, and onnx's own inference is asked where it can.

        Args:
            node: the node.
            values: of its inputs, where known.
            shapes: of its inputs, None where unknown or absent; None within one is a size that depends on data.
        """
        return None

    def evaluate(self, node: Node, values: Sequence[Array | None]) -> Any:
        """Outputs (an array, or a list of several) of small known inputs; None: onnx's reference evaluator is asked.

        Args:
            node: the node.
            values: of its inputs, None for an absent optional one.

        Raises:
            Exception: of any kind, where the node makes no sense; its outputs are not known then.
        """
        return None

    def form(self, node: Node, shapes: list[Shape | None], data: int) -> Form | None:
        """The operator as a product of its input ``data`` with one constant weight; None where it is none.

        Args:
            node: the node.
            shapes: of its inputs.
            data: position of the operand that is not constant.
        """
        return None

    def macs(self, node: Node, shapes: Sequence[Any], out: Any) -> Any:
        """Multiply-accumulates of one run; by default those of the matrix form.

        Args:
            node: the node.
            shapes: of its inputs, None where unknown or absent; sizes may be arrays, for many cuts at once, and so is
                the result then.
            out: shape of the first output, the same.
        """
        if not self.weights or out is None or shapes[self.data] is None:
            return 0
        # Which axes are summed over does not depend on their sizes.
        plain: list[Shape | None] = [None if s is None else tuple(int(np.ravel(n)[0]) for n in s) for s in shapes]
        form = self.form(node, plain, self.data)
        if form is None:
            return 0
        return prod(out) * prod(shapes[self.data][a] for a in form.axes) * form.taps // form.parts

    def output_axis(self, node: Node, shapes: Sequence[Any], rank: int, weight: int) -> int | None:
        """The axis of the first output along which a layer's channels lie; None where it has one channel.

        Args:
            node: the layer.
            shapes: of its inputs.
            rank: of the output.
            weight: position of the weight.
        """
        return rank - 1

    def channels(self, node: Node, shapes: Sequence[Any], out: Any, weight: int) -> Any:
        """How many channels a layer makes; 0 where that is not known."""
        if not out:
            return 0
        axis = self.output_axis(node, shapes, len(out), weight)
        return 1 if axis is None else out[axis] or 0

    def numbers(self, node: Node, i: int, codes: NDArray[Any], read: Read) -> NDArray[Any] | None:
        """What the codes at input ``i`` stand for; None where that input holds numbers, or it is not known.

        Args:
            node: the node.
            i: position of the input.
            codes: its value.
            read: values of other inputs.

        Returns:
            float32 of the codes' shape; codes that are packed may have more positions along an axis that no channels
            lie on, or an axis of their own behind the others.
        """
        return None

    def inverse(self, node: Node, i: int, constant: Read) -> Inverse | None:
        """How input ``i`` is had from output 0; None where that cannot be told.

        Args:
            node: the node.
            i: position of the input.
            constant: floating values of the other inputs.
        """
        if i or any(node.outputs[1:]):
            return None
        if self.moves is Move.SAME:
            return Inverse(lambda value, _addends, _shape: value)
        if self.moves is Move.SHAPE:
            return Inverse(lambda value, _addends, shape: value.reshape(shape))
        return None

    def saturation(self, node: Node, constant: Read) -> list[tuple[float, bool]]:
        """Where the operator is flat as a function of input 0: (level, whether it is flat below that, else above)."""
        return []

    def neutral(self, step: Step, i: int) -> str | None:
        """Name of the tensor that stands for 0 in input ``i`` (a zero point), where 0 itself does not."""
        return None


class NoRule(Rule):
    """Stands in for operators without a rule."""


NO_RULE = NoRule()
_table: dict[tuple[str, str], list[tuple[int, int, Rule]]] = {}
_loaded = False
T = TypeVar("T", bound=type[Rule])


def register(
    domain: str, *ops: str, since: int = 1, until: int = FOREVER, rule: Rule | None = None
) -> Callable[[T], T]:
    """Register a rule for operators of ``domain`` ("" is ONNX's own) from opset ``since`` to ``until``, exclusive.

    Use it as a class decorator, or pass ``rule=`` an instance.

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


def unregister(domain: str, op: str) -> None:
    """Forget every rule of an operator, so that another can take its place."""
    _table.pop((domain, op), None)


def lookup(domain: str, op: str, version: int) -> Rule:
    """The rule for an operator at an opset version, or the rule that freezes."""
    if not _loaded:
        _load()
    for low, high, rule in _table.get((domain, op), ()):
        if low <= version < high:
            return rule
    return NO_RULE


def rule_of(node: Node) -> Rule:
    """The rule of a node."""
    return lookup(node.domain, node.op, node.version)


def known() -> list[tuple[str, str]]:
    """(domain, operator) of every registered rule, sorted."""
    return sorted(_table)


def _load() -> None:
    """Import the rules of this package, and those that others announce under the entry point ``onnxprune.rules``."""
    global _loaded
    import_module(BUILT_IN)
    announced(ENTRY_POINT)
    _loaded = True
