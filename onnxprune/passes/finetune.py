"""Fine-tune: train a pruned model by gradients to answer as the original does, from inputs alone or with labels."""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from typing import Any

import numpy as np

from onnxprune.errors import ModelError, UsageError, argument
from onnxprune.passes.calibration import CalibrationBatches
from onnxprune.passes.recover import HAS_INPUTS, compare_with_original, split_for
from onnxprune.passes.training import FEATURES, RATE, Training, TrainingSettings, distance
from onnxprune.passes.training_sizes import answers_of_sample, check_samples, short_steps
from onnxprune.pipeline import Context, Model, Pass, PassResult
from onnxprune.report.facts import Fact, Remark
from onnxprune.settings import checked, effort_of, named_arguments
from onnxprune.training.checkpoint import OtherDataError
from onnxprune.training.loop import Effort
from onnxprune.training.own_loss import UserLoss

# Fewest samples, and steps: 57 steps of a detector of 640 px cost 160 seconds and brought 0.7 points.
_SHORT_SAMPLES, _LEAST_STEPS = 512, 64
_PATIENCE = 0.5  # nearly every training gets worse in its first tenth before it gets better
_CLOSE = 0.5  # points lost below which a training is not worth its time


@named_arguments()
class Finetune(Pass):
    """Train the weights of a pruned model so that it answers as the original does.

    The loss compares scores of classes by the Kullback-Leibler divergence at temperature 4, other outputs and a few
    tensors between blocks by their relative squared error. Every eighth batch of the data is a hold-out on which the
    model is compared with the original ten times on the way: the best weights are kept, and where none is better than
    those before, the training is undone. With a cache folder, an interrupted training goes on from where it was.

    Args:
        effort: steps (500), time (``"3m"``, ``"90s"``), both as an :class:`onnxprune.training.loop.Effort`, or None:
            1,000 steps or 3 minutes, whichever ends first, less or more where the run has another effort than
            ``normal``.
        labels: classes [samples] or values of the first output, or their file; half of the loss is then on them. None:
            those of the run; without any, distillation alone. The hold-out is then judged half by its labels.
        rate: largest step, in units of each weight's own size, above 0.
        batch_size: samples of a step, 1 or more; None: 32, and down to 4 where outputs have many positions.
        features: number of tensors between blocks to compare, 0 or more.
        augment: ``auto`` to shift and mirror images where the original answers them alike, at the same places or at
            moved ones; ``shift`` or ``flip`` for one of the two; ``none``; True and False for ``auto`` and ``none``.
        blocks: ``yes`` to train one residual block or stage after the other, each to make what the original's makes
            from the inputs that the pruned model gives it; ``no`` to train the whole model; ``auto``: with fewer than
            512 samples both are tried, each for a quarter of the effort, and the better on the hold-out goes on.
        loss: a loss of your own in place of the labels', half of the whole: ``f(outputs, targets, labels)`` gets the
            values of the model and of its original, {output: array}, in front of a softmax at the end, and the labels
            of the samples (None without); it returns its value and the gradients, {output: array}. None: none.

    Raises:
        UsageError: no data, fewer than 64 samples (16 where outputs have many positions), data without variety, labels
            that do not fit, or ``blocks="yes"`` with a loss of your own.
        ModelError: no weight can be trained, or the model cannot be run as a training graph.
    """

    requires = (HAS_INPUTS,)

    def __init__(
        self,
        effort: int | str | bool | Effort | None = None,
        *,
        labels: Any = None,
        rate: float = RATE,
        batch_size: int | None = None,
        features: int = FEATURES,
        augment: bool | str = "auto",
        blocks: str = "no",
        loss: UserLoss | None = None,
    ) -> None:
        is_auto = effort is None or effort is True or effort == "auto"
        if not isinstance(effort, Effort):
            effort = Effort(*effort_of(True if effort is None else effort, argument("finetune")))
        variants = {True: "auto", False: "none"}[augment] if isinstance(augment, bool) else augment
        variants, blocks = checked("augment", variants, "prune"), checked("blocks", blocks, "prune")
        if blocks == "yes" and loss is not None:
            raise UsageError(
                f"{argument('loss')} is one of the whole model, and {argument('blocks', 'yes')} trains its blocks.",
                hint=f"Drop one of the two, or give {argument('blocks', 'no')}.",
            )
        self.settings = TrainingSettings(effort, is_auto, labels, rate, batch_size, features, variants, blocks, loss)

    def part(self, share: float) -> Finetune:
        """Return the same training with a share of its effort."""
        result = copy(self)
        result.settings = replace(self.settings, effort=self.settings.effort.part(share))
        return result

    def __call__(self, context: Context, model: Model) -> PassResult:
        """Train, and keep the result where it is better."""
        if context.stages.interrupted:
            return PassResult(model, changed=False)
        if not (model.is_reduced or self.settings.labels is not None or _has_other_weights(context, model)):
            return PassResult(model, [Remark("nothing was pruned, so there is nothing to fine-tune")], changed=False)
        split = split_for(context, model.analysis, "full")
        check_samples(context, model.analysis, split)
        with context.stage("finetune"):
            training = Training.prepare(self.settings, context, model, split)
            course = training.run()
        facts = training.facts(course)
        remarks: list[Fact] = [facts, *map(Remark, training.remarks(facts))]
        tuned = replace(model, hold_out=split.validation)
        if not facts.undone:
            tuned = tuned.with_parts(training.parts(), as_pruned=model.as_pruned or model.parts)
        return PassResult(tuned, remarks)


class ShortFinetune(Pass):
    """Train for as many steps as the effort allows, where that can be expected to help; else change nothing.

    It needs 512 samples or more, 16 where outputs have many positions (detectors, segmentation), an effort whose work
    is 64 steps or more, and a model that answers otherwise than the original. Where the first half brings the outputs
    no closer, it ends. An obstacle to the training is no error here.

    Args:
        augment, blocks: see :class:`Finetune`.
    """

    requires = (HAS_INPUTS,)

    def __init__(self, augment: str = "auto", blocks: str = "no") -> None:
        self._augment, self._blocks = augment, blocks

    def __call__(self, context: Context, model: Model) -> PassResult:
        """Train, and keep the result where it is better."""
        untouched = PassResult(model, changed=False)
        steps = short_steps(context, model)
        if not (model.is_pruned or model.is_factorized) or context.stages.interrupted:
            return untouched
        if steps < _LEAST_STEPS:
            samples = CalibrationBatches(context, model.analysis).samples or 0
            if samples * answers_of_sample(model.analysis, model.analysis.facts.probes[0].inputs) >= _SHORT_SAMPLES:
                context.stages.leave_out("training towards the original")
            return untouched
        try:
            split = split_for(context, model.analysis, "full")
            samples = split.num_fit + split.num_held_out
            if samples * answers_of_sample(model.analysis, split.fit[0]) < _SHORT_SAMPLES or not split.num_held_out:
                return untouched
            (before,) = compare_with_original(context.analysis, [model.parts], split.validation, context.outputs)
            if distance(before) < _CLOSE:
                return untouched
            effort = Effort(steps, patience=_PATIENCE)
            return Finetune(effort, augment=self._augment, blocks=self._blocks)(context, model)
        except OtherDataError as error:
            return PassResult(model, [Remark(f"not fine-tuned: {error.args[0]}")], changed=False)
        except (UsageError, ModelError):
            return untouched


def _has_other_weights(context: Context, model: Model) -> bool:
    """Return whether a model of the original's graph has weights of its own: zeros, codes, or those of a training."""
    for name, weight in context.analysis.loaded.weights.items():
        other = model.weights.get(name)
        if other is None or other is weight or other.shape != weight.shape:
            continue
        one, two = weight.read(), other.read()
        if one.dtype.kind == "f" and not np.allclose(one, two, rtol=0, atol=float(np.finfo(one.dtype).tiny)):
            return True
    return False
