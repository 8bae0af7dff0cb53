"""Criteria: pure functions from arrays to one score per channel of one slot. No onnx here."""

from onnxprune.criteria import activations, elimination, norms, redundancy, second_order
from onnxprune.criteria.registry import Criterion, get, names, needs, needs_of, register, unregister
from onnxprune.criteria.slot import Slot
from onnxprune.statistics.maps import Maps

BUILT_IN = (activations, elimination, norms, redundancy, second_order)

__all__ = [
    "BUILT_IN",
    "Criterion",
    "Maps",
    "Slot",
    "get",
    "names",
    "needs",
    "needs_of",
    "register",
    "unregister",
]
