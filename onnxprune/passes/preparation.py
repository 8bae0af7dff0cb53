"""Check that the prepared graph, from which pruned model and masked original are made, is equivalent to the file.

Functions and bodies are inlined, weights computed, selections hoisted and constants unshared before pruning. The masked
original is prepared in the same way, so that an error of the preparation would be in both models, and a comparison of
these two would not detect it. This check compares with the file itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from onnxprune.channels.analysis import Analysis
from onnxprune.errors import ModelError, ValidationError
from onnxprune.graph.facts import Probe, integer_bounds
from onnxprune.graph.probes import input_specs
from onnxprune.io.functions import inline_functions
from onnxprune.io.read import same_nodes
from onnxprune.io.subgraphs import outline_bodies
from onnxprune.passes.comparing import Pair, kinds_of, rounding_of
from onnxprune.passes.workspace import Workspace
from onnxprune.pruning.masked import Model, branch_assignments, force, force_closed, open_conditions
from onnxprune.report.facts import Exactness
from onnxprune.runtime import compare
from onnxprune.runtime.inputs import variations
from onnxprune.runtime.sessions import Feed

# The prepared graph has all channels: there is less rounding than after pruning.
_ALLOWED = 1e-5


def check_preparation(analysis: Analysis, trial: Workspace, feeds: Sequence[Feed], seed: int) -> None:
    """Run the file and the prepared graph of the analysis on seeded inputs, one feed per probe.

    A large model is not run where its nodes are identical to the file's. Where bodies differ, or were changed since,
    every branch is run.

    Raises:
        ValidationError: they differ.
    """
    loaded, graph = analysis.loaded, analysis.graph
    prepared: Model = graph.proto, graph.weights
    if not trial.heavy or not same_nodes(loaded.as_read, outline_bodies(*prepared)[0]):
        others = other_feeds(analysis, seed)
        probes = analysis.facts.probes
        hold_against_file(analysis, trial, prepared, feeds, lambda number: others(probes[number]))
    if not graph.has_bodies:
        return
    hold = _Forced(analysis, trial, feeds)
    read = inline_functions(loaded.as_read) if loaded.as_read.functions else loaded.as_read
    closed = outline_bodies(loaded.proto, loaded.weights)
    if not same_nodes(read, closed[0]):
        for side in (True, False):
            hold(force_closed((read, loaded.weights), side), force_closed(closed, side))
    if analysis.folds or analysis.hoists or analysis.copies:
        for way in branch_assignments(open_conditions(graph, analysis.facts)):
            hold(force((loaded.proto, loaded.weights), way), force(prepared, way))


def hold_against_file(
    analysis: Analysis,
    trial: Workspace,
    model: Model,
    feeds: Sequence[Feed],
    others: Callable[[int], Iterable[Feed]] = lambda _: (),
) -> None:
    """Run the file of a trial and a model, and check that their outputs are equal.

    Args:
        analysis: analysis of the model, with the types of its tensors.
        trial: trial with the file.
        model: model to compare with the file.
        feeds: one call of the model per probe.
        others: function that returns more feeds for a probe, where outputs are constant over the inputs.

    Raises:
        ValidationError: they differ.
    """
    loaded = trial.loaded
    read = inline_functions(loaded.as_read) if loaded.as_read.functions else loaded.as_read
    rounding, kinds = rounding_of(analysis, _ALLOWED), kinds_of(analysis)
    with trial.lend_original() as file:
        pair = Pair(trial, (read, loaded.weights), outline_bodies(*model), kinds, rounding, file=file)
        for probe, feed in enumerate(feeds):
            try:
                comparison = pair.compared([feed])
            except ModelError:  # the model declares more sizes open than it can run at
                if not probe:
                    raise
                continue
            more = compare.find_varying_feeds(file, comparison.idle, [feed], others(probe)) if comparison.idle else []
            if more and comparison.facts.passed:
                comparison = pair.compared([feed, *more])
            _require(comparison.facts)


@dataclass(frozen=True, slots=True)
class _Forced:
    """Comparison of two models with the same branches forced; skipped where the reference does not run."""

    analysis: Analysis
    trial: Workspace
    feeds: Sequence[Feed]

    def __call__(self, reference: Model, model: Model) -> None:
        """Compare both models; raises ValidationError where they differ."""
        pair = Pair(self.trial, reference, model, kinds_of(self.analysis), rounding_of(self.analysis, _ALLOWED))
        for feed in self.feeds:
            try:
                comparison = pair.compared([feed])
            except ModelError:
                continue
            _require(comparison.facts)


def other_feeds(analysis: Analysis, seed: int) -> Callable[[Probe], Iterator[Feed]]:
    """Draw other seeded inputs than the first, at the sizes of a probe."""
    graph, facts = analysis.graph, analysis.facts
    bounds = integer_bounds(graph, facts)
    return lambda probe: variations(input_specs(graph), probe.inputs, bounds=bounds, seed=seed)


def _require(facts: Exactness) -> None:
    if facts.passed is False:
        raise ValidationError(
            f"Preparing the graph changed output {facts.worst_output!r} by {facts.error:.3g} "
            f"(allowed {facts.tolerance:.3g}). {facts.note}",
            hint="This is a bug in onnxprune: nothing was written. Please report the model's operators.",
        )
