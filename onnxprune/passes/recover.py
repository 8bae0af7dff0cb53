"""Recover: re-solve the weights of the cut model so that its layers say what the original's said, from inputs alone."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from onnxprune.analysis import Analysis
from onnxprune.errors import UsageError, nearest
from onnxprune.graph.restore import restore
from onnxprune.graph.unshare import rejoin
from onnxprune.graph.view import Graph
from onnxprune.model.weights import Weight
from onnxprune.passes.calibrate import fixed_batch
from onnxprune.passes.state import State
from onnxprune.recover.aims import Aim, find_aims
from onnxprune.recover.layers import Layer
from onnxprune.recover.problem import HELD, Problem
from onnxprune.recover.repair import repair
from onnxprune.recover.solve import modes
from onnxprune.report.facts import Repair
from onnxprune.rewrite.after import After
from onnxprune.rewrite.cut import cut
from onnxprune.runtime.segments import Segments, Store


class Recover:
    """Repair a cut model in closed form.

    Every contraction is fitted by least squares, in the order in which data flows: from the cut and already repaired
    model's input of the layer to what the original had at its output, or at the sum that its output goes into.

    Args:
        mode: ``none``, ``bias`` (means), ``bn`` (a scale and shift per output), ``lstsq`` (weights, every layer aimed
            at its own output) or ``full`` (whichever errs least on held-out data, aimed at sums).
        memory_limit: bytes of activations to hold in memory; more go to temporary files.

    Raises:
        UsageError: an unknown mode, no data, or data that does not fit.
    """

    def __init__(self, mode: str = "full", *, memory_limit: int = 2 << 30) -> None:
        allowed = ("none", *modes())
        if mode not in allowed:
            raise UsageError(f"Unknown way to recover {mode!r}.", hint=nearest(mode, allowed))
        self.mode, self.memory_limit = mode, memory_limit

    def __call__(self, state: State) -> None:
        """Replace the cut model's weights."""
        analysis = state.analyzed()
        if self.mode == "none" or state.removed is None or not state.removed.any():
            return
        proto, weights = cut(analysis.table, state.removed)
        with state.stage("recover"), tempfile.TemporaryDirectory(prefix="onnxprune-") as folder:
            repairs, left = self._repair(state, analysis, Graph.of(proto, weights), weights, Path(folder))
        restore(proto, weights, analysis.unshared, analysis.folds, analysis.hoists)
        rejoin(proto, weights, analysis.copies)
        state.proto, state.weights = proto, weights
        state.later.append(lambda: _report(state, repairs, left))

    def _repair(
        self, state: State, analysis: Analysis, graph: Graph, weights: dict[str, Weight], folder: Path
    ) -> tuple[list[Repair], Mapping[str, str]]:
        assert state.removed is not None
        after = After(analysis.table, state.removed)
        known = {o for node in analysis.graph.nodes for o in node.outputs if o}
        aims = find_aims(graph, dict.fromkeys(known), after.shape, joint=self.mode == "full")
        source = state.calibration()
        batch = fixed_batch(analysis) or (max(1, min(32, source.samples // (2 * HELD))) if source.samples else 16)
        store = Store(self.memory_limit, folder), Store(self.memory_limit, folder)
        cut_run = Segments(graph, weights, [[n for a in level for n in a.needs] for level in aims.levels], store[0])
        full = analysis.graph
        full_run = Segments(full, full.weights, [[a.tail.aim for a in level] for level in aims.levels], store[1])
        feeds = list(source.batches(batch))
        for run in (cut_run, full_run):
            run.feed(feeds)
        samples = sum(len(next(iter(f.values()))) for f in feeds if f)
        del feeds
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

            with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
                repairs += pool.map(one, level)
            for run in (cut_run, full_run):
                run.done(number)
            state.tell("recover", (number + 1) / len(aims.levels))
        return repairs, aims.left


def _report(state: State, repairs: Sequence[Repair], left: Mapping[str, str]) -> None:
    state.report.repairs = [*repairs, *(Repair(name, f"left: {why}", 0.0, 0.0) for name, why in left.items())]
