"""Recover: solve the weights of a pruned model so that its layers reproduce the original outputs, from inputs alone."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxprune import __version__
from onnxprune.channels.analysis import Analysis
from onnxprune.channels.propagate import infer_by_rule
from onnxprune.channels.survivors import Survivors
from onnxprune.errors import Note, UsageError, argument, nearest
from onnxprune.graph.inference import probe_at
from onnxprune.graph.view import Graph
from onnxprune.io.files import workspace
from onnxprune.io.weights import Weight
from onnxprune.passes.calibrate import bytes_per_sample
from onnxprune.passes.calibration import MAX_VALIDATION, CalibrationBatches, CalibrationSplit
from onnxprune.passes.comparable import (
    NEVER,
    UNREACHED,
    can_follow,
    comparable_tensors,
    inside,
    of_iterations,
    survivors,
    untaken,
)
from onnxprune.passes.prepared import Prepared
from onnxprune.passes.recalibrated import Recalibrated, normalisations
from onnxprune.passes.row_importance import Importances, row_importances
from onnxprune.passes.synthetic import draw_calibration
from onnxprune.passes.workspace import Workspace
from onnxprune.pipeline import Context, HoldOut, Model, ModelParts, Pass, PassResult, Requirement, uninterrupted
from onnxprune.recovery import MODES
from onnxprune.recovery.attention import Mixing, find_pairs, mixings
from onnxprune.recovery.in_floats import in_floats
from onnxprune.recovery.layer import Counted, Get, Importance, Problem, recover_layer
from onnxprune.recovery.regression import HOLD_OUT_PERIOD, Solution
from onnxprune.recovery.targets import Layer, RecoveryTarget, RecoveryTargets, find_targets
from onnxprune.report.facts import FEW_SAMPLES, Fact, Fidelity, Recovered, Recovery, Remark, Repair
from onnxprune.runtime import sessions
from onnxprune.runtime.capture import (
    BranchAssignment,
    branch_assignments,
    count,
    make_folder,
    read_arrays,
    write_arrays,
)
from onnxprune.runtime.data import StoredFeeds
from onnxprune.runtime.fidelity import KnownOutputs, Outputs, fidelity, hints_of
from onnxprune.runtime.masks import counted_rows
from onnxprune.runtime.segments import Segments, Store
from onnxprune.runtime.sessions import Feed, spread
from onnxprune.settings import named_arguments

# -- what a recovery is worth ------------------------------------------------------------------------------------------


# Samples from which on they should be of several classes.
_TELLING = 16
# Hold-out error that is rounding: the removal did not affect the layer.
_UNTOUCHED = 1e-9
# A recovery that leaves more than this share of the noise is undone.
_WORSE = 1.01


def doubts(analysis: Analysis, feeds: Sequence[Feed], repairs: Sequence[Repair]) -> list[str]:
    """Return warnings about the data used for fitting: each warning once, with the layer where it is worst."""
    warnings = []
    samples = sum(map(count, feeds))
    if samples < FEW_SAMPLES:
        what = "1 sample" if samples == 1 else f"{samples} samples"
        warnings.append(f"recovery has only {what}, without the held-out ones: give more, for example 256")
    if samples > 1 and _constant(feeds):
        warnings.append(
            "all calibration samples are the same, so recovery can learn almost nothing: give different samples"
        )
        return warnings
    if samples >= _TELLING and (output := _single_class(analysis, feeds)):
        warnings.append(
            f"the original predicts the same class for all {samples} calibration samples (largest entry of "
            f"{output!r}): recovery has no samples of the other classes; give samples of all classes"
        )
    return warnings + _gaps(repairs)


def _single_class(analysis: Analysis, feeds: Sequence[Feed]) -> str:
    """Return the first output of class scores whose largest entry is the same for all samples, or an empty string."""
    first: dict[str, int] = {}
    varied: set[str] = set()
    with Workspace.of(analysis) as trial:
        session = sessions.open_session(trial.original)
        for feed in feeds:
            for name, value in sessions.run(session, feed).items():
                if value.ndim != 2 or value.shape[1] < 2 or not value.size or value.dtype.kind != "f":
                    continue
                best = value.argmax(axis=1)
                if (best != first.setdefault(name, int(best[0]))).any():
                    varied.add(name)
            if varied >= first.keys():
                return ""
    return next(name for name in first if name not in varied)


def _gaps(repairs: Sequence[Repair]) -> list[str]:
    """Return the layers with too little data."""
    warnings = []
    reached = [r for r in repairs if r.unknowns and r.before > _UNTOUCHED]
    short = [r for r in reached if r.rows < r.unknowns]
    if short:
        worst = min(short, key=lambda r: r.rows / r.unknowns)
        warnings.append(
            f"{_layers(short)} more unknowns than the data has rows (worst: {worst.layer}, {worst.unknowns} and "
            f"{worst.rows}): their weights change little; give more samples"
        )
    narrow = [r for r in reached if r not in short and r.directions < r.unknowns / 2]
    if narrow:
        worst = min(narrow, key=lambda r: r.directions / r.unknowns)
        warnings.append(
            f"{_layers(narrow)} inputs that vary in less than half of their directions (worst: {worst.layer}, "
            f"{worst.directions} of {worst.unknowns}): the other directions are not recovered; give more varied "
            "samples"
        )
    return warnings


def _layers(which: Sequence[Repair]) -> str:
    return "1 layer has" if len(which) == 1 else f"{len(which)} layers have"


def _constant(feeds: Sequence[Feed]) -> bool:
    """Return whether every sample of every input is the same."""
    for name, value in feeds[0].items():
        for feed in feeds:
            if value.ndim == 0 or feed[name].shape[1:] != value.shape[1:] or (feed[name] != value[:1]).any():
                return False
    return True


def compare_with_original(
    analysis: Analysis,
    models: Sequence[ModelParts],
    hold_out: HoldOut,
    outputs: Outputs | None = None,
    known: KnownOutputs | None = None,
) -> list[Fidelity]:
    """Measure the fidelity of several models to the original on the same inputs.

    Args:
        analysis: of the original.
        models: to compare with it.
        hold_out: the inputs.
        outputs: kinds of outputs that a user set.
        known: outputs of the original that are known from elsewhere; None: none.
    """
    facts: list[Fidelity] = []
    known = KnownOutputs() if known is None else known
    with Workspace.of(analysis) as trial:
        settings: dict[str, Any] = {"hints": hints_of(analysis), "outputs": outputs, "together": not trial.heavy}
        settings["known"] = None if trial.drawing else known
        for number, model in enumerate(models):
            path, _ = trial.write(*model, f"model{number}")
            facts.append(fidelity(trial.original, path, hold_out.inputs, hold_out.name, **settings))
    return facts


def is_worse(after: Fidelity, before: Fidelity) -> bool:
    """Return whether the outputs are less faithful: more answers are lost, or within chance the outputs differ more.

    Answers are counted on few samples: a difference below their standard error, sqrt(p (1 - p) / n), is chance.
    """
    now, was = loss(after), loss(before)
    if abs(now - was) > math.sqrt(max(was * (1.0 - was), 0.0) / max(before.samples, 1)):
        return now > _WORSE * was
    return noise(after) > _WORSE * noise(before)


def loss(facts: Fidelity) -> float:
    """Return the share of the original's answers that are lost, averaged over answers."""
    return float(np.mean([1 - answer.points / 100 for answer in facts.answers] or [noise(facts)]))


def noise(facts: Fidelity) -> float:
    """Return |a - b|^2 / |a|^2, at most 1, averaged over outputs; the Hellinger distance for class probabilities."""
    return float(np.mean([o.noise for o in facts.outputs] or [0.0]))


def remarks(facts: Recovery, repairs: Sequence[Repair], reasons: Mapping[str, str]) -> list[str]:
    """Return warnings about a recovery that had little effect."""
    unreached = sum(why.startswith(UNREACHED) for why in reasons.values())
    warnings = []
    if unreached:
        what = "1 layer lies" if unreached == 1 else f"{unreached} layers lie"
        warnings.append(
            f"{what} in branches that no calibration sample takes, and cannot be recovered; {argument('explain')} "
            "lists them"
        )
    if facts.undone:
        help = f"inputs of your own ({argument('data')})" if facts.inputs else "more samples"
        warnings.append(f"recovery increased the error of the outputs and was undone: {help} may help")
    elif not any(r.done for r in repairs):
        why = (
            "no layer can be changed" if reasons and not repairs else "no change lowered the error on hold-out samples"
        )
        mode = argument("recover", facts.mode)
        warnings.append(f"no layer was recovered ({mode}): {why}; {argument('explain')} shows the reasons")
    return [Note(text) for text in warnings]


# -- its inputs --------------------------------------------------------------------------------------------------------


NO_DATA = (
    f"Give inputs with {argument('data')} (a few hundred, without labels), or recover from synthetic data, which is "
    f"weaker: {argument('recover', 'datafree')}."
)


def no_data(mode: str) -> UsageError:
    """Return the error of a recovery without data."""
    return UsageError(
        f"{argument('recover', mode)} needs calibration data, but {argument('data')} is missing", hint=NO_DATA
    )


def split_for(context: Context, analysis: Analysis, mode: str) -> CalibrationSplit:
    """Return the inputs for a mode of recovery.

    Args:
        context: context of the run.
        analysis: analysis of the model before pruning.
        mode: see :class:`onnxprune.passes.Recover`.

    Raises:
        UsageError: there is no data and the mode needs some, or it does not fit.
    """
    if mode != "datafree":
        if context.calibration is None:
            raise no_data(mode)
        return CalibrationSplit.of(_batches(context, analysis), context.inputs().name)
    with context.stage("inputs"):
        drawn_feeds, spread = draw_calibration(context, analysis)
    words = f"synthetic inputs (range {spread})" if spread else "synthetic inputs"
    if context.calibration is None:
        return CalibrationSplit.of(drawn_feeds, "synthetic", words)
    source = CalibrationBatches(context, analysis)
    samples = 0
    feeds: list[Feed] = []
    for feed in source.batches():
        feeds.append(feed)
        samples += count(feed)
        if context.calibration.limit is None and samples >= MAX_VALIDATION:
            break
    if not feeds:
        raise _too_few(source)
    return CalibrationSplit(drawn_feeds, HoldOut(feeds, context.inputs().name), words)


def _batches(context: Context, analysis: Analysis) -> StoredFeeds:
    """Return the data in batches, small enough to leave some for the hold-out."""
    assert context.calibration is not None
    all_batches, source = (
        CalibrationBatches(context, analysis),
        CalibrationBatches(context, analysis, context.effort.samples),
    )
    if source.samples != all_batches.samples:
        amount = f"{all_batches.samples} samples" if all_batches.samples else "the samples"
        context.stages.leave_out(f"recovery from more than the first {source.samples} of {amount}")
    size = min(32, context.calibration.batch_size or 32)
    if source.samples is not None:
        size = max(1, min(size, source.samples // (2 * HOLD_OUT_PERIOD)))
    batches = StoredFeeds(source.batches(size))
    if not batches:
        raise _too_few(source)
    return batches


def _too_few(source: CalibrationBatches) -> UsageError:
    return UsageError(
        "The data has too few samples for one call of the model.", hint=f"Its batch size is {source.fixed or 1}."
    )


# -- checkpoints -------------------------------------------------------------------------------------------------------


FORMAT = 2
"""Raised whenever layers are fitted in another way."""

Fitted = tuple[Solution, tuple[int, int, int]]
"""A layer's new weights, and the number of rows, the unknowns and the rank of the fit."""


class Checkpoints:
    """Solutions level by level, in one folder per model, data and settings.

    Args:
        folder: parent folder, made where it does not exist.
        key: fingerprint of model, data and settings, see :func:`fingerprint_of`.

    Raises:
        UsageError: the folder cannot be made or written.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self._folder = folder / f"repair-{hashlib.sha256(f'{__version__}:{FORMAT}:{key}'.encode()).hexdigest()[:32]}"
        make_folder(self._folder)

    def load(self, level: int, layers: Sequence[str]) -> list[Fitted] | None:
        """Load the solutions of these layers; None where they were not stored."""
        file = read_arrays(self._path(level))
        try:
            if list(file["layers"]) == list(layers):
                return [_read(file, i) for i in range(len(layers))]
        except (KeyError, TypeError, ValueError):  # missing, or something else
            return None
        return None

    def save(self, level: int, layers: Sequence[str], fits: Sequence[Fitted]) -> None:
        """Write the solutions of a level, all at once."""
        arrays = {"layers": np.asarray(layers, dtype=np.str_)}
        for i, (solution, extent) in enumerate(fits):
            numbers = [solution.before, solution.after, np.nan if solution.ridge is None else solution.ridge]
            values = (solution.matrix, solution.bias, np.asarray(numbers), np.asarray(solution.how), np.asarray(extent))
            arrays |= {f"{i}.{name}": value for name, value in zip(_PARTS, values, strict=True)}
        write_arrays(self._path(level), arrays)

    def _path(self, level: int) -> Path:
        return self._folder / f"{level}.npz"


_PARTS = ("matrix", "bias", "numbers", "how", "extent")


def _read(file: Mapping[str, np.ndarray], i: int) -> Fitted:
    matrix, bias, numbers, how, extent = (file[f"{i}.{name}"] for name in _PARTS)
    before, after, ridge = map(float, numbers)
    rows, unknowns, directions = map(int, extent)
    solution = Solution(matrix, bias, before, after, str(how), None if np.isnan(ridge) else ridge)
    return solution, (rows, unknowns, directions)


def fingerprint_of(proto: onnx.ModelProto, weights: Mapping[str, Weight], feeds: Sequence[Feed]) -> str:
    """Return the SHA-256 of a model and of inputs."""
    digest = hashlib.sha256(proto.SerializeToString(deterministic=True))
    for name in sorted(weights):
        weight = weights[name]
        digest.update(f"{name}:{weight.onnx_type}:{weight.shape}".encode())
        text = weight.onnx_type == onnx.TensorProto.STRING
        digest.update(repr(weight.read().tolist()).encode() if text else weight.stored())
    for feed in feeds:
        for name, value in sorted(feed.items()):
            digest.update(f"{name}:{value.dtype}:{value.shape}".encode())
            digest.update(repr(value.tolist()).encode() if value.dtype == object else value.tobytes())
    return digest.hexdigest()


# -- the pass ----------------------------------------------------------------------------------------------------------


# Default of the bytes of activations to hold in memory.
_MEMORY = 512 << 20
# Share of this memory, one in so many, up to which activations of the original are computed ahead.
_AHEAD = 8
# Unknowns per output from which on products are shared between BLAS threads.
_WIDE = 1024
# Share of noise below which no recovery is needed.
_EXACT = 1e-9
# Reason of the layers that an interrupt left.
_LATE = "the recovery was interrupted before it came to it"


HAS_INPUTS = Requirement(
    "calibration data, and there is none", lambda context, _: context.calibration is not None, NO_DATA, of_context=True
)

_Values = tuple[Get, Get, Any, Sequence[int], int, Counted, Importance]


@dataclass(frozen=True, slots=True)
class _Outcome:
    """Result of a recovery: its layers, the model (None: unchanged), and fidelity before and after."""

    repairs: Sequence[Repair] = ()
    reasons: Mapping[str, str] = field(default_factory=dict)
    parts: ModelParts | None = None
    before: Fidelity | None = None
    after: Fidelity | None = None
    worse: bool = False


@named_arguments()
class Recover(Pass):
    """Recover a pruned model in closed form.

    Every contraction is fitted by least squares, in the order in which data flows: from the layer's input in the pruned
    and so far recovered model to its output in the original, or to the sum that reads the output.

    Args:
        mode: ``none``, ``bias`` (means), ``bn`` (a scale and shift per output), ``lstsq`` (weights, every layer fitted
            to its own output), ``full`` (the candidate with the least hold-out error, fitted to sums) or ``datafree``
            (the same from synthetic inputs, see :func:`onnxprune.passes.synthetic.draw_calibration`: much weaker;
            data are only used for comparison, where there are any).
        memory_limit: bytes of activations to hold in memory, else the run's, else 512 MiB; more go to temporary files.
        symmetric: fit layers from the surviving inputs of the original, not from those of the pruned model, so that no
            layer compensates errors of others; worse, for comparison only.
        why: reason of the mode, for the report.
        near: fit only the layers that lost input channels, and do not evaluate the result: cheap after small removals,
            for callers that evaluate it themselves.

    Without data, BatchNormalizations have the statistics of the synthetic inputs while layers are fitted, see
    :class:`onnxprune.passes.recalibrated.Recalibrated`.

    Every eighth batch of the data is a hold-out on which the result is compared with the original. A recovery that
    lowers the fidelity there is undone.

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
        if self.mode == "none" or not model.is_reduced:
            return PassResult(model, [Recovered(Recovery(self.mode, self.why))], changed=False)
        split = split_for(context, model.analysis, self.mode)
        with context.stage("recover"):
            best = self._best(context, model, split)
            warnings = [] if split.synthetic else doubts(model.analysis, split.fit, best.repairs)
        recovery = Recovery(self.mode, self.why, split.synthetic, split.num_fit, split.num_held_out)
        recovery.before, recovery.after, recovery.undone = best.before, best.after, best.worse
        warnings += remarks(recovery, best.repairs, best.reasons)
        skipped = [Repair(name, f"left: {why}", 0.0, 0.0) for name, why in best.reasons.items()]
        facts: list[Fact] = [Recovered(recovery, [*best.repairs, *skipped]), *map(Remark, warnings)]
        recovered = replace(model, hold_out=split.validation)
        if not best.worse and best.parts is not None:
            recovered = recovered.with_parts(best.parts, as_pruned=model.as_pruned or model.parts)
        return PassResult(recovered, facts)

    def _best(self, context: Context, model: Model, split: CalibrationSplit) -> _Outcome:
        """Return the last attempt that makes nothing worse, or the first that is exact."""
        best = None
        key = self._key(context, model, split)
        for recalibrate in _recalibrations(self.mode, model.analysis):
            prepared = Prepared(*model.parts, in_floats=True)
            checkpoints = (
                Checkpoints(context.cache, f"{recalibrate} {key}") if context.cache is not None and key else None
            )
            with workspace() as folder:
                repairs, reasons = self._repair(context, model, prepared, split.fit, folder, recalibrate, checkpoints)
            parts = prepared.model() if any(r.done for r in repairs) else None
            if self.near:
                return _Outcome(repairs, reasons, parts)
            pair = [model.parts] if parts is None else [model.parts, parts]
            was, *others = compare_with_original(
                context.analysis, pair, split.validation, context.outputs, known=context.known
            )
            after = others[0] if others else was
            outcome = _Outcome(repairs, reasons, parts, was, after, is_worse(after, was))
            best = outcome if best is None or best.worse or not outcome.worse else best
            if noise(after) < _EXACT or context.stages.interrupted:
                break
        assert best is not None
        return best

    def _key(self, context: Context, model: Model, split: CalibrationSplit) -> str:
        """Return a key of everything that fitted layers depend on; empty where no checkpoint is kept."""
        if context.cache is None or self.near:
            return ""
        how = self.mode, self.symmetric, context.effort.rows
        settings = model.analysis.loaded.sha256, *how, model.is_factorized, sorted(model.locked)
        return f"{settings} {fingerprint_of(*model.parts, split.fit)}"

    def _of_original(self, target: RecoveryTarget) -> tuple[str, ...]:
        """Return the tensors of the original that the fit of a layer needs."""
        names = (target.path.target, target.data) if self.symmetric or target.recurrent else (target.path.target,)
        return (*names, *(name for name, _ in target.conditions))

    @property
    def _fitting(self) -> str:
        """Return the mode of the fit of a layer."""
        return "full" if self.mode == "datafree" else self.mode

    def _targets(
        self, context: Context, model: Model, now: Prepared, after: Survivors, branches: Sequence[BranchAssignment]
    ) -> RecoveryTargets:
        """Return the recovery targets in the pruned model on batches with this branch assignment."""
        graph = now.graph
        comparable = {name for name in comparable_tensors(context, model) if can_follow(model.analysis, after, name)}
        comparable |= {name for name, known in now.same.items() if known in comparable}
        shape = _shapes_now(model.analysis, graph) if model.is_factorized or now.has_new_tensors else after.shape
        targets = find_targets(graph, comparable, shape, joint=self._fitting == "full")
        targets.reject(partial(untaken, graph, branches))
        if self.near:
            targets.keep(lambda target: after.touched(target.data))
        return targets

    def _values(
        self,
        target: RecoveryTarget,
        store: tuple[Store, Store],
        weights: Mapping[str, Weight],
        after: Survivors,
        feeds: Sequence[Feed],
        importances: Sequence[Importances],
    ) -> _Values:
        """Return the tensor values that a problem needs; the store of the pruned model comes first."""
        get = of_iterations(store[1].get, target.conditions, weights) if target.conditions else store[1].get
        data = partial(survivors, get, after) if self.symmetric or target.recurrent else store[0].get
        usable = [
            b
            for b in store[1].batches([target.path.target])
            if not target.conditions or len(get(target.path.target, b))
        ]
        samples = sum(count(feeds[b]) for b in usable)
        counted: Counted = lambda b, sizes: counted_rows(feeds[b], sizes)  # noqa: E731
        importance: Importance = lambda b: importances[b].get(target.path.target)  # noqa: E731
        return data, get, after.steps(target.path.target), usable, samples, counted, importance

    def _importances(
        self, context: Context, full: Graph, targets: RecoveryTargets, feeds: Sequence[Feed]
    ) -> Sequence[Importances]:
        """Return the importances of positions of the targets in the original, for every batch."""
        every_target = [target for level in targets.levels for target in level]
        axes = {
            target.path.target: target.form.axes[0]
            for target in every_target
            if len(target.form.axes) == 1 and not (target.path.is_rearranged or target.conditions or target.recurrent)
        }
        is_wanted = self.mode == "full" and not self.near and context.calibration is not None
        return row_importances(context, full, axes if is_wanted else {}, feeds)

    def _repair(
        self,
        context: Context,
        pruned: Model,
        model: Prepared,
        feeds: Sequence[Feed],
        folder: Path,
        recalibrate: bool,
        checkpoints: Checkpoints | None,
    ) -> tuple[list[Repair], Mapping[str, str]]:
        analysis, graph, weights = pruned.analysis, model.graph, model.weights
        mode = self._fitting
        after = Survivors(analysis.table, pruned.removal, model.same)
        # Activations of both models are held: half of the memory for each.
        memory = (self.memory_limit or context.memory_limit or _MEMORY) // 2
        full = in_floats(context.analysis.graph)
        full_weights = full.weights
        recalibrated = None
        if recalibrate:
            recalibrated = Recalibrated(full, after, graph, weights, feeds, Store(memory, folder))
            full_weights = recalibrated.original
        branches = branch_assignments(full, full.weights, feeds)
        targets = self._targets(context, pruned, model, after, branches)
        store = Store(memory, folder), Store(memory, folder)
        needs = [[n for a in level for n in a.needs] for level in targets.levels]
        within = inside(analysis)
        cut_run = Segments(graph, weights, needs, store[0], within, branches)
        needs_of_original = [[n for a in x for n in self._of_original(a)] for x in targets.levels]
        starts = run_ahead(analysis, needs_of_original, sum(map(count, feeds)), memory // _AHEAD)
        full_run = Segments(full, full_weights, needs_of_original, store[1], within, branches, starts)
        for run in (cut_run, full_run):
            run.feed(feeds)
        importances = self._importances(context, full, targets, feeds)
        # Labels belong to the model before pruning and do not cover factorized layers.
        pairwise = self.mode == "full" and not pruned.is_factorized
        pairs = find_pairs(analysis.table, analysis.units.component, after, targets) if pairwise else []
        mixed: dict[int, Mixing] = {}
        values: dict[int, _Values] = {}
        repairs: list[Repair] = []

        def one(layer: Layer) -> Fitted:
            problem = values[layer.node.index]
            locked = layer.target.weight.root in pruned.locked
            settings = {"mixing": mixed.get(layer.node.index), "density": context.effort.rows}
            at_once = min(len(layers), os.cpu_count() or 1)
            return _fitted(layer, problem, mode, locked, memory=memory // at_once, **settings)

        with context.stages.until_interrupted(lambda: _so_far(repairs, targets)):
            for number, level in enumerate(targets.levels):
                _run_piece((cut_run, full_run), number)
                values.update(
                    {a.node.index: self._values(a, store, full_weights, after, feeds, importances) for a in level}
                )
                layers = [Layer(graph, weights, a) for a in level if values[a.node.index][3]]
                targets.reasons.update({a.node.label: NEVER for a in level if not values[a.node.index][3]})
                mixed.update(mixings([p for p in pairs if p.level == level[0].level], store[1].get, store[1].batches))
                fits = _fitted_level(one, layers, number, checkpoints)
                with uninterrupted():
                    repairs += [_written(*pair) for pair in zip(layers, fits, strict=True)]
                for run in (cut_run, full_run):
                    run.drop(number)
                context.tell("recover", (number + 1) / len(targets.levels))
        if recalibrated is not None:
            recalibrated.undo()
        return repairs, {**targets.reasons, **_unfitted(targets, repairs)}


def _run_piece(runs: Sequence[Segments], number: int) -> None:
    """Run one piece of every model on all batches."""
    for run in runs:
        for _ in run.run(number):
            pass


def _so_far(repairs: Sequence[Repair], targets: RecoveryTargets) -> str:
    """Describe a recovery that ends early; empty where no layer has new weights."""
    num_recovered, num_targets = sum(r.done for r in repairs), sum(map(len, targets.levels))
    return f"the recovery ended after {len(repairs)} of {num_targets} layers" if num_recovered else ""


def _unfitted(targets: RecoveryTargets, repairs: Sequence[Repair]) -> dict[str, str]:
    """Return the reasons of the layers that a recovery did not reach before its early end."""
    listed = {r.layer for r in repairs} | targets.reasons.keys()
    return {a.node.label: _LATE for level in targets.levels for a in level if a.node.label not in listed}


def run_ahead(analysis: Analysis, names_by_level: Sequence[Sequence[str]], samples: int, limit: int) -> list[int]:
    """Return for every level the first level of the piece in which its tensors of the original are computed.

    Args:
        analysis: analysis of the model, for the sizes of its tensors.
        names_by_level: tensors of every level.
        samples: number of samples.
        limit: bytes of tensors to compute at a time, unless a level alone has more.
    """
    starts: list[int] = []
    room = 0
    sizes = bytes_per_sample(analysis, {n for names in names_by_level for n in names})
    for level, names in enumerate(names_by_level):
        size = samples * sum(sizes.get(name, limit) for name in set(names))
        if starts and size <= room:
            starts.append(starts[-1])
            room -= size
        else:
            starts.append(level)
            room = limit - size
    return starts


def _fitted_level(
    fit: Callable[[Layer], Fitted], layers: Sequence[Layer], level: int, checkpoints: Checkpoints | None
) -> Sequence[Fitted]:
    """Return the fits of the layers of a level, from a checkpoint if there is one."""
    names = [layer.node.label for layer in layers]
    fits = None if checkpoints is None else checkpoints.load(level, names)
    if fits is None:
        fits = spread(fit, layers, heavy=any(_columns(layer.shape) >= _WIDE for layer in layers))
        if checkpoints is not None:
            checkpoints.save(level, names, fits)
    return fits


def _fitted(layer: Layer, values: _Values, mode: str, locked: bool, **settings: Any) -> Fitted:
    """Fit new weights for one layer; ``values`` and ``settings`` are the problem's, ``locked``: zeros stay 0."""
    matrix, bias = layer.read()
    channels = matrix.shape[0] * matrix.shape[1] // layer.form.taps
    mask = matrix != 0 if locked else None
    problem = Problem(layer.target, layer.shape, channels, *values, mask=mask, **settings)
    solution = recover_layer(problem, matrix, bias, mode=mode, fixed_bias=layer.fixed_bias, as_stored=layer.as_stored)
    return solution, problem.extent


def _written(layer: Layer, fitted: Fitted) -> Repair:
    solution, extent = fitted
    if solution.how != "kept":
        layer.write(solution.matrix, solution.bias)
    return Repair(layer.node.label, solution.how, solution.before, solution.after, *extent)


def _shapes_now(analysis: Analysis, graph: Graph) -> Callable[[str], Any]:
    """Return the shapes in the current model: factorized layers have tensors that the original lacks."""
    return probe_at(graph, analysis.facts.probes[0].inputs, infer_by_rule).shapes.get


def _recalibrations(mode: str, analysis: Analysis) -> list[bool]:
    """Return whether to recalibrate normalisations, for one attempt after the other until one is exact.

    A channel that is an exact combination of others is recovered under the trained statistics. Channels that are only
    correlated are weighted better under the statistics of the inputs, where there are normalisations.
    """
    return [False, True] if mode == "datafree" and normalisations(analysis.graph) else [False]


def _columns(shape: Sequence[int]) -> int:
    """Return the unknowns per output of a layer whose weight has this shape."""
    return int(np.prod(shape)) // max(shape[:2]) if len(shape) > 1 else 1


def check_mode(mode: str) -> str:
    """Check the mode; raises UsageError with the nearest name."""
    if not isinstance(mode, str) or mode not in MODES:
        raise UsageError(f"Unknown way to recover {mode!r}.", hint=nearest(str(mode), MODES))
    return mode


def settle_mode(recover: str | None, data: bool, validate: bool) -> tuple[str, str]:
    """Return the mode of recovery and its reason.

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
