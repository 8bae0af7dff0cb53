"""Choice of the layers to factorize and of their ranks, with least loss within a common budget."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from onnxprune.errors import UsageError
from onnxprune.factorization.decompositions import METHODS, Fit, Method, Metric, Ranks, Real, elements
from onnxprune.factorization.layers import Layer
from onnxprune.factorization.ranks import Choice, by_energy, by_vbmf, within
from onnxprune.factorization.settings import Request

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
        stages = [self.layer.shape.whole()]
        return self.layer.macs(stages) if self.cost == "macs" else elements(stages)

    def fit(self, name: str) -> Fit:
        """Fit one method to the kernel."""
        if name not in self._fits:
            self._fits[name] = METHODS[name].fit(self.kernel, self.metric, self.seed)
        return self._fits[name]

    def refusal(self, name: str) -> str:
        """Return why a method cannot factorize the layer; empty where it can."""
        return METHODS[name].refusal(self.layer.shape)

    def candidate_at(self, name: str, ranks: Ranks) -> Candidate:
        """Return a candidate at given ranks; its loss is not known."""
        return Candidate(name, ranks, self._cost(METHODS[name], ranks), 1.0)

    def within(self, name: str, limit: float, step: int) -> Candidate | None:
        """Return the candidate of least loss that costs at most ``limit``; None where there is none."""
        found = within(METHODS[name], self._cost, self.fit(name), limit, step)
        return None if found is None else _candidate(name, found)

    def choices(self, names: Sequence[str], step: int) -> Iterator[Candidate]:
        """Yield candidates of several methods over the whole range of cost."""
        for name in names:
            if self.refusal(name):
                continue
            seen: set[Ranks] = set()
            for share in SHARES:
                found = self.within(name, share * self.full_cost, step)
                if found is not None and found.ranks not in seen:
                    seen.add(found.ranks)
                    yield found

    def share(self, candidate: Candidate, cost: str) -> float:
        """Return the share of the layer's ``macs`` or ``params`` that a candidate has."""
        stages, whole = METHODS[candidate.method].stages(self.layer.shape, candidate.ranks), [self.layer.shape.whole()]
        if cost == "macs":
            return self.layer.macs(stages) / max(self.layer.macs(whole), 1)
        return elements(stages) / elements(whole)

    def _cost(self, method: Method, ranks: Ranks) -> int:
        stages = method.stages(self.layer.shape, ranks)
        return self.layer.macs(stages) if self.cost == "macs" else elements(stages)


def _candidate(name: str, choice: Choice) -> Candidate:
    return Candidate(name, choice.ranks, choice.cost, choice.loss)


# Steps of the budget that costs are rounded up to.
_STEPS = 10_000


def allocate(
    wholes: Sequence[int], options: Sequence[Sequence[Candidate]], gains: Sequence[float], budget: float
) -> list[Candidate | None] | None:
    """Return one candidate per layer (None: unchanged), or None where even the cheapest exceed the budget.

    The multiple-choice knapsack by dynamic programming over the budget in 10,000 steps (Dudzinski and Walukiewicz,
    European Journal of Operational Research 28, 1987), then the room that rounding leaves is spent where it gains most.

    Args:
        wholes: cost of every unchanged layer.
        options: candidates of every layer.
        gains: weight of each layer's loss.
        budget: largest cost of all layers together.
    """
    if min_total_cost(wholes, options) > budget:
        return None
    if sum(wholes) <= budget:
        return [None] * len(wholes)
    chosen = _knapsack(wholes, options, gains, budget)
    if chosen is None:  # only rounding prevents a solution
        chosen = [min((None, *own), key=lambda c: _cost(c, w)) for w, own in zip(wholes, options, strict=True)]
    spent = sum(_cost(c, w) for c, w in zip(chosen, wholes, strict=True))
    return _spent(chosen, wholes, options, gains, budget - spent)


def _cost(candidate: Candidate | None, whole: int) -> int:
    return whole if candidate is None else candidate.cost


def _knapsack(
    wholes: Sequence[int], options: Sequence[Sequence[Candidate]], gains: Sequence[float], budget: float
) -> list[Candidate | None] | None:
    """Compute the least loss for every number of steps spent, layer by layer; then trace back from the whole budget."""
    loss = np.zeros(_STEPS + 1)
    picked = []
    ways: list[list[Candidate | None]] = [[None, *own] for own in options]
    costs = [[int(np.ceil(_cost(c, w) * _STEPS / budget)) for c in own] for w, own in zip(wholes, ways, strict=True)]
    for own, steps, gain in zip(ways, costs, gains, strict=True):
        best, pick = np.full(_STEPS + 1, np.inf), np.zeros(_STEPS + 1, np.int32)
        for k, (candidate, step) in enumerate(zip(own, steps, strict=True)):
            if step > _STEPS:
                continue
            lost = loss[: _STEPS + 1 - step] + (0.0 if candidate is None else gain * candidate.loss)
            better = lost < best[step:]
            best[step:][better], pick[step:][better] = lost[better], k
        loss = best
        picked.append(pick)
    if not np.isfinite(loss[-1]):
        return None
    left, chosen = _STEPS, list[Candidate | None]()
    for own, steps, pick in zip(reversed(ways), reversed(costs), reversed(picked), strict=True):
        k = int(pick[left])
        chosen.append(own[k])
        left -= steps[k]
    return chosen[::-1]


def _spent(
    chosen: list[Candidate | None],
    wholes: Sequence[int],
    options: Sequence[Sequence[Candidate]],
    gains: Sequence[float],
    room: float,
) -> list[Candidate | None]:
    """Spend the rest of the budget where it gains most, one layer after the other."""
    while room > 0:
        best: tuple[float, int, Candidate | None] = (0.0, -1, None)
        for k, now in enumerate(chosen):
            if now is None:
                continue
            for other in (None, *options[k]):
                more = _cost(other, wholes[k]) - now.cost
                brings = gains[k] * (now.loss - (0.0 if other is None else other.loss))
                if 0 < more <= room and brings > best[0]:
                    best = (brings, k, other)
        if best[1] < 0:
            break
        _, k, other = best
        room -= _cost(other, wholes[k]) - _cost(chosen[k], wholes[k])
        chosen[k] = other
    return chosen


def min_total_cost(wholes: Sequence[int], options: Sequence[Sequence[Candidate]]) -> int:
    """Return the least cost of all layers together."""
    return sum(min([w, *(c.cost for c in own)]) for w, own in zip(wholes, options, strict=True))


def fill_gains(gains: Sequence[float]) -> list[float]:
    """Replace gains that could not be measured by the median of the others."""
    known = [g for g in gains if np.isfinite(g)]
    middle = float(np.median(known)) if known else 1.0
    return [g if np.isfinite(g) else middle for g in gains]


@dataclass(slots=True)
class LayerChoices:
    """Choices by the layer's name, and why other layers are unchanged."""

    candidates: dict[str, Candidate] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


def choose_local(opened: LayerFits, request: Request, chosen: LayerChoices) -> None:
    """Choose the ranks of one layer on its own.

    Raises:
        UsageError: a rank that a pattern names is out of range.
    """
    layer, name = opened.layer, request.method
    why = opened.refusal(name)
    if why:
        chosen.reasons[layer.name] = why
        return
    names = list(layer.names)
    if request.ranks:
        found = _given_ranks(opened, request, names)
        must = True
    elif request.energy is not None:
        found, must = opened.candidate_at(name, by_energy(opened.fit(name), request.energy, request.round_to)), False
    elif request.vbmf is not None:
        found, must = opened.candidate_at(name, _by_vbmf(opened, request)), False
    else:
        limit = (1.0 - request.ratio_of(names)) * opened.full_cost
        best, must = opened.within(name, limit, request.round_to), False
        found = best if best is not None else f"no rank would save {request.ratio_of(names):.0%} of its {request.cost}"
    if isinstance(found, str):
        chosen.reasons[layer.name] = found
    elif not must and found.cost >= opened.full_cost:
        ranks = ",".join(map(str, found.ranks))
        chosen.reasons[layer.name] = f"the given ranks ({ranks}) would not save {request.cost}"
    else:
        chosen.candidates[layer.name] = found


def choose_by_share(
    opened: Mapping[str, LayerFits], wanted: Mapping[str, tuple[str, float]], step: int, chosen: LayerChoices
) -> None:
    """Choose ranks for layers of known method and share of the cost, {name: (method, share)}; multiples of ``step``."""
    for name, one in opened.items():
        method, share = wanted.get(name, ("", 0.0))
        found = one.within(method, share * one.full_cost, step) if method and not one.refusal(method) else None
        if found is None:
            chosen.reasons[name] = "other layers lose less per saving"
        else:
            chosen.candidates[name] = found


def _by_vbmf(opened: LayerFits, request: Request) -> Ranks:
    """Return ranks above noise; CP uses the larger of the channel modes, as its terms have to span both."""
    assert request.vbmf is not None
    if request.method != "cp":
        return by_vbmf(opened.fit(request.method), request.vbmf, request.round_to)
    return (max(by_vbmf(opened.fit("tucker"), request.vbmf, request.round_to)),)


def _given_ranks(opened: LayerFits, request: Request, names: Sequence[str]) -> Candidate | str:
    """Return the candidate with the ranks that were given for this layer, or an error text."""
    asked = request.ranks_of(names)
    if asked is None:
        return "no rank was given for this layer"
    pattern, ranks = asked
    method = METHODS[request.method]
    limits = method.limits(opened.layer.shape)
    if len(ranks) == 1:
        ranks = ranks * len(limits)
    sizes = (*limits, *opened.layer.shape.kernel)[: max(len(limits), len(ranks))]
    over = [(r, most) for r, most in zip(ranks, sizes, strict=False) if r > most]
    if over or len(ranks) > len(sizes):
        rank, most = over[0] if over else (ranks[-1], 0)
        allowed = ",".join(f"1..{n}" for n in sizes)
        if pattern == "*":
            return f"rank {rank} is larger than the largest rank, {most}"
        raise UsageError(f"rank {rank} of {opened.layer.name!r} is out of range.", hint=f"Allowed: {allowed}.")
    return opened.candidate_at(request.method, ranks)


def read_choices(opened: Mapping[str, LayerFits], entries: Sequence[tuple[str, str, Ranks]]) -> dict[str, Candidate]:
    """Return the choices of a plan, [(name of the layer, method, ranks)].

    Raises:
        UsageError: no such layer or method, or ranks that do not fit.
    """
    result = {}
    for name, method, ranks in entries:
        layer = opened.get(name)
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
