"""Reasons in plain words: why an atom is frozen, why a layer stays, and advice for the user."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from onnxprune.labels.atoms import Reason
from onnxprune.report import numbers
from onnxprune.report.facts import LayerFacts


@dataclass(frozen=True, slots=True)
class Words:
    """One barrier code in words: ``short`` fits a table cell, ``why`` a sentence, ``advice`` the next step."""

    short: str
    why: str
    advice: str = ""


BARRIERS: dict[str, Words] = {
    Reason.GRAPH_OUTPUT: Words(
        "is a model output",
        "These channels are a model output, and programs that run the model depend on its shape.",
        "--cache-heads lets the caches of a decoder shrink, --resize-io NAME other inputs and outputs.",
    ),
    Reason.CAPTURED_BY_SUBGRAPH: Words(
        "used inside a body",
        "The body of a control-flow node reads these channels from outside, and that body cannot be inlined "
        "(SequenceMap, Scan before opset 9, sparse constants, foreign operators with bodies).",
    ),
    Reason.NO_RULE: Words(
        "operator without a rule",
        "The channels pass through an operator without a rule, so its effect on them is not known.",
        "Register a rule for the operator: see CONTRIBUTING, 'Add a rule'.",
    ),
    Reason.DYNAMIC_SHAPE: Words(
        "shape not known",
        "The shape depends on the data or on an unknown input dimension.",
        "Give the shape with --input-shape NAME=2,3,224,224.",
    ),
    Reason.MISSING_CONSTANT: Words(
        "value computed at run time",
        "The operator reads a shape, an axis or an index that the model computes at run time.",
        "Give the input shapes with --input-shape, or fold constants before pruning.",
    ),
    Reason.NORMALISED: Words(
        "normalised over these channels",
        "A GroupNorm, Softmax, maximum or similar operator runs over these channels. With fewer channels all other "
        "values would change, so the pruned model would not be exact.",
        "--approximate prunes them where the operator stays defined (GroupNorm, EmbedLayerNormalization).",
    ),
    Reason.FIXED_SIZE: Words(
        "axis must keep its size",
        "An operator needs this axis at exactly this size.",
    ),
    Reason.SHARED: Words(
        "shared by all heads",
        "All heads share these channels (a scale, a rotation), and whole heads are removed in their place.",
    ),
    Reason.HEAD_SIZE: Words(
        "heads must keep one common size",
        "The attention kernel needs the same head size for queries, keys and values.",
        "Prune whole heads: --reshape-axis heads.",
    ),
    Reason.ROTARY: Words(
        "paired by rotary positions",
        "Rotary position embeddings pair these channels, so no single one can be removed.",
        "Prune whole heads: --reshape-axis heads.",
    ),
    Reason.SPATIAL: Words(
        "used as positions, not channels",
        "A later operator treats this axis as positions (height, width, time), not as channels.",
    ),
    Reason.CACHE: Words(
        "halves of a cache differ",
        "The channels of a cache's input and output do not correspond, so the output could not be fed back.",
    ),
    Reason.UNLABELLED_OPERAND: Words(
        "meets a tensor that cannot shrink",
        "The channels are combined with a tensor without removable channels (a model input, or a constant of the full "
        "size).",
    ),
    Reason.UNSUPPORTED_FORM: Words(
        "form of operator not supported",
        "The operator has a rule, but the rule does not support the form used here.",
    ),
    Reason.KERNEL: Words(
        "is a kernel size",
        "This axis is the height, width or depth of a kernel, and pruning removes channels only.",
    ),
    Reason.OPERAND: Words(
        "holds settings, not channels",
        "This axis belongs to an operand that holds sizes or settings of the operator, not channels.",
    ),
    Reason.COVERED: Words(
        "pruned as another group",
        "Another group prunes the same channels: as whole heads or rows instead of single channels, or the reverse.",
    ),
    Reason.TIED_TOGETHER: Words(
        "can only be removed all at once",
        "These channels are tied to each other (they overlap, or are added in another order), so removing one would "
        "remove all.",
    ),
    Reason.NOT_STORED: Words(
        "no stored weights",
        "The model fills in or repeats these channels at run time, so the file holds no weights to prune.",
    ),
    Reason.GRID_UNBALANCED: Words(
        "groups would become unequal",
        "The channels form equal rows (heads, convolution groups), and no removal keeps these rows equal.",
    ),
    Reason.SINGLE: Words("has one channel", "The layer has one channel, and a group always keeps its last unit."),
    Reason.EXCLUDED: Words(
        "excluded by option",
        "The layer matches --exclude, or does not match --include.",
        "Change --exclude or --include to prune it.",
    ),
    Reason.KEPT_WHOLE: Words(
        "kept whole by option",
        "The channels form several rows (heads, convolution groups), and --group-policy none prunes no such groups.",
        "Choose another --group-policy to prune them.",
    ),
    Reason.NO_SCORE: Words(
        "not scored by the criterion",
        "The criterion has no score for these channels.",
        "Choose another --criterion: l2 and gm score every weight.",
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


def tally(reasons: Iterable[str], max_reasons: int = 4) -> str:
    """Reasons counted by their short words, most frequent first: ``is a model output (3), recurrent state (1)``."""
    counted = Counter(short(reason) or "not chosen, or less than one unit" for reason in reasons).most_common()
    shown = [f"{text} ({count})" for text, count in counted[:max_reasons]]
    if len(counted) > max_reasons:
        shown.append(f"other ({sum(count for _, count in counted[max_reasons:])})")
    return ", ".join(shown)


@dataclass(frozen=True, slots=True)
class Shortfall:
    """One layer that lost fewer channels than requested: ``lost`` of ``channels`` went, ``requested`` were to go.

    ``why`` is a sentence that many layers may share, ``detail`` its meaning for this one.
    """

    layer: str
    channels: int
    lost: int
    requested: int
    why: str
    detail: str = ""
    advice: str = ""


def shortfalls(
    facts: Sequence[LayerFacts],
    groups: Sequence[Mapping[str, Any]],
    ratio_of: Callable[[Sequence[str]], float | None],
    round_to: int | str = 1,
) -> list[Shortfall]:
    """Layers that lost less than requested, with the reason.

    Args:
        facts: the layers after the cut.
        groups: the groups with ``removed`` units each.
        ratio_of: from the node and tensor names of a group to the ratio requested for it; None where it is excluded.
        round_to: the multiple that was to be kept; ``auto``: that of each group.
    """
    items = []
    for layer in facts:
        lost = layer.channels_before - layer.channels_after
        group = _home(layer, groups)
        names = [layer.name, *group.get("layers", ()), *(slot["tensor"] for slot in group.get("slots", ()))]
        share = ratio_of(names)
        # Halves may be rounded either way, so at least the smaller of the two counts was requested.
        want = math.ceil((share or 0.0) * layer.channels_before - 0.5)
        reason = layer.reason or (Reason.EXCLUDED if share is None else "")
        # A reason on a layer that lost nothing is told even where no ratio was requested for (a plan applied by index).
        if lost >= want and (lost or not reason):
            continue
        why = in_words(reason) if reason else _constraint(layer, group, round_to)
        detail = split(reason)[1]
        items.append(Shortfall(layer.name, layer.channels_before, lost, want, why, detail, advice(reason)))
    return items


def _home(layer: LayerFacts, groups: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the group of a layer's outputs, or an empty one: groups list readers too, so sizes must match."""
    for group in groups:
        removed = group.get("removed", 0)
        lost = removed if isinstance(removed, int) else len(removed)
        fits = group.get("size") == layer.channels_before and lost == layer.channels_before - layer.channels_after
        if fits and layer.name in group.get("layers", ()):
            return group
    return {}


def _constraint(layer: LayerFacts, group: Mapping[str, Any], round_to: int | str) -> str:
    """Return the reason why a group that may be cut was cut less: its steps, ``--round-to``, the last unit."""
    size = int(group.get("size", layer.channels_before))
    steps = int(group.get("steps", size))
    if layer.channels_after == 1 or steps == 1:
        return "A group always keeps its last unit."
    multiple = round_to if isinstance(round_to, int) else int(group.get("multiple", 1))
    if multiple > 1:
        return f"--round-to {round_to} allows multiples of {multiple} only, and this is the nearest."
    if 0 < steps < layer.channels_before:
        return f"Its group can be pruned in {steps} equal steps only, and this is the nearest."
    return "It shares its channels with other layers, or its group has a smaller ratio."


def render(shortfalls_of_rules: Sequence[Shortfall], *, name_width: int) -> list[RenderableType]:
    """Render the limits on pruning, those with the same reason together, most channels first."""
    if not shortfalls_of_rules:
        return [Text("every layer was pruned as asked", style="green")]
    by_reason: dict[tuple[str, str], list[Shortfall]] = {}
    for item in shortfalls_of_rules:
        by_reason.setdefault((item.why, item.advice), []).append(item)
    parts: list[RenderableType] = []
    for (why, step), items in sorted(by_reason.items(), key=lambda pair: -sum(item.channels for item in pair[1])):
        parts.append(Text.assemble((why, "bold"), f" {step}" if step else ""))
        for item in items:
            name = numbers.shorten(item.layer, name_width)
            suffix = f", {item.requested} asked" if item.requested else ""
            detail = f" ({item.detail})" if item.detail else ""
            parts.append(Text(f"  {name}: {item.lost} of {item.channels} channels removed{suffix}{detail}"))
    return parts
