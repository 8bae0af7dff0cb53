"""Factorization by default: layers are factorized as well where pruning alone damages a model, and that is better."""

from __future__ import annotations

import math
from collections.abc import Sequence

from onnxprune.errors import Note, argument
from onnxprune.report.facts import FAITHFUL
from onnxprune.search.problem import Evaluated, best_of

# Share of the distance of pruning alone that a factorized candidate may have left: a smaller gain is within chance.
_CLEARLY = 0.95
# Without points: distance of outputs from which on a model is not faithful.
_DISTANT = (100.0 - FAITHFUL) / 100.0


def is_damaged(pruned: Evaluated, original_points: float | None) -> bool:
    """Return whether a pruned candidate has lost so much that factorization may be worth its work.

    Args:
        pruned: the best candidate of pruning alone, recovered from the samples of a trial.
        original_points: metric of the original where the user gave a metric, which any loss of counts; else None.
    """
    quality = pruned[1].quality
    if original_points is not None:
        return quality.points < original_points
    return -quality.fine > _DISTANT if math.isnan(quality.points) else quality.points < FAITHFUL


def better_factorized(
    pruned: Evaluated, factorized: Sequence[Evaluated], original_points: float | None
) -> tuple[list[Evaluated], str]:
    """Return the factorized candidates that are clearly better than pruning alone, and a remark on the choice.

    Args:
        pruned: the best candidate of pruning alone.
        factorized: candidates with factorized layers, at the same targets.
        original_points: metric of the original where the user gave a metric, else None.

    Returns:
        the candidates, none where pruning alone is about as good; the remark is empty then.
    """
    best_possible = 0.0 if original_points is None else original_points
    limit = best_possible - _CLEARLY * (best_possible - pruned[1].quality.fine)
    better = [pair for pair in factorized if pair[1].quality.fine > limit]
    if not better:
        return [], ""
    best = best_of(better)[1].quality
    unit = "points of fidelity" if original_points is None else "of the metric"
    remark = Note(
        f"layers are factorized: in a trial this keeps {best.points:.4g} {unit}, pruning alone "
        f"{pruned[1].quality.points:.4g}; to prune alone: {argument('factorize', False)}"
    )
    return better, remark
