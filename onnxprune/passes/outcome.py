"""What a repair is worth: samples that it never sees, and the model's outputs on them before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from onnxprune.analysis import Analysis
from onnxprune.passes.trial import Trial
from onnxprune.pipeline import HoldOut, ModelParts
from onnxprune.report.facts import Fidelity, Recovery, Repair
from onnxprune.runtime.capture import count
from onnxprune.runtime.fidelity import fidelity
from onnxprune.runtime.sessions import Feed, open_session, run

UNREACHED = "no calibration sample takes"
"""Begins the reason of every layer that is left since the data never come to it."""
# One batch in so many is set aside, up to so many samples.
_EVERY, MOST = 8, 256
# Samples below which a repair is worth a warning, and from which on they should be of several classes.
_FEW, _TELLING = 64, 16
# Held-out error that is rounding: the cut did not reach the layer.
_UNTOUCHED = 1e-9
# A repair that leaves more noise than this share of what there was is undone.
_WORSE = 1.01


def set_aside(feeds: Sequence[Feed], name: str) -> tuple[list[Feed], HoldOut]:
    """Batches to fit to, and batches to judge the result on with a name for them.

    Every eighth batch is kept from the fit; with fewer than eight, the result is judged on what it was fitted to, and
    the name says so.
    """
    fit: list[Feed] = []
    aside: list[Feed] = []
    samples = 0
    for number, feed in enumerate(feeds):
        if number % _EVERY == _EVERY - 1 and samples < MOST:
            aside.append(feed)
            samples += count(feed)
        else:
            fit.append(feed)
    if aside:
        return fit, HoldOut(aside, f"{name}, set aside from the repair")
    return fit, HoldOut(fit, f"{name}, which the repair was fitted to")


def doubts(analysis: Analysis, feeds: Sequence[Feed], repairs: Sequence[Repair]) -> list[str]:
    """What is wrong with data that was fitted to, as warnings: each thing once, with the layer where it is worst."""
    found = []
    samples = sum(map(count, feeds))
    if samples < _FEW:
        what = "1 sample" if samples == 1 else f"{samples} samples"
        found.append(f"the repair is fitted to {what}: {_FEW} or more are needed to do well, and 256 do better")
    if samples > 1 and _constant(feeds):
        found.append("all calibration samples are the same: a repair can learn next to nothing from them")
        return found
    if samples >= _TELLING and (output := _single_class(analysis, feeds)):
        found.append(
            f"the original says the same class for all {samples} calibration samples (largest entry of {output!r}): "
            "the repair sees nothing of the other classes; give samples of all"
        )
    return found + _gaps(repairs)


def _single_class(analysis: Analysis, feeds: Sequence[Feed]) -> str:
    """The first output of class scores whose largest entry is the same for all samples; empty where there is none."""
    first: dict[str, int] = {}
    varied: set[str] = set()
    with Trial.of(analysis) as trial:
        session = open_session(trial.original)
        for feed in feeds:
            for name, value in run(session, feed).items():
                if value.ndim != 2 or value.shape[1] < 2 or not value.size or value.dtype.kind != "f":
                    continue
                best = value.argmax(axis=1)
                if (best != first.setdefault(name, int(best[0]))).any():
                    varied.add(name)
            if varied >= first.keys():
                return ""
    return next(name for name in first if name not in varied)


def _gaps(repairs: Sequence[Repair]) -> list[str]:
    """Layers that the data say too little of."""
    found = []
    reached = [r for r in repairs if r.unknowns and r.before > _UNTOUCHED]
    short = [r for r in reached if r.rows < r.unknowns]
    if short:
        worst = min(short, key=lambda r: r.rows / r.unknowns)
        found.append(
            f"{_layers(short)} more unknowns than the data have rows (worst: {worst.layer}, {worst.unknowns} and "
            f"{worst.rows}): their repair stays close to the weights they have; more samples would help"
        )
    flat = [r for r in reached if r not in short and r.directions < r.unknowns / 2]
    if flat:
        worst = min(flat, key=lambda r: r.directions / r.unknowns)
        found.append(
            f"{_layers(flat)} inputs that vary in less than half of their directions (worst: {worst.layer}, "
            f"{worst.directions} of {worst.unknowns}): the others are not repaired; give samples that differ more"
        )
    return found


def _layers(which: Sequence[Repair]) -> str:
    return "1 layer has" if len(which) == 1 else f"{len(which)} layers have"


def _constant(feeds: Sequence[Feed]) -> bool:
    """Whether every sample of every input is the same."""
    for name, value in feeds[0].items():
        for feed in feeds:
            if value.ndim == 0 or feed[name].shape[1:] != value.shape[1:] or (feed[name] != value[:1]).any():
                return False
    return True


def judge(analysis: Analysis, models: Sequence[ModelParts], feeds: Sequence[Feed], source: str) -> list[Fidelity]:
    """Fidelity of several models to the original on the same inputs."""
    found = []
    with Trial.of(analysis) as trial:
        for number, model in enumerate(models):
            path, _ = trial.write(*model, f"model{number}")
            found.append(fidelity(trial.original, path, feeds, source, together=not trial.heavy))
    return found


def is_worse(after: Fidelity, before: Fidelity) -> bool:
    """Whether outputs are further from the original's: mean share of noise, that of an output at most 1."""
    return noise(after) > _WORSE * noise(before)


def noise(facts: Fidelity) -> float:
    """|a - b|^2 / |a|^2, at most 1, averaged over outputs; the Hellinger distance for class probabilities."""
    return float(np.mean([o.noise for o in facts.outputs] or [0.0]))


def remarks(facts: Recovery, repairs: Sequence[Repair], left: Mapping[str, str]) -> list[str]:
    """What a user should know of a repair that came to little, as warnings."""
    unreached = sum(why.startswith(UNREACHED) for why in left.values())
    found = []
    if unreached:
        what = "1 layer lies" if unreached == 1 else f"{unreached} layers lie"
        found.append(
            f"{what} in branches that no calibration sample takes, and cannot be repaired; --explain says which"
        )
    if facts.undone:
        help = "inputs of your own (--data)" if facts.inputs else "more samples"
        found.append(f"the repair took the outputs further from the original's and was undone: {help} may help")
    elif not any(r.done for r in repairs):
        why = "no layer can be changed" if left and not repairs else "nothing lowered the error on held-out samples"
        found.append(f"no layer was repaired (--recover {facts.mode}): {why}; --explain says more")
    return found
