"""Recover: re-solve the weights of the cut model so that its layers say what the original's said, from inputs alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from onnxprune.analysis import Analysis
from onnxprune.errors import UsageError, nearest
from onnxprune.files import workspace
from onnxprune.graph.infer import probe_at
from onnxprune.graph.view import Graph
from onnxprune.model.weights import Weight
from onnxprune.passes.kept import Fitted, Kept, print_of
from onnxprune.passes.material import NO_DATA, CalibrationSplit, no_data, split_for
from onnxprune.passes.outcome import doubts, is_worse, judge, noise, remarks
from onnxprune.passes.prepared import Prepared
from onnxprune.passes.reached import NEVER, of_iterations, untaken
from onnxprune.passes.restate import Restated, normalisations
from onnxprune.passes.seen import can_follow, comparable_tensors, inside, survivors
from onnxprune.pipeline import Context, Model, ModelParts, Pass, PassResult, Requirement
from onnxprune.propagate import infer_by_rule
from onnxprune.recover import MODES
from onnxprune.recover.aims import Aim, Aims, find_aims
from onnxprune.recover.layers import Layer
from onnxprune.recover.logits import Mixing, find_pairs, mixings
from onnxprune.recover.problem import Get, Problem
from onnxprune.recover.repair import repair
from onnxprune.report.facts import Fact, Fidelity, Recovered, Recovery, Remark, Repair
from onnxprune.rewrite.after import After
from onnxprune.runtime.capture import count
from onnxprune.runtime.parallel import spread
from onnxprune.runtime.segments import Segments, Store
from onnxprune.runtime.sessions import Feed
from onnxprune.runtime.ways import Way, ways

# Bytes of activations to hold in memory where nobody says how many.
_MEMORY = 2 << 30
# Unknowns per output from which on products are shared between BLAS threads.
_WIDE = 1024
# Share of noise below which nothing is left to repair.
_EXACT = 1e-9


HAS_INPUTS = Requirement(
    "calibration data, and there is none", lambda context, _: context.calibration is not None, NO_DATA, of_context=True
)

_Values = tuple[Get, Get, Any, Sequence[int], int]


@dataclass(frozen=True, slots=True)
class _Attempt:
    """What a recovery did: its layers, the model (None: as before), and fidelity before and after."""

    repairs: Sequence[Repair] = ()
    left: Mapping[str, str] = field(default_factory=dict)
    parts: ModelParts | None = None
    before: Fidelity | None = None
    after: Fidelity | None = None
    worse: bool = False


class Recover(Pass):
    """Repair a cut model in closed form.

    Every contraction is fitted by least squares, in the order in which data flows: from the cut and already repaired
    model's input of the layer to what the original had at its output, or at the sum that its output goes into.

    Args:
        mode: ``none``, ``bias`` (means), ``bn`` (a scale and shift per output), ``lstsq`` (weights, every layer aimed
            at its own output), ``full`` (whichever errs least on held-out data, aimed at sums) or ``datafree`` (the
            same from inputs that are made up, see :func:`onnxprune.passes.datafree.make_up`: much weaker; data are
            used to compare on, where there are any).
        memory_limit: bytes of activations to hold in memory, else the run's, else 2 GiB; more go to temporary files.
        symmetric: fit layers from the original's inputs where the cut left them, not from the cut model's, so that no
            layer makes up for what others lost; worse, and there for comparison.
        why: who chose the mode, for the report. near: fit only the layers that read less than they did, and do not
            judge the result: cheap where little was cut, for those who judge it themselves.

    Without data BatchNormalizations have, as long as layers are fitted, the statistics of what is made up, see
    :class:`onnxprune.passes.restate.Restated`.

    Every eighth batch of the data is kept from the fit, to compare the result with the original on. A repair that
    takes the outputs further from it there is undone.

    Raises:
        UsageError: an unknown mode, no data, or data that does not fit.
    """

    def __init__(
        self,
        mode: str = "full",
        *,
        memory_limit: int | None = None,
        symmetric: bool = False,
        why: str = "asked for",
        near: bool = False,
    ) -> None:
        self.mode, self.memory_limit, self.symmetric, self.why = check_mode(mode), memory_limit, symmetric, why
        self.near = near
        if mode not in ("none", "datafree"):
            self.requires = (HAS_INPUTS,)

    @property
    def label(self) -> str:
        """The pass with its mode."""
        return f"recover {self.mode!r}"

    def __call__(self, context: Context, model: Model) -> PassResult:
        """Replace the pruned model's weights."""
        if self.mode == "none" or not (model.is_pruned or model.is_factorized):
            return PassResult(model, [Recovered(Recovery(self.mode, self.why))], changed=False)
        split = split_for(context, model.analysis, self.mode)
        with context.stage("recover"):
            best = self._best(context, model, split)
            warnings = [] if split.synthetic else doubts(model.analysis, split.fit, best.repairs)
        whole = Recovery(self.mode, self.why, split.synthetic, split.num_fit, split.num_held_out)
        whole.before, whole.after, whole.undone = best.before, best.after, best.worse
        warnings += remarks(whole, best.repairs, best.left)
        left = [Repair(name, f"left: {why}", 0.0, 0.0) for name, why in best.left.items()]
        facts: list[Fact] = [Recovered(whole, [*best.repairs, *left]), *map(Remark, warnings)]
        recovered = replace(model, hold_out=split.validation)
        if not best.worse and best.parts is not None:
            recovered = recovered.with_parts(best.parts, as_pruned=model.as_pruned or model.parts)
        return PassResult(recovered, facts)

    def _best(self, context: Context, model: Model, split: CalibrationSplit) -> _Attempt:
        """The last attempt that makes nothing worse, or the first that is exact."""
        best = None
        key = self._key(context, model, split)
        for restate in _ways(self.mode, model.analysis):
            prepared = Prepared(*model.parts)
            kept = Kept(context.cache, f"{restate} {key}") if context.cache is not None and key else None
            with workspace() as folder:
                repairs, left = self._repair(context, model, prepared, split.fit, folder, restate, kept)
            parts = prepared.model() if any(r.done for r in repairs) else None
            if self.near:
                return _Attempt(repairs, left, parts)
            hold_out = split.validation
            pair = [model.parts, parts or model.parts]
            was, after = judge(context.analysis, pair, hold_out.inputs, hold_out.name)
            found = _Attempt(repairs, left, parts, was, after, is_worse(after, was))
            best = found if best is None or best.worse or not found.worse else best
            if noise(after) < _EXACT:
                break
        assert best is not None
        return best

    def _key(self, context: Context, model: Model, split: CalibrationSplit) -> str:
        """Everything that fitted layers depend on; empty where they are not kept."""
        if context.cache is None or self.near:
            return ""
        settings = model.analysis.loaded.sha256, self.mode, self.symmetric, model.is_factorized
        return f"{settings} {print_of(*model.parts, split.fit)}"

    def _of_original(self, aim: Aim) -> tuple[str, ...]:
        """What has to be known of the original before a layer can be fitted."""
        names = (aim.tail.aim, aim.data) if self.symmetric or aim.recurrent else (aim.tail.aim,)
        return (*names, *(name for name, _ in aim.where))

    @property
    def _fitting(self) -> str:
        """What is tried for a layer."""
        return "full" if self.mode == "datafree" else self.mode

    def _aims(self, context: Context, model: Model, graph: Graph, after: After, taken: Sequence[Way]) -> Aims:
        """What to repair in the cut model on batches that take these ways."""
        known = {name for name in comparable_tensors(context, model) if can_follow(model.analysis, after, name)}
        shape = _shapes_now(model.analysis, graph) if model.is_factorized else after.shape
        aims = find_aims(graph, known, shape, joint=self._fitting == "full")
        aims.leave(partial(untaken, graph, taken))
        if self.near:
            aims.keep(lambda aim: after.touched(aim.data))
        return aims

    def _values(
        self, aim: Aim, store: tuple[Store, Store], weights: Mapping[str, Weight], after: After, feeds: Sequence[Feed]
    ) -> _Values:
        """What a problem has to know of values; of stores the one of the cut model comes first."""
        get = of_iterations(store[1].get, aim.where, weights) if aim.where else store[1].get
        data = partial(survivors, get, after) if self.symmetric or aim.recurrent else store[0].get
        own = [b for b in store[1].batches([aim.tail.aim]) if not aim.where or len(get(aim.tail.aim, b))]
        return data, get, after.steps(aim.tail.aim), own, sum(count(feeds[b]) for b in own)

    def _repair(
        self,
        context: Context,
        pruned: Model,
        model: Prepared,
        feeds: Sequence[Feed],
        folder: Path,
        restate: bool,
        kept: Kept | None,
    ) -> tuple[list[Repair], Mapping[str, str]]:
        analysis, graph, weights = pruned.analysis, model.graph, model.weights
        mode = self._fitting
        after = After(analysis.table, pruned.removal)
        # Both models' activations are held, so that each may have half.
        memory = (self.memory_limit or context.memory_limit or _MEMORY) // 2
        full = context.analysis.graph
        full_weights = full.weights
        restated = None
        if restate:
            restated = Restated(full, after, graph, weights, feeds, Store(memory, folder))
            full_weights = restated.original
        taken = ways(full, full.weights, feeds)
        aims = self._aims(context, pruned, graph, after, taken)
        store = Store(memory, folder), Store(memory, folder)
        needs = [[n for a in level for n in a.needs] for level in aims.levels]
        within = inside(analysis)
        cut_run = Segments(graph, weights, needs, store[0], within, taken)
        wanted = [[n for a in x for n in self._of_original(a)] for x in aims.levels]
        full_run = Segments(full, full_weights, wanted, store[1], within, taken)
        for run in (cut_run, full_run):
            run.feed(feeds)
        # Labels are of the model that was cut: of layers that were taken apart they know nothing.
        pairwise = self.mode == "full" and not pruned.is_factorized
        pairs = find_pairs(analysis.table, analysis.units.component, after, aims) if pairwise else []
        mixed: dict[int, Mixing] = {}
        values: dict[int, _Values] = {}
        repairs: list[Repair] = []
        for number, level in enumerate(aims.levels):
            for run in (cut_run, full_run):
                for _ in run.run(number):
                    pass
            values.update({a.node.index: self._values(a, store, full_weights, after, feeds) for a in level})
            layers = [Layer(graph, weights, a) for a in level if values[a.node.index][3]]
            aims.left.update({a.node.label: NEVER for a in level if not values[a.node.index][3]})
            mixed.update(mixings([p for p in pairs if p.level == level[0].level], store[1].get, store[1].batches))

            def one(layer: Layer) -> Fitted:
                return _fitted(layer, values[layer.node.index], mode, mixed.get(layer.node.index))

            repairs += [_written(*pair) for pair in zip(layers, _found(one, layers, number, kept), strict=True)]
            for run in (cut_run, full_run):
                run.done(number)
            context.tell("recover", (number + 1) / len(aims.levels))
        if restated is not None:
            restated.undo()
        return repairs, aims.left


def _found(fit: Callable[[Layer], Fitted], layers: Sequence[Layer], level: int, kept: Kept | None) -> Sequence[Fitted]:
    """The fits of a level's layers, from where they are kept if they are there."""
    names = [layer.node.label for layer in layers]
    found = None if kept is None else kept.load(level, names)
    if found is None:
        found = spread(fit, layers, heavy=any(_columns(layer.shape) >= _WIDE for layer in layers))
        if kept is not None:
            kept.save(level, names, found)
    return found


def _fitted(layer: Layer, values: _Values, mode: str, mixing: Mixing | None) -> Fitted:
    """New weights for one layer, or those it has; ``values`` are a problem's."""
    matrix, bias = layer.read()
    channels = matrix.shape[0] * matrix.shape[1] // layer.form.taps
    problem = Problem(layer.aim, layer.shape, channels, *values, mixing=mixing)
    solution = repair(problem, matrix, bias, mode=mode, fixed_bias=layer.fixed_bias, as_stored=layer.as_stored)
    return solution, problem.extent


def _written(layer: Layer, fitted: Fitted) -> Repair:
    solution, extent = fitted
    if solution.how != "kept":
        layer.write(solution.matrix, solution.bias)
    return Repair(layer.node.label, solution.how, solution.before, solution.after, *extent)


def _shapes_now(analysis: Analysis, graph: Graph) -> Callable[[str], Any]:
    """Shapes in the model as it is: factorized layers have tensors that the original never had."""
    return probe_at(graph, analysis.facts.probes[0].inputs, infer_by_rule).shapes.get


def _ways(mode: str, analysis: Analysis) -> list[bool]:
    """Whether to restate normalisations, one attempt after the other until one is exact.

    A channel that others say exactly is found under the statistics that were trained, which it belongs to. What is
    only alike is weighed better under those of the inputs, where there are normalisations.
    """
    return [False, True] if mode == "datafree" and normalisations(analysis.graph) else [False]


def _columns(shape: Sequence[int]) -> int:
    """Unknowns per output of a layer whose weight has this shape."""
    return int(np.prod(shape)) // max(shape[:2]) if len(shape) > 1 else 1


def check_mode(mode: str) -> str:
    """The mode, if there is such a one; raises UsageError with the nearest."""
    if mode not in MODES:
        raise UsageError(f"Unknown way to recover {mode!r}.", hint=nearest(mode, MODES))
    return mode


def settle_mode(recover: str | None, data: bool, validate: bool) -> tuple[str, str]:
    """How to repair, and who says so.

    Raises:
        UsageError: an unknown mode, or one that needs data where there is none.
    """
    if recover is not None:
        if check_mode(recover) not in ("none", "datafree") and not data:
            raise no_data(recover)
        return recover, "asked for"
    if not data:
        return "none", "no data was given"
    return ("full", "data was given") if validate else ("none", "models are not run")
