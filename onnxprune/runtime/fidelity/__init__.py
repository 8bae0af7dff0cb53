"""Fidelity of a model to its original: figures of single outputs, and points by the meaning of the outputs."""

from onnxprune.runtime.fidelity.figures import are_probabilities, roots
from onnxprune.runtime.fidelity.hints import hints_of
from onnxprune.runtime.fidelity.kinds import KINDS, Hint
from onnxprune.runtime.fidelity.points import KnownOutputs, Outputs, fidelity

__all__ = ["KINDS", "Hint", "KnownOutputs", "Outputs", "are_probabilities", "fidelity", "hints_of", "roots"]
