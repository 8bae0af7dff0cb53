"""Recover accuracy in closed form: weights that make the cut model's layers say what the original's said."""

from __future__ import annotations

MODES = ("none", "bias", "bn", "lstsq", "full", "datafree")
"""What may be asked for, from nothing to all; :class:`onnxprune.passes.Recover` says what each does."""
