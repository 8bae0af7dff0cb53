"""Recover: re-solve the weights of the cut model so that its layers say what the original's said, from inputs alone."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxprune.analysis import Analysis
from onnxprune.contractions import pick, rows_per_sample
from onnxprune.errors import UsageError, nearest
from onnxprune.graph.restore import restore
from onnxprune.graph.unshare import rejoin
from onnxprune.graph.view import Graph
from onnxprune.model.weights import Weight
from onnxprune.passes.calibrate import fixed_batch
from onnxprune.passes.state import State
from onnxprune.recover.aims import Aim, find_aims
from onnxprune.recover.layers import Layer
from onnxprune.recover.solve import Solution, modes, solve
from onnxprune.recover.sums import Sums
from onnxprune.report.facts import Repair
from onnxprune.rewrite.after import After
from onnxprune.rewrite.cut import cut
from onnxprune.runtime.segments import Segments, Store

# Rows per unknown that a layer is fitted to, where there are so many.
_ROWS = 100
# One batch in so many is held out to judge a repair by.
_HELD = 5


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
        batch = fixed_batch(analysis) or (max(1, min(32, source.samples // (2 * _HELD))) if source.samples else 16)
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
            problem = _Problem(after, store[0], store[1], cut_run.batches, samples)
            with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
                repairs += pool.map(lambda aim, p=problem: self._one(p, graph, weights, aim), level)
            for run in (cut_run, full_run):
                run.done(number)
            state.tell("recover", (number + 1) / len(aims.levels))
        return repairs, aims.left

    def _one(self, problem: _Problem, graph: Graph, weights: dict[str, Weight], aim: Aim) -> Repair:
        layer = Layer(graph, weights, aim)
        matrix, bias = layer.read()
        train, held = problem.sums(aim, weights[aim.node.inputs[aim.form.weight]].shape, matrix.shape)
        solution: Solution = solve(train, held, matrix, bias, mode=self.mode, fixed_bias=layer.fixed_bias)
        if solution.how != "kept":
            layer.write(solution.matrix, solution.bias)
        return Repair(aim.node.label, solution.how, solution.before, solution.after)


def _report(state: State, repairs: Sequence[Repair], left: Mapping[str, str]) -> None:
    state.report.repairs = [*repairs, *(Repair(name, f"left: {why}", 0.0, 0.0) for name, why in left.items())]


@dataclass(slots=True)
class _Problem:
    """Data and targets of one level."""

    after: After
    cut: Store
    full: Store
    batches: int
    samples: int

    def sums(self, aim: Aim, weight: Sequence[int], matrix: Sequence[int]) -> tuple[Sums, Sums]:
        """Sums over the batches to fit to and over those held out."""
        parts, n, outputs = matrix
        channels = parts * n // aim.form.taps
        per_sample = rows_per_sample(aim.form, channels, self.samples, _ROWS)
        zero = [
            np.zeros(s) for s in ((parts, n), (parts, outputs), (parts, n, n), (parts, n, outputs), (parts, outputs))
        ]
        sums = Sums(0, *zero), Sums(0, *(z.copy() for z in zero))
        for batch in range(self.batches):
            data, target = self._batch(aim, batch, weight)
            rows = pick(aim.form, data, per_sample)
            one = Sums.of(aim.form.columns(data, rows), aim.form.rows(target, rows))
            sums[batch % _HELD == _HELD - 1].add(one)
        return sums if sums[1].rows else (sums[0], sums[0])

    def _batch(self, aim: Aim, batch: int, weight: Sequence[int]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Input and wanted output of the contraction."""
        data = np.asarray(self.cut.get(aim.data, batch))
        wanted = np.asarray(self.full.get(aim.tail.aim, batch))
        for axis, index in self.after.steps(aim.tail.aim):
            wanted = wanted.take(index, axis=axis) if index.ndim == 1 else np.take_along_axis(wanted, index, axis=axis)
        addends = [np.asarray(self.cut.get(n, batch)) for n in aim.tail.addends]
        shape = aim.form.output_shape(data.shape, weight)
        return data, aim.tail.back(wanted, addends, shape)
