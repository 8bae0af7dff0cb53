"""Which choices make a layer faster, and by how much: candidates of every layer, carried out and timed on their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from onnxprune.factors.candidates import Candidate, Opened
from onnxprune.passes.factor_work import Work
from onnxprune.passes.joint_budget import JointBudget

# Shares of a layer's cost at which candidates are timed.
_SHARES = (0.2, 0.35, 0.5, 0.65, 0.8)
# Less than this is saved: within noise.
_FASTER = 0.97


class Timed(NamedTuple):
    """A candidate and its time as a share of the layer's."""

    candidate: Candidate
    share: float


def timed_options(work: Work, joint: JointBudget) -> list[list[Timed]]:
    """Per layer the candidates that are faster than it, by rising time; of two the slower one loses less."""
    found = []
    total = max(len(joint.opened), 1)
    for number, (opened, options) in enumerate(zip(joint.opened, joint.options, strict=True)):
        timed = []
        for candidate in _some(opened, options):
            (done,) = work.carry_out({opened.layer.name: candidate})
            latency = joint.latency(done)
            if latency is not None and done.candidate is candidate:
                timed.append(Timed(candidate, latency.after_ms / latency.before_ms))
        found.append(_worth(timed))
        work.context.tell("layers apart", (number + 1) / total)
    return found


def _some(opened: Opened, options: Sequence[Candidate]) -> list[Candidate]:
    """Of every method the candidates nearest to the shares, each once."""
    found: dict[tuple[str, tuple[int, ...]], Candidate] = {}
    for method in dict.fromkeys(c.method for c in options):
        own = [c for c in options if c.method == method and c.cost < opened.whole]
        for share in _SHARES if own else ():
            one = min(own, key=lambda c: abs(c.cost - share * opened.whole))
            found[method, tuple(one.ranks)] = one
    return list(found.values())


def _worth(timed: Sequence[Timed]) -> list[Timed]:
    """Those that are faster, without any that loses more than a faster one."""
    kept: list[Timed] = []
    for one in sorted((t for t in timed if t.share < _FASTER), key=lambda t: (t.share, t.candidate.loss)):
        if not kept or one.candidate.loss < kept[-1].candidate.loss:
            kept.append(one)
    return kept
