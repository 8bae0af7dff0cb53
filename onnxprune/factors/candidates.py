"""What could be put in the place of a layer, and what every choice costs and loses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from onnxprune.decompose import METHODS, Fit, Method, Metric, Ranks
from onnxprune.decompose.cost import elements
from onnxprune.decompose.factor import Real
from onnxprune.decompose.ranks import Choice, within
from onnxprune.factors.layer import Layer

AUTO = ("svd", "tucker", "spatial-svd")
"""What ``auto`` tries. Not CP: its rank has to be known before anything is, and its filters are slow for their work."""
# Shares of a layer's cost at which ``auto`` looks for ranks.
SHARES = tuple(np.round(np.arange(0.05, 1.0, 0.05), 2))


@dataclass(frozen=True, slots=True)
class Candidate:
    """One method at some ranks: ``cost`` in what the budget counts, ``loss`` as a share of the output's energy."""

    method: str
    ranks: Ranks
    cost: int
    loss: float


@dataclass(slots=True)
class Opened:
    """A layer with its weight read, and the fits of methods made when first asked for."""

    layer: Layer
    kernel: Real
    metric: Metric
    seed: int
    cost: str = "macs"
    _fits: dict[str, Fit] = field(default_factory=dict)

    @property
    def whole(self) -> int:
        """Cost of the layer as it is."""
        stages = [self.layer.shape.whole()]
        return self.layer.macs(stages) if self.cost == "macs" else elements(stages)

    def fit(self, name: str) -> Fit:
        """The kernel laid open for one method."""
        if name not in self._fits:
            self._fits[name] = METHODS[name].fit(self.kernel, self.metric, self.seed)
        return self._fits[name]

    def refusal(self, name: str) -> str:
        """Why a method cannot take the layer apart; empty where it can."""
        return METHODS[name].refusal(self.layer.shape)

    def priced(self, name: str, ranks: Ranks) -> Candidate:
        """A candidate at given ranks; its loss is not known."""
        return Candidate(name, ranks, self._cost(METHODS[name], ranks), 1.0)

    def within(self, name: str, limit: float, step: int) -> Candidate | None:
        """The candidate that loses least and costs at most ``limit``; None where there is none."""
        found = within(METHODS[name], self._cost, self.fit(name), limit, step)
        return None if found is None else _candidate(name, found)

    def choices(self, names: Sequence[str], step: int) -> Iterator[Candidate]:
        """Candidates of several methods over the whole range of cost."""
        for name in names:
            if self.refusal(name):
                continue
            seen: set[Ranks] = set()
            for share in SHARES:
                found = self.within(name, share * self.whole, step)
                if found is not None and found.ranks not in seen:
                    seen.add(found.ranks)
                    yield found

    def share(self, candidate: Candidate, cost: str) -> float:
        """What of the layer's ``macs`` or ``params`` a candidate has."""
        stages, whole = METHODS[candidate.method].stages(self.layer.shape, candidate.ranks), [self.layer.shape.whole()]
        if cost == "macs":
            return self.layer.macs(stages) / max(self.layer.macs(whole), 1)
        return elements(stages) / elements(whole)

    def _cost(self, method: Method, ranks: Ranks) -> int:
        stages = method.stages(self.layer.shape, ranks)
        return self.layer.macs(stages) if self.cost == "macs" else elements(stages)


def _candidate(name: str, choice: Choice) -> Candidate:
    return Candidate(name, choice.ranks, choice.cost, choice.loss)
