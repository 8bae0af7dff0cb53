"""Recover accuracy in closed form: fit the weights of a pruned model to the layer outputs of the original."""

from __future__ import annotations

MODES = ("none", "bias", "bn", "lstsq", "full", "datafree")
"""Modes of recovery, from none to all, see :class:`onnxprune.passes.Recover`."""
