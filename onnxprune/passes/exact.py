"""Exact: the proof that a removal is exact, from the file as read to the model as written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxprune.channels.analysis import Analysis
from onnxprune.channels.selection import removed_atoms
from onnxprune.errors import ModelError, ValidationError
from onnxprune.graph.facts import Probe, integer_bounds
from onnxprune.graph.probes import input_specs
from onnxprune.passes.comparing import Pair, kinds_of, rounding_of
from onnxprune.passes.preparation import check_preparation, other_feeds
from onnxprune.passes.structure import check_file
from onnxprune.passes.workspace import Workspace, synthetic_feeds
from onnxprune.pipeline import SAME_REMOVAL, Context, Guarantee, Pass, PassResult
from onnxprune.pipeline import Model as RunModel
from onnxprune.pruning.masked import (
    Model,
    Witnesses,
    branch_assignments,
    branch_names,
    force,
    masked_original,
    open_conditions,
)
from onnxprune.pruning.rewriting import cut
from onnxprune.report.facts import Exactness
from onnxprune.runtime import compare
from onnxprune.runtime.compare import TOLERANCE
from onnxprune.runtime.inputs import synthetic
from onnxprune.runtime.sessions import Feed

_IN_CODES = 4  # the accuracy level at which products with 4-bit weights round their activations to 8 bits


class Proof(NamedTuple):
    """The outcome of a proof.

    Attributes:
        facts: exactness of the removal.
        refused: indices of the probes at whose sizes the model failed to run, though it declares them open.
    """

    facts: Exactness
    refused: frozenset[int]

    def of(self, model: RunModel) -> RunModel:
        """Return the model with this proof."""
        return replace(model, proof=self.facts, refused=self.refused)


def check_exactness(
    analysis: Analysis,
    removed: NDArray[np.bool_],
    trial: Workspace,
    final: Path,
    model: Model,
    feeds: Sequence[Any],
    seed: int,
) -> Proof:
    """Compare the pruned model, in memory and as the file ``final``, with the masked original on one feed per probe.

    Where an output is constant over the inputs, more feeds are tried; where it stays constant, the last tensors in
    front of it that vary are compared too, and the note names them.

    Groups that were pruned through a normalisation have no exact counterpart: the comparison then uses a model with all
    other groups pruned, and the note records this.

    Args:
        analysis: analysis of the model before pruning.
        removed: mask over atoms [atoms], bool.
        trial: trial of that model, with its file.
        final: path of the pruned model's file.
        model: the pruned model in memory.
        feeds: one call of the model per probe.
        seed: seed of any further feeds.

    Raises:
        ValidationError: they differ, or the preparation of the model for pruning changed its outputs.
    """
    check_preparation(analysis, trial, feeds, seed)
    removed, skipped = _exact_part(analysis, removed)
    if skipped:
        model = cut(analysis.table, removed)
        final, _ = trial.write(*model, "exact_part")
    check = _Check(analysis, trial, removed, final, model, seed)
    worst, refused = Exactness(passed=True), set[int]()
    calls = list(zip(analysis.facts.probes, feeds, strict=True))
    for index, (probe, feed) in enumerate(calls):
        try:
            worst = _worse(worst, check.at(probe, feed))
        except ModelError:  # the model declares sizes at which it does not run: other sizes are tried below
            if not index:
                raise
            refused.add(index)
        if not worst.passed:
            break
    if worst.passed:
        worst = check.beyond(worst)
    if worst.passed and analysis.graph.has_bodies:
        worst = check.elsewhere([call for index, call in enumerate(calls) if index not in refused], worst)
    if worst.passed is False:
        raise ValidationError(
            f"The pruned model is not exact: output {worst.worst_output!r} differs by {worst.error:.3g} (allowed "
            f"{worst.tolerance:.3g}). {worst.note}",
            hint="This is a bug in onnxprune: nothing was written. Please report the model's operators.",
        )
    if trial.drawing:
        note = f"random numbers of {', '.join(dict.fromkeys(trial.drawing))} are the same in both models"
        worst.note = f"{worst.note}; {note}" if worst.note else note
    if skipped:
        what = "1 group that was" if skipped == 1 else f"{skipped} groups that were"
        note = f"without {what} pruned through a normalisation, where fidelity is the only measure"
        worst.note = f"{worst.note}; {note}" if worst.note else note
    return Proof(worst, frozenset(refused))


def _worse(one: Exactness, other: Exactness) -> Exactness:
    """Return the facts with the larger error, with the probe sizes and the notes of both."""
    batches = [*one.batches, *(n for n in other.batches if n not in one.batches)]
    notes = "; ".join(filter(None, dict.fromkeys((one.note, other.note))))
    worst = other if not other.passed or other.error >= one.error else one
    worst.batches, worst.note = batches, notes
    return worst


def _rounds(model: Model) -> bool:
    return any(a.name == "accuracy_level" and a.i == _IN_CODES for n in model[0].graph.node for a in n.attribute)


def _without_rounding(model: Model) -> Model:
    copy = onnx.ModelProto()
    copy.CopyFrom(model[0])
    for node in copy.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 0
    return copy, model[1]


@dataclass(slots=True)
class _Check:
    """The comparison of one pruned model with the masked original, at one probe after the other."""

    analysis: Analysis
    trial: Workspace
    removed: NDArray[np.bool_]
    final: Path
    model: Model
    seed: int
    _rounding: compare.Rounding = field(init=False)

    def __post_init__(self) -> None:
        self._rounding = rounding_of(self.analysis, TOLERANCE)

    def _pair(self, probe: Probe, masked: Model, model: Model, final: Path | None = None) -> Pair:
        """Return the models to compare at the sizes of one probe."""
        survivors = Witnesses(self.analysis.table, self.removed, probe, masked, model).survivors
        return Pair(self.trial, masked, model, kinds_of(self.analysis), self._rounding, survivors, final=final)

    def beyond(self, worst: Exactness) -> Exactness:
        """Run the file at sizes that no probe has, where the model leaves sizes open, and return the facts."""
        facts, graph = self.analysis.facts, self.analysis.graph
        for probe in facts.elsewhere():
            bounds = integer_bounds(graph, replace(facts, probes=(*facts.probes, probe)))
            feed = synthetic(input_specs(graph), probe.inputs, bounds=bounds, seed=self.seed)
            try:
                return _worse(worst, self.at(probe, feed))
            except ModelError:  # the original does not run there either
                continue
        return worst

    def at(self, probe: Probe, feed: Feed) -> Exactness:
        """Return the facts at the sizes of one probe."""
        masked = masked_original(self.analysis.table, self.removed, probe)
        # A file with random numbers would draw others than the reference.
        pair = self._pair(probe, masked, self.model, None if self.trial.drawing else self.final)
        comparison, feeds = pair.compared([feed]), [feed]
        if not comparison.facts.passed and _rounds(masked):
            return self._in_floats(probe, masked, feed)
        if comparison.uncertain and set(comparison.uncertain) == set(comparison.failed):
            return self._inside(probe, masked, [feed], comparison)
        if comparison.facts.passed and comparison.idle:
            with pair.lend_reference() as reference:
                feeds += compare.find_varying_feeds(
                    reference, comparison.idle, feeds, other_feeds(self.analysis, self.seed)(probe)
                )
            if len(feeds) > 1:
                comparison = pair.compared(feeds)
        if not comparison.facts.passed or not comparison.idle:
            return comparison.noted()
        return self._inside(probe, masked, feeds, comparison)

    def _in_floats(self, probe: Probe, masked: Model, feed: Feed) -> Exactness:
        """Return the facts where products with 4-bit weights take floats.

        With activations rounded to 8 bits, a rounding to the other side is as large as a real error.
        """
        facts = self._pair(probe, _without_rounding(masked), _without_rounding(self.model)).compared([feed]).noted()
        remark = "with activations of 4-bit products in floats"
        facts.note = f"{facts.note}; {remark}" if facts.note else remark
        return facts

    def elsewhere(self, calls: Sequence[tuple[Probe, Feed]], worst: Exactness) -> Exactness:
        """Run all branches of Ifs and bodies of Loops, also those that the inputs do not select; return the facts."""
        conditions = open_conditions(self.analysis.graph, self.analysis.facts)
        run, missed = set[tuple[str, bool]](), set[tuple[str, bool]]()
        for way in branch_assignments(conditions):
            for probe, feed in calls:
                masked = masked_original(self.analysis.table, self.removed, probe)
                try:
                    exactness = self._pair(probe, force(masked, way), force(self.model, way)).compared([feed]).facts
                except ModelError:  # with these sizes the original does not run there either
                    missed.update(way.items())
                    break
                run.update(way.items())
                if exactness.passed is not True or exactness.error > worst.error:
                    exactness.batches, exactness.note = (
                        worst.batches,
                        "; ".join(filter(None, (worst.note, exactness.note))),
                    )
                    worst = exactness
                if worst.passed is not True:
                    return worst
        names = branch_names(conditions, missed - run)
        if names:
            remark = f"could not be run at these sizes: {_listed_names(names)}"
            worst.note = f"{worst.note}; {remark}" if worst.note else remark
        return worst

    def _inside(self, probe: Probe, masked: Model, feeds: Sequence[Feed], comparison: compare.Comparison) -> Exactness:
        """Compare tensors in front of the outputs that decide nothing; return the given facts where there are none.

        These are outputs that never vary, and those that differ by no more than their own rounding.
        """
        undecided = list(dict.fromkeys([*comparison.uncertain, *comparison.idle]))
        witnesses = Witnesses(self.analysis.table, self.removed, probe, masked, self.model)
        names = witnesses.upstream(undecided)
        if names:
            with self.trial.lend(*witnesses.tapped(names), "tapped") as path:
                names = witnesses.last(undecided, compare.varying_outputs(path, feeds) & set(names))
        if not names:
            return comparison.noted()
        reference, shrunk, new = witnesses.pair(names, comparison.uncertain)
        facts = self._pair(probe, reference, shrunk).compared(feeds).facts
        facts.worst_output = new.get(facts.worst_output, facts.worst_output)
        why = "differed by no more than its own rounding" if comparison.uncertain else "did not vary"
        remark = f"{_listed_names(undecided)} {why} on any synthetic sample; compared instead, before it: "
        remark += _listed_names(names)
        facts.note = f"{facts.note}; {remark}" if facts.note else remark
        return facts


def _listed_names(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _exact_part(analysis: Analysis, removed: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], int]:
    """Return the mask without groups that run through a normalisation, and how many such groups were pruned."""
    units = analysis.units
    mask = np.zeros(units.frozen.size, dtype=bool)
    mask[units.component[removed]] = True
    exact, skipped = np.zeros_like(mask), 0
    for group in units.groups:
        units_removed = group.units[mask[group.units]]
        if group.exact:
            exact[units_removed] = True
        elif units_removed.size:
            skipped += 1
    return (removed_atoms(units, exact), skipped) if skipped else (removed, 0)


PROVED = Guarantee("a proof of every removal", lambda _, after: not after.is_unproved)


class Exact(Pass):
    """Compare the pruned model with the masked original, whose removed channels are multiplied by 0.

    A recovery changes weights on purpose: after one, the model before the recovery is compared. Every removal is proved
    once, so that ``Validate`` behind this pass does not repeat the comparison.

    Raises:
        ValidationError: the removal is not exact, or the result is not a valid model.
    """

    ensures: Sequence[Guarantee] = (SAME_REMOVAL, PROVED)

    def __call__(self, context: Context, model: RunModel) -> PassResult:
        """Prove the removal, if there is one without a proof."""
        if not model.is_unproved:
            return PassResult(model, changed=False)
        with Workspace.of(model.analysis) as trial:
            proof = prove(context, model, trial)
        return PassResult(proof.of(model), [proof.facts])


def prove(context: Context, model: RunModel, trial: Workspace, written: Path | None = None) -> Proof:
    """Prove that the removal is exact.

    Args:
        context: context of the run.
        model: the pruned model.
        trial: trial of the model before pruning.
        written: file of the pruned model; None: it is written.

    Raises:
        ValidationError: the removal is not exact.
    """
    assert model.removed is not None
    parts = model.as_pruned or model.parts
    if written is None or model.as_pruned is not None:
        with context.stage("write"):
            written, _ = trial.write(*parts, "cut")
            check_file(written, trial.original)
    with context.stage("exactness"), trial.blaming():
        feeds = synthetic_feeds(context, model.analysis)
        return check_exactness(model.analysis, model.removed, trial, written, parts, feeds, context.seed)
