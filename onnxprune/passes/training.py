"""Training of one model towards its original: as a whole, block by block, or in the way that is better."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Self

import numpy as np
import onnx

from onnxprune.channels.analysis import Analysis
from onnxprune.channels.survivors import Survivors
from onnxprune.errors import ModelError, Note, argument
from onnxprune.gradients.backward import TrainingGraph, training_graph
from onnxprune.gradients.static import StaticGraph, static_graph
from onnxprune.gradients.tape import Tape
from onnxprune.io.constants import set_constant
from onnxprune.io.weights import ArrayWeight, Weight
from onnxprune.passes.calibration import CalibrationBatches, CalibrationSplit
from onnxprune.passes.comparable import can_follow
from onnxprune.passes.gradients import fitted_heads
from onnxprune.passes.labels import as_targets, labelled_head, read_labels
from onnxprune.passes.recover import compare_with_original, noise
from onnxprune.passes.training_sizes import BATCH, answers_of_sample, default_batch, training_samples
from onnxprune.passes.workspace import Workspace
from onnxprune.pipeline import EFFORTS, Context, Model, ModelParts
from onnxprune.report.facts import Fidelity, Finetuning
from onnxprune.runtime.capture import count
from onnxprune.runtime.masks import Padding
from onnxprune.runtime.sessions import Array, Feed, open_session, run
from onnxprune.training.augment import Augmentation
from onnxprune.training.blocks import Block, blocks_of
from onnxprune.training.checkpoint import FORMAT, Checkpoint, part_of, stored
from onnxprune.training.codes import CodedWeight, encoded, with_numbers
from onnxprune.training.curvature import CALLS, Curvature
from onnxprune.training.loop import Course, Effort, Keeper, interruptible, train
from onnxprune.training.losses import BALANCE, OFFSET, Losses, deviation
from onnxprune.training.own_loss import OwnLoss, UserLoss
from onnxprune.training.parameters import Head, bottlenecks, trainable
from onnxprune.training.samples import TrainingSamples
from onnxprune.training.step import PROBE, Adam, Parameters, Step, Vector, step_sizes
from onnxprune.training.teacher import Teacher

RATE, FEATURES = 4e-3, 4
"""Largest step, in units of each weight's own size; and number of tensors between blocks to compare."""
_FEATURE_SHARE = 0.3  # the share of the outputs' loss at the beginning
_CODED_PROBE = 0.05
_SETTLED = 1e-6  # a loss below it is none
_LEAST_GAIN = 0.02  # points on the hold-out: less says nothing of other samples
_BOLDNESS = 1 / 16  # largest step, relative to the random one that would double the loss
_MEMORY = 512 << 20
_FEW_SAMPLES, _TRIAL = 512, 0.25  # samples below which both ways are tried, each for this share of the effort
_MOST_BLOCKS, _BLOCK_STEPS, _HELD_CALLS = 16, 8, 2
_LIVE = 2.5  # bytes alive during a step, relative to those of all activations


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """Settings of a training, see :class:`onnxprune.passes.Finetune`; ``is_auto``: its effort is that of the run."""

    effort: Effort
    is_auto: bool
    labels: Any
    rate: float
    batch_size: int | None
    features: int
    augment: str
    blocks: str
    loss: UserLoss | None


@dataclass(slots=True)
class Training:
    """A training of one model: its teacher, samples, step and judge."""

    context: Context
    model: Model
    split: CalibrationSplit
    settings: TrainingSettings
    samples: TrainingSamples
    student: StaticGraph
    teacher: Teacher
    parameters: Parameters
    step: Step
    frozen: Mapping[str, str]
    calls: int
    labels: Mapping[Head, tuple[str, tuple[int, ...]]]
    held_labels: Array | None
    before: Fidelity
    own_loss: OwnLoss | None = None
    augmentation: Augmentation | None = None
    after: Fidelity | None = None
    by_labels: list[float] = field(default_factory=list)
    coded: Sequence[CodedWeight] = ()
    batch: int = BATCH
    judged: dict[float, Judgement] = field(default_factory=dict)
    balance: Array = field(default_factory=lambda: np.zeros((), np.float32))
    reconstruction: Reconstruction | None = None
    blocks: int = 0

    @classmethod
    def prepare(cls, settings: TrainingSettings, context: Context, model: Model, split: CalibrationSplit) -> Self:
        """Build the graphs of both models at the batch size that memory allows.

        Raises:
            ModelError: no weight can be trained.
        """
        (before,) = compare_with_original(context.analysis, [model.parts], split.validation, context.outputs)
        batch = settings.batch_size or default_batch(answers_of_sample(model.analysis, split.fit[0]))
        user_labels = settings.labels if settings.labels is not None else context.labels
        labels, hold_out = (
            (None, None)
            if user_labels is None
            else split_labels(read_labels(user_labels, context, model.analysis), split)
        )
        parts, coded = with_numbers(*model.parts)
        samples, student = _samples_and_student(context, model, parts, split, batch, labels)
        feed, _ = samples.draw(0)
        loaded = context.analysis.loaded
        original = static_graph(loaded.proto, loaded.weights, feed)
        weights, reasons = trainable(student)
        if not weights:
            raise _untrainable(reasons)
        by_parts = settings.loss is None and labels is None
        fitted = fitted_heads(student, weights, original, before, f"Drop {argument('finetune')}.", by_parts=by_parts)
        steps = _features(student, original, model, [h.tensor for h in fitted], settings.features)
        teacher = Teacher(original, student, fitted, steps, feed)
        names = teacher.names
        known = {} if labels is None else _labelled(fitted, student, labels)
        user_loss = None if settings.loss is None else OwnLoss(settings.loss, student, weights, fitted, names)
        graph = _graph_with_loss(student, teacher, weights, fitted, steps, known, user_loss)
        frozen = {**{n: r for n, r in reasons.items() if "parameter" not in r}, **graph.frozen}
        frozen = {n: r for n, r in frozen.items() if not any(n in c.settings for c in coded)}
        if not graph.gradients:
            raise _untrainable(frozen)
        parameters = Parameters({n: student.constants[n] for n in graph.gradients}, _locked(model, coded))
        step = Step(graph, parameters, context.device.threads)
        calls = max(1, -(-batch // samples.size))
        graphs, labelled = (student, teacher, parameters, step), (known, hold_out)
        training = cls(context, model, split, settings, samples, *graphs, frozen, calls, *labelled, before, user_loss)
        training.coded, training.batch = coded, batch
        training.reconstruction = Reconstruction.suited(training, original, fitted)
        if settings.augment != "none":
            answers = lambda f: [teacher(f)[names[h.tensor]] for h in fitted]  # noqa: E731
            training.augmentation = Augmentation.suited([samples.draw(0)[0]], answers, settings.augment)
        return training

    def run(self) -> Course:
        """Train as a whole or block by block, or in the way that is better on the hold-out."""
        start = None if self.held_labels is None else self.judgement()
        effort, keeper = self.effort(), self.keeper()
        if self.reconstruction is None:
            course = self._train_all(effort, keeper)
        elif self.settings.blocks == "yes":
            course = self._by_blocks(effort, keeper)
        else:
            course = self._better(effort, keeper)
        if keeper is not None and course.stopped != "interrupted":
            keeper.clear()
        end = self.judged.get(dict(course.curve)[course.best]) or self.judgement()
        self.after = end.fidelity
        self.by_labels = [x.by_labels for x in (start, end) if x is not None and x.by_labels is not None]
        return course

    def draw(self, number: int, teacher: Teacher | None = None) -> list[Feed]:
        """Return the calls of a step, with what a teacher answers; None: that of the whole model."""
        calls = []
        for k in range(self.calls):
            feed, labels = self.samples.draw(number * self.calls + k)
            if self.augmentation is not None:
                feed = self.augmentation(feed, np.random.default_rng([self.context.seed, number, k]))
            calls.append(self.call(feed, labels, teacher or self.teacher))
        return calls

    def call(self, feed: Feed, labels: Array | None, teacher: Teacher) -> Feed:
        """Return one call with everything that the loss reads."""
        batch = {} if labels is None else {name: as_targets(labels, shape) for name, shape in self.labels.values()}
        feed = {**feed, **teacher(feed)}
        if self.own_loss is not None:
            batch = self.own_loss(feed, self.parameters, labels)
        return {**feed, **batch, BALANCE: self.balance}

    def judge(self) -> float:
        """Return the distance of the present weights on the hold-out."""
        judgement = self.judgement()
        self.judged[judgement.distance] = judgement
        return judgement.distance

    @property
    def least_gain(self) -> float:
        """Points that weights have to gain on the hold-out to be kept; 0 where labels or a loss are learnt as well."""
        return _LEAST_GAIN if self.held_labels is None and self.own_loss is None else 0.0

    def _train_all(self, effort: Effort, keeper: Keeper | None = None) -> Course:
        """Train all weights together."""
        first, balance = self.draw(0), self.balance
        balance[...] = 0
        outputs = self.step(first)
        balance[...] = 1
        features = self.step(first) - outputs
        # Tensors between are compared on the way to the outputs, and never in their place.
        # A model that is its own teacher has no loss to compare them with.
        is_far = outputs > _SETTLED and features > 1e-6 * outputs
        balance[...] = _FEATURE_SHARE * outputs / features if is_far else 0
        sizes, doubling = step_sizes(self.step, first, self.parameters, self.context.seed, self.least_loss, self.probe)
        rate = min(self.settings.rate, _BOLDNESS * doubling)
        optimizer, error = self.optimizer(sizes), partial(standard_error, samples=self.split.num_held_out)
        tell = partial(self.context.tell, self.stage)
        course = self.step, optimizer, self.parameters, self.draw, self.judge, effort, rate, error, tell, keeper
        return train(*course, least_gain=self.least_gain)

    def _by_blocks(self, effort: Effort, keeper: Keeper | None = None) -> Course:
        """Train one block after the other."""
        assert self.reconstruction is not None
        self.blocks = len(self.reconstruction.blocks)
        return self.reconstruction.run(effort, keeper)

    def _better(self, effort: Effort, keeper: Keeper | None = None) -> Course:
        """Try both ways for a share of the effort, and go on in the better one from the weights that it has made."""
        vector, start = self.parameters.vector, self.parameters.vector.copy()
        state = {n: v for n, v in stored(keeper).items() if n.startswith("trial")}
        trials = []
        for k, way in enumerate((self._train_all, self._by_blocks)):
            trial = {name.removeprefix(f"trial{k}."): value for name, value in state.items()}
            if "weights" in trial:
                course, vector[:] = Course().restore(trial), trial["weights"]
            else:
                vector[:] = start
                course = way(effort.part(_TRIAL), part_of(keeper, state))
            trials.append((dict(course.curve)[course.best], course, vector.copy(), way))
            if course.stopped == "interrupted":
                break
            state |= {f"trial{k}.{n}": v for n, v in {**course.state(), "weights": vector.copy()}.items()}
            if keeper is not None and "weights" not in trial:
                keeper.save(state)
        _, best, weights, way = min(trials, key=lambda one: one[0])
        vector[:] = weights
        assert self.reconstruction is not None
        self.blocks = 0 if way == self._train_all else len(self.reconstruction.blocks)
        spent = sum(course.steps for _, course, _, _ in trials)
        seconds = sum(course.seconds for _, course, _, _ in trials)
        if any(course.stopped == "interrupted" for _, course, _, _ in trials):
            return replace(best, steps=spent, seconds=seconds, stopped="interrupted")
        last = way(effort.part(1 - _TRIAL * len(trials)), part_of(keeper, state))
        return Course(
            steps=spent + last.steps,
            seconds=seconds + last.seconds,
            losses=[*best.losses, *last.losses],
            curve=[*best.curve, *((spent + step, value) for step, value in last.curve[1:])],
            best=spent + last.best if last.best else best.best,
            stopped=last.stopped,
        )

    @property
    def stage(self) -> str:
        """The name of the stage of the progress bar."""
        return "finetune"

    @property
    def probe(self) -> float:
        """The distance at which the curvature of the loss is measured: codes hide small changes."""
        return _CODED_PROBE if self.coded else PROBE

    @property
    def least_loss(self) -> float:
        """The smallest loss that the first steps may double."""
        return 0.0

    def optimizer(self, sizes: Vector) -> Adam:
        """Return the optimiser, with the sizes of its steps."""
        return Adam(self.parameters, sizes, coordinates=self.curvature())

    def curvature(self) -> Curvature:
        """Return the curvature of the layers' inputs on a few calls."""
        feeds = (self.samples.draw(k)[0] for k in range(CALLS))
        return Curvature.measured(self.student, self.parameters, feeds)

    def effort(self) -> Effort:
        """Return the length of the training: as requested, else as much as the effort of the run allows."""
        requested, usual = self.settings.effort, EFFORTS["normal"]
        if not self.settings.is_auto or self.context.effort.name == usual.name:
            return requested
        scale = self.context.effort.seconds / usual.seconds
        if scale < 1:
            self.context.stages.leave_out(f"fine-tuning for more than {scale:.0%} of the usual steps")
        return Effort(round((requested.steps or 0) * scale) or None, (requested.seconds or 0) * scale or None)

    def keeper(self) -> Checkpoint | None:
        """Return where the state of the training is kept; None without a folder, or for data that are read once."""
        context, settings = self.context, self.settings
        data = CalibrationBatches(context, self.model.analysis).fingerprint() if context.cache is not None else None
        if context.cache is None or data is None:
            return None
        words = [*self.key(), context.seed, settings.rate, self.batch, settings.features]
        words += [settings.augment, self.effort(), self.held_labels is not None, self.parameters.shapes, FORMAT]
        words += [] if self.reconstruction is None else [settings.blocks, self.reconstruction.blocks]
        name = hashlib.sha256(repr(words).encode()).hexdigest()[:32]
        return Checkpoint(context.cache / f"{self.stage}-{name}.npz", data, self.parameters.vector)

    def key(self) -> list[Any]:
        """Return the key of the training's state, beside its settings."""
        return [self.context.analysis.loaded.sha256]

    def judgement(self) -> Judgement:
        """Judge the present weights on the hold-out, by the original's answers and by labels."""
        parts, split = self.parts(), self.split
        (facts,) = compare_with_original(self.context.analysis, [parts], split.validation, self.context.outputs)
        if self.held_labels is None:
            return Judgement(facts)
        (head,) = self.labels
        return Judgement(facts, label_points(self.context.analysis, parts, split, head, self.held_labels))

    def parts(self) -> ModelParts:
        """Return the model with the present weights."""
        views = self.parameters.views(self.parameters.vector)
        proto, weights = self.model.parts
        numbers = {c.numbers for c in self.coded}
        inside = {n: v.copy() for n, v in views.items() if n not in weights and n not in numbers}
        changed: dict[str, Weight] = {n: ArrayWeight(n, v.copy()) for n, v in views.items() if n in weights}
        changed |= encoded(views, self.coded)
        if inside:  # Constant nodes
            proto = onnx.ModelProto()
            proto.CopyFrom(self.model.proto)
            for node in proto.graph.node:
                if node.op_type == "Constant" and node.output[0] in inside:
                    set_constant(node, ArrayWeight(node.output[0], inside[node.output[0]]))
        return proto, {**weights, **changed}

    def facts(self, course: Course) -> Finetuning:
        """Return the facts of the training."""
        return Finetuning(
            trained=len(self.parameters.spans),
            frozen=dict(self.frozen),
            augmentation="" if self.augmentation is None else self.augmentation.name,
            blocks=self.blocks,
            **self.course_facts(course),
        )

    def course_facts(self, course: Course) -> dict[str, Any]:
        """Return the fields of :class:`TrainingCourse`."""
        return {
            "steps": course.steps,
            "seconds": course.seconds,
            "batch": self.batch,
            "samples": self.samples.count,
            "aside": self.split.num_held_out,
            "losses": course.ends,
            "curve": course.curve,
            "before": self.before,
            "after": self.after or self.before,
            "undone": course.best == 0,
            "stopped": course.stopped,
            "by_labels": self.by_labels,
        }

    def remarks(self, facts: Finetuning) -> list[str]:
        """Return warnings."""
        remarks = []
        if facts.undone:
            remarks.append(
                f"{argument('finetune')} brought the outputs no closer to the original's on held-out samples and was "
                f"undone: more samples ({argument('data')}) or more time may help"
            )
        if facts.stopped:
            remarks.append(f"fine-tuning ended after {facts.steps} steps: {facts.stopped}")
        if self.samples.count < self.split.num_fit:
            num_others = self.split.num_fit - self.samples.count
            remarks.append(f"{num_others} samples have other sizes than most, and were not trained on")
        reasons = sorted(set(facts.frozen.values()))
        if reasons:
            what = "1 weight was" if len(facts.frozen) == 1 else f"{len(facts.frozen)} weights were"
            remarks.append(f"{what} not trained: {reasons[0]}")
        return [Note(text) for text in remarks]


@dataclass(slots=True)
class Reconstruction:
    """A training of one block after the other: what each makes of its present inputs, against the original's.

    Attributes:
        training: the training of the whole model.
        blocks: the blocks, in order.
        teacher: the original, from inputs to what blocks and outputs are compared with.
        fitted: the outputs.
    """

    training: Training
    blocks: Sequence[Block]
    teacher: Teacher
    fitted: Sequence[Head]

    @classmethod
    def suited(cls, training: Training, original: StaticGraph, fitted: Sequence[Head]) -> Reconstruction | None:
        """Return the training by blocks; None where it is not asked for, or there are no two blocks."""
        settings, split = training.settings, training.split
        is_auto = settings.blocks == "auto" and settings.loss is None
        if settings.blocks != "yes" and not (is_auto and split.num_fit + split.num_held_out < _FEW_SAMPLES):
            return None
        student, steps = training.student, settings.effort.steps
        limit = _MOST_BLOCKS if steps is None else max(1, min(_MOST_BLOCKS, steps // _BLOCK_STEPS))
        targets = _features(student, original, training.model, [h.tensor for h in fitted], limit)
        blocks = blocks_of(student, targets, training.parameters.spans)
        if len(blocks) < 2:
            return None
        teacher = Teacher(original, student, fitted, targets, training.samples.draw(0)[0])
        return cls(training, blocks, teacher, fitted)

    def run(self, effort: Effort, keeper: Keeper | None = None) -> Course:
        """Train every block for the same share of an effort, and leave the best weights behind any of them.

        Args:
            effort: effort of all blocks together.
            keeper: where the state is kept, so that an interrupted training goes on within its block.
        """
        training = self.training
        vector = training.parameters.vector
        state = stored(keeper)
        if state:
            course, first, best = Course().restore(state), int(state["blocks"]), state["best"]
            vector[:] = state["present"]
        else:
            course, first, best = Course(curve=[(0, training.judge())]), 0, vector.copy()
        samples = training.samples.beside(training.split.validation.inputs, training.held_labels)
        held_calls = [training.call(*samples.draw(k), self.teacher) for k in range(_HELD_CALLS)]
        share = effort.part(1 / len(self.blocks))
        with interruptible() as interrupted:
            for k in range(first, len(self.blocks)):
                state = {**course.state(), "blocks": np.asarray(k), "present": vector.copy(), "best": best}
                if not interrupted.is_set():
                    train_block = self._prepared(self.blocks[k], share, course.steps, held_calls)
                if interrupted.is_set():
                    course.stopped = "interrupted"
                    break
                part = train_block(part_of(keeper, state))
                course.steps, course.seconds = course.steps + part.steps, course.seconds + part.seconds
                course.losses += part.losses
                if part.steps:
                    course.curve.append((course.steps, training.judge()))
                    if course.curve[-1][1] < dict(course.curve)[course.best]:
                        course.best = course.steps
                        best = vector.copy()
                if part.stopped == "interrupted":
                    course.stopped = part.stopped
                    break
                if keeper is not None:
                    state |= {**course.state(), "blocks": np.asarray(k + 1), "present": vector, "best": best}
                    keeper.save(state)
                training.context.tell(training.stage, (k + 1) / len(self.blocks))
        vector[:] = best
        return course

    def _prepared(
        self, block: Block, effort: Effort, number: int, held_calls: Sequence[Feed]
    ) -> Callable[[Keeper | None], Course]:
        """Return the training of the weights of one block, with all others as they are now.

        Args:
            block: the block.
            effort: its effort.
            number: number of the first step.
            held_calls: calls of the hold-out, on which its best weights are chosen.
        """
        training = self.training
        present = training.parameters.views(training.parameters.vector)
        constants = {**training.student.constants, **{name: value.copy() for name, value in present.items()}}
        student = replace(training.student, constants=constants, producer={}, readers={})
        graph = training_graph(student, partial(self._loss, block), block.weights, inputs=self._inputs())
        if not graph.gradients:
            return lambda keeper: Course()
        parameters = Parameters({n: constants[n] for n in graph.gradients}, _locked(training.model, training.coded))
        step = Step(graph, parameters, training.context.device.threads)

        def draw(k: int) -> list[Feed]:
            return training.draw(number + k, self.teacher)

        sizes, doubling = step_sizes(step, draw(0), parameters, training.context.seed, 0.0, training.probe)
        feeds = (training.samples.draw(k)[0] for k in range(CALLS))
        optimizer = Adam(parameters, sizes, coordinates=Curvature.measured(student, parameters, feeds))
        rate = min(training.settings.rate, _BOLDNESS * doubling)

        def train_block(keeper: Keeper | None) -> Course:
            judge = lambda: 100 * step(held_calls)  # noqa: E731
            course = train(step, optimizer, parameters, draw, judge, effort, rate, keeper=keeper)
            for name, value in parameters.views(parameters.vector).items():
                present[name][...] = value
            return course

        return train_block

    def _loss(self, block: Block, tape: Tape) -> str:
        """Emit the error of what a block makes; of the head, the loss of the outputs."""
        names, counted = self.teacher.names, self.teacher.counted
        if block.target:
            return deviation(tape, block.target, names[block.target], counted.get(block.target, ""))
        labels = {head: name for head, (name, _) in self.training.labels.items()}
        heads = {h: names[h.tensor] for h in self.fitted}
        return Losses(heads, {}, labels, counted).emit(tape)

    def _inputs(self) -> Mapping[str, tuple[Sequence[int], Any]]:
        """Return the inputs that losses read: shape and type by name."""
        labels = {name: (shape, np.dtype(np.float32)) for name, shape in self.training.labels.values()}
        return {**self.teacher.inputs, **labels}


def _untrainable(reasons: Mapping[str, str]) -> ModelError:
    """Return the error of a model whose weights all stay as they are.

    Args:
        reasons: the reason for each weight.
    """
    parameters = {name: why for name, why in reasons.items() if "parameter" not in why}
    name, why = next(iter(parameters.items()), ("", ""))
    text = f"weight {name!r}: {why}" if name else "it has no weights in float32"
    return ModelError(f"No weight of the model can be trained: {text}.", hint=f"Drop {argument('finetune')}.")


def _locked(model: Model, coded: Sequence[CodedWeight]) -> frozenset[str]:
    """Return the names of the weights whose zeros stay 0, as a training knows them."""
    return model.locked | {c.numbers for c in coded if c.codes in model.locked}


@dataclass(frozen=True, slots=True)
class Judgement:
    """The judgement of the hold-out.

    Attributes:
        fidelity: to the original.
        by_labels: points by the labels, 0 to 100; None without labels.
        penalty: points that the present weights are penalised with.
    """

    fidelity: Fidelity
    by_labels: float | None = None
    penalty: float = 0.0

    @property
    def distance(self) -> float:
        """The distance from the expected answers: half by the original, half by the labels; and a penalty."""
        mine = distance(self.fidelity)
        return self.penalty + (mine if self.by_labels is None else (mine + 100 - self.by_labels) / 2)


def distance(facts: Fidelity) -> float:
    """Return how far a model is from the original: the points it lacks; the share of noise where there are none."""
    return 100 * noise(facts) if facts.points is None else 100 - facts.points


def standard_error(distance: float, samples: int) -> float:
    """Return the standard error of a distance in points that was measured on so many samples."""
    share = min(max(distance / 100, 0.0), 1.0)
    return 100 * math.sqrt(share * (1 - share) / samples) if samples else 0.0


def _samples_and_student(
    context: Context,
    model: Model,
    parts: ModelParts,
    split: CalibrationSplit,
    batch: int,
    labels: Array | None,
) -> tuple[TrainingSamples, StaticGraph]:
    """Return the samples in calls that memory has room for, and the graph of the model at their size.

    Args:
        context: the run.
        model: the model to train.
        parts: its graph and weights, coded ones as numbers.
        split: samples to fit to, and those held out.
        batch: number of samples of a step.
        labels: of the samples to fit to.
    """
    fixed = CalibrationBatches(context, model.analysis).fixed
    samples = training_samples(context, model.analysis, split, fixed or min(batch, split.num_fit), labels)
    student = static_graph(*parts, samples.draw(0)[0])
    limit = (context.memory_limit or _MEMORY) / _LIVE
    if fixed is None and (room := int(limit // max(1, _bytes(student) // samples.size))) < samples.size:
        samples = training_samples(context, model.analysis, split, max(1, room), labels)
        student = static_graph(*parts, samples.draw(0)[0])
    return samples, student


def _graph_with_loss(
    student: StaticGraph,
    teacher: Teacher,
    weights: Sequence[str],
    fitted: Sequence[Head],
    features: Collection[str],
    labelled: Mapping[Head, tuple[str, tuple[int, ...]]],
    user_loss: OwnLoss | None,
) -> TrainingGraph:
    """Return the graph of a step: the model, its losses, and their gradients by the weights."""
    names, scalar = teacher.names, np.dtype(np.float32)
    losses = Losses(
        {h: names[h.tensor] for h in fitted},
        {n: names[n] for n in features},
        {} if user_loss is not None else {h: n for h, (n, _) in labelled.items()},
        teacher.counted,
        user_gradients={} if user_loss is None else user_loss.gradient_names,
    )
    inputs = {**teacher.inputs, **{name: (shape, scalar) for name, shape in labelled.values()}}
    inputs |= dict.fromkeys((BALANCE, OFFSET), ((), scalar))
    inputs |= {} if user_loss is None else user_loss.inputs
    return training_graph(student, losses.loss, weights, inputs=inputs)


def _bytes(graph: StaticGraph) -> int:
    """Return the bytes of all activations of one call."""
    tensors = [o for node in graph.nodes for o in node.outputs if o in graph.shapes]
    return sum(int(np.prod(graph.shapes[o], dtype=np.int64)) * graph.kinds[o].itemsize for o in tensors)


def _features(
    student: StaticGraph, original: StaticGraph, model: Model, fitted: Sequence[str], number: int
) -> dict[str, list[tuple[int, Array]]]:
    """Return tensors between blocks, with the channels of the original that each still has: (axis, indices)."""
    after = Survivors(model.analysis.table, model.removal)
    result: dict[str, list[tuple[int, Array]]] = {}
    for name in bottlenecks(student):
        if name in fitted or name not in original.shapes or not original.is_float(name):
            continue
        if name not in model.analysis.graph.producer or not can_follow(model.analysis, after, name):
            continue
        steps = after.steps(name)
        shape = list(original.shapes[name])
        for axis, index in steps:
            shape[axis] = index.shape[axis if index.ndim > 1 else 0]
        if all(i.ndim == 1 for _, i in steps) and tuple(shape) == student.shapes[name]:
            result[name] = steps
    names = list(result)
    if len(names) > number:
        indices = np.unique(np.linspace(0, len(names) - 1, number + 1).round().astype(int)[1:])
        names = [names[k] for k in indices]
    return {name: result[name] for name in names} if number else {}


def split_labels(values: Array, split: CalibrationSplit) -> tuple[Array, Array | None]:
    """Return the labels of the samples to fit, and those of the hold-out; both come in the order of the batches.

    Args:
        values: labels of all samples.
        split: the samples.
    """
    if not split.num_held_out:
        return values[: split.num_fit], values[: split.num_fit]
    queues = {True: list(split.validation.inputs), False: list(split.fit)}
    parts: dict[bool, list[Array]] = {True: [], False: []}
    start, number = 0, 0
    while queues[True] or queues[False]:
        is_held = bool(queues[True]) and (number % 8 == 7 or not queues[False])
        size = count(queues[is_held].pop(0))
        parts[is_held].append(values[start : start + size])
        start, number = start + size, number + 1
    return np.concatenate(parts[False]), np.concatenate(parts[True])


def label_points(
    analysis: Analysis, parts: ModelParts, split: CalibrationSplit, head: Head, labels: Array
) -> float | None:
    """Return how well an output agrees with the labels of the hold-out: accuracy in percent, or 100 R^2, 0 or more.

    Args:
        analysis: of the original.
        parts: the model.
        split: the samples.
        head: output that the labels belong to.
        labels: of the hold-out.
    """
    with Workspace.of(analysis) as trial:
        session = open_session(trial.write(*parts, "labelled")[0], spin=False)
        feeds = split.validation.inputs
        outputs = [run(session, feed)[head.output] for feed in feeds]
    if len({x.shape[1:] for x in outputs}) > 1:
        return None
    values = np.concatenate(outputs)
    if labels.dtype.kind != "f":
        if values.ndim < 2 or len(values) != len(labels):
            return None
        return 100 * float(np.mean(values.reshape(len(values), -1).argmax(1) == labels.ravel()))
    if values.shape != labels.shape:
        return None
    masks = [Padding(feed).counted(x.shape) for feed, x in zip(feeds, outputs, strict=True)]
    each_counted = [np.True_ if mask is None else mask for mask in masks]
    counted = np.concatenate([np.broadcast_to(m, x.shape) for m, x in zip(each_counted, outputs, strict=True)])
    mean = (labels * counted).sum(axis=0, dtype=np.float64) / np.maximum(counted.sum(axis=0), 1)
    error = float(np.square((values.astype(np.float64) - labels) * counted).sum())
    spread = float(np.square((labels - mean) * counted).sum())
    return 100 * max(0.0, 1 - error / spread) if spread > 0 else None


def _labelled(fitted: Sequence[Head], student: StaticGraph, labels: Array) -> dict[Head, tuple[str, tuple[int, ...]]]:
    """Return the head that labels belong to, with the name and shape of their input."""
    head = labelled_head(fitted, student, labels)
    return {head: ("labels", student.shapes[head.tensor])}
