"""Rotate: turn residual streams by an orthogonal matrix, so that the channels that are pruned carry least."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxprune.channels.analysis import Analysis
from onnxprune.channels.plan import Plan, PlanRotation, check_model
from onnxprune.errors import BudgetError, ModelError, Note, UsageError, ValidationError, argument
from onnxprune.graph.facts import Probe, integer_bounds
from onnxprune.graph.probes import input_specs
from onnxprune.io.read import with_parts
from onnxprune.io.subgraphs import outline_bodies
from onnxprune.passes.calibration import CalibrationBatches, TrialSplit
from onnxprune.passes.comparing import rounding_of
from onnxprune.passes.prune import Prune
from onnxprune.passes.recover import Recover, is_worse
from onnxprune.passes.validate import Validate
from onnxprune.passes.workspace import Workspace, synthetic_feeds
from onnxprune.pipeline import UNPRUNED, Context, Model, Pass, PassResult, apply
from onnxprune.pruning.rotation import Site, Stream, find_streams, turned_model
from onnxprune.report.facts import Exactness, Fact, Fidelity, Remark, Settings, Sizes
from onnxprune.runtime.capture import count
from onnxprune.runtime.compare import TOLERANCE, compare_models
from onnxprune.runtime.inputs import synthetic
from onnxprune.runtime.masks import counted_rows
from onnxprune.runtime.sessions import Array, Feed, open_session, run
from onnxprune.settings import checked, named_arguments

Moments = NDArray[np.float64]
AUTO = "auto"
# Samples from which second moments are taken, per channel of the widest stream; and at least.
_ROWS, _FEWEST = 64, 64
# Bytes of a model from which on the two candidates are not both tried.
_LARGE = 1 << 30
# Difference of the shares of multiply-accumulates that two candidates may have to be compared.
_CLOSE = 0.02


@named_arguments()
class Rotate(Pass):
    """Turn residual streams to the principal directions of the calibration data.

    A stream is turned where normalisations and linear layers alone read it and linear layers alone write it. Weights of
    writers and readers are multiplied by one orthogonal matrix per stream; the model computes the same as before.

    Args:
        mode: ``yes``, or ``auto``: only where a trial at the same multiply-accumulates is more faithful with it.
        plan: a plan or its file, whose rotations are repeated instead of computing them from data.
        trial: the pruning to try in mode ``auto``.
        share: share of multiply-accumulates that it should leave; None: any.
        recover: mode of the recovery in the trial.

    Raises:
        UsageError: no data, or a plan that does not fit.
        ModelError: mode ``yes``, and no stream can be turned.
        ValidationError: the turned model is not equal to the original.
    """

    requires = (UNPRUNED,)

    def __init__(
        self,
        mode: str = "yes",
        *,
        plan: Plan | str | Path | None = None,
        trial: Prune | None = None,
        share: float | None = None,
        recover: str = "full",
    ) -> None:
        self.mode = checked("rotate", mode)
        self.plan = Plan.load(plan) if isinstance(plan, (str, Path)) else plan
        self.trial, self.share, self.recover = trial or Prune(), share, recover

    def __call__(self, context: Context, model: Model) -> PassResult:
        """Find streams, turn them, and check that the outputs are equal."""
        if self.plan is None and self.mode == "no":
            return PassResult(model, changed=False)
        with context.stage("rotate"):
            streams, reasons = find_streams(context.analysis)
            if self.plan is not None:
                return self._by_plan(context, self.plan, streams, reasons)
            if self.mode == AUTO:
                return self._where_it_helps(context, model, streams)
            if not streams:
                raise _no_stream(reasons)
            return self._result(*self._by_data(context, streams))

    def _by_data(self, context: Context, streams: Sequence[Stream]) -> tuple[Analysis, list[PlanRotation], list[Fact]]:
        """Return the turned model, its rotations, and facts about them."""
        rotations = [_rotation(s, m) for s, m in zip(streams, second_moments(context, streams), strict=True)]
        turned = _turned(context, streams, rotations)
        proof = prove_rotation(context, turned)
        return turned, rotations, [Settings({"rotate": self.mode}), proof, *_sizes(context.analysis, turned)]

    def _by_plan(
        self, context: Context, plan: Plan, streams: Sequence[Stream], reasons: Mapping[str, str]
    ) -> PassResult:
        """Repeat the rotations of a plan."""
        check_model(plan.model_sha256, context.analysis.loaded.sha256)
        turned = _turned(context, _streams_of(plan.rotations, streams, reasons), plan.rotations, by_plan=True)
        proof = prove_rotation(context, turned)
        return self._result(turned, plan.rotations, [Settings({"rotate": "by the plan"}), proof])

    def _where_it_helps(self, context: Context, model: Model, streams: Sequence[Stream]) -> PassResult:
        """Turn the streams where a trial is more faithful with it; a failure there stops no run."""
        unchanged = PassResult(model, changed=False)
        if not streams:
            return unchanged
        if context.analysis.loaded.size > _LARGE:
            context.stages.leave_out("trying rotations of a model of more than 1 GB")
            return unchanged
        try:
            turned, rotations, facts = self._by_data(context, streams)
            helps, remark = self._helps(context, turned, rotations)
        except (BudgetError, ModelError, ValidationError) as error:
            return replace(unchanged, facts=[Remark(Note(f"streams were not rotated: {error.message.marked}"))])
        if not helps:
            return replace(unchanged, facts=[Remark(remark)])
        return self._result(turned, rotations, [*facts, Remark(remark)])

    def _result(self, turned: Analysis, rotations: Sequence[PlanRotation], facts: Sequence[Fact]) -> PassResult:
        return PassResult(Model.of(turned), facts, original=turned, rotations=tuple(rotations))

    def _helps(self, context: Context, turned: Analysis, rotations: Sequence[PlanRotation]) -> tuple[bool, Note]:
        """Return whether the pruned model is more faithful with rotations, at the same work, and a remark."""
        plain = self._trial(context, self.trial.ratio, self.share)
        ours = self._trial(context.with_original(turned, rotations), self.trial.ratio, plain[0])
        helps = is_worse(plain[1], ours[1]) and ours[0] <= plain[0] + _CLOSE
        names = f"{len(rotations)} stream{'' if len(rotations) == 1 else 's'}"
        now, was = (f"{_points(facts):.1f}" for facts in (ours[1], plain[1]))
        work = f"at {min(plain[0], 1.0):.2f} of the multiply-accumulates in a trial"
        if helps:
            return True, Note(f"{names} rotated: {now} points, {was} without, {work}")
        return False, Note(f"{names} could be rotated, but were not: {now} points, {was} without, {work}")

    def _trial(self, context: Context, ratio: float, share: float | None) -> tuple[float, Fidelity]:
        """Return the share of multiply-accumulates that a trial leaves, and its fidelity, at the ratio that fits."""
        split = TrialSplit()
        samples = split.num_fit(context, context.analysis) + split.max_validation
        trial = context.for_trial(min(samples, 2 * split.num_fit(context, context.analysis)))
        stages = (Recover(self.recover, near=False), Validate(exact=False, timed=False))
        macs = sum(layer.macs_before for layer in context.analysis.layers)
        best: tuple[float, Fidelity] | None = None
        for _ in range(3):
            current, facts = Model.of(context.analysis), list[Fact]()
            for stage in (replace(self.trial, ratio=ratio), *stages):
                result = apply(stage, trial, current)
                current, facts = result.model, [*facts, *result.facts]
            after = next(f.macs_after for f in facts if isinstance(f, Sizes) and f.macs_after is not None)
            fidelity = next(f for f in reversed(facts) if isinstance(f, Fidelity))
            work = after / max(macs, 1)
            if best is None or share is None or abs(work - share) < abs(best[0] - share):
                best = work, fidelity
            if share is None or abs(work - share) <= _CLOSE or work >= 1:
                break
            ratio = min(0.95, max(0.01, ratio * (1 - share) / (1 - work)))
        assert best is not None
        return best


def _points(facts: Fidelity) -> float:
    """Return the points of the worst answer; without answers, those of the cosine."""
    points = [answer.points for answer in facts.answers]
    return min(points) if points else 100 * facts.worst_cosine


def _no_stream(reasons: Mapping[str, str]) -> ModelError:
    listed = "; ".join(f"{name}: {why}" for name, why in list(reasons.items())[:3])
    general = (
        "A stream is a group of channels that linear layers write and that normalisations with linear layers behind "
        "them read, all of them with float weights."
    )
    return ModelError(
        f"{argument('rotate', 'yes')}: the model has no stream that can be rotated.",
        hint=f"Reasons: {listed}." if listed else general,
    )


def _streams_of(
    rotations: Sequence[PlanRotation], streams: Sequence[Stream], reasons: Mapping[str, str]
) -> list[Stream]:
    """Return the streams that a plan turns; raises UsageError where the model has none of a name."""
    known = {stream.name: stream for stream in streams}
    for item in rotations:
        stream = known.get(item.tensor)
        if stream is None or stream.size != item.size:
            why = f": {reasons[item.tensor]}" if item.tensor in reasons else ""
            raise UsageError(
                f"The plan rotates the stream {item.tensor!r} with {item.size} channels, which this model does not "
                f"have{why}.",
                hint="Apply it to the model that it was made for.",
            )
        if item.values().shape != (item.size, item.size):
            raise UsageError(
                f"The plan's matrix of the stream {item.tensor!r} is damaged.",
                hint="Write the plan again.",
            )
    return [known[item.tensor] for item in rotations]


# -- the matrices ------------------------------------------------------------------------------------------------------


def second_moments(context: Context, streams: Sequence[Stream]) -> list[Moments]:
    """Return the second moments of every stream behind its normalisations, [channels, channels] each.

    Every place counts the same: its moments are divided by their trace. Rows that an attention mask leaves out are not
    counted.

    Raises:
        UsageError: the data do not fit, or hold nothing.
    """
    analysis = context.analysis
    batches = CalibrationBatches(context, analysis, max(_FEWEST, _ROWS))
    names = {name for s in streams for site in s.sites for name in site.tensors}
    proto = onnx.ModelProto()
    proto.CopyFrom(analysis.graph.proto)
    present = {o.name for o in proto.graph.output} | set(analysis.graph.inputs)
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(names - present))
    initializers = {t.name for t in proto.graph.initializer}
    weights = {name: w for name, w in analysis.graph.weights.items() if name in initializers}
    sums = [[np.zeros((s.size, s.size)) for _ in s.sites] for s in streams]
    rows = 0
    with Workspace.of(analysis) as trial, trial.lend(*outline_bodies(proto, weights), "moments") as lent:
        session = open_session(lent)
        for feed in batches:
            values = {**feed, **run(session, feed)}
            for stream, moments in zip(streams, sums, strict=True):
                for site, total in zip(stream.sites, moments, strict=True):
                    data = _rows(analysis, stream, site, values, feed)
                    total += data.T @ data
            rows += count(feed)
            if context.effort.samples is not None and rows >= context.effort.samples:
                break
    results = []
    for stream, moments in zip(streams, sums, strict=True):
        traces = [float(np.trace(m)) for m in moments]
        if not all(math.isfinite(t) for t in traces) or not any(traces):
            raise UsageError(
                f"The stream {stream.name!r} is 0 or not finite on the data, so that it has no principal directions.",
                hint="Give other samples.",
            )
        results.append(sum((m / t for m, t in zip(moments, traces, strict=True) if t), np.zeros_like(moments[0])))
    return results


def _rows(analysis: Analysis, stream: Stream, site: Site, values: Mapping[str, Array], feed: Feed) -> Moments:
    """Return the input of a reader as rows [rows, channels], float64."""
    parts = [np.moveaxis(np.asarray(values[name], np.float64), site.axis, -1) for name in site.tensors]
    data: Moments = np.sum(np.broadcast_arrays(*parts), axis=0) if len(parts) > 1 else parts[0]
    if site.addend:
        data = data + np.asarray(analysis.graph.weights[site.addend].read(), np.float64)
    mask = counted_rows(feed, data.shape[:-1])
    data = data.reshape(-1, stream.size) if mask is None else data.reshape(-1, stream.size)[mask]
    if stream.is_centred:
        data = data - data.mean(axis=1, keepdims=True)
    if site.is_normalised:
        data = data / np.sqrt(np.mean(data**2, axis=1, keepdims=True) + 1e-30)
    return data


def _rotation(stream: Stream, moments: Moments) -> PlanRotation:
    """Return the eigenvectors of second moments, the largest eigenvalue first; the first large entry is positive."""
    values, vectors = np.linalg.eigh(moments)
    order = np.argsort(values, kind="stable")[::-1]
    values, vectors = np.maximum(values[order], 0.0), vectors[:, order]
    largest = np.abs(vectors).argmax(axis=0)
    vectors = vectors * np.where(vectors[largest, np.arange(stream.size)] < 0, -1.0, 1.0)
    return PlanRotation.of(stream.name, vectors, values / max(values.sum(), 1e-300))


def _orthogonal(matrix: NDArray[Any]) -> Moments:
    """Return the orthogonal matrix next to one that was rounded."""
    u, _, vh = np.linalg.svd(np.asarray(matrix, np.float64))
    nearest: Moments = u @ vh
    return nearest


def _turned(
    context: Context, streams: Sequence[Stream], rotations: Sequence[PlanRotation], *, by_plan: bool = False
) -> Analysis:
    """Return the analysis of the model with turned streams."""
    analysis = context.analysis
    parts = turned_model(analysis, streams, [_orthogonal(r.values()) for r in rotations])
    loaded = with_parts(analysis.loaded, *parts)
    if not by_plan:  # statistics that are kept on disk are those of one model; plans name the file
        words = [analysis.loaded.sha256, *(part for r in rotations for part in (r.tensor, r.matrix))]
        digest = hashlib.sha256("\n".join(words).encode()).hexdigest()
        loaded = replace(loaded, digest=lambda: digest)
    known: dict[str, Any] = {"approximate": analysis.approximate, "resizing": analysis.resizing}
    turned = Analysis(loaded, input_shapes=context.input_shapes, **known)
    return turned.with_reshape_axis(analysis.reshape_axis)


def _sizes(before: Analysis, after: Analysis) -> Iterable[Fact]:
    """Describe weights that were added."""
    more = after.parameters - before.parameters
    if more > 0.01 * before.parameters:
        yield Remark(Note(f"rotations added {more:,} parameters: biases, in place of shifts of normalisations"))


# -- the proof ---------------------------------------------------------------------------------------------------------


def prove_rotation(context: Context, turned: Analysis) -> Exactness:
    """Compare the model with turned streams with the file, at the sizes of every probe and at others.

    Raises:
        ValidationError: they differ.
    """
    analysis = context.analysis
    feeds = synthetic_feeds(context, analysis)
    calls: list[tuple[Feed, bool]] = [(feed, not k) for k, feed in enumerate(feeds)]
    probe: Probe
    for probe in analysis.facts.elsewhere():
        bounds = integer_bounds(analysis.graph, replace(analysis.facts, probes=(*analysis.facts.probes, probe)))
        shapes = probe.inputs
        calls.append((synthetic(input_specs(analysis.graph), shapes, bounds=bounds, seed=context.seed), False))
        break
    worst = Exactness(passed=True)
    model = outline_bodies(turned.loaded.proto, turned.loaded.weights)
    with ExitStack() as stack:
        trial = stack.enter_context(Workspace.of(analysis))
        stack.enter_context(trial.blaming())
        file, other = stack.enter_context(trial.lend_original()), stack.enter_context(trial.lend(*model, "turned"))
        for feed, is_needed in calls:
            try:
                now = compare_models(file, other, [feed], rounding_of(analysis, TOLERANCE)).noted()
            except ModelError:  # the model declares more sizes open than it runs at
                if is_needed:
                    raise
                continue
            now.batches = list(dict.fromkeys([*worst.batches, *now.batches]))
            worst = now if not now.passed or now.error >= worst.error else worst
            if worst.passed is False:
                break
    if worst.passed is False:
        raise ValidationError(
            f"The rotated model is not equal to the original: output {worst.worst_output!r} differs by "
            f"{worst.error:.3g} (allowed {worst.tolerance:.3g}). {worst.note}",
            hint=f"Nothing was written. Use {argument('rotate', 'no')}, and please report the model's operators.",
        )
    return worst
