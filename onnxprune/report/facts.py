"""The facts a run collects: plain dataclasses, filled by the stages, shown on screen, dumped by ``--json``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from html import escape
from importlib import import_module
from typing import Any

from onnxprune.errors import Note, UsageError, argument


@dataclass(slots=True)
class LayerFacts:
    """One contraction before and after the cut: MACs (multiply-accumulates) at the probe shape, parameters."""

    name: str
    op: str
    channels_before: int
    channels_after: int
    params_before: int
    params_after: int
    macs_before: int
    macs_after: int
    reason: str = ""
    """The reason for which the layer was left as it is; empty where it was changed."""


@dataclass(frozen=True, slots=True)
class NetworkNode:
    """One node of the original network: ``inputs`` are the places of the nodes whose values it reads."""

    name: str
    op: str
    inputs: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Network:
    """The nodes of the original network in the order in which they run, for drawings."""

    nodes: tuple[NetworkNode, ...]


@dataclass(slots=True)
class Totals:
    """Whole-model sums before and after: parameters (elements), MACs, file size (bytes)."""

    params_before: int = 0
    params_after: int = 0
    macs_before: int = 0
    macs_after: int = 0
    bytes_before: int = 0
    bytes_after: int = 0


@dataclass(slots=True)
class RotatedStream:
    """A stream that was turned to the principal directions of the data, and the share of its energy that is left.

    ``name``: its first tensor; ``energy``: share of the second moments of the data, 0 to 1, in the directions that
    were not pruned.
    """

    name: str
    channels_before: int
    channels_after: int
    energy: float


@dataclass(slots=True)
class BranchFacts:
    """A residual branch: the tensor that it ends in, and the node that adds it.

    ``error``: noise of the outputs, a share of their variance, when it was removed behind the branches before it, or
    without it alone where it stays; null where a plan decided. ``source``: the tensor beside it. ``cache``: inputs and
    outputs that were removed with it.
    """

    name: str
    sum: str
    source: str
    layers: list[str] = field(default_factory=list)
    macs: int = 0
    params: int = 0
    error: float | None = None
    removed: bool = True
    reason: str = ""
    cache: list[str] = field(default_factory=list)
    macs_share: float = 0.0
    params_share: float = 0.0


@dataclass(slots=True)
class ResizedTensor:
    """An input or output of the model that lost channels: its shape before and after, open sizes by name."""

    name: str
    before: list[int | str]
    after: list[int | str]


@dataclass(slots=True)
class VocabularyFacts:
    """A vocabulary that lost tokens.

    ``inputs``: inputs of ids; ``tables``: weights that lost rows; ``outputs``: outputs whose last axis has a position
    for each remaining token; ``reasons``: why others keep theirs. ``special``: ids of special tokens, by name.
    ``map``: file of the new ids.
    """

    inputs: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    tokens_before: int = 0
    tokens_after: int = 0
    bytes_saved: int = 0
    special: dict[str, list[int]] = field(default_factory=dict)
    keep_ids: bool = False
    reasons: dict[str, str] = field(default_factory=dict)
    map: str = ""


@dataclass(slots=True)
class ExpertFacts:
    """A mixture of experts: the node that chooses, how many there are and how many are chosen per token.

    ``removed``: numbers of those that went; ``scores``: of all, the least first to go; empty where a plan decided.
    ``params``: elements of weights that went. ``reason``: why none went, or fewer than asked.
    """

    name: str
    experts: int
    top_k: int
    removed: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    params: int = 0
    reason: str = ""


@dataclass(slots=True)
class MetricFacts:
    """A user's metric of the original and of the final model, higher is better."""

    name: str
    before: float
    after: float


@dataclass(slots=True)
class Exactness:
    """Cut model against the masked original.

    ``passed`` is None when the question was not asked (``note`` says why). ``error`` is the largest absolute difference
    over all outputs divided by the largest absolute reference value of that output; ``tolerance`` the allowed one.
    """

    passed: bool | None = None
    error: float = 0.0
    tolerance: float = 0.0
    batches: list[int] = field(default_factory=list)
    worst_output: str = ""
    note: str = ""


@dataclass(slots=True)
class OutputFidelity:
    """Final model against the original for one output: cosine, signal-to-noise in dB, top-1 agreement or None.

    ``hellinger``: mean squared Hellinger distance of class probabilities, 0 to 1; None for any other output.
    ``centred_cosine``: cosine of the outputs without their means over samples and positions, per channel; of boxes and
    scores in one output the smaller one. ``kind``, ``axis``: how the output was read, and the axis of its classes or
    attributes.
    """

    output: str
    cosine: float
    snr_db: float
    top1: float | None = None
    hellinger: float | None = None
    centred_cosine: float | None = None
    kind: str = ""
    axis: int | None = None

    @property
    def noise(self) -> float:
        """|a - b|^2 / |a|^2, at most 1; the squared Hellinger distance for class probabilities."""
        return min(1.0, 10 ** (-self.snr_db / 10)) if self.hellinger is None else self.hellinger


@dataclass(slots=True)
class AnswerFidelity:
    """The fidelity of one answer of the final model: of an output, or of the boxes and scores of a detector together.

    ``points``: 100 times the share of the original's answers that the final model still gives; ``lost``: the loss.
    ``distance``, 0 to 1, is what candidates of a search are compared by: of classes, of which a sample has one, the
    noise of the scores, since few samples resolve no small difference of counts; of all others the lost share.
    """

    outputs: list[str]
    kind: str
    points: float
    lost: str = ""
    distance: float = 0.0


def _below(value: float, limit: float, digits: int) -> str:
    """Return a number below a limit as text, with so many digits that the text is below it as well."""
    texts = [f"{value:.{n}f}" for n in range(digits, 9)]
    return next((text for text in texts if float(text) < limit), texts[0])


@dataclass(slots=True)
class Fidelity:
    """Fidelity of every output; ``source``: the inputs that were used (``synthetic`` or the data's path).

    ``points``, 0 to 100, are those of the worst answer, because a model is used by all of its answers and a mean would
    hide a lost one; None where nothing was compared. States that return as inputs are no answers.
    """

    outputs: list[OutputFidelity] = field(default_factory=list)
    samples: int = 0
    source: str = "synthetic"
    note: str = ""
    points: float | None = None
    answers: list[AnswerFidelity] = field(default_factory=list)

    def shortfall(self, least: float) -> str:
        """Return the figure below a limit of fidelity, empty where there is none.

        Args:
            least: a centred cosine that every output needs, 0 < least <= 1; or points, 1 < least <= 100.
        """
        if least > 1:
            points = math.nan if self.points is None else self.points
            answer = ", ".join(self.worst.outputs[:4]) if self.worst is not None else ""
            text = _below(points, least, 1)
            return "" if points >= least else f"fidelity of {text} points{f' ({answer})' if answer else ''}"
        cosine = self.worst_centred_cosine
        return "" if cosine >= least else f"worst cosine {_below(cosine, least, 4)}"

    @property
    def worst(self) -> AnswerFidelity | None:
        """The answer with the fewest points; None without any."""
        return min(self.answers, key=lambda answer: answer.points, default=None)

    @property
    def worst_centred_cosine(self) -> float:
        """The smallest centred cosine over the outputs, which ``--min-fidelity`` up to 1 gates on; NaN without any."""
        cosines = [o.cosine if o.centred_cosine is None else o.centred_cosine for o in self.outputs]
        return min(cosines) if cosines and not any(map(math.isnan, cosines)) else math.nan

    @property
    def worst_cosine(self) -> float:
        """The smallest cosine over the outputs; NaN when no output was compared."""
        cosines = [o.cosine for o in self.outputs]
        return min(cosines) if cosines and not any(map(math.isnan, cosines)) else math.nan


FAITHFUL, DEGRADED = 97.0, 85.0
"""Points from which on a model is called faithful, and degraded; below it is damaged.

At 97 points a classifier answers nearly as its original does, and loses a few tenths of a percent of accuracy; at 85
one answer of seven is another one, which is rarely of use without training.
"""


@dataclass(slots=True)
class Verdict:
    """The verdict on a model: ``faithful``, ``degraded`` or ``damaged``.

    ``reason``: the worst answer and its loss; ``next_step``: advice, empty where nothing is needed;
    ``synthetic``: it was judged on made-up inputs, which are no promise for real ones.
    """

    word: str
    points: float
    reason: str
    next_step: str = ""
    synthetic: bool = False


FEW_SAMPLES = 64
"""Samples below which a recovery may fail for want of data."""


@dataclass(slots=True)
class SmallerRatio:
    """A smaller ratio that was tried, and the points that it keeps."""

    ratio: float
    points: float


def verdict_on(facts: Fidelity, next_step: str = "") -> Verdict | None:
    """Return the verdict that points give; None where nothing was compared.

    Args:
        facts: fidelity of the model.
        next_step: advice where the model is not faithful.
    """
    worst = facts.worst
    if facts.points is None or worst is None:
        return None
    word = "faithful" if facts.points >= FAITHFUL else "degraded" if facts.points >= DEGRADED else "damaged"
    names = ", ".join(worst.outputs[:3]) + (f" and {len(worst.outputs) - 3} more" if len(worst.outputs) > 3 else "")
    reason = f"{names}{f' ({worst.kind})' if worst.kind else ''}: {worst.lost}"
    synthetic = facts.source == "synthetic"
    if synthetic:
        next_step = Note(f"measured on synthetic inputs: give real ones with {argument('data')}")
    elif word == "faithful":
        next_step = ""
    return Verdict(word, facts.points, reason, next_step, synthetic)


@dataclass(slots=True)
class Latency:
    """Milliseconds per run, original and final model run in turn.

    Attributes:
        before_ms, after_ms: medians.
        before_spread_ms, after_spread_ms: interquartile ranges.
        runs: number of pairs of runs.
        threads: inside an operator; 0 for the runtime's default.
        paired: median of the ratios of the pairs; None where runs are not paired.
        speedup_interval: 95 % confidence interval of that median; None likewise.
    """

    before_ms: float
    after_ms: float
    before_spread_ms: float
    after_spread_ms: float
    runs: int
    threads: int
    paired: float | None = None
    speedup_interval: tuple[float, float] | None = None

    @property
    def speedup(self) -> float:
        """Return the speed in multiples of the original's: the median of the pairs, else the ratio of the medians."""
        if self.paired is not None:
            return self.paired
        return self.before_ms / self.after_ms if self.after_ms else float("nan")

    @property
    def speed_verdict(self) -> str:
        """Return ``faster``, ``slower`` or ``no difference``: only what the whole interval says."""
        low, high = self.speedup_interval or (self.speedup / _UNPAIRED, self.speedup * _UNPAIRED)
        if low > 1 + _SAME:
            return "faster"
        return "slower" if high < 1 - _SAME else "no difference"

    def to_dict(self) -> dict[str, Any]:
        """Return the times as plain data, with the speed-up and its verdict."""
        interval = None if self.speedup_interval is None else list(self.speedup_interval)
        speedup = {"speedup": self.speedup, "speedup_interval": interval, "speed_verdict": self.speed_verdict}
        return {k: v for k, v in asdict(self).items() if k != "paired"} | speedup


# Differences below this are none: two runs of one file differ as much by where its weights lie in memory. Without pairs
# of runs the medians have to differ by more.
_SAME, _UNPAIRED = 0.01, 1.04


@dataclass(slots=True)
class LayerTimes:
    """Milliseconds of every node of the original, by name, in the original and in the final model.

    They are scaled so that their sums are the latencies of the models; a fused node counts for the nodes within it.
    """

    before: dict[str, float]
    after: dict[str, float]


@dataclass(slots=True)
class NodeTime:
    """Milliseconds of one node: as it is, and where every group keeps ``SHARES`` of its units."""

    name: str
    op: str
    ms: float
    at_shares: list[float] = field(default_factory=list)


@dataclass(slots=True)
class KindSteps:
    """Nodes of one kind, and the time of one by the channels that it ``reads`` or ``makes``.

    ``ms[i]`` is the time at ``channels[i]``, where of the others there are as many as in the original.
    """

    op: str
    nodes: int
    by: str
    channels: list[int] = field(default_factory=list)
    ms: list[float] = field(default_factory=list)


SHARES = (0.75, 0.5, 0.25)
"""Shares of units at which a profile shows times."""


@dataclass(slots=True)
class Profile:
    """The time of a model on one device, by kind of node.

    ``checks`` are (predicted, measured) milliseconds of whole runs at counts that were not measured before; ``error``
    is their largest difference as a share.
    """

    model: str
    device: dict[str, Any]
    inputs: dict[str, list[int]]
    ms: float
    error: float
    checks: list[tuple[float, float]] = field(default_factory=list)
    nodes: list[NodeTime] = field(default_factory=list)
    steps: list[KindSteps] = field(default_factory=list)


@dataclass(slots=True)
class Repair:
    """Recovery of one layer: hold-out errors as shares of its target's variance.

    ``how`` names the fit; ``kept``: no candidate was better than the present weights; ``left: why``: the layer was not
    fitted. The fit used ``rows`` with ``unknowns`` per output; ``directions`` is the numerical rank of the Gram matrix
    (of at most 1024 columns, in proportion).
    """

    layer: str
    how: str
    before: float
    after: float
    rows: int = 0
    unknowns: int = 0
    directions: int = 0

    @property
    def done(self) -> bool:
        """Whether the layer has new weights."""
        return self.how != "kept" and not self.how.startswith("left")


@dataclass(slots=True)
class Recovery:
    """Recovery of a model: its mode, and fidelity before and after.

    ``why`` is the reason of the mode; ``inputs`` names the inputs of the fit where they were not data; ``samples`` is
    the number of samples in the fit and ``aside`` in the hold-out, or in the data to compare on where the fit used
    none; ``before`` and ``after`` are the fidelity of the pruned model before and after the recovery, on the same
    inputs (the hold-out, where there is one); ``undone``: the recovery lowered the fidelity and was reverted.
    """

    mode: str = "none"
    why: str = ""
    inputs: str = ""
    samples: int = 0
    aside: int = 0
    before: Fidelity | None = None
    after: Fidelity | None = None
    undone: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingCourse:
    """Course of a training, judged on a hold-out.

    ``batch`` samples a step, drawn from ``samples``; ``aside`` are the hold-out. ``losses`` without penalties, of the
    first step and of the last 20 on average; ``curve``: pairs of a step and the objective on the hold-out. ``before``
    and ``after`` are the fidelity there; ``undone``: no step was better than the start; ``stopped``: why it ended
    early, else empty. ``by_labels``: points by the labels of the hold-out before and after, accuracy in percent or
    100 R^2; empty without labels.
    """

    steps: int
    seconds: float
    batch: int
    samples: int
    aside: int
    losses: list[float]
    curve: list[tuple[int, float]]
    before: Fidelity
    after: Fidelity
    undone: bool
    stopped: str = ""
    by_labels: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finetuning(TrainingCourse):
    """Training of a model towards its original.

    ``trained`` weights; ``frozen`` ones with the reason. The objective is 100 less the points of fidelity, or with
    labels the mean of this and of 100 less the points by labels. ``blocks``: number of blocks that were trained one
    after the other; 0 where the model was trained as a whole.
    """

    trained: int
    frozen: dict[str, str]
    augmentation: str
    blocks: int = 0


@dataclass(slots=True)
class FactorizedLayer:
    """One layer that was considered for factorization.

    ``method`` is empty where the layer stays whole, for ``reason``. ``error`` is the share of the output's energy
    (about its mean, on the data; without data of the weights') that the factors lose. Milliseconds are those of the
    layer on its own, where they were measured. ``note`` describes other events, such as a fallback of the method.
    """

    name: str
    op: str
    method: str = ""
    ranks: list[int] = field(default_factory=list)
    error: float = 0.0
    params_before: int = 0
    params_after: int = 0
    macs_before: int = 0
    macs_after: int = 0
    before_ms: float | None = None
    after_ms: float | None = None
    reason: str = ""
    note: str = ""


@dataclass(slots=True)
class SparsifiedLayer:
    """One weight that was considered for sparsification.

    ``pattern`` is empty where it was left out, for ``reason``; ``weight`` is the name of its constant, ``shape`` that
    of its matrix: parts, contracted, outputs. ``zeros_before`` and ``zeros`` count elements. ``error`` is the share of
    the energy of the layer's output (on the data; without data of the weights) that was lost, before any recovery; null
    where it was not measured. ``note``: differences from the request.
    """

    name: str
    op: str
    weight: str = ""
    pattern: str = ""
    shape: list[int] = field(default_factory=list)
    elements: int = 0
    zeros_before: int = 0
    zeros: int = 0
    error: float | None = None
    reason: str = ""
    note: str = ""

    @property
    def density(self) -> float:
        """The share of elements that are not 0."""
        return 1 - self.zeros / self.elements if self.elements else 1.0


@dataclass(slots=True)
class SparsityFacts:
    """The zeros of one weight in a file.

    ``pattern``: their pattern: N:M, blocks, ``unstructured``; empty without zeros. ``expected`` is the N:M that most
    sparse layers hold, where this one could hold it as well, else empty; ``holds``: whether it does.
    """

    name: str
    op: str
    weight: str
    elements: int
    zeros: int
    pattern: str = ""
    expected: str = ""
    holds: bool = False


@dataclass(slots=True)
class ZerosFacts:
    """The zeros of a whole model: of its layers' weights, and their worth.

    ``elements`` and ``zeros`` count over all weights that are matrices; ``storage`` is ``dense`` or ``sparse``, with
    ``sparse_tensors`` stored by their nonzero entries; ``weight_bytes`` and ``deflated_bytes`` are those of all
    weights, as stored and after deflate; ``device`` is where the model is to run, ``advice`` why zeros
    bring no speed there, empty where they do, and ``where`` which layers then gain.
    """

    elements: int = 0
    zeros: int = 0
    storage: str = "dense"
    sparse_tensors: int = 0
    weight_bytes: int = 0
    deflated_bytes: int = 0
    device: str = ""
    advice: str = ""
    where: str = ""


@dataclass(slots=True)
class Quantization:
    """A quantization to 8 bits.

    ``mode`` is ``dynamic`` or ``qdq``; ``weights`` hold codes now, with ``elements`` in all. ``layers`` have weights
    that can be rounded; ``rounded`` of them were fitted to ``samples`` inputs, ``corrected`` have a bias that takes up
    the shift; ``folded`` BatchNormalizations went into the layer in front. ``bytes_float`` is the size of the file
    before.
    """

    mode: str
    weights: int = 0
    elements: int = 0
    layers: int = 0
    rounded: int = 0
    corrected: int = 0
    folded: int = 0
    samples: int = 0
    bytes_float: int = 0


@dataclass(slots=True)
class TargetFacts:
    """Target of one kind of cost, and the cost reached; in MACs, parameters, bytes or seconds."""

    kind: str
    asked: str
    limit: float
    before: float
    after: float
    how: str = "counted"
    """``counted``, ``measured`` on this machine, or ``predicted`` from a table of another."""

    @property
    def met_before(self) -> bool:
        """Whether the original costs no more than the limit."""
        return self.before <= self.limit


@dataclass(slots=True)
class AnswerFacts:
    """One evaluated candidate, pruned, recovered and compared: ``fine`` is its score, higher is better."""

    name: str
    fine: float
    points: float
    chosen: bool = False


@dataclass(slots=True)
class CandidateFacts:
    """One model that a search evaluated: its cost as a share of the original's, and its points.

    ``trial``: it was recovered from the samples of a trial, not from all; ``chosen``: it is the result.
    """

    name: str
    cost: float
    points: float
    trial: bool = False
    chosen: bool = False


@dataclass(slots=True)
class GroupLosses:
    """Loss of the model where one group alone is pruned, at ``shares`` of its units removed."""

    name: str
    units: int
    shares: list[float]
    losses: list[float]


@dataclass(slots=True)
class BudgetFacts:
    """The allocation for targets.

    ``points``, named by ``what``, before and after. ``gap``: with costs linearised at the answer, no choice of
    counts loses less than (1 - gap) of this one's loss, by the losses it was chosen by. ``candidates`` are all
    models that were evaluated, with their cost of the kind ``cost``; ``losses`` are those of the groups that counts
    were chosen by, from ``losses_by``.
    """

    targets: list[TargetFacts] = field(default_factory=list)
    answers: list[AnswerFacts] = field(default_factory=list)
    gap: float | None = None
    what: str = ""
    points_before: float = 0.0
    points_after: float = 0.0
    max_drop: float | None = None
    cost: str = ""
    candidates: list[CandidateFacts] = field(default_factory=list)
    losses_by: str = ""
    losses: list[GroupLosses] = field(default_factory=list)
    can_factorize: bool = False
    """Whether layers could be factorized for these targets as well, which was neither decided nor tried."""


@dataclass(slots=True)
class SweepPoint:
    """One model of a sweep; ``target`` is empty for the original. ``error`` says why there is no such model.

    ``cosine`` is the worst output's, ``ms`` the time of a run, 0 where it was not measured. ``best``: no other model of
    the sweep has at least as many points for no more MACs.
    """

    target: str
    macs: int = 0
    params: int = 0
    size: int = 0
    ms: float = 0.0
    points: float = 0.0
    cosine: float = 0.0
    answer: str = ""
    best: bool = False
    file: str = ""
    error: str = ""


@dataclass(slots=True, repr=False)
class SweepFacts:
    """The models of a sweep, the original first; ``what`` names the points; times were taken with ``threads``."""

    model: str
    what: str
    threads: int
    settings: dict[str, Any] = field(default_factory=dict)
    points: list[SweepPoint] = field(default_factory=list)
    interrupted: str = ""
    """Description of the work that an interrupt ended early; empty where there was none."""

    def __repr__(self) -> str:
        return f"<SweepFacts: {len(self.points)} models, {self.what}>"


def _shown(name: str) -> Any:
    """Return a module of the stage that shows facts; it stands above this one, and waits until it is needed."""
    return import_module(f"onnxprune.report.{name}")


@dataclass(slots=True, repr=False)
class Report:
    """All facts of a run. ``to_dict`` returns the machine-readable object of ``--json``."""

    model: str = ""
    output: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of the choice of units: criterion, scope, policy and others; only the criterion for a plan."""
    layers: list[LayerFacts] = field(default_factory=list)
    totals: Totals = field(default_factory=Totals)
    exactness: Exactness = field(default_factory=Exactness)
    fidelity: Fidelity | None = None
    latency: Latency | None = None
    layer_times: LayerTimes | None = None
    """Times of single layers; null where they were not asked for."""
    metric: MetricFacts | None = None
    recovery: Recovery = field(default_factory=Recovery)
    repairs: list[Repair] = field(default_factory=list)
    finetuning: Finetuning | None = None
    budget: BudgetFacts | None = None
    smaller: SmallerRatio | None = None
    """A smaller ratio that was tried where the model lost too much, and its points; null where none was tried."""
    branches: list[BranchFacts] = field(default_factory=list)
    """Every residual branch, the removed ones first, in the order of their removal; empty where none was asked for."""
    resized: list[ResizedTensor] = field(default_factory=list)
    """Inputs and outputs of the model that lost channels; empty where all keep their sizes."""
    experts: list[ExpertFacts] = field(default_factory=list)
    """Every mixture of experts; empty where none was asked for."""
    vocabulary: VocabularyFacts | None = None
    """The tokens that are left; null where none were removed."""
    rotations: list[RotatedStream] = field(default_factory=list)
    """Streams that were turned before pruning, see ``--rotate``; empty where none was."""
    groups: list[dict[str, Any]] = field(default_factory=list)
    barriers: list[dict[str, Any]] = field(default_factory=list)
    factorized: list[FactorizedLayer] = field(default_factory=list)
    """Every layer that was considered for factorization; empty where none was requested."""
    sparsified: list[SparsifiedLayer] = field(default_factory=list)
    """Every weight that was considered for sparsification; empty where none was requested."""
    zeros: ZerosFacts | None = None
    """The zeros of a model that was sparsified, and their worth; None for others."""
    quantization: Quantization | None = None
    """The quantization behind everything else; null where none was asked for."""
    product: Exactness | None = None
    """Whether factorized layers compute the product of their weights; None where there are none."""
    regularized: Regularized | None = None
    """Training with a penalty that brings units to 0; null where there was none."""
    dead: DeadChannels | None = None
    """Units whose removal changes no output; null where none were looked for."""
    flushed: int = 0
    """Values of weights that were subnormal and are 0 now."""
    warnings: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    """Time that every stage took on the clock."""
    timings: dict[str, StageTime] = field(default_factory=dict)
    """Time that every stage took, on the clock and of processors."""
    interrupted: str = ""
    """Description of the work that an interrupt ended early; empty where there was none."""
    left_out: list[str] = field(default_factory=list)
    """Work that the effort left out, as phrases."""
    network: Network | None = field(default=None, compare=False)
    """The original network, for drawings; no part of ``to_dict``."""

    def __str__(self) -> str:
        text: str = _shown("summary").text(self)
        return text

    def _repr_html_(self) -> str:
        """Return the whole page for a notebook, in a frame of its own so that styles stay inside."""
        return f'<iframe srcdoc="{escape(self.to_html())}" style="width:100%;height:40em;border:0"></iframe>'

    def to_html(self, about: Mapping[str, Any] | None = None) -> str:
        """Return a self-contained HTML page: verdict, sizes, the network, every layer, and why layers were not pruned.

        Args:
            about: more to tell of the run, {name: value}; None: the versions of packages.
        """
        known = {"versions": _shown("console").versions()} if about is None else about
        html: str = _shown("run_page").run_page(self, known)
        return html

    def to_markdown(self) -> str:
        """Return the report as Markdown, for a comment on a pull request."""
        text: str = _shown("run_page").markdown(self)
        return text

    def to_dataframe(self) -> Any:
        """Return the layers as a pandas.DataFrame, one row for each, without an index of names.

        Raises:
            UsageError: pandas is not installed.
        """
        try:
            pandas = import_module("pandas")
        except ImportError:
            raise UsageError("a DataFrame needs pandas, which is not installed", hint="pip install pandas") from None
        rows: list[Any] = [*self.layers] or [*self.factorized] or [*self.sparsified]
        names = [f.name for f in fields(rows[0] if rows else LayerFacts)]
        return pandas.DataFrame([[getattr(row, name) for name in names] for row in rows], columns=names)

    def __repr__(self) -> str:
        totals, exact = self.totals, self.exactness.passed
        proof = "not checked" if exact is None else "exact" if exact else "NOT exact"
        parameters = f"{totals.params_after:,} of {totals.params_before:,} parameters"
        return f"<Report: {parameters}, {totals.macs_after:,} of {totals.macs_before:,} MACs, {proof}>"

    @property
    def verdict(self) -> Verdict | None:
        """The verdict on the final model; None where fidelity was not measured."""
        return None if self.fidelity is None else verdict_on(self.fidelity, self._next_step())

    def _next_step(self) -> str:
        """Return advice for a loss on real inputs, by the command that made the model."""
        if self.smaller is not None and self.smaller.points >= DEGRADED:
            return Note(f"a smaller {argument('ratio')}: {self.smaller.ratio:g} keeps {self.smaller.points:.1f}")
        if not self.recovery.why:
            return "recover it, or train it further"
        if self.recovery.mode == "none":
            return Note(f"recover it: {argument('recover', 'full')}, or remove less")
        if self.budget is not None:
            size, gate = ("larger", "target") if self.budget.targets else ("smaller", "max_drop")
            more = f"factorize layers as well ({argument('factorize')}), or " if self.budget.can_factorize else ""
            return Note(f"{more}a {size} {argument(gate)}")
        if self.factorized or self.sparsified:
            return Note(f"a smaller {argument('ratio')}, or {argument('exclude')} the sensitive layers")
        if "depth" in self.settings and "scope" not in self.settings:
            return Note(f"fewer branches: a smaller {argument('depth')}")
        if "scope" not in self.settings:  # a plan decided
            return Note(f"give more {argument('data')}, or prune less")
        samples = self.recovery.samples + self.recovery.aside
        if 0 < samples < FEW_SAMPLES:
            return Note(f"give more {argument('data')} than {samples} samples, or a smaller {argument('ratio')}")
        return Note(f"a smaller {argument('ratio')}, or {argument('max_drop', 2)} to find how much can be removed")

    def shortfall(self, min_fidelity: float | None = None, max_drop: float | None = None) -> str:
        """Return the gate that is not met and the reason; empty where all are met.

        Args:
            min_fidelity: points above 1, or the centred cosine that every output needs; None: no limit.
            max_drop: permitted drop of the metric, of points of fidelity where none was measured; None: no limit.
        """
        facts, metric = self.fidelity, self.metric
        if min_fidelity is not None:
            gate = f"{argument('min_fidelity')} {min_fidelity:g}"
            if facts is None or not facts.outputs:
                return f"{gate}: {self._unmeasured}"
            below = facts.shortfall(min_fidelity)
            if below:
                return f"{below} is below {gate}"
        if max_drop is None:
            return ""
        gate = f"{argument('max_drop')} {max_drop:g}"
        points = None if facts is None else facts.points
        if metric is None and points is None:
            return f"{gate}: {self._unmeasured}"
        measured = metric or MetricFacts("points of fidelity", 100.0, points or 0.0)
        lost = measured.before - measured.after
        if lost <= max_drop + 1e-9:
            return ""
        change = f"{measured.name} fell from {measured.before:.4g} to {measured.after:.4g}"
        return f"{change}: {lost:.3g} lost, more than {gate}"

    @property
    def _unmeasured(self) -> str:
        note = "" if self.fidelity is None else self.fidelity.note
        return f"fidelity could not be measured{f': {note}' if note else ''}"

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready plain data."""
        verdict = self.verdict
        facts = asdict(replace(self, network=None))
        del facts["network"]
        plain = {**facts, "verdict": None if verdict is None else asdict(verdict)}
        return plain if self.latency is None else plain | {"latency": self.latency.to_dict()}


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of a pass, by name."""

    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sums over the whole model, as far as a pass knows them: parameters (elements), MACs, file size (bytes)."""

    params_before: int | None = None
    params_after: int | None = None
    macs_before: int | None = None
    macs_after: int | None = None
    bytes_before: int | None = None
    bytes_after: int | None = None


@dataclass(frozen=True, slots=True)
class Pruned:
    """Layers, groups and barriers of a model that channels were removed from."""

    layers: list[LayerFacts]
    groups: list[dict[str, Any]]
    barriers: list[dict[str, Any]]
    resized: list[ResizedTensor] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Shortened:
    """Every branch of a model that branches were removed from, removed ones first."""

    branches: list[BranchFacts]


@dataclass(frozen=True, slots=True)
class Rotated:
    """Streams that were turned to their principal directions, and their channels now."""

    streams: list[RotatedStream]


@dataclass(frozen=True, slots=True)
class WithoutExperts:
    """Every mixture of a model that experts were removed from."""

    mixtures: list[ExpertFacts]


@dataclass(frozen=True, slots=True)
class Factorization:
    """Every layer that a factorization looked at, and whether new layers compute the product of their weights."""

    layers: list[FactorizedLayer]
    product: Exactness


@dataclass(frozen=True, slots=True)
class Sparsification:
    """Every weight that a sparsification looked at."""

    layers: list[SparsifiedLayer]


@dataclass(frozen=True, slots=True)
class Recovered:
    """Recovery of the whole model, and of every layer."""

    recovery: Recovery
    layers: list[Repair] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Flushed:
    """Values of weights that were subnormal and are 0 now."""

    values: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Regularized(TrainingCourse):
    """Training with a penalty that brings units to 0.

    ``kind``, ``groups`` and final ``strength`` of the penalty; ``units`` that it looked at, and ``zeros`` among these
    at the end; ``density``: share of the trained weights that are not 0. The objective has a point more for every
    percent of the units that should be 0 and are not.
    """

    kind: str
    groups: str
    strength: float
    units: int
    zeros: int
    density: float


@dataclass(frozen=True, slots=True)
class DeadChannels:
    """Units whose removal changes no output.

    ``units``: units of all groups that can be pruned; ``found``: dead ones among these; ``removed``: those that are
    gone, as far as groups keep their form and a unit; ``folded``: constant channels that became part of a bias;
    ``reasons``: why constant channels stay, by the node that reads them.
    """

    units: int
    found: int
    removed: int
    folded: int = 0
    reasons: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Remark:
    """A warning for the user, as a sentence."""

    text: str


@dataclass(frozen=True, slots=True)
class StageTime:
    """Seconds of a stage: on the clock, and of all processors, without those of worker processes."""

    seconds: float
    processor_seconds: float


@dataclass(frozen=True, slots=True)
class Timings:
    """Time that the stages of a run took, by name; a stage may lie within another.

    ``interrupted`` describes the work that an interrupt ended early; the run went on with the best answer so far.
    ``left_out`` describes the work that bounds on the effort left out.
    """

    stages: Mapping[str, StageTime]
    interrupted: str = ""
    left_out: tuple[str, ...] = ()


Fact = (
    Settings
    | Sizes
    | Pruned
    | Shortened
    | Rotated
    | WithoutExperts
    | Factorization
    | Sparsification
    | ZerosFacts
    | Quantization
    | Recovered
    | Finetuning
    | Flushed
    | DeadChannels
    | Regularized
    | Remark
    | Timings
    | Exactness
    | Fidelity
    | MetricFacts
    | VocabularyFacts
    | Latency
    | LayerTimes
    | BudgetFacts
)
"""The facts that a pass may return; a report is the sum of these."""


def report_of(facts: Iterable[Fact], *, model: str = "") -> Report:
    """Merge facts into a report: the last fact of a kind holds; settings, sizes and warnings add up.

    Args:
        facts: facts of all passes, in order.
        model: path of the model, empty where there is none.

    Raises:
        TypeError: a record of another kind.
    """
    report = Report(model)
    for fact in facts:
        _add(report, fact)
    return report


def _add(report: Report, fact: Fact) -> None:
    match fact:
        case Settings(values):
            report.settings = {**report.settings, **values}
        case Sizes():
            known = {f.name: getattr(fact, f.name) for f in fields(fact) if getattr(fact, f.name) is not None}
            report.totals = replace(report.totals, **known)
        case Pruned(layers, groups, barriers, resized):
            report.layers, report.groups, report.barriers, report.resized = layers, groups, barriers, resized
        case Shortened(branches):
            report.branches = branches
        case Rotated(streams):
            report.rotations = streams
        case WithoutExperts(mixtures):
            report.experts = mixtures
        case Factorization(layers=factorized, product=product):
            report.factorized, report.product = factorized, product
        case Sparsification(layers=sparsified):
            report.sparsified = sparsified
        case Recovered(whole, repairs):
            report.recovery, report.repairs = whole, repairs
        case Flushed(values=count):
            report.flushed += count
        case Remark(text):
            report.warnings.append(text)
        case Timings(stages, interrupted, left_out):
            report.timings = {**report.timings, **stages}
            report.seconds = {name: time.seconds for name, time in report.timings.items()}
            report.interrupted, report.left_out = interrupted, list(left_out)
            report.warnings += [f"interrupted: {interrupted}"] if interrupted else []
        case _ if type(fact) in _PLACES:
            setattr(report, _PLACES[type(fact)], fact)
        case _:
            raise TypeError(f"a report has no place for {type(fact).__name__}")


_PLACES: dict[type, str] = {
    DeadChannels: "dead",
    Regularized: "regularized",
    Exactness: "exactness",
    Quantization: "quantization",
    ZerosFacts: "zeros",
    Fidelity: "fidelity",
    Finetuning: "finetuning",
    Latency: "latency",
    LayerTimes: "layer_times",
    MetricFacts: "metric",
    BudgetFacts: "budget",
    VocabularyFacts: "vocabulary",
}
"""Fields of a report that hold one fact as it is."""
