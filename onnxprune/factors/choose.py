"""From what was asked to one choice per layer, and a reason for every layer that stays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from onnxprune.decompose import METHODS, Ranks
from onnxprune.decompose.ranks import by_energy, by_vbmf
from onnxprune.errors import UsageError
from onnxprune.factors.candidates import Candidate, Opened
from onnxprune.factors.request import Request


@dataclass(slots=True)
class Chosen:
    """Choices by the layer's name, and why other layers stay."""

    taken: dict[str, Candidate] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)


def choose_local(opened: Opened, request: Request, chosen: Chosen) -> None:
    """Decide for one layer on its own.

    Raises:
        UsageError: a rank that a pattern names is out of range.
    """
    layer, name = opened.layer, request.method
    why = opened.refusal(name)
    if why:
        chosen.left[layer.name] = why
        return
    names = list(layer.names)
    if request.ranks:
        found = _asked(opened, request, names)
        must = True
    elif request.energy is not None:
        found, must = opened.priced(name, by_energy(opened.fit(name), request.energy, request.round_to)), False
    elif request.vbmf is not None:
        found, must = opened.priced(name, _by_vbmf(opened, request)), False
    else:
        limit = (1.0 - request.ratio_of(names)) * opened.whole
        best, must = opened.within(name, limit, request.round_to), False
        found = best if best is not None else f"no rank saves {request.ratio_of(names):.0%} of its {request.cost}"
    if isinstance(found, str):
        chosen.left[layer.name] = found
    elif not must and found.cost >= opened.whole:
        ranks = ",".join(map(str, found.ranks))
        chosen.left[layer.name] = f"at the ranks asked for ({ranks}) it would have no fewer {request.cost}"
    else:
        chosen.taken[layer.name] = found


def choose_wanted(
    opened: Mapping[str, Opened], wanted: Mapping[str, tuple[str, float]], step: int, chosen: Chosen
) -> None:
    """Ranks for layers whose method and share of the cost are known, {name: (method, share)}; multiples of ``step``."""
    for name, one in opened.items():
        method, share = wanted.get(name, ("", 0.0))
        found = one.within(method, share * one.whole, step) if method and not one.refusal(method) else None
        if found is None:
            chosen.left[name] = "others lose less for what they save"
        else:
            chosen.taken[name] = found


def _by_vbmf(opened: Opened, request: Request) -> Ranks:
    """Ranks above noise; CP takes the larger one of the channel modes, as its terms have to span both."""
    assert request.vbmf is not None
    if request.method != "cp":
        return by_vbmf(opened.fit(request.method), request.vbmf, request.round_to)
    return (max(by_vbmf(opened.fit("tucker"), request.vbmf, request.round_to)),)


def _asked(opened: Opened, request: Request, names: Sequence[str]) -> Candidate | str:
    """The ranks that were named for this layer."""
    asked = request.ranks_of(names)
    if asked is None:
        return "no rank is given for it"
    pattern, ranks = asked
    method = METHODS[request.method]
    limits = method.limits(opened.layer.shape)
    if len(ranks) == 1:
        ranks = ranks * len(limits)
    sizes = (*limits, *opened.layer.shape.kernel)[: max(len(limits), len(ranks))]
    over = [(r, most) for r, most in zip(ranks, sizes, strict=False) if r > most]
    if over or len(ranks) > len(sizes):
        rank, most = over[0] if over else (ranks[-1], 0)
        allowed = ",".join(f"1..{n}" for n in sizes)
        if pattern == "*":
            return f"rank {rank} is more than its largest, {most}"
        raise UsageError(f"rank {rank} of {opened.layer.name!r} is out of range.", hint=f"Allowed: {allowed}.")
    return opened.priced(request.method, ranks)


def read_choices(opened: Mapping[str, Opened], entries: Sequence[tuple[str, str, Ranks]]) -> dict[str, Candidate]:
    """The choices of a plan, [(name of the layer, method, ranks)].

    Raises:
        UsageError: no such layer or method, or ranks that do not fit.
    """
    result = {}
    for name, method, ranks in entries:
        layer = opened.get(name)
        if layer is None:
            raise UsageError(
                f"The plan factorizes layer {name!r}, which this model does not have or which cannot be factorized.",
                hint="Give the plan that was written for this model.",
            )
        if method not in METHODS or layer.refusal(method):
            why = layer.refusal(method) if method in METHODS else f"there is no method {method!r}"
            raise UsageError(f"The plan factorizes layer {name!r} by {method}: {why}.")
        limits = METHODS[method].limits(layer.layer.shape)
        sizes = (*limits, *layer.layer.shape.kernel)[: max(len(limits), len(ranks))]
        if (
            len(ranks) < len(limits)
            or not any(ranks)
            or any(not 0 <= r <= n for r, n in zip(ranks, sizes, strict=False))
        ):
            allowed = ",".join(f"1..{n}" for n in sizes)
            raise UsageError(f"The plan gives layer {name!r} the ranks {list(ranks)}.", hint=f"Allowed: {allowed}.")
        result[name] = layer.priced(method, ranks)
    return result
