"""What losses count beside each other, learnt from answers that were carried out."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from onnxprune.budget.allocate import Choices
from onnxprune.budget.sizes import Counts

Array = NDArray[np.float64]

# How much an answer tells beside the belief that all losses count alike, and how far they may differ.
_BELIEF, _WIDEST = 0.05, 30.0
# The least that an answer can have lost, as a share of what the worst one did: no answer tells more than others.
_LEAST = 0.01


class Learned:
    """Losses of columns with weights, so that their weighted sum is what answers lost when they were carried out.

    A knapsack adds up what every column loses alone. What is lost together is modelled by the same sum with weights
    m >= 0, from all answers i with losses L_ic that lost n_i:
    min sum_i ((sum_c m_c L_ic - n_i) / n_i)^2 + 0.05 sum_c (m_c / s - 1)^2, s the weight that all would have alike.

    Args:
        choices: what every column may do. whole: how good the original is; 0 where noise counts, below 0.
    """

    def __init__(self, choices: Choices, whole: float = 0.0) -> None:
        self._choices, self._whole = choices, whole
        self._losses: list[Array] = []
        self._fine: list[float] = []

    def add(self, kept: Counts, fine: float) -> None:
        """An answer: counts [columns], and how good it was; higher is better."""
        self._losses.append(self._of(kept))
        self._fine.append(fine)

    def weights(self) -> Array:
        """What the losses of every column count [columns], as multiples of what they count on the whole."""
        losses, lost = np.array(self._losses), self._lost()
        told = losses.sum(axis=1) > 0
        if not told.any():
            return np.ones(losses.shape[1])
        losses, lost = losses[told], lost[told]
        alike = float(np.median(lost / losses.sum(axis=1)))
        columns = losses.shape[1]
        belief = np.sqrt(_BELIEF)
        rows = np.vstack([alike * losses / lost[:, None], belief * np.eye(columns)])
        wanted = np.concatenate([np.ones(len(lost)), np.full(columns, belief)])
        return np.asarray(np.clip(nnls(rows, wanted)[0], 1 / _WIDEST, _WIDEST))

    def gain(self, kept: Counts, weights: Array) -> float:
        """How much less than the best answer so far another would lose, as a share of it."""
        best = float(self._losses[int(np.argmax(self._fine))] @ weights)
        return 1.0 - float(self._of(kept) @ weights) / best if best > 0 else 0.0

    def _of(self, kept: Counts) -> Array:
        """Losses [columns] at counts; between levels as if they fell evenly."""
        pairs = zip(kept, self._choices.kept, self._choices.losses, strict=True)
        return np.array([np.interp(n, levels, losses) for n, levels, losses in pairs], dtype=np.float64)

    def _lost(self) -> Array:
        """What every answer lost, above 0 even where one does as well as the original."""
        lost = self._whole - np.array(self._fine)
        return np.asarray(np.maximum(lost, max(_LEAST * lost.max(), 1e-12)))
