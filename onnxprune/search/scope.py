"""Scope of a default pruning: all groups compete, or every group loses the same share, whichever keeps more."""

from __future__ import annotations

from dataclasses import replace

from onnxprune.allocation.settings import AUTO
from onnxprune.errors import BudgetError, Note
from onnxprune.passes.calibration import TrialSplit
from onnxprune.passes.prune import WITH_DATA, Prune
from onnxprune.passes.training import standard_error
from onnxprune.pipeline import Context, Model, PassResult
from onnxprune.report.facts import FAITHFUL, Remark
from onnxprune.search.evaluation import Quality, evaluate


class PruneByTrial(Prune):
    """Remove the least important units; where competition between groups damages the model, try every group alone.

    Units of all groups that compete per MAC save more work at the same share of units, and concentrate on the groups
    with the most work. Where the model is not faithful then, the same share of every group is recovered and compared
    on the samples of a trial, and kept where it loses less by more than the standard error of the comparison.
    """

    def __call__(self, context: Context, model: Model) -> PassResult:
        """Choose units, prune the model, describe the removal."""
        result = super().__call__(context, model)
        if not self._is_open(context) or result.model.plan.criterion != WITH_DATA:
            return result
        ended = context.stages.until_interrupted(lambda: "one scope of the ranking was tried")
        with context.stage("scopes"), ended:
            return self._better(context, model, result)
        return result

    def _better(self, context: Context, model: Model, result: PassResult) -> PassResult:
        """Return the result, or that of every group alone where it loses less.

        Args:
            context: the run.
            model: the model before.
            result: of competition between groups.
        """
        competing = self._quality(context, result.model)
        if not competing.points < FAITHFUL:
            return result
        context.tell("scopes", 0.5)
        try:
            even = replace(self, criterion=WITH_DATA, scope="local")(context, model)
            alone = self._quality(context, even.model)
        except BudgetError:
            return result
        samples = 0 if competing.fidelity is None else competing.fidelity.samples
        if not samples or alone.points <= competing.points + standard_error(100 - competing.points, samples):
            return result
        note = (
            f"the same share of every group keeps {alone.points:.1f} points of fidelity in a trial, units of all "
            f"groups that compete {competing.points:.1f}: scope local"
        )
        return replace(even, facts=[*even.facts, Remark(Note(note))])

    def _is_open(self, context: Context) -> bool:
        """Return whether the scope is to be chosen, and there is time to."""
        is_default = self.criterion is None and self.plan is None and not self.between
        return is_default and self.scope == AUTO and self.cost == AUTO and context.effort.name != "quick"

    @staticmethod
    def _quality(context: Context, pruned: Model) -> Quality:
        """Return the quality of a pruned model after a recovery from the samples of a trial."""
        return evaluate(context, pruned, mode="full", split=TrialSplit(context.effort.trial_samples)).quality
