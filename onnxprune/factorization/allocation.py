"""Choice of the layers to factorize and of their ranks, with least loss within a common budget."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from onnxprune.errors import UsageError
from onnxprune.factorization.decompositions import METHODS, Fit, Method, Metric, Ranks
from onnxprune.factorization.layers import Layer
from onnxprune.factorization.ranks import Choice, by_energy, by_vbmf, within
from onnxprune.factorization.settings import Request
from onnxprune.operators.kernels import Real, Stage, elements

AUTO = ("svd", "tucker", "spatial-svd")
"""Methods that ``auto`` tries. CP is excluded: its rank must be known before the fit, and its filters are slow."""
# Shares of a layer's cost at which ``auto`` looks for ranks.
SHARES = tuple(np.round(np.arange(0.05, 1.0, 0.05), 2))


@dataclass(frozen=True, slots=True)
class Candidate:
    """One method at some ranks: ``cost`` in units of the budget, ``loss`` as a share of the output's energy."""

    method: str
    ranks: Ranks
    cost: int
    loss: float


@dataclass(slots=True)
class LayerFits:
    """A layer with its weight loaded, and the fits of methods, computed on first use."""

    layer: Layer
    kernel: Real
    metric: Metric
    seed: int
    cost: str = "macs"
    _fits: dict[str, Fit] = field(default_factory=dict)

    @property
    def full_cost(self) -> int:
        """Return the cost of the unchanged layer."""
        return _cost_of(self.layer, [self.layer.shape.as_stage()], self.cost)

    def fit(self, name: str) -> Fit:
        """Fit one method to the kernel."""
        if name not in self._fits:
            self._fits[name] = METHODS[name].fit(self.kernel, self.metric, self.seed)
        return self._fits[name]

    def refusal(self, name: str) -> str:
        """Return the reason why a method cannot factorize the layer; empty where it can."""
        return METHODS[name].refusal(self.layer.shape)

    def candidate_at(self, name: str, ranks: Ranks) -> Candidate:
        """Return a candidate at given ranks; its loss is not known."""
        return Candidate(name, ranks, self._cost(METHODS[name], ranks), 1.0)

    def within(self, name: str, limit: float, step: int) -> Candidate | None:
        """Return the candidate of least loss that costs at most ``limit``; None where there is none."""
        choice = within(METHODS[name], self._cost, self.fit(name), limit, step)
        return None if choice is None else _candidate(name, choice)

    def choices(self, names: Sequence[str], step: int) -> Iterator[Candidate]:
        """Yield candidates of several methods over the whole range of cost."""
        for name in names:
            if self.refusal(name):
                continue
            yielded: set[Ranks] = set()
            for share in SHARES:
                candidate = self.within(name, share * self.full_cost, step)
                if candidate is not None and candidate.ranks not in yielded:
                    yielded.add(candidate.ranks)
                    yield candidate

    def is_lighter(self, candidate: Candidate) -> bool:
        """Return whether a candidate has less work than the layer, counting the activations between its factors."""
        layer = self.layer
        stages = METHODS[candidate.method].stages(layer.shape, candidate.ranks)
        return layer.work(stages) < layer.work([layer.shape.as_stage()])

    def _cost(self, method: Method, ranks: Ranks) -> int:
        return _cost_of(self.layer, method.stages(self.layer.shape, ranks), self.cost)


def cost_share(layer: Layer, candidate: Candidate, cost: str) -> float:
    """Return the share of a layer's ``macs`` or ``params`` that a candidate has."""
    stages = METHODS[candidate.method].stages(layer.shape, candidate.ranks)
    return _cost_of(layer, stages, cost) / max(_cost_of(layer, [layer.shape.as_stage()], cost), 1)


def _cost_of(layer: Layer, stages: Sequence[Stage], cost: str) -> int:
    """Return the ``macs`` or ``params`` of a layer in stages."""
    return layer.macs(stages) if cost == "macs" else elements(stages)


def _candidate(name: str, choice: Choice) -> Candidate:
    return Candidate(name, choice.ranks, choice.cost, choice.loss)


# Steps of the budget that costs are rounded up to.
_STEPS = 10_000


def allocate(
    full_costs: Sequence[int], options: Sequence[Sequence[Candidate]], gains: Sequence[float], budget: float
) -> list[Candidate | None] | None:
    """Return one candidate per layer (None: unchanged), or None where even the cheapest exceed the budget.

    The multiple-choice knapsack by dynamic programming over the budget in 10,000 steps (Dudzinski and Walukiewicz,
    European Journal of Operational Research 28, 1987), then the room that rounding leaves is spent where it gains most.

    Args:
        full_costs: cost of every unchanged layer.
        options: candidates of every layer.
        gains: weight of each layer's loss.
        budget: largest cost of all layers together.
    """
    if min_total_cost(full_costs, options) > budget:
        return None
    if sum(full_costs) <= budget:
        return [None] * len(full_costs)
    candidates = _knapsack(full_costs, options, gains, budget)
    if candidates is None:  # only rounding prevents a solution
        candidates = [
            min((None, *layer_options), key=lambda c: _cost(c, w))
            for w, layer_options in zip(full_costs, options, strict=True)
        ]
    spent = sum(_cost(c, w) for c, w in zip(candidates, full_costs, strict=True))
    return _spent(candidates, full_costs, options, gains, budget - spent)


def _cost(candidate: Candidate | None, full_cost: int) -> int:
    return full_cost if candidate is None else candidate.cost


def _knapsack(
    full_costs: Sequence[int], options: Sequence[Sequence[Candidate]], gains: Sequence[float], budget: float
) -> list[Candidate | None] | None:
    """Compute the least loss for every number of steps spent, layer by layer; then trace back from the whole budget."""
    loss = np.zeros(_STEPS + 1)
    picked = []
    ways: list[list[Candidate | None]] = [[None, *layer_options] for layer_options in options]
    costs = [
        [int(np.ceil(_cost(c, w) * _STEPS / budget)) for c in layer_options]
        for w, layer_options in zip(full_costs, ways, strict=True)
    ]
    for layer_options, steps, gain in zip(ways, costs, gains, strict=True):
        best, pick = np.full(_STEPS + 1, np.inf), np.zeros(_STEPS + 1, np.int32)
        for k, (candidate, step) in enumerate(zip(layer_options, steps, strict=True)):
            if step > _STEPS:
                continue
            losses = loss[: _STEPS + 1 - step] + (0.0 if candidate is None else gain * candidate.loss)
            better = losses < best[step:]
            best[step:][better], pick[step:][better] = losses[better], k
        loss = best
        picked.append(pick)
    if not np.isfinite(loss[-1]):
        return None
    remaining, candidates = _STEPS, list[Candidate | None]()
    for layer_options, steps, pick in zip(reversed(ways), reversed(costs), reversed(picked), strict=True):
        k = int(pick[remaining])
        candidates.append(layer_options[k])
        remaining -= steps[k]
    return candidates[::-1]


def _spent(
    candidates: list[Candidate | None],
    full_costs: Sequence[int],
    options: Sequence[Sequence[Candidate]],
    gains: Sequence[float],
    room: float,
) -> list[Candidate | None]:
    """Spend the rest of the budget where it gains most, one layer after the other."""
    while room > 0:
        best: tuple[float, int, Candidate | None] = (0.0, -1, None)
        for k, now in enumerate(candidates):
            if now is None:
                continue
            for other in (None, *options[k]):
                more = _cost(other, full_costs[k]) - now.cost
                brings = gains[k] * (now.loss - (0.0 if other is None else other.loss))
                if 0 < more <= room and brings > best[0]:
                    best = (brings, k, other)
        if best[1] < 0:
            break
        _, k, other = best
        room -= _cost(other, full_costs[k]) - _cost(candidates[k], full_costs[k])
        candidates[k] = other
    return candidates


def min_total_cost(full_costs: Sequence[int], options: Sequence[Sequence[Candidate]]) -> int:
    """Return the least cost of all layers together."""
    return sum(min([w, *(c.cost for c in layer_options)]) for w, layer_options in zip(full_costs, options, strict=True))


def fill_gains(gains: Sequence[float]) -> list[float]:
    """Replace gains that could not be measured by the median of the others."""
    finite = [g for g in gains if np.isfinite(g)]
    middle = float(np.median(finite)) if finite else 1.0
    return [g if np.isfinite(g) else middle for g in gains]


@dataclass(slots=True)
class LayerChoices:
    """Choices by the layer's name, and why other layers are unchanged."""

    candidates: dict[str, Candidate] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


def choose_local(fits: LayerFits, request: Request, choices: LayerChoices) -> None:
    """Choose the ranks of one layer on its own.

    Raises:
        UsageError: a rank that a pattern names is out of range.
    """
    layer, name = fits.layer, request.method
    why = fits.refusal(name)
    if why:
        choices.reasons[layer.name] = why
        return
    names = list(layer.names)
    if request.ranks:
        candidate = _given_ranks(fits, request, names)
        must = True
    elif request.energy is not None:
        candidate, must = fits.candidate_at(name, by_energy(fits.fit(name), request.energy, request.round_to)), False
    elif request.vbmf is not None:
        candidate, must = fits.candidate_at(name, _by_vbmf(fits, request)), False
    else:
        limit = (1.0 - request.ratio_of(names)) * fits.full_cost
        best, must = fits.within(name, limit, request.round_to), False
        candidate = (
            best if best is not None else f"no rank would save {request.ratio_of(names):.0%} of its {request.cost}"
        )
    if isinstance(candidate, str):
        choices.reasons[layer.name] = candidate
    elif not must and candidate.cost >= fits.full_cost:
        ranks = ",".join(map(str, candidate.ranks))
        choices.reasons[layer.name] = f"the given ranks ({ranks}) would not save {request.cost}"
    else:
        choices.candidates[layer.name] = candidate


def choose_by_share(
    fits: Mapping[str, LayerFits], shares: Mapping[str, tuple[str, float]], step: int, choices: LayerChoices
) -> None:
    """Choose ranks for layers of known method and share of the cost, {name: (method, share)}; multiples of ``step``."""
    for name, layer_fits in fits.items():
        method, share = shares.get(name, ("", 0.0))
        candidate = (
            layer_fits.within(method, share * layer_fits.full_cost, step)
            if method and not layer_fits.refusal(method)
            else None
        )
        if candidate is None:
            choices.reasons[name] = "other layers lose less per saving"
        else:
            choices.candidates[name] = candidate


def _by_vbmf(fits: LayerFits, request: Request) -> Ranks:
    """Return ranks above noise; CP uses the larger of the channel modes, as its terms have to span both."""
    assert request.vbmf is not None
    if request.method != "cp":
        return by_vbmf(fits.fit(request.method), request.vbmf, request.round_to)
    return (max(by_vbmf(fits.fit("tucker"), request.vbmf, request.round_to)),)


def _given_ranks(fits: LayerFits, request: Request, names: Sequence[str]) -> Candidate | str:
    """Return the candidate with the ranks that were given for this layer, or an error text."""
    entry = request.ranks_of(names)
    if entry is None:
        return "no rank was given for this layer"
    pattern, ranks = entry
    method = METHODS[request.method]
    limits = method.limits(fits.layer.shape)
    if len(ranks) == 1:
        ranks = ranks * len(limits)
    sizes = (*limits, *fits.layer.shape.kernel)[: max(len(limits), len(ranks))]
    over = [(r, max_rank) for r, max_rank in zip(ranks, sizes, strict=False) if r > max_rank]
    if over or len(ranks) > len(sizes):
        rank, max_rank = over[0] if over else (ranks[-1], 0)
        allowed = ",".join(f"1..{n}" for n in sizes)
        if pattern == "*":
            return f"rank {rank} is larger than the largest rank, {max_rank}"
        raise UsageError(f"rank {rank} of {fits.layer.name!r} is out of range.", hint=f"Allowed: {allowed}.")
    return fits.candidate_at(request.method, ranks)


def read_choices(fits: Mapping[str, LayerFits], entries: Sequence[tuple[str, str, Ranks]]) -> dict[str, Candidate]:
    """Return the choices of a plan, [(name of the layer, method, ranks)].

    Raises:
        UsageError: no such layer or method, or ranks that do not fit.
    """
    result = {}
    for name, method, ranks in entries:
        layer = fits.get(name)
        if layer is None:
            raise UsageError(
                f"The plan factorizes layer {name!r}, which this model does not have or which cannot be factorized.",
                hint="Give the plan that was written for this model.",
            )
        if method not in METHODS or layer.refusal(method):
            why = layer.refusal(method) if method in METHODS else f"there is no method {method!r}"
            raise UsageError(f"The plan factorizes layer {name!r} by {method}: {why}.")
        limits = METHODS[method].limits(layer.layer.shape)
        sizes = (*limits, *layer.layer.shape.kernel)[: max(len(limits), len(ranks))]
        if (
            len(ranks) < len(limits)
            or not any(ranks)
            or any(not 0 <= r <= n for r, n in zip(ranks, sizes, strict=False))
        ):
            allowed = ",".join(f"1..{n}" for n in sizes)
            raise UsageError(f"The plan gives layer {name!r} the ranks {list(ranks)}.", hint=f"Allowed: {allowed}.")
        result[name] = layer.candidate_at(method, ranks)
    return result
