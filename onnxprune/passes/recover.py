"""Recover: re-solve the weights of the cut model so that its layers say what the original's said, from inputs alone."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxprune.analysis import Analysis
from onnxprune.errors import UsageError, nearest
from onnxprune.graph.infer import probe_at
from onnxprune.graph.view import Graph
from onnxprune.model.weights import Weight
from onnxprune.passes.calls import Calls
from onnxprune.passes.outcome import doubts, is_worse, judge, remarks, set_aside
from onnxprune.passes.prepared import Prepared
from onnxprune.passes.state import State
from onnxprune.propagate import infer_by_rule
from onnxprune.recover import MODES
from onnxprune.recover.aims import Aim, find_aims
from onnxprune.recover.layers import Layer
from onnxprune.recover.problem import HELD, Problem
from onnxprune.recover.repair import repair
from onnxprune.report.facts import Recovery, Repair
from onnxprune.rewrite.after import After
from onnxprune.runtime.capture import count
from onnxprune.runtime.parallel import spread
from onnxprune.runtime.segments import Segments, Store
from onnxprune.runtime.sessions import Feed

# Bytes of activations to hold in memory where nobody says how many.
_MEMORY = 2 << 30
# Unknowns per output from which on products are shared between BLAS threads.
_WIDE = 1024


class Recover:
    """Repair a cut model in closed form.

    Every contraction is fitted by least squares, in the order in which data flows: from the cut and already repaired
    model's input of the layer to what the original had at its output, or at the sum that its output goes into.

    Args:
        mode: ``none``, ``bias`` (means), ``bn`` (a scale and shift per output), ``lstsq`` (weights, every layer aimed
            at its own output) or ``full`` (whichever errs least on held-out data, aimed at sums).
        memory_limit: bytes of activations to hold in memory, else the run's, else 2 GiB; more go to temporary files.
        why: who chose the mode, for the report.

    Every eighth batch of the data is kept from the fit, to compare the result with the original on. A repair that
    takes the outputs further from it there is undone.

    Raises:
        UsageError: an unknown mode, no data, or data that does not fit.
    """

    def __init__(self, mode: str = "full", *, memory_limit: int | None = None, why: str = "asked for") -> None:
        self.mode, self.memory_limit, self.why = check_mode(mode), memory_limit, why

    def __call__(self, state: State) -> None:
        """Replace the cut model's weights."""
        analysis = state.analyzed()
        facts = Recovery(self.mode, self.why)
        repairs: list[Repair] = []
        left: Mapping[str, str] = {}
        warnings: list[str] = []
        if self.mode != "none" and state.changed:
            if state.data is None:
                raise no_data(self.mode)
            assert state.proto is not None
            before = state.proto, state.weights
            with state.stage("recover"), tempfile.TemporaryDirectory(prefix="onnxprune-") as folder:
                feeds, (judges, name) = set_aside(_feeds(state, analysis), state.calibration().name)
                warnings += doubts(feeds)
                model = Prepared(*before)
                repairs, left = self._repair(state, analysis, model.graph, model.weights, feeds, Path(folder))
                repaired = model.model() if any(r.done for r in repairs) else before
                facts.before, facts.after = judge(state.original, [before, repaired], judges, name)
            facts.samples, facts.aside = sum(map(count, feeds)), 0 if judges is feeds else sum(map(count, judges))
            facts.undone = is_worse(facts.after, facts.before)
            warnings += remarks(facts, repairs, left)
            state.judged_on = judges, name
            if not facts.undone and repaired is not before:
                state.unrepaired = state.unrepaired or before
                state.proto, state.weights = repaired
        state.later.append(lambda: _report(state, facts, repairs, left, warnings))

    def _repair(
        self,
        state: State,
        analysis: Analysis,
        graph: Graph,
        weights: dict[str, Weight],
        feeds: Sequence[Feed],
        folder: Path,
    ) -> tuple[list[Repair], Mapping[str, str]]:
        after = After(analysis.table, state.gone)
        full = state.original.graph
        made = (o for node in full.nodes for o in node.outputs if o in analysis.graph.producer)
        known = [name for name in made if _can_follow(analysis, after, name)]
        shape = _shapes_now(state, graph) if state.factorized else after.shape
        aims = find_aims(graph, known, shape, joint=self.mode == "full")
        # Both models' activations are held, so that each may have half.
        memory = (self.memory_limit or state.memory_limit or _MEMORY) // 2
        store = Store(memory, folder), Store(memory, folder)
        cut_run = Segments(graph, weights, [[n for a in level for n in a.needs] for level in aims.levels], store[0])
        full_run = Segments(full, full.weights, [[a.tail.aim for a in level] for level in aims.levels], store[1])
        for run in (cut_run, full_run):
            run.feed(feeds)
        samples = sum(map(count, feeds))
        repairs: list[Repair] = []
        for number, level in enumerate(aims.levels):
            for run in (cut_run, full_run):
                for _ in run.run(number):
                    pass

            def one(aim: Aim) -> Repair:
                layer = Layer(graph, weights, aim)
                matrix, bias = layer.read()
                shape, channels = weights[aim.node.inputs[aim.form.weight]].shape, matrix.shape[0] * matrix.shape[1]
                steps = after.steps(aim.tail.aim)
                problem = Problem(
                    aim, shape, channels // aim.form.taps, store[0].get, store[1].get, steps, cut_run.batches, samples
                )
                solution = repair(problem, matrix, bias, mode=self.mode, fixed_bias=layer.fixed_bias)
                if solution.how != "kept":
                    layer.write(solution.matrix, solution.bias)
                return Repair(aim.node.label, solution.how, solution.before, solution.after)

            repairs += spread(one, level, heavy=any(_columns(weights, aim) >= _WIDE for aim in level))
            for run in (cut_run, full_run):
                run.done(number)
            state.tell("recover", (number + 1) / len(aims.levels))
        return repairs, aims.left


def _shapes_now(state: State, graph: Graph) -> Callable[[str], Any]:
    """Shapes in the model as it is: layers that were taken apart have tensors that the original never had."""
    return probe_at(graph, state.analyzed().facts.probes[0].inputs, infer_by_rule).shapes.get


def _columns(weights: Mapping[str, Weight], aim: Aim) -> int:
    """Unknowns per output of a layer."""
    shape = weights[aim.node.inputs[aim.form.weight]].shape
    return int(np.prod(shape)) // max(shape[:2]) if len(shape) > 1 else 1


def check_mode(mode: str) -> str:
    """The mode, if there is such a one; raises UsageError with the nearest."""
    if mode not in MODES:
        raise UsageError(f"Unknown way to recover {mode!r}.", hint=nearest(mode, MODES))
    return mode


def no_data(mode: str) -> UsageError:
    """What is said where there is nothing to repair from."""
    return UsageError(
        f"recover {mode!r} needs calibration data, and there is none",
        hint="Give inputs with --data (Python: data=...); a few hundred without labels are enough.",
    )


def _can_follow(analysis: Analysis, after: After, name: str) -> bool:
    """Whether survivors stand at the same positions at any batch size: not where heads and samples share an axis."""
    for axis, index in after.steps(name):
        axes = {axis} if index.ndim == 1 else {axis, *(a for a, n in enumerate(index.shape) if n > 1)}
        if any(analysis.facts.varies(name, a) for a in axes):
            return False
    return True


def _feeds(state: State, analysis: Analysis) -> list[Feed]:
    """The data in batches that leave enough of them to hold some out."""
    source = Calls(state, analysis)
    many = min(32, state.batch_size or 32)
    if source.samples is not None:
        many = max(1, min(many, source.samples // (2 * HELD)))
    feeds = list(source.batches(many))
    if not feeds:
        raise UsageError("The data fill no call of the model.", hint=f"It takes {source.fixed or 1} samples at a time.")
    return feeds


def _report(
    state: State, facts: Recovery, repairs: Sequence[Repair], left: Mapping[str, str], warnings: Sequence[str]
) -> None:
    report = state.report
    report.recovery = facts
    report.repairs = [*repairs, *(Repair(name, f"left: {why}", 0.0, 0.0) for name, why in left.items())]
    report.warnings += warnings
    if facts.samples:  # a repair may add biases
        report.totals.params_after = sum(int(np.prod(w.shape)) for w in state.weights.values())
