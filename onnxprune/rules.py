"""Rules for operators, under their public name: one rule defines labels, rewriting and shapes of its operator.

Importing this module registers the built-in rules. Add your own with :func:`register`, see CONTRIBUTING.
"""

from onnxprune.labels.label import Label, along
from onnxprune.operators.built_in import BUILT_IN
from onnxprune.operators.context import Cut, Step
from onnxprune.operators.contractions import Form, Pairwise, Windows
from onnxprune.operators.elementwise import Elementwise
from onnxprune.operators.factoring import Factoring, Product
from onnxprune.operators.registry import (
    Inverse,
    Move,
    NoRule,
    Rule,
    known,
    lookup,
    register,
    rule_of,
    unregister,
    with_facts,
)

__all__ = [
    "BUILT_IN",
    "Cut",
    "Elementwise",
    "Factoring",
    "Form",
    "Inverse",
    "Label",
    "Move",
    "NoRule",
    "Pairwise",
    "Product",
    "Rule",
    "Step",
    "Windows",
    "along",
    "known",
    "lookup",
    "register",
    "rule_of",
    "unregister",
    "with_facts",
]


def __dir__() -> list[str]:
    return [*__all__]
