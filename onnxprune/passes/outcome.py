"""What a repair is worth: samples that it never sees, and the model's outputs on them before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from onnxprune.analysis import Analysis
from onnxprune.passes.prepared import Model
from onnxprune.passes.trial import Trial
from onnxprune.report.facts import Fidelity, Recovery, Repair
from onnxprune.runtime.capture import count
from onnxprune.runtime.fidelity import fidelity
from onnxprune.runtime.sessions import Feed

# One batch in so many is set aside, up to so many samples.
_EVERY, _MOST = 8, 256
# Samples below which a repair is worth a warning.
_FEW = 64
# A repair that leaves more noise than this share of what there was is undone.
_WORSE = 1.01


def set_aside(feeds: Sequence[Feed], name: str) -> tuple[list[Feed], tuple[list[Feed], str]]:
    """Batches to fit to, and batches to judge the result on with a name for them.

    Every eighth batch is kept from the fit; with fewer than eight, the result is judged on what it was fitted to, and
    the name says so.
    """
    fit: list[Feed] = []
    aside: list[Feed] = []
    samples = 0
    for number, feed in enumerate(feeds):
        if number % _EVERY == _EVERY - 1 and samples < _MOST:
            aside.append(feed)
            samples += count(feed)
        else:
            fit.append(feed)
    if aside:
        return fit, (aside, f"{name}, set aside from the repair")
    return fit, (fit, f"{name}, which the repair was fitted to")


def doubts(feeds: Sequence[Feed]) -> list[str]:
    """What is wrong with data to fit to, as warnings."""
    found = []
    samples = sum(map(count, feeds))
    if samples < _FEW:
        what = "1 sample" if samples == 1 else f"{samples} samples"
        found.append(f"the repair is fitted to {what}: {_FEW} or more are needed to do well, and 256 do better")
    if samples > 1 and _constant(feeds):
        found.append("all calibration samples are the same: a repair can learn next to nothing from them")
    return found


def _constant(feeds: Sequence[Feed]) -> bool:
    """Whether every sample of every input is the same."""
    for name, value in feeds[0].items():
        for feed in feeds:
            if value.ndim == 0 or feed[name].shape[1:] != value.shape[1:] or (feed[name] != value[:1]).any():
                return False
    return True


def judge(analysis: Analysis, models: Sequence[Model], feeds: Sequence[Feed], source: str) -> list[Fidelity]:
    """Fidelity of several models to the original on the same inputs."""
    found = []
    with Trial.of(analysis) as trial:
        for number, model in enumerate(models):
            path, _ = trial.write(*model, f"model{number}")
            found.append(fidelity(trial.original, path, feeds, source, together=not trial.large))
    return found


def is_worse(after: Fidelity, before: Fidelity) -> bool:
    """Whether outputs are further from the original's: mean share of noise, that of an output at most 1."""
    return noise(after) > _WORSE * noise(before)


def noise(facts: Fidelity) -> float:
    """|a - b|^2 / |a|^2, at most 1, averaged over outputs."""
    return float(np.mean([min(1.0, 10 ** (-o.snr_db / 10)) for o in facts.outputs] or [0.0]))


def remarks(facts: Recovery, repairs: Sequence[Repair], left: Mapping[str, str]) -> list[str]:
    """What a user should know of a repair that came to little, as warnings."""
    if facts.undone:
        return ["the repair took the outputs further from the original's and was undone: more samples may help"]
    if not any(r.done for r in repairs):
        why = "no layer can be changed" if left and not repairs else "nothing lowered the error on held-out samples"
        return [f"no layer was repaired (--recover {facts.mode}): {why}; --explain says more"]
    return []
