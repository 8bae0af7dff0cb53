"""Reasons in plain words: why an atom is frozen, why a layer stays, and what the user can do."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from onnxprune.report import numbers
from onnxprune.report.facts import LayerFacts


@dataclass(frozen=True, slots=True)
class Words:
    """One barrier code in words: ``short`` fits a table cell, ``why`` a sentence, ``advice`` the next step."""

    short: str
    why: str
    advice: str = ""


BARRIERS: dict[str, Words] = {
    "graph-input": Words(
        "is a model input",
        "These channels come straight from a model input, and whoever feeds the model counts on its shape.",
    ),
    "graph-output": Words(
        "is a model output",
        "These channels are a model output, and whoever reads the model counts on its shape.",
    ),
    "captured-by-subgraph": Words(
        "used inside a body",
        "The body of a control-flow node reads these channels from outside, and what lies in that body cannot be laid "
        "open (SequenceMap, Scan before opset 9, sparse constants in it, foreign operators that hold bodies).",
    ),
    "no-rule": Words(
        "operator without a rule",
        "The channels pass through an operator that has no rule, so nothing is known about what it does with them.",
        "A rule can be registered from outside the package, see CONTRIBUTING.",
    ),
    "dynamic-shape": Words(
        "shape not known",
        "The shape here depends on the data or on an input dimension that is not known.",
        "Give the shape with --input-shape NAME=2,3,224,224.",
    ),
    "missing-constant": Words(
        "value computed at run time",
        "The operator takes a shape, an axis or an index that is computed at run time, so it cannot be followed.",
        "Give the input shapes with --input-shape, or fold constants before pruning.",
    ),
    "normalised": Words(
        "normalised over these channels",
        "A LayerNorm, Softmax, mean or the like is taken over these channels: with fewer of them every other value "
        "changes, so the cut would not be exact.",
        "--approximate allows it where it can be defined (LayerNorm, RMSNorm, GroupNorm, channel means).",
    ),
    "fixed-size": Words(
        "axis must keep its size",
        "An operator needs this axis at exactly this size.",
    ),
    "unlabelled-operand": Words(
        "meets a tensor that cannot shrink",
        "The channels are combined with a tensor that has no removable channels of its own (an input, or a constant of "
        "the full size).",
    ),
    "grid-unbalanced": Words(
        "groups would become unequal",
        "The channels are arranged in equal rows (heads, convolution groups), and no cut keeps the rows equal here.",
    ),
    "not-stored": Words(
        "no stored weights",
        "What makes these channels is filled in or repeated while the model runs: the file holds nothing to cut.",
    ),
    "spatial": Words(
        "used as positions, not channels",
        "A later operator treats this axis as positions (height, width, time), so its entries cannot be taken out one "
        "by one.",
    ),
    "shape-value": Words(
        "its size is used as a number",
        "The model reads the size of this axis at run time and computes with it, so the size cannot change.",
    ),
    "excluded": Words(
        "excluded by option",
        "The layer was left out by --exclude, or is not among those of --include.",
        "Change --exclude or --include to cut it.",
    ),
    "no-score": Words(
        "not scored by the criterion",
        "The criterion has nothing to say about these channels, so there was nothing to choose by.",
        "Another --criterion may have: l2 and gm score every weight.",
    ),
    "kept-whole": Words(
        "kept whole by option",
        "The channels lie in several rows (heads, convolution groups), and --group-policy none leaves such alone.",
        "Choose another --group-policy to cut them.",
    ),
    "recurrent-state": Words(
        "recurrent state",
        "The channels are the state of a recurrent layer that is also given from, or handed to, the outside.",
    ),
    "quantization-block": Words(
        "quantized in blocks",
        "The weights are quantized in blocks along this axis, and single channels cannot leave a block.",
        "Prune first and quantize afterwards, or use --round-to with the block size.",
    ),
    "unsupported-form": Words(
        "form of operator not supported",
        "The operator has a rule, but not for the form in which it is used here.",
    ),
    "covered": Words(
        "cut as another group",
        "The same channels are cut as another group: whole heads or rows instead of single channels, or the other way.",
    ),
    "tied-together": Words(
        "only go all at once",
        "Each of these channels takes all others along (they overlap, or are added to each other in another order), so "
        "that none would be left.",
    ),
    "single": Words("has one channel", "The layer has a single channel, and the last one always stays."),
    "duplicate-write": Words(
        "written more than once",
        "Two places would have to cut the same tensor in different ways.",
    ),
}


def split(reason: str) -> tuple[str, str]:
    """Split a reason ``code`` or ``code: detail`` into (code, detail); free text is detail with an empty code."""
    code, _, detail = reason.partition(":")
    code = code.strip()
    if code in BARRIERS or (code and " " not in code):
        return code, detail.strip()
    return "", reason.strip()


def short(reason: str) -> str:
    """Return a few words for a table cell; for an unknown code the code itself, with its detail."""
    code, detail = split(reason)
    words = BARRIERS.get(code)
    if words is not None:
        return words.short
    return f"{code} ({detail})" if code and detail else code or detail


def in_words(text: str) -> str:
    """Explain in a full sentence why channels stay, without the detail; an unknown code is returned as it is."""
    code, detail = split(text)
    words = BARRIERS.get(code)
    return words.why if words is not None else code or detail


def advice(reason: str) -> str:
    """Return advice for the user, or an empty string."""
    words = BARRIERS.get(split(reason)[0])
    return words.advice if words is not None else ""


def tally(reasons: Iterable[str], most: int = 4) -> str:
    """Reasons counted by their short words, most frequent first: ``is a model output (3), recurrent state (1)``."""
    counted = Counter(short(reason) or "not asked, or less than one unit" for reason in reasons).most_common()
    shown = [f"{text} ({count})" for text, count in counted[:most]]
    if len(counted) > most:
        shown.append(f"other ({sum(count for _, count in counted[most:])})")
    return ", ".join(shown)


@dataclass(frozen=True, slots=True)
class Shortfall:
    """One layer that lost fewer channels than asked: ``lost`` of ``channels`` went, ``asked`` were to go.

    ``why`` is a sentence that many layers may share, ``detail`` what it means for this one.
    """

    layer: str
    channels: int
    lost: int
    asked: int
    why: str
    detail: str = ""
    advice: str = ""


def shortfalls(
    facts: Sequence[LayerFacts],
    groups: Sequence[Mapping[str, Any]],
    asked: Callable[[Sequence[str]], float | None],
    round_to: int = 1,
) -> list[Shortfall]:
    """Layers that lost less than asked, with the reason.

    Args:
        facts: the layers after the cut.
        groups: the groups with ``removed`` units each.
        asked: from the node and tensor names of a group to the ratio asked for it; None where it is excluded.
        round_to: the multiple that was to be kept.
    """
    found = []
    for layer in facts:
        lost = layer.channels_before - layer.channels_after
        group = _home(layer, groups)
        names = [layer.name, *group.get("layers", ()), *(slot["tensor"] for slot in group.get("slots", ()))]
        share = asked(names)
        # Halves may be rounded either way, so the smaller of the two counts is what was asked at least.
        want = math.ceil((share or 0.0) * layer.channels_before - 0.5)
        reason = layer.reason or ("excluded" if share is None else "")
        # A reason on a layer that lost nothing is told even where no ratio was asked for (a plan applied by index).
        if lost >= want and (lost or not reason):
            continue
        why = in_words(reason) if reason else _constraint(layer, group, round_to)
        detail = split(reason)[1]
        found.append(Shortfall(layer.name, layer.channels_before, lost, want, why, detail, advice(reason)))
    return found


def _home(layer: LayerFacts, groups: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the group of a layer's outputs, or an empty one: groups list readers too, so sizes must match."""
    for group in groups:
        removed = group.get("removed", 0)
        lost = removed if isinstance(removed, int) else len(removed)
        fits = group.get("size") == layer.channels_before and lost == layer.channels_before - layer.channels_after
        if fits and layer.name in group.get("layers", ()):
            return group
    return {}


def _constraint(layer: LayerFacts, group: Mapping[str, Any], round_to: int) -> str:
    """Return why a group that may be cut was cut less: its steps, ``--round-to``, the last unit."""
    size = int(group.get("size", layer.channels_before))
    steps = int(group.get("steps", size))
    if layer.channels_after == 1 or steps == 1:
        return "The last unit of a group always stays."
    if round_to > 1:
        return f"--round-to {round_to} keeps a multiple of {round_to}, and the nearest such count is this one."
    if 0 < steps < layer.channels_before:
        return f"Its group goes in {steps} equal steps only, and the nearest step is this one."
    return "It shares its channels with other layers, or its group was given a smaller ratio."


def render(found: Sequence[Shortfall], *, name_width: int) -> list[RenderableType]:
    """Render the limits on pruning, those with the same reason together, most channels first."""
    if not found:
        return [Text("every layer lost what was asked", style="green")]
    by_reason: dict[tuple[str, str], list[Shortfall]] = {}
    for item in found:
        by_reason.setdefault((item.why, item.advice), []).append(item)
    parts: list[RenderableType] = []
    for (why, step), items in sorted(by_reason.items(), key=lambda pair: -sum(item.channels for item in pair[1])):
        parts.append(Text.assemble((why, "bold"), f" {step}" if step else ""))
        for item in items:
            name = numbers.shorten(item.layer, name_width)
            asked = f", {item.asked} asked" if item.asked else ""
            detail = f" ({item.detail})" if item.detail else ""
            parts.append(Text(f"  {name}: {item.lost} of {item.channels} channels removed{asked}{detail}"))
    return parts
