"""How much work a model is worth where nobody says: counted and not on a clock, so that a run can be repeated."""

from __future__ import annotations

from collections.abc import Sequence

from onnxprune.analysis import Analysis
from onnxprune.passes.measured import MOST
from onnxprune.selection.drift import SHARES, counts

# What all trials together may take, in seconds on the machine that the figures below are from.
_SECONDS = 30.0
# An answer cut, repaired and judged: at least, and for a billion multiply-accumulates.
_EACH, _PER_BILLION = 1.0, 80.0
# A group cut alone: opened, and run on a sample for a billion multiply-accumulates.
_OPENED, _RUN = 0.05, 0.03
# The sizes to cut groups to, best first; fewer samples than that say too little.
_SHARES, _FEWEST = (SHARES, (0.25, 0.5), (0.5,)), 16


def sample_macs(analysis: Analysis) -> float:
    """Multiply-accumulates of the model for one sample."""
    batch = max(min((shape[0] for shape in analysis.facts.probes[0].inputs.values() if shape), default=1), 1)
    return sum(layer.macs_before for layer in analysis.layers) / batch


def trials_of(macs: float) -> int:
    """How many answers around the best one to try. ``macs``: multiply-accumulates of a sample."""
    return int(_SECONDS / (_EACH + _PER_BILLION * macs * 1e-9))


def measuring(macs: float, steps: Sequence[int]) -> tuple[Sequence[float], int] | None:
    """Shares of every group to cut alone, and samples to run each cut on; None where that takes too long.

    It may take as long as all trials, or as one where that is longer.

    Args:
        macs: multiply-accumulates of a sample. steps: in how many steps every group can be cut.
    """
    allowed = max(_SECONDS, _EACH + _PER_BILLION * macs * 1e-9)
    for shares in _SHARES:
        cuts = max(1, sum(len(counts(n, shares)) for n in steps))
        samples = int((allowed / cuts - _OPENED) / (_RUN * max(macs, 1.0) * 1e-9))
        if samples >= _FEWEST:
            return shares, min(samples, MOST)
    return None
