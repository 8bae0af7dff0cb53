"""Two models side by side on the same inputs; where rounding flips a choice, with choices held equal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from onnxprune.channels.analysis import Analysis
from onnxprune.errors import ModelError, ValidationError
from onnxprune.graph.facts import integer_bounds
from onnxprune.graph.precision import epsilons
from onnxprune.graph.probes import input_specs
from onnxprune.operators.registry import rule_of
from onnxprune.passes.workspace import Workspace, synthetic_feeds
from onnxprune.pipeline import Context
from onnxprune.pruning.holding import COMPUTED_SUFFIX, VALUE_SUFFIX, Holding, SurvivorSteps, no_steps
from onnxprune.pruning.masked import Model
from onnxprune.report.facts import Exactness
from onnxprune.runtime.compare import Comparison, Rounding, compare_models
from onnxprune.runtime.inputs import synthetic
from onnxprune.runtime.sessions import Feed, Openable, open_session, run


def rounding_of(analysis: Analysis, base: float) -> Rounding:
    """Return the rounding differences that the arithmetic of a model explains.

    Args:
        analysis: analysis of the model.
        base: tolerance of float32, relative to the largest value of an output.
    """
    graph = analysis.graph
    quantized = any(rule_of(node).quantized for node in graph.nodes)
    return Rounding(base, quantized, epsilons(graph, kinds_of(analysis)))


def kinds_of(analysis: Analysis) -> Mapping[str, int]:
    """Element types of tensors, by name."""
    return analysis.facts.probes[0].dtypes


@dataclass(frozen=True, slots=True)
class Pair:
    """A reference, and a model that should be equivalent.

    Args:
        trial: trial that lends the models.
        kinds: element types by name.
        rounding: allowed differences.
        survivors: function that returns the surviving part of a tensor in the other model.
        file: file of the reference, if there is one.
        final: file of the other model, if there is one.
    """

    trial: Workspace
    reference: Model
    other: Model
    kinds: Mapping[str, int]
    rounding: Rounding
    survivors: SurvivorSteps = no_steps
    file: Openable | None = None
    final: Openable | None = None

    def compared(self, feeds: Sequence[Feed]) -> Comparison:
        """Compare the outputs of both models on the same inputs.

        Where that differs, they are compared again in front of operators that choose, and behind these with what they
        choose by held equal; so are random numbers. Outputs that depend on random numbers which cannot be held prove
        nothing, and are not judged.

        Raises:
            ModelError: the reference does not load or run.
        """
        with self._lent() as (one, other):
            comparison = compare_models(one, other, feeds, self.rounding)
        if comparison.facts.passed is not False:
            return comparison
        holding = Holding(self.reference, self.other, self.kinds, self.survivors)
        if holding:
            comparison = self._with_held_choices(holding, feeds) or comparison
        if (
            comparison.facts.passed is False
            and comparison.failed
            and holding.depend_on_unheld().issuperset(comparison.failed)
        ):
            names = ", ".join(comparison.failed[:4])
            why = f"not provable: {names} depends on random numbers, which differ with the sizes"
            return comparison._replace(facts=Exactness(None, batches=comparison.facts.batches, note=why), failed=())
        return comparison

    def _with_held_choices(self, holding: Holding, feeds: Sequence[Feed]) -> Comparison | None:
        """Compare with discrete choices held equal; None where the reference does not run with them."""
        tapped, names = holding.tapped()
        pairs = []
        try:
            with self.trial.lend(*tapped, "tapped") as model:
                session = open_session(model, optimize=False)
                for feed in feeds:
                    values = run(session, feed)
                    pairs.append(holding.feeds({name: values[name] for name in names}))
                del session
            one, other = holding.pair()
            firsts = [{**feed, **choices} for feed, (choices, _) in zip(feeds, pairs, strict=True)]
            seconds = [{**feed, **choices} for feed, (_, choices) in zip(feeds, pairs, strict=True)]
            with self.trial.lend(*one, "held") as a, self.trial.lend(*other, "held_too") as b:
                comparison = compare_models(a, b, firsts, self.rounding, others=seconds)
        except (KeyError, ModelError):
            return None
        idle = {
            name: why for name, why in comparison.idle.items() if not name.endswith((VALUE_SUFFIX, COMPUTED_SUFFIX))
        }
        operators = _listed(holding.operators)
        remark = f"compared before operators that choose or draw, and after them with equal choices: {operators}"
        note = f"{comparison.facts.note}; {remark}" if comparison.facts.note else remark
        worst = comparison.facts.worst_output.removesuffix(VALUE_SUFFIX).removesuffix(COMPUTED_SUFFIX)
        return comparison._replace(facts=replace(comparison.facts, note=note, worst_output=worst), idle=idle)

    @contextmanager
    def lend_reference(self) -> Iterator[Openable]:
        """Lend the reference, as an open session or as a source of one."""
        if self.file is not None:
            yield self.file
            return
        with self.trial.lend(*self.reference, "masked") as one:
            yield one

    @contextmanager
    def _lent(self) -> Iterator[tuple[Openable, Openable]]:
        """Lend both models, as open sessions or as sources of such."""
        with self.lend_reference() as one:
            if self.final is not None:
                yield one, self.final
                return
            with self.trial.lend(*self.other, "other") as other:
                yield one, other


def compare_everywhere(pair: Pair, calls: Iterable[tuple[Feed, bool]], what: str) -> Exactness:
    """Compare two models on several calls; return the worst.

    Args:
        pair: the models.
        calls: inputs, and whether the reference has to run on them: it may declare more sizes open than it runs at.
        what: the other model in the error.

    Raises:
        ValidationError: they differ. ModelError: the reference does not run.
    """
    worst: Exactness | None = None
    for feed, is_needed in calls:
        try:
            now = pair.compared([feed]).facts
        except ModelError:
            if is_needed:
                raise
            continue
        batches = [*(worst.batches if worst else []), *now.batches]
        worst = now if worst is None or now.passed is False or now.error >= worst.error else worst
        worst.batches = list(dict.fromkeys(batches))
        if worst.passed is False:
            break
    assert worst is not None
    if worst.passed is False:
        raise ValidationError(
            f"{what} is not exact: output {worst.worst_output!r} differs by {worst.error:.3g} (allowed "
            f"{worst.tolerance:.3g}). {worst.note}",
            hint="This is a bug in onnxprune: nothing was written. Please report the model's operators.",
        )
    return worst


def calls_of(context: Context, analysis: Analysis) -> Iterator[tuple[Feed, bool]]:
    """Yield one seeded call per probe, and one at sizes that no probe has; the first has to run.

    Args:
        context: context of the run.
        analysis: analysis of the model.
    """
    for number, feed in enumerate(synthetic_feeds(context, analysis)):
        yield feed, not number
    facts, graph = analysis.facts, analysis.graph
    probe = next(facts.elsewhere(), None)
    if probe is not None:
        bounds = integer_bounds(graph, replace(facts, probes=(*facts.probes, probe)))
        yield synthetic(input_specs(graph), probe.inputs, bounds=bounds, seed=context.seed), False


def _listed(operators: Mapping[str, int]) -> str:
    """Return a list of operators with their counts."""
    names = [f"{op} ({n})" if n > 1 else op for op, n in operators.items()]
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
