"""Kinds of outputs: the meaning of an output, read off its values, its name, and the end of the graph.

A detector's boxes and scores are one answer, whether they are several tensors or columns of one; every other output is
an answer of its own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from onnxprune.runtime.sessions import Array, Feed, eps

KINDS = ("classes", "boxes", "detections", "embedding", "signal", "sequence")
"""Kinds that a user can set; the measures know some more."""

Numbers = NDArray[np.float64]

_CLASS = re.compile(r"class|cls|logit|prob|score|softmax|label|conf|heat|mask|seg|salien", re.I)
_BOX = re.compile(r"box|bbox|loc|reg|dis_pred|rect|dets?(_|$|\d)", re.I)
_EMBEDDING = re.compile(r"embed|feat|hidden|pool|repr|vector|token_states|encod", re.I)
_STATE = re.compile(r"present|past|state|hidden|cache|(^|[._/])(h|c|hn|cn|mems?|memory)([._/n0-9]|$)", re.I)
# Largest number of elements of an output that a decision looks at.
_ENOUGH = 1 << 21
_MANY = 8
# Columns of a sequence from which on they are an alphabet or a vocabulary rather than a few independent answers.
_ALPHABET = 8


@dataclass(frozen=True, slots=True)
class Hint:
    """Hints of the graph about an output.

    Attributes:
        axis: axis of the channels (classes, attributes) of the layers that made it; None: not known.
        ends: types of the operators between those layers and the output.
        listed: whether it is a list whose rows were selected by their values.
        past: input of which it is the next value, where it is a cache; else empty.
    """

    axis: int | None = None
    ends: frozenset[str] = frozenset()
    listed: bool = False
    past: str = ""


@dataclass(frozen=True, slots=True)
class Part:
    """Columns of an output, as [samples, positions, columns].

    Attributes:
        name: the output.
        axis: axis of the columns; None: one column.
        columns: the first of them and the one after the last; None: all.
        batched: whether the first axis is samples; otherwise there is one sample.
        form: of scores: ``probabilities`` (adding up to 1), ``independent`` (each from 0 to 1), ``logits`` (of
            probabilities), ``binary logits`` (of independent scores), ``codes`` (quantised).
        background: column that stands for no object, or None.
    """

    name: str
    axis: int | None = None
    columns: tuple[int, int] | None = None
    batched: bool = True
    form: str = ""
    background: int | None = None

    def of(self, outputs: Feed) -> Numbers:
        """Return the columns [samples, positions, columns], float64."""
        array, axis = outputs[self.name], self.axis
        if self.columns is None:
            return table(array, axis, self.batched)
        part_columns = slice(*self.columns)
        if axis is not None and 0 <= axis < array.ndim:  # other columns need no conversion
            return table(array[(slice(None),) * axis + (part_columns,)], axis, self.batched)
        return table(array, axis, self.batched)[..., part_columns]

    def scores(self, outputs: Feed) -> Numbers:
        """Return the columns as scores from 0 to 1, without the background."""
        values = as_scores(self.of(outputs), self.form)
        return values if self.background is None else np.delete(values, self.background, axis=-1)


@dataclass(frozen=True, slots=True)
class Level:
    """Boxes and scores of the same anchors or detections.

    Attributes:
        boxes: four numbers per box, or the numbers that boxes are computed of.
        scores: their products are the scores.
        labels: the class of each row, where it is a list.
        extras: other numbers per box: landmarks, coefficients of masks.
        form: ``corners`` (x, y, x, y), ``centre`` (x, y, width, height), or ``raw``.
        listed: whether rows are selected detections, in any order.
    """

    boxes: Part
    scores: tuple[Part, ...]
    labels: tuple[Part, ...] = ()
    extras: tuple[Part, ...] = ()
    form: str = "raw"
    listed: bool = False


@dataclass(frozen=True, slots=True)
class Reading:
    """One answer of a model: outputs that are judged together.

    Attributes:
        kind: one of :data:`KINDS`, or ``values`` (numbers per channel), ``labels`` (integers, texts), ``state``
            (returns as an input).
        outputs: names.
        part: of a single output.
        levels: of detections.
        set: whether a user set the kind.
    """

    kind: str
    outputs: tuple[str, ...]
    part: Part = field(default_factory=lambda: Part(""))
    levels: tuple[Level, ...] = ()
    set: bool = False


def table(array: Array, axis: int | None, batched: bool = True) -> Numbers:
    """Return an output as [samples, positions, columns], float64; complex numbers as their size."""
    values = np.abs(array) if array.dtype.kind == "c" else array
    values = values.astype(np.float64)
    values = values if batched else values[None]
    axis = None if axis is None else axis + (not batched)
    if values.ndim == 0:
        return values.reshape(1, 1, 1)
    if axis is None or axis >= values.ndim:
        return values.reshape(values.shape[0], -1, 1)
    if axis == 0:  # no axis is left for samples
        return values.reshape(values.shape[0], -1).T[None]
    values = np.moveaxis(values, axis, -1)
    rows = math.prod(values.shape[1:-1])
    return values.reshape(values.shape[0], rows, values.shape[-1])


def as_scores(values: Numbers, form: str) -> Numbers:
    """Return scores of any form as numbers from 0 to 1; values that are not finite count as the lowest."""
    if form == "binary logits":
        return 1 / (1 + np.exp(-np.clip(np.nan_to_num(values, nan=-60, neginf=-60, posinf=60), -60, 60)))
    if form == "logits":
        return softmax(values)
    known = values
    if not np.isfinite(values).all():
        known = np.nan_to_num(values, nan=0.0, posinf=1.0, neginf=0.0)
    if form == "codes":
        known = known - min(0.0, float(known.min(initial=0.0)))
        return np.asarray(known / np.maximum(known.sum(-1, keepdims=True), 1e-12))
    return np.clip(known, 0.0, 1.0)


def softmax(values: Numbers) -> Numbers:
    """Return probabilities of logits over the last axis."""
    known = np.nan_to_num(values, nan=-1e30, posinf=1e30, neginf=-1e30)
    powers = np.exp(known - known.max(-1, keepdims=True))
    return np.asarray(powers / powers.sum(-1, keepdims=True))


# -- all outputs -------------------------------------------------------------------------------------------------------


def read_outputs(
    outputs: Sequence[Feed],
    inputs: Sequence[Feed],
    hints: Mapping[str, Hint],
    user_kinds: Mapping[str, tuple[str, int | None]],
) -> list[Reading]:
    """Decide the kind of each output of a model.

    Args:
        outputs: of the original, some batches.
        inputs: of the same batches.
        hints: hints of the graph, by output.
        user_kinds: {output: (kind, axis or None)} as the user set them.
    """
    values = {name: _gather(name, outputs) for name in outputs[0]} if outputs else {}
    first = {name: array for feed in inputs[:1] for name, array in feed.items()}
    sized = [name for name, array in values.items() if array.size]
    levels = _levels(values, hints, user_kinds)
    inside = [part.name for level in levels for part in _parts(level)]
    readings = []
    if levels:
        there = tuple(name for name in sized if name in inside)
        readings.append(Reading("detections", there, levels=tuple(levels), set=any(n in user_kinds for n in there)))
    alone = [name for name in sized if name not in inside and not _counts_rows(name, values, bool(levels))]
    readings += [_single(name, values[name], first, hints.get(name, Hint()), user_kinds.get(name)) for name in alone]
    answers = [reading for reading in readings if reading.kind != "state"]
    return readings if answers else [Reading("values", r.outputs, r.part, set=r.set) for r in readings]


def _parts(level: Level) -> list[Part]:
    return [level.boxes, *level.scores, *level.labels, *level.extras]


def _gather(name: str, outputs: Sequence[Feed]) -> Array:
    """Join an output over batches as far as shapes allow, up to a few million elements."""
    arrays: list[Array] = []
    for feed in outputs:
        array = feed.get(name)
        if array is None or array.ndim == 0 or (arrays and array.shape[1:] != arrays[0].shape[1:]):
            break
        arrays.append(array)
        if sum(a.size for a in arrays) > _ENOUGH:
            break
    return np.concatenate(arrays) if arrays else np.asarray(outputs[0][name])


def _counts_rows(name: str, values: Mapping[str, Array], detects: bool) -> bool:
    """Return whether an output beside detections is how many there are."""
    array = values[name]
    return detects and "num" in name.lower() and (array.ndim < 2 or array.shape[1:] == (1,))


def _single(name: str, array: Array, inputs: Feed, hint: Hint, user_kind: tuple[str, int | None] | None) -> Reading:
    """Decide the kind of an output that is no part of detections."""
    if user_kind is not None:
        axis = user_kind[1] if user_kind[1] is not None else _axis(array, inputs, hint)
        axis = axis + array.ndim if axis is not None and axis < 0 else axis
        form = _form(table(array, axis), False) if user_kind[0] in ("classes", "sequence") else ""
        return Reading(user_kind[0], (name,), Part(name, axis, form=form), set=True)
    if not eps(array.dtype) and not (array.dtype.kind in "iu" and array.dtype.itemsize == 1):
        return Reading("labels", (name,), Part(name))
    if any(_returns(name, array, other, value) for other, value in inputs.items()):
        return Reading("state", (name,), Part(name))
    axis = _axis(array, inputs, hint)
    kind, form = _kind(name, array, axis, inputs, hint)
    return Reading(kind, (name,), Part(name, axis, form=form))


def _returns(name: str, array: Array, other: str, value: Array) -> bool:
    """Return whether an output is the next value of an input: a state, a cache of keys and values."""
    if not _STATE.search(name) or not _STATE.search(other) or array.ndim != value.ndim or array.ndim < 2:
        return False
    return sum(a != b for a, b in zip(array.shape, value.shape, strict=True)) <= 2 and array.dtype == value.dtype


def _axis(array: Array, inputs: Feed, hint: Hint) -> int | None:
    """Return the axis of the classes or attributes: as the graph shows, else as layouts are by custom."""
    if hint.axis is not None and hint.axis < array.ndim and array.shape[hint.axis] > 1:
        return hint.axis
    if array.ndim < 2:
        return None
    if array.ndim < 4:
        return array.ndim - 1
    last = any(value.ndim == 4 and value.shape[-1] in (1, 3) and value.shape[1] > 4 for value in inputs.values())
    return array.ndim - 1 if last else 1


# -- one output --------------------------------------------------------------------------------------------------------


def _kind(name: str, array: Array, axis: int | None, inputs: Feed, hint: Hint) -> tuple[str, str]:
    """Return the kind of an output, and the form of its scores."""
    columns = table(array, axis)
    number, dense = columns.shape[-1], columns.shape[1] > 1
    named = bool(_CLASS.search(name))
    classes = "sequence" if array.ndim == 3 and dense else "classes"
    if not eps(array.dtype):
        return (classes, "codes") if number > 1 and array.ndim < 4 else ("signal", "")
    form = _form(columns, "Sigmoid" in hint.ends)
    if form == "binary logits" and classes == "sequence" and number >= _ALPHABET and "Sigmoid" not in hint.ends:
        form = "logits"  # of an alphabet, which inputs that mean nothing to the model move below 0, too
    if form == "probabilities":
        return classes, form
    if form == "independent" and ("Sigmoid" in hint.ends or "HardSigmoid" in hint.ends or named):
        return ("signal", "") if array.ndim == 4 and number == 3 and not named else ("classes", form)
    shapes = {value.shape[1:] for value in inputs.values()}
    if number == 1:
        return ("signal", "") if columns.shape[1] >= 16 else ("values", "")
    if array.shape[1:] in shapes and array[:1].size >= 16 and not named:
        return "signal", ""
    if array.ndim >= 4:
        return _of_map(name, number, form, named)
    if _is_embedding(name, columns, named, hint):
        return "embedding", ""
    if array.ndim == 2 and hint.axis is None and number >= 1000 and not named:
        return "signal", ""
    if form == "binary logits":
        return "classes", form
    if not named and _never_changes_its_mind(columns):
        return "values", ""
    return classes, form


def _of_map(name: str, number: int, form: str, named: bool) -> tuple[str, str]:
    """Return the kind of an output with columns at positions of an image or a volume."""
    if named:
        return "classes", form
    if _EMBEDDING.search(name) or (number >= 64 and number % 32 == 0):
        return "embedding", ""
    return ("classes", form) if number > 3 else ("signal", "")


def _is_embedding(name: str, columns: Numbers, named: bool, hint: Hint) -> bool:
    number = columns.shape[-1]
    if named or number < 8:
        return False
    if _EMBEDDING.search(name) or {"LpNormalization", "LayerNormalization", "ReduceL2"} & hint.ends:
        return True
    norms = np.linalg.norm(columns, axis=-1)
    return bool(np.ptp(norms) < 1e-3 * norms.max()) or (64 <= number <= 4096 and number % 32 == 0)


def _never_changes_its_mind(columns: Numbers) -> bool:
    """Return whether the largest column is the same one everywhere: then columns are quantities, not classes."""
    answers = columns.reshape(-1, columns.shape[-1]).argmax(-1)
    return len(answers) >= _MANY and bool((answers == answers[0]).all())


def _form(columns: Numbers, binary: bool) -> str:
    """Return the form of scores [samples, positions, columns].

    Args:
        columns: the scores.
        binary: whether small numbers of columns may be logits of independent scores.
    """
    known = columns[np.isfinite(columns).all(-1)]
    if not known.size:
        return "logits"
    low, high = float(known.min()), float(known.max())
    if low >= -1e-6 and high <= 1 + 1e-3:
        sums = known.sum(-1)
        together = known.shape[-1] > 1 and float(np.abs(sums - 1).max()) <= 0.01
        return "probabilities" if together else "independent"
    if low >= -0.2 and high <= 1.5 and float(np.median(known)) < 0.2 and known.shape[-1] > 1 and binary:
        return "independent"
    tops = known.max(-1)  # of probabilities they are of any sign, of independent scores only above 0 where one is true
    share = float((tops < 0).mean())
    return "binary logits" if tops.size >= _MANY and share >= 0.2 and (share < 1 or binary) else "logits"


# -- detections --------------------------------------------------------------------------------------------------------


def _levels(
    values: Mapping[str, Array], hints: Mapping[str, Hint], user_kinds: Mapping[str, tuple[str, int | None]]
) -> list[Level]:
    """Return the boxes with their scores, of single outputs and of groups with the same positions."""
    arrays = {
        n: a for n, a in values.items() if a.size and n not in {g for g, k in user_kinds.items() if k[0] != "boxes"}
    }
    levels = _heads({n: a for n, a in values.items() if n not in user_kinds}, hints)
    for head in levels:
        arrays.pop(head.boxes.name, None)
    for name, array in values.items():
        if name not in arrays and name not in user_kinds:
            continue
        kind, axis = user_kinds.get(name, ("", None))
        joint = _joint(name, array, hints.get(name, Hint()), kind == "detections", axis) if array.size else None
        if joint is not None and kind in ("", "detections"):
            levels.append(joint)
            arrays.pop(name, None)
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, array in arrays.items():
        groups.setdefault(_positions(array, hints.get(name, Hint())), []).append(name)
    for key, names in groups.items():
        reading = _group(key, {n: arrays[n] for n in names}, hints, user_kinds)
        if reading is not None:
            levels.append(reading)
    return levels


def _heads(values: Mapping[str, Array], hints: Mapping[str, Hint]) -> list[Level]:
    """Return the levels of raw heads of a detector: maps of the same columns at several resolutions.

    Columns are those of one or several anchors: four numbers of a box, its objectness, its classes, all logits.
    """
    maps: dict[int, list[tuple[str, int]]] = {}
    for name, array in values.items():
        axis = _column_axis(array, hints.get(name, Hint())) if array.ndim >= 4 and eps(array.dtype) else None
        axis = 1 if array.ndim == 4 and hints.get(name, Hint()).axis is None else axis
        if axis is not None and array.shape[axis] >= 6:
            maps.setdefault(array.shape[axis], []).append((name, axis))
    levels = []
    for number, arrays in maps.items():
        sizes = {values[name][:1].size for name, _ in arrays}
        if len(arrays) < 2 or len(sizes) < len(arrays) or not _halve(sizes):
            continue
        medians = np.median([np.median(table(values[n], axis), axis=(0, 1)) for n, axis in arrays], axis=0)
        anchors = _anchors(medians)
        if anchors is None:
            continue
        width = number // anchors
        for name, axis in arrays:
            for first in range(0, number, width):
                box = Part(name, axis, (first, first + 4))
                sure = Part(name, axis, (first + 4, first + 5), form="binary logits")
                classes = Part(name, axis, (first + 5, first + width), form="binary logits")
                levels.append(Level(box, (sure, classes)))
    return levels


def _halve(sizes: set[int]) -> bool:
    """Return whether maps get smaller by four from level to level, roughly."""
    ordered = sorted(sizes, reverse=True)
    return all(3 <= a / b <= 5 for a, b in pairwise(ordered))


def _anchors(medians: Numbers) -> int | None:
    """Return the number of anchors whose columns stand side by side; None where no column looks like objectness."""
    for anchors in (3, 1, 2, 4, 5, 6, 9):
        width = len(medians) // anchors
        if len(medians) % anchors or width < 6:
            continue
        columns = medians.reshape(anchors, width)
        if (columns[:, 4] < -2).all() and (columns[:, 4] < columns[:, :4].min(1) - 1).all():
            return anchors
    return None


def _positions(array: Array, hint: Hint) -> tuple[int, ...]:
    """Return (samples, positions) of an output whose columns are its last axis, or the one that the graph shows."""
    if array.ndim < 2 or (array.ndim == 2 and array.shape[1] == 4 and hint.listed):
        return (array.shape[0] if array.ndim else 0,)
    axis = _column_axis(array, hint)
    if axis is None:
        return array.shape[0], array.shape[1]
    return array.shape[0], array[:1].size // array.shape[axis]


def _column_axis(array: Array, hint: Hint) -> int | None:
    if array.ndim < 3:
        return None
    return hint.axis if hint.axis and hint.axis < array.ndim else array.ndim - 1


def _group(
    key: tuple[int, ...],
    arrays: Mapping[str, Array],
    hints: Mapping[str, Hint],
    user_kinds: Mapping[str, tuple[str, int | None]],
) -> Level | None:
    """Return the level of outputs with the same positions, if boxes and scores are among them."""
    if len(key) == 2 and key[1] < 4:
        return None
    boxes, scores, labels, extras = list[Part](), list[Part](), list[Part](), list[Part]()
    for name, array in arrays.items():
        axis = array.ndim - 1 if len(key) == 1 and array.ndim == 2 else _column_axis(array, hints.get(name, Hint()))
        part = Part(name, axis, batched=len(key) > 1)
        columns = part.of({name: array}) if array.dtype.kind in "fiu" else np.zeros((1, 1, 1))
        number, set_as_boxes = columns.shape[-1], user_kinds.get(name, ("",))[0] == "boxes"
        form = _form(columns, True)
        integral = not eps(array.dtype) or (number == 1 and bool((columns == np.rint(columns)).all()))
        if set_as_boxes or _are_boxes(name, number, form):
            boxes.append(part)
        elif integral:
            labels.append(part)
        elif form in ("probabilities", "independent") or _CLASS.search(name):
            scores.append(_with_background(Part(name, part.axis, batched=part.batched, form=form), columns))
        else:
            extras.append(part)
    alone = boxes and not scores and any(user_kinds.get(b.name, ("",))[0] == "boxes" for b in boxes)
    if not boxes or not (scores or alone):
        return None
    return _formed(Level(boxes[0], tuple(scores), tuple(labels), (*extras, *boxes[1:])), arrays, hints)


def _are_boxes(name: str, number: int, form: str) -> bool:
    """Return whether columns are coordinates, or distributions over coordinates (16 bins for each side, say)."""
    if number % 4 or form == "probabilities":
        return False
    if number == 4:
        return bool(_BOX.search(name)) or not _CLASS.search(name)
    return number >= 32 and form != "independent" and not _CLASS.search(name) and number % 4 == 0


def _with_background(part: Part, columns: Numbers) -> Part:
    """Return scores with their background, a first or last class that most anchors have."""
    number = columns.shape[-1]
    if number < 2 or part.form == "independent":
        return part
    chances = columns if part.form == "probabilities" else softmax(columns)
    mean = chances.reshape(-1, number).mean(0)
    column = 0 if mean[0] >= mean[-1] else number - 1
    exclusive = bool(mean[column] > 0.5)
    form = part.form if part.form == "probabilities" else "logits" if exclusive else "binary logits"
    return Part(part.name, part.axis, part.columns, part.batched, form, column if exclusive else None)


def _joint(name: str, array: Array, hint: Hint, set_by_user: bool, axis: int | None) -> Level | None:
    """Return the level of an output that has boxes and scores as columns; None for any other."""
    if not eps(array.dtype) or array.ndim < 2 or (array.ndim == 2 and array.shape[1] not in (5, 6, 7)):
        return None
    known = hint.axis if axis is None else axis
    axes = [known] if known else [array.ndim - 1, 1] if array.ndim < 4 else [array.ndim - 1 if array.ndim > 4 else 1]
    for candidate in dict.fromkeys(a + array.ndim if a < 0 else a for a in axes):
        batched = array.ndim > 2
        number, rows = array.shape[candidate], array[:1].size // array.shape[candidate] if batched else len(array)
        if 5 <= number <= 2048 and (rows >= 4 or set_by_user) and (known or number <= max(rows, 7)):
            level = _columns(name, array, candidate, batched, hint, set_by_user)
            if level is not None:
                return level
    return None


def _columns(name: str, array: Array, axis: int, batched: bool, hint: Hint, set_by_user: bool) -> Level | None:
    """Return boxes and scores among the columns of an output: selected detections, or one row per anchor."""
    x = table(array, axis, batched)
    number = x.shape[-1]

    def part(start: int, stop: int, form: str = "") -> Part:
        return Part(name, axis, (start, stop), batched, form)

    listed = _selected(x)
    if listed is not None:
        box, score, label = listed
        level = Level(
            part(box, box + 4), (part(score, score + 1, "independent"),), (part(label, label + 1),), listed=True
        )
        return _formed(level, {name: array}, {name: hint})
    within = np.all((x >= -1e-4) & (x <= 1 + 1e-3), axis=(0, 1)).reshape(-1)
    stop = 4 + int(np.argmin(np.append(within[4:], False)))
    varied = bool((np.ptp(x[..., 4:stop], axis=(0, 1)) > 0).any()) if stop > 4 else False
    are_integers = varied and (stop == number or "Sigmoid" in hint.ends)
    outside = not within[:4].all() or (array.ndim == 3 and hint.axis is not None and bool(_BOX.search(name)))
    if not are_integers or not (outside or set_by_user) or (array.ndim == 2 and not hint.listed and not set_by_user):
        return None
    apart = _has_objectness(x[..., 4:stop])
    ranges = [(4, 5), (5, stop)] if apart else [(4, stop)]
    products = tuple(part(*span, "independent") for span in ranges)
    extras = (part(stop, number),) if stop < number else ()
    level = Level(part(0, 4), products, extras=extras, listed=hint.listed)
    return _formed(level, {name: array}, {name: hint})


def _selected(x: Numbers) -> tuple[int, int, int] | None:
    """Return the columns (boxes, score, label) of selected detections; None where rows are none."""
    number = x.shape[-1]
    places = {6: [(0, 4, 5), (0, 5, 4), (2, 1, 0)], 7: [(1, 6, 5), (3, 2, 1), (0, 5, 6)]}.get(number, [])
    are_integers = (x == np.rint(x)).all((0, 1))
    scores = ((x >= -1) & (x <= 1 + 1e-3)).all((0, 1)) & ~are_integers
    return next((place for place in places if are_integers[place[2]] and scores[place[1]]), None)


def _has_objectness(scores: Numbers) -> bool:
    """Return whether the first of the scores is of any object, not of one class: high together with another one."""
    if scores.shape[-1] < 2:
        return False
    first, best = scores[..., 0].ravel(), scores[..., 1:].max(-1).ravel()
    likely = np.argsort(-first)[: max(20, int((first > 0.25).sum()))]
    return bool(np.minimum(first, best)[likely].sum() > 0.5 * first[likely].sum() > 0)


def _formed(level: Level, arrays: Mapping[str, Array], hints: Mapping[str, Hint]) -> Level:
    """Return the level with the form of its boxes, as far as they can be read as rectangles."""
    listed = level.listed or any(hints.get(part.name, Hint()).listed for part in _parts(level))
    boxes = level.boxes.of(dict(arrays))
    form = _box_form(boxes, listed)
    listed = listed and form != "raw"
    return Level(level.boxes, level.scores, level.labels, level.extras, form, listed)


def _box_form(boxes: Numbers, listed: bool) -> str:
    """Return ``corners``, ``centre`` or ``raw``, of boxes [samples, anchors, 4]."""
    rows = boxes.reshape(-1, boxes.shape[-1])
    rows = rows[np.isfinite(rows).all(-1) & (rows != 0).any(-1)]
    if boxes.shape[-1] != 4 or not len(rows):
        return "raw"
    high = float(np.quantile(np.abs(rows), 0.999))
    if not listed and 1.7 < high < 16:  # neither shares of the image nor pixels
        return "raw"
    corners = float(((rows[:, 2] > rows[:, 0]) & (rows[:, 3] > rows[:, 1])).mean()) >= 0.95
    form = "corners" if corners else "centre" if float((rows[:, 2:] > 0).all(-1).mean()) >= 0.95 else "raw"
    if form == "raw" or listed:
        return form
    # Offsets from anchors all lie about the origin and would overlap; boxes of an image lie all over it.
    rng = np.random.default_rng(0)
    pairs = rng.integers(0, len(rows), (2, 512))
    overlap = intersection_over_union(as_corners(rows[pairs[0]], form), as_corners(rows[pairs[1]], form))
    return form if float(overlap.mean()) < 0.25 else "raw"


def as_corners(boxes: Numbers, form: str) -> Numbers:
    """Return boxes [..., 4] as (x, y, x, y)."""
    if form == "corners":
        return boxes
    centre, half = boxes[..., :2], np.maximum(boxes[..., 2:4], 0) / 2
    return np.concatenate([centre - half, centre + half], axis=-1)


def intersection_over_union(one: Numbers, other: Numbers) -> Numbers:
    """Return the intersection over union of boxes [..., 4] with corners, which broadcast."""
    low, high = np.maximum(one[..., :2], other[..., :2]), np.minimum(one[..., 2:], other[..., 2:])
    inner = np.clip(high - low, 0, None).prod(-1)
    areas = [np.clip(box[..., 2:] - box[..., :2], 0, None).prod(-1) for box in (one, other)]
    return np.asarray(inner / np.maximum(areas[0] + areas[1] - inner, 1e-12))
