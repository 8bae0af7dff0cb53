"""Criteria: pure functions from arrays to one score per channel of one slot. No onnx here."""

from onnxprune.criteria import norms
from onnxprune.criteria.registry import Criterion, get, names, register, unregister
from onnxprune.criteria.slot import Slot

BUILT_IN = (norms,)

__all__ = ["BUILT_IN", "Criterion", "Slot", "get", "names", "register", "unregister"]
