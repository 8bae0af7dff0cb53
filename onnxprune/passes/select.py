"""Score and choose: which units go, in one step or several, without cutting anything yet."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxprune.allocation.ranked import RankedGroup
from onnxprune.allocation.rounding import AUTO, Rounding
from onnxprune.allocation.selection import (
    Array,
    batches,
    candidates,
    choose,
    rank_groups,
    savings,
    split_rows,
    spread,
)
from onnxprune.allocation.settings import Request
from onnxprune.channels.analysis import Analysis
from onnxprune.channels.groups import QUERIES, Group
from onnxprune.channels.selection import removed_atoms
from onnxprune.devices import kernels_of
from onnxprune.errors import Note, UsageError, argument
from onnxprune.graph.facts import integer_bounds
from onnxprune.graph.probes import input_specs
from onnxprune.importance.criteria import Criterion, Slot, needs_of
from onnxprune.importance.criteria import get as get_criterion
from onnxprune.importance.scores import (
    ScoredSlot,
    all_constant,
    by_maps,
    by_squares,
    needs_data,
    scored,
    uninformative,
    unit_scores,
    without,
)
from onnxprune.importance.slots import (
    PlacedSlot,
    Squares,
    claims,
    gradient_slots,
    map_slots,
    weight_slots,
    weight_squares,
)
from onnxprune.importance.statistics import GRADIENTS
from onnxprune.labels.atoms import Reason
from onnxprune.passes.calibrate import captured_maps
from onnxprune.passes.calibration import CalibrationBatches
from onnxprune.passes.gradients import score_gradients
from onnxprune.passes.output_sensitivity import output_sensitivity
from onnxprune.passes.workspace import Workspace
from onnxprune.pipeline import Context
from onnxprune.runtime.inputs import synthetic
from onnxprune.runtime.latency import profile
from onnxprune.runtime.sessions import Feed

Mask = NDArray[np.bool_]


class Selector:
    """Chooses units of one analysed model.

    Args:
        context: the run.
        analysis: of the model; its grids are resolved as ``request`` wants them.
        request: settings of the allocation.
        criterion, name: the criterion and its name.
        seconds: kept from one choice to the next: time of every node, filled where ``cost`` asks for it.
        retrain: called between steps with the analysis and the mask over removed atoms; returns the analysis of the
            same graph with other weights, which later steps score. None: the weights stay.

    Attributes:
        ratios: the ratio asked for each group, None where it is excluded.
        excluded: groups that were left whole although they may be cut, with the reason.
        warnings: warnings about the choice, for the report.
        pool_of: the groups once ``pool`` was called.
        rounding: the multiples that the device likes; None where a multiple was asked for.
    """

    def __init__(
        self,
        context: Context,
        analysis: Analysis,
        request: Request,
        criterion: Criterion,
        name: str,
        seconds: dict[str, float] | None = None,
        retrain: Callable[[Analysis, Mask], Analysis] | None = None,
    ) -> None:
        self.context, self.request, self._retrain = context, request, retrain
        is_small = request.reshape_axis == "head_dim" and request.ratio < 1 / 3
        self.analysis = analysis = analysis.with_reshape_axis(QUERIES if is_small else request.reshape_axis)
        self.criterion, self.name = criterion, name
        self.needs = needs_of(criterion)
        if self.needs and context.calibration is None:
            raise needs_data(name)
        if request.normalize == "measured":
            _check_measurable(context, request)
        self.candidates = candidates(analysis, request)
        split = split_rows(analysis, self.candidates)
        if split:
            raise UsageError(
                f"{argument('reshape_axis', 'both')} cannot prune group {split[0]}: its rows do not hold whole rows "
                "of every grid.",
                hint=f"Choose {argument('reshape_axis', 'heads')} or head_dim.",
            )
        self.ratios, self.excluded = self.candidates.ratios, dict(self.candidates.excluded)
        self.warnings: list[str] = []
        self.removed = np.zeros(analysis.units.component.size, dtype=bool)
        self._seconds = {} if seconds is None else seconds
        self._ranks_all = False
        self._last: dict[int, RankedGroup] = {}
        self.rounding: Rounding | None = None
        if request.round_to == AUTO:
            kernels = kernels_of(request.device, context.device.providers)
            self.rounding = Rounding(analysis, self.candidates.groups, kernels)
        self._reached: dict[int, bool] = {}
        self.pool_of: dict[int, RankedGroup] = {}

    def __call__(self) -> Mask:
        """Return a mask over the components to remove, after all steps."""
        steps, mask = self.request.steps, np.zeros(self.analysis.units.frozen.size, dtype=bool)
        weighed = self._savings()
        for i in range(1, steps + 1):
            if steps > 1:
                self.context.tell("score", (i - 1) / steps)
            removed = self.analysis.units.close(mask) if mask.any() else None
            if removed is not None:
                self.removed = np.asarray(removed[self.analysis.units.component])
                if self._retrain is not None:
                    new = self._retrain(self.analysis, self.removed)
                    self.analysis = new.with_reshape_axis(self.request.reshape_axis)
            self._last = self._rank(removed, i / steps, weighed)
            mask = choose(self.analysis, self.request, self._last, self.rounding)
        self._warn(mask)
        return mask

    @property
    def settings(self) -> dict[str, Any]:
        """Return the settings of the choice by name, for the report; the device where it decided the multiples."""
        where = {} if self.rounding is None else {"device": self.rounding.kernels.name}
        return {**self.request.settings, **where}

    @property
    def multiples(self) -> dict[int, int]:
        """Return the multiple of remaining units that was kept to where possible, by group id."""
        if self.rounding is None:
            return dict.fromkeys(self.ratios, self.request.least_multiple)
        groups = self.analysis.units.groups
        return {n: m * groups[n].size // groups[n].steps for n, m in self.rounding.multiples.items()}

    def pool(self) -> dict[int, RankedGroup]:
        """Score every group that may lose units, {group id: scored group}; the caller chooses how many to remove.

        Raises:
            UsageError: the criterion scores none of them.
        """
        if not self.pool_of:
            self._ranks_all = True
            self._last = self._rank(None, 1.0, self._savings())
            self.pool_of = self._last
        return self.pool_of

    def include_unreached(self) -> dict[int, Array]:
        """Add to the pool the groups in branches that no sample takes: without them a budget may be out of reach.

        Their units are ordered by their weights, and a group counts as much as the others do on average, because what
        no sample shows can neither be scored on data nor measured.

        Returns:
            Shares [units] of each unit in the score of its group, by group id; empty where there are no such groups.
        """
        pool = self.pool()
        numbers = {n for n, is_reached in self._reached.items() if not is_reached and n not in pool}
        groups = [g for g in self.candidates.groups if g.id in numbers]
        of_squares = by_squares(get_criterion("l2"))
        assert of_squares is not None
        items = scored(self._by_squares(groups, None), of_squares) if groups else []
        sizes = {g.id: g.size for g in groups}
        scores = unit_scores(items, sizes, "none", self.request.policy)
        shares = {n: values / max(float(values.sum()), 1e-30) for n, values in scores.items()}
        mean = float(np.mean([group.values.sum() for group in pool.values()]))
        multiples = None if self.rounding is None else self.rounding.multiples
        ranked = rank_groups(
            self.analysis,
            self.request,
            self.candidates,
            {n: share * mean for n, share in shares.items()},
            multiples=multiples,
        )
        self.pool_of = self._last = {**pool, **ranked}
        for number in ranked:
            del self.excluded[number]
        return {n: shares[n] for n in ranked}

    def at(self, ratio: float) -> Mask:
        """Return a mask over the atoms to remove at another ratio; with one step, scores are computed only once."""
        request = replace(self.request, ratio=ratio)
        if self.request.steps > 1:
            other = Selector(self.context, self.analysis, request, self.criterion, self.name, self._seconds)
            return removed_atoms(self.analysis.units, other())
        if not self._ranks_all:
            self._ranks_all = True
            self._last = self._rank(None, 1.0, self._savings())
        ratios = candidates(self.analysis, request).ratios
        again = {n: replace(c, ratio=self._share(ratios[n] or 0.0, n)) for n, c in self._last.items()}
        return removed_atoms(self.analysis.units, choose(self.analysis, request, again, self.rounding))

    def _share(self, ratio: float, number: int) -> float:
        return 1.0 - (1.0 - ratio) ** 0.5 if number in self.candidates.two_way else ratio

    def _rank(self, removed: Mask | None, share: float, weighed: dict[int, Array] | None) -> dict[int, RankedGroup]:
        """Score the remaining units, and rank the groups."""
        groups = [g for g in self.candidates.groups if self._takes_part(g)]
        if not groups:
            return {}
        items = self._scored(groups, removed)
        if not items and removed is None:
            raise uninformative(self.name)
        if self.needs and removed is None and all_constant(items):
            self.warnings.append(f"{self.name} gives all channels the same score: is the data constant?")
        sizes = {g.id: g.size for g in groups}
        scores = unit_scores(items, sizes, self._method(), self.request.policy)
        if self.request.normalize == "measured":
            scores = output_sensitivity(self.context, self.analysis, groups, scores)
        if removed is not None:  # what was chosen before stays chosen, whether or not there is something left to score
            scores = {n: scores.get(n, np.zeros(sizes[n])) for n in self._last}
        for group in groups:
            if group.id not in scores:
                self.excluded[group.id] = f"{Reason.NO_SCORE}: {self._unscored(group.id)}"
        multiples = None if self.rounding is None else self.rounding.multiples
        return rank_groups(
            self.analysis,
            self.request,
            self.candidates,
            scores,
            savings=weighed,
            removed=removed,
            progress=share,
            multiples=multiples,
        )

    def _unscored(self, group: int) -> str:
        if not self._reached.get(group, True):
            return "no sample of the data takes a branch that reads these channels"
        return f"criterion {self.name} has no score for these channels"

    def _method(self) -> str:
        """Return the method that normalizes scores of a weight; measured sensitivities use only their order."""
        if self.request.normalize != "measured":
            return self.request.normalize
        return "none" if getattr(self.criterion, "comparable", False) else "mean"

    def _takes_part(self, group: Group) -> bool:
        """Return whether the group can lose anything at all, so that its scores matter."""
        ratio = self.ratios[group.id] or 0.0
        if self._ranks_all:
            return True
        if self.request.scope != "local" and group.id not in self.candidates.local:
            return ratio > 0
        return ratio > 0 and (self.request.round_to != 1 or group.steps > 1)

    def _scored(self, groups: Sequence[Group], mask: Mask | None) -> list[ScoredSlot]:
        """Return the raw scores of every slot without the removed units."""
        units = self.analysis.units
        removed = None if mask is None else np.asarray(mask[units.component])
        squared = by_squares(self.criterion)
        if set(self.needs) & set(GRADIENTS):
            items = scored(self._by_gradients(groups, removed), by_maps(self.criterion))
        elif self.needs:
            items = scored(self._by_maps(groups, removed), by_maps(self.criterion))
        elif squared is not None:
            items = scored(self._by_squares(groups, removed), squared)
        else:
            items = scored(self._by_weights(groups, removed), self.criterion)
        return items if mask is None else without(items, {g.id: mask[g.units] for g in groups})

    def _by_weights(self, groups: Sequence[Group], removed: Mask | None) -> Iterator[PlacedSlot[Slot]]:
        placed = self.request.policy == "backward"
        for lot in batches(groups):
            yield from weight_slots(self.analysis.table, self.analysis.units, lot, self.context.seed, removed, placed)

    def _by_squares(self, groups: Sequence[Group], removed: Mask | None) -> Iterator[PlacedSlot[Squares]]:
        placed = self.request.policy == "backward"
        for lot in batches(groups):
            yield from weight_squares(self.analysis.table, self.analysis.units, lot, removed, placed)

    def _by_gradients(self, groups: Sequence[Group], removed: Mask | None) -> Iterator[PlacedSlot[Slot]]:
        placed = self.request.policy == "backward"
        analysis = self.analysis
        group_claims = [
            (name, claim)
            for lot in batches(groups)
            for name, slot_claims in claims(analysis.table, analysis.units, lot, removed, placed)
            for claim in slot_claims
        ]
        gradients = score_gradients(self.context, analysis, self.needs, group_claims, removed)
        yield from gradient_slots(analysis.table, group_claims, gradients, self.context.seed, removed)

    def _by_maps(self, groups: Sequence[Group], removed: Mask | None) -> Iterator[PlacedSlot[Slot]]:
        captured = captured_maps(self.context, self.analysis, groups, self.needs, removed)
        short = captured.shortage()
        if short is not None and removed is None:
            samples = "1 sample" if captured.samples == 1 else f"{captured.samples} samples"
            self.warnings.append(
                f"{self.name} has {samples}, but {short[0]} needs at least {short[1]} to find "
                "dependent channels: its scores are uncertain."
            )
        # Scores that solve for dependent channels take the cube of their number.
        work, finished = {g.id: float(g.size) ** 3 for g in groups}, 0.0
        total = sum(work.values()) or 1.0
        with self.context.stage("score"):
            for lot in batches(groups):
                slots = map_slots(self.analysis, lot, captured, removed, self.context.seed)
                for number, (group, slot) in enumerate(slots):
                    self._reached[group] = self._reached.get(group, False) or slot.maps is None or slot.maps.samples > 0
                    yield PlacedSlot(group, slot, 0, (number,))
                    finished += work.pop(group, 0.0)
                    self.context.tell("score", min(0.99, finished / total))

    def _savings(self) -> dict[int, Array] | None:
        what = self.request.cost
        if what == "none":
            return None
        seconds = self._measured() if what == "latency" else None
        return savings(self.analysis, self.candidates.groups, what, seconds)

    def _measured(self) -> dict[str, float]:
        """Measure the time of every node of the original, once per run."""
        analysis, context = self.analysis, self.context
        if not self._seconds:
            with context.stage("profile"), Workspace.of(analysis) as trial:
                times = profile(trial.original, [_feed(context, analysis)])
            self._seconds.update(spread(analysis, [(t.name, t.op, t.seconds) for t in times]))
        return self._seconds

    def _warn(self, mask: Mask) -> None:
        """Warn where one threshold cannot remove the requested number of units."""
        pool = {n: c for n, c in self._last.items() if self.request.scope != "local" and not c.is_local}
        groups = self.analysis.units.groups
        target = sum(c.ratio * c.values.size for c in pool.values())
        num_removed = sum(int(mask[groups[n].units].sum()) for n in pool)
        widest = max((int(np.diff(c.counts).max(initial=1)) * c.per_step for c in pool.values()), default=0)
        if num_removed + widest * len({c.ranking_scope for c in pool.values()}) < target:
            self.warnings.append(
                Note(
                    f"{num_removed} of {target:.0f} requested units were removed: no group may lose more than "
                    f"{self.request.widest:g} of its units ({argument('max_ratio')})"
                )
            )


def _check_measurable(context: Context, request: Request) -> None:
    """Raise UsageError where scores cannot be measured."""
    if context.calibration is None:
        raise UsageError(
            f"{argument('normalize', 'measured')} needs data: it runs the pruned model on it.",
            hint=f"Give inputs with {argument('data')}, or choose {argument('normalize', 'root')}.",
        )
    if request.steps > 1:
        raise UsageError(
            f"{argument('normalize', 'measured')} measures the original once, but {argument('steps')} scores again "
            "after each step.",
            hint=f"Drop {argument('steps')}, or choose {argument('normalize', 'root')}.",
        )


def _feed(context: Context, analysis: Analysis) -> Feed:
    """Return one call of the model: the user's inputs, else synthetic ones."""
    if context.calibration is not None:
        return next(iter(CalibrationBatches(context, analysis, 1)))
    bounds = integer_bounds(analysis.graph, analysis.facts)
    return synthetic(input_specs(analysis.graph), analysis.facts.probes[0].inputs, bounds=bounds, seed=context.seed)
