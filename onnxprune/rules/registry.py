"""The table of rules under the name that rules know it by; it lies below the graph: :mod:`onnxprune.operators`."""

from onnxprune.operators.registry import (
    NO_RULE,
    Inverse,
    Move,
    NoRule,
    Rule,
    known,
    lookup,
    register,
    rule_of,
    unregister,
)

__all__ = ["NO_RULE", "Inverse", "Move", "NoRule", "Rule", "known", "lookup", "register", "rule_of", "unregister"]
