"""Rules for operators, under their public name: one rule defines labels, rewriting and shapes of its operator.

Importing this module registers the built-in rules. Add your own with :func:`register`, see CONTRIBUTING.
"""

from onnxprune.labels.label import Label, along
from onnxprune.operators.built_in import BUILT_IN
from onnxprune.operators.context import Cut, Step
from onnxprune.operators.contractions import Form, Pairwise, Windows
from onnxprune.operators.elementwise import Elementwise
from onnxprune.operators.registry import Inverse, Move, Rule, known, lookup, register, rule_of, unregister

__all__ = [
    "BUILT_IN",
    "Cut",
    "Elementwise",
    "Form",
    "Inverse",
    "Label",
    "Move",
    "Pairwise",
    "Rule",
    "Step",
    "Windows",
    "along",
    "known",
    "lookup",
    "register",
    "rule_of",
    "unregister",
]
