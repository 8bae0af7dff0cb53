"""The table of rules: one rule object per operator, by domain, name and opset range."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from onnxprune.plugins import announced

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from onnxprune.contractions import Form
    from onnxprune.graph.view import Node
    from onnxprune.labels.combine import Shape
    from onnxprune.rules.context import Cut, Step

FOREVER = 1 << 30
ENTRY_POINT = "onnxprune.rules"


class Rule:
    """How labels pass through one operator, and how its node is rewritten once channels are gone.

    Subclass and override; the base rule freezes every input, which is always right and never cuts.
    """

    operands: tuple[int, ...] = ()
    """Inputs that carry sizes, bounds or indices, checked by ``rewrite``; other sizes used as data keep their value."""

    shapeless: bool = False
    """Whether ``propagate`` copes with tensors whose rank is not known; other rules are then not asked."""

    def propagate(self, step: Step) -> None:
        """Read ``step.labels(i)``, unite and freeze, and state the outputs with ``step.set(o, labels)``.

        An input whose labels are never read is frozen by the engine.
        """

    def rewrite(self, cut: Cut) -> None:
        """Adapt attributes and shape operands of the node to the new sizes; most operators need nothing."""

    def reads(self, step: Step) -> list[tuple[int, tuple[int, ...]]]:
        """(input, axes) pairs that this operator sums over: where the oracle multiplies removed channels by 0."""
        return []

    def infer(
        self, node: Node, shapes: list[Shape | None], values: list[NDArray[Any] | None]
    ) -> list[Shape | None] | None:
        """Shapes of the outputs, for operators that onnx has no shape inference for; None where they cannot be told.

        Args:
            node: the node. values: of its inputs, where known.
            shapes: of its inputs, None where unknown or absent; None within one is a size that depends on data.
        """
        return None

    def form(self, node: Node, shapes: list[Shape | None], data: int) -> Form | None:
        """The operator as a product of its input ``data`` with one constant weight; None where it is none.

        Args:
            node: the node. shapes: of its inputs. data: position of the operand that is not constant.
        """
        return None

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
        _load_plugins()
    for low, high, rule in _table.get((domain, op), ()):
        if low <= version < high:
            return rule
    return NO_RULE


def known() -> list[tuple[str, str]]:
    """(domain, operator) of every registered rule, sorted."""
    return sorted(_table)


def _load_plugins() -> None:
    """Import rules that other packages announce under the entry point group ``onnxprune.rules``."""
    global _loaded
    announced(ENTRY_POINT)
    _loaded = True
