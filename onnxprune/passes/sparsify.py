"""Sparsify: set single weights to 0 in a pattern, and update the others so that the layers' outputs change least."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import numpy as np

from onnxprune.channels.analysis import Analysis
from onnxprune.channels.propagate import infer_by_rule
from onnxprune.errors import BudgetError, UsageError, argument
from onnxprune.globs import check_patterns
from onnxprune.graph.inference import probe_at
from onnxprune.io.write import assemble
from onnxprune.labels.atoms import Reason
from onnxprune.passes.between import describe_between, run_between
from onnxprune.passes.gradients import score_gradients
from onnxprune.passes.grams import Reader, input_grams
from onnxprune.passes.prepared import Prepared
from onnxprune.pipeline import Context, Model, Pass, PassResult
from onnxprune.report.facts import Fact, Finetuning, Settings, Sizes, Sparsification, SparsifiedLayer
from onnxprune.runtime.sessions import spread
from onnxprune.settings import named_arguments
from onnxprune.sparsification import scores as score
from onnxprune.sparsification.layers import UNFIT, LayerScan, SparseLayer, find_layers
from onnxprune.sparsification.obs import inverse_factor, prune_columns
from onnxprune.sparsification.patterns import LOCKED, Mask, Pattern, Real, part_of_blocks
from onnxprune.sparsification.scores import GRADIENTS, InputGram
from onnxprune.sparsification.settings import MAX_SHARE, Options, Request, request_of

_EXCLUDED = f"{Reason.EXCLUDED}: by its name"
_UNSEEN = "scored by magnitude: its input cannot be captured"
# Columns from which on products are shared between BLAS threads.
_WIDE = 1024


@named_arguments()
@dataclass(frozen=True, repr=False, eq=False)
class Sparsify(Pass, Options):
    """Set weights of layers to 0: a share of them, N of every M neighbouring input channels, or blocks.

    Zeros of these weights then stay 0 in every recovery and fine-tuning of the pipeline.

    Args:
        pattern: ``unstructured``, N:M such as ``2:4``, or blocks NxM such as ``4x1``, outputs times input channels.
        between: passes to run between two of ``steps``, such as ``Finetune("1m")``, in which zeros stay 0. Empty: none.

    ``criterion`` (``obs`` with data, else ``magnitude``), ``ratio`` (0.5) or ``energy``, ``layers``, ``include``,
    ``exclude``, ``scope``, ``steps``, ``schedule`` and ``progressive`` are explained at
    :class:`onnxprune.sparsification.settings.Options`.

    Raises:
        UsageError: a value out of range, options that contradict each other, a pattern that fits no layer, a name that
            matches nothing, a criterion that needs data where there is none.
        BudgetError: no layer can become sparse with these settings.
    """

    pattern: str = "unstructured"
    between: Sequence[Pass] = ()

    def __post_init__(self) -> None:
        self.request  # noqa: B018  # wrong values are errors of the construction

    @cached_property
    def request(self) -> Request:
        """The settings, checked."""
        return request_of(self.pattern, self)

    def __call__(self, context: Context, model: Model) -> PassResult:
        """Choose weights, set them to 0, update the others."""
        criterion = self.request.scored_by(context.calibration is not None)
        with context.stage("sparsify"):
            work = _Work.prepare(context, model, self.request, criterion)
            trainings: list[Finetuning] = []
            for step in range(1, self.request.steps + 1):
                work.run(step)
                if step < self.request.steps and self.between:
                    trainings += work.train(model, self.between)
            parts = work.model.model()
        records = work.records()
        locked = frozenset(layer.source.root for layer in work.layers)
        sparse = model.with_parts(
            parts,
            as_pruned=model.as_pruned or model.parts,
            locked=model.locked | locked,
            sparsified=tuple(records),
        )
        macs = sum(layer.macs_before for layer in context.analysis.layers)
        settings = Settings({**self.request.settings(criterion), **describe_between(trainings)})
        facts: list[Fact] = [settings, Sparsification(records)]
        if not model.is_pruned and not model.is_factorized:
            facts.append(Sizes(params_before=context.analysis.parameters, macs_before=macs, macs_after=macs))
        return PassResult(sparse, facts)


@dataclass(slots=True)
class _Work:
    """A model on the way to being sparse."""

    context: Context
    analysis: Analysis
    request: Request
    criterion: str
    model: Prepared
    scan: LayerScan
    layers: list[SparseLayer]
    reasons: dict[str, str]
    zeros_before: dict[str, int]
    originals: dict[str, Real] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    block_masks: dict[str, Mask] = field(default_factory=dict)  # blocks of progressive masks

    @classmethod
    def prepare(cls, context: Context, current: Model, request: Request, criterion: str) -> _Work:
        """Find the layers to take.

        Raises:
            UsageError: the pattern fits none, or a name matches nothing. BudgetError: there is none to take.
        """
        model = Prepared(*current.parts)
        scan = scan_layers(current.analysis, model)
        names = (*model.weights, *(n.label for n in model.graph.nodes))
        check_patterns([(argument(name), getattr(request, name)) for name in ("layers", "include", "exclude")], names)
        reasons, layers = dict(scan.reasons), []
        for layer in scan.layers:
            why = _why_not(layer, request, model)
            if why:
                reasons[layer.name] = why
            else:
                layers.append(layer)
        if not layers:
            _refuse(scan, reasons, request)
        before = {layer.name: int((layer.read(model.weights) == 0).sum()) for layer in scan.layers}
        return cls(context, current.analysis, request, criterion, model, scan, layers, reasons, before)

    def run(self, step: int) -> None:
        """Score the weights as they are now, and set more of them to 0 in a step, counted from 1."""
        progress = self.request.progress(step)
        pattern = self.request.shape.at(progress)
        scorer = self._scorer()
        counts = self._counts(pattern, progress, scorer)
        heavy = any(layer.shape[1] >= _WIDE for layer in self.layers)
        if self.request.finer_pattern is None:
            change = partial(self._sparse, pattern, scorer, counts)
        else:
            is_last = step == self.request.steps
            masks = {
                layer.name: self._unfinished_mask(scorer, counts[layer.name], layer, is_last) for layer in self.layers
            }
            change = partial(self._masked, scorer, masks)
        new = spread(change, self.layers, heavy=heavy)
        for layer, (matrix, error) in zip(self.layers, new, strict=True):
            layer.write(self.model.weights, matrix)
            self.errors[layer.name] = error

    def train(self, model: Model, passes: Sequence[Pass]) -> list[Finetuning]:
        """Run passes on the model as it is now, in which zeros stay 0; return the facts of the trainings."""
        locked = model.locked | {layer.source.root for layer in self.layers}
        present = model.with_parts(self.model.model(), as_pruned=model.as_pruned or model.parts, locked=locked)
        trained, facts = run_between(self.context, present, passes)
        self.model = Prepared(*trained.parts)
        self.scan = scan_layers(self.analysis, self.model)
        by_name = {layer.name: layer for layer in self.scan.layers}
        self.layers = [by_name[layer.name] for layer in self.layers]
        return facts

    def _scorer(self) -> _Scorer:
        """Capture the statistics of the current model that the criterion needs."""
        grams: Mapping[str, InputGram] = {}
        gradients: Mapping[str, Real] = {}
        if self.criterion in ("wanda", "obs"):
            readers: dict[str, list[Reader]] = {
                layer.name: [(layer.node, layer.form, layer.channels)] for layer in self.layers if layer.data
            }
            grams = input_grams(self.context, self.analysis, self.model.graph, self.model.weights, readers)
            self.notes |= {layer.name: _UNSEEN for layer in self.layers if layer.name not in grams}
        if self.criterion in GRADIENTS:
            analysis = Analysis(assemble(*self.model.model()), input_shapes=self.context.input_shapes)
            statistic = _STATISTIC[self.criterion]
            gradients = score_gradients(self.context, analysis, [statistic]).weights[statistic]
            self._without_gradient(gradients)
        return _Scorer(self.criterion, grams, gradients, self.model)

    def _without_gradient(self, gradients: Mapping[str, Real]) -> None:
        """Leave out layers whose weights have no gradient; raises BudgetError where none is left."""
        missing = [layer for layer in self.layers if layer.source.root not in gradients]
        for layer in missing:
            self.reasons[layer.name] = "its weight has no gradient"
            self.layers.remove(layer)
        if not self.layers:
            _refuse(self.scan, self.reasons, self.request)

    def _counts(self, pattern: Pattern, progress: float, scorer: _Scorer) -> dict[str, int]:
        """Return the number of blocks that become 0 in every layer, by name."""
        request = self.request
        if pattern.nonzero:
            return dict.fromkeys((layer.name for layer in self.layers), 0)
        blocks = {layer.name: layer.size // pattern.block for layer in self.layers}
        ratios = {layer.name: request.own_ratio(layer.names) for layer in self.layers}
        counts = {
            n: round((request.share if ratios[n] is None else ratios[n] or 0.0) * progress * blocks[n]) for n in blocks
        }
        if request.energy is not None:
            keep = 1 - (1 - request.energy) * progress
            return {a.name: score.blocks_by_energy(self._scores(scorer, a), pattern, keep) for a in self.layers}
        if request.scope == "global":
            competing = [layer for layer in self.layers if ratios[layer.name] is None]
            scores = [self._scores(scorer, layer) for layer in competing]
            num_blocks = score.blocks_globally(scores, pattern, request.share * progress, MAX_SHARE) if scores else []
            counts |= dict(zip((layer.name for layer in competing), num_blocks, strict=True))
        return counts

    def _scores(self, scorer: _Scorer, layer: SparseLayer) -> Real:
        """Return the scores of a layer, under which blocks chosen before go first."""
        scores = scorer.scores(layer)
        blocks = self.block_masks.get(layer.name)
        return scores if blocks is None else np.where(blocks, LOCKED, scores)

    def _unfinished_mask(self, scorer: _Scorer, count: int, layer: SparseLayer, is_last: bool) -> Mask:
        """Choose blocks, and return the zeros of this step: blocks of earlier steps, and half of the new ones."""
        finer_pattern = self.request.finer_pattern
        assert finer_pattern is not None
        matrix = layer.read(self.model.weights)
        before = self.block_masks.get(layer.name, np.zeros(matrix.shape, bool))
        if is_last:
            return before
        scores = score.locked(self._scores(scorer, layer), matrix)
        self.block_masks[layer.name] = before | self.request.shape.zeros(scores, count)
        return part_of_blocks(self.block_masks[layer.name], before, scores, finer_pattern)

    def _masked(self, scorer: _Scorer, masks: Mapping[str, Mask], layer: SparseLayer) -> tuple[Real, float]:
        """Return a layer's matrix with zeros in a mask, and the share of its output's energy that is lost."""
        matrix, gram = layer.read(self.model.weights), scorer.grams.get(layer.name)
        zeros = masks[layer.name] | (matrix == 0)
        new = np.where(zeros, 0.0, matrix)
        if self.criterion == "obs" and gram is not None:
            for k, part in enumerate(matrix):
                new[k] = prune_columns(part, inverse_factor(scorer.part(layer, k)), Pattern(), 0, zeros[k])
        start = self.originals.setdefault(layer.name, matrix)
        return new, _error(start, new - start, None if gram is None else partial(scorer.part, layer))

    def _sparse(
        self, pattern: Pattern, scorer: _Scorer, counts: Mapping[str, int], layer: SparseLayer
    ) -> tuple[Real, float]:
        """Return a layer's new matrix, and the share of its output's energy that is lost."""
        matrix, count = layer.read(self.model.weights), counts[layer.name]
        gram = scorer.grams.get(layer.name)
        if self.criterion == "obs" and gram is not None:
            new = np.empty_like(matrix)
            for k, part in enumerate(matrix):
                # Parts share the blocks evenly.
                num_of_part = (count * (k + 1)) // len(matrix) - (count * k) // len(matrix)
                new[k] = prune_columns(part, inverse_factor(scorer.part(layer, k)), pattern, num_of_part, part == 0)
        else:
            per_output = self.criterion == "wanda" and self.request.scope == "local" and pattern.block == 1
            scores = score.locked(scorer.scores(layer), matrix)
            new = np.where(pattern.zeros(scores, count, per_output=per_output), 0.0, matrix)
        start = self.originals.setdefault(layer.name, matrix) if self.request.steps > 1 else matrix
        return new, _error(start, new - start, None if gram is None else partial(scorer.part, layer))

    def records(self) -> list[SparsifiedLayer]:
        """Return the facts on every weight, in the order of the graph."""
        names = {layer.name for layer in self.layers}
        by_name = {layer.name: layer for layer in self.scan.layers}
        result = []
        for name, op in self.scan.ops.items():
            layer = by_name.get(name)
            if layer is None:
                result += [SparsifiedLayer(name, op, reason=self.reasons[name])] if name in self.reasons else []
                continue
            zeros = int((layer.read(self.model.weights) == 0).sum())
            record = SparsifiedLayer(name, op, layer.source.root, shape=list(layer.shape), elements=layer.size)
            record.zeros_before, record.zeros = self.zeros_before[name], zeros
            if name in names:
                record.pattern, record.error = self.request.pattern, self.errors.get(name)
                record.note = self.notes.get(name, "")
            else:
                record.reason = self.reasons[name]
            result.append(record)
        return result


_STATISTIC = {
    "gradient": "gradient",
    "snip": "gradient",
    "snip-momentum": "gradient_total",
    "taylor": "gradient_square",
}
_MOMENTUM = 0.9


@dataclass(frozen=True, slots=True)
class _Scorer:
    """Scores of the weights of layers from captured statistics."""

    criterion: str
    grams: Mapping[str, InputGram]
    gradients: Mapping[str, Real]
    model: Prepared

    def part(self, layer: SparseLayer, index: int) -> Real:
        """Return the Gram matrix of the input of a part, in the order of the layer's matrix."""
        gram = self.grams[layer.name].part(index, layer.form.taps)
        return layer.ordered(layer.ordered(gram, 0), 1)

    def scores(self, layer: SparseLayer) -> Real:
        """Return energies of the weights of a layer [parts, n, o]."""
        matrix = layer.read(self.model.weights)
        if layer.source.root in self.gradients:
            return self._by_gradient(layer, matrix)
        gram = self.grams.get(layer.name)
        if gram is None:
            return score.magnitude(matrix)
        if self.criterion == "wanda":
            return score.wanda(matrix, layer.ordered(gram.power(layer.form.taps)))
        diagonal = [np.square(inverse_factor(self.part(layer, k))).sum(axis=0) for k in range(len(matrix))]
        return score.obs(matrix, np.stack(diagonal))

    def _by_gradient(self, layer: SparseLayer, matrix: Real) -> Real:
        """Return squares of |g| (gradient), |w g| (snip), 0.9 sum |w g| over calls (snip-momentum), or E[(w g)^2].

        Lee et al., SNIP, ICLR 2019; Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019.
        """
        values = np.asarray(self.gradients[layer.source.root], np.float64)
        stored = layer.ordered(layer.form.matrix(layer.source.arranged(values, self.model.weights)))
        if self.criterion == "gradient":
            return np.square(stored)
        if self.criterion == "taylor":
            return np.square(matrix) * stored
        return np.square(matrix * stored * (_MOMENTUM if self.criterion == "snip-momentum" else 1.0))


def _error(matrix: Real, change: Real, gram: Callable[[int], Real] | None) -> float:
    """Return the energy of a change's output as a share of the output's; without a Gram matrix of the weights'."""
    if gram is None:
        return float(np.square(change).sum() / max(np.square(matrix).sum(), 1e-300))
    lost = total = 0.0
    for k in range(len(matrix)):
        part_gram = gram(k)
        lost += float(np.sum(change[k] * (part_gram @ change[k])))
        total += float(np.sum(matrix[k] * (part_gram @ matrix[k])))
    return max(lost, 0.0) / max(total, 1e-300)


def scan_layers(analysis: Analysis, model: Prepared) -> LayerScan:
    """Find the layers of a model at the probe sizes."""
    shape = probe_at(model.graph, analysis.facts.probes[0].inputs, infer_by_rule).shapes.get
    return find_layers(model.graph, shape)


def _why_not(layer: SparseLayer, request: Request, model: Prepared) -> str:
    """Return the reason why a layer is left out; empty where it is not."""
    if request.is_excluded(layer.names):
        return _EXCLUDED
    if layer.default_reason and not request.is_named(layer.names):
        return layer.default_reason
    why = layer.misfit(request.shape)
    if not why and not np.isfinite(layer.read(model.weights)).all():
        why = "its weight holds NaN or infinity"
    return why


def _refuse(scan: LayerScan, reasons: Mapping[str, str], request: Request) -> None:
    """Raise the error of a model without a layer to take.

    Raises:
        UsageError: the pattern fits none of those that could be taken, with the sizes that there are.
        BudgetError: all are left out for other reasons.
    """
    pattern = request.shape
    unfit = [layer for layer in scan.layers if reasons.get(layer.name, "").startswith(UNFIT)]
    if unfit:
        sizes = Counter((layer.channels, layer.shape[2]) for layer in unfit).most_common(6)
        listed = ", ".join(f"{i} x {o}" for (i, o), _ in sizes)
        need = f"input channels in multiples of {pattern.width}"
        need += f" and outputs in multiples of {pattern.outputs}" if pattern.outputs > 1 else ""
        raise UsageError(
            f"{argument('pattern', str(pattern))} fits no layer of this model: it needs {need}.",
            hint=f"There are (input channels x outputs): {listed}. {argument('pattern', 'unstructured')} always fits.",
        )
    counts: Counter[str] = Counter(reasons.values())
    text = "; ".join(f"{n} layer{'s' if n > 1 else ''}: {why}" for why, n in counts.most_common(4))
    hint = f"Reasons: {text}." if text else "The model has no layers with weights of their own."
    if any(layer.default_reason for layer in scan.layers):
        hint += f" {argument('include')} takes layers that are left out by default."
    raise BudgetError("No layer of this model can become sparse with these settings.", hint=hint)
