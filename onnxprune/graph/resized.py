"""Inputs and outputs of a model that may lose channels, and the record of their removed channels.

The record is a property of the model (``metadata_props``), so that whoever runs the file can gather the entries that
remain from arrays of full size: a session does it for its inputs, a comparison for the outputs of the original.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxprune.errors import UsageError, argument, nearest
from onnxprune.globs import matches
from onnxprune.graph.caches import find_caches
from onnxprune.graph.view import Graph

Array = NDArray[Any]
Steps = Sequence[tuple[int, NDArray[np.int64]]]
"""Indices to gather along axes, one after the other; an index of a grid has an own row for every row of the axis."""
KEY = "onnxprune.resized"
"""Name of the property."""


@dataclass(frozen=True, slots=True)
class Resizing:
    """Inputs and outputs that may lose channels.

    Attributes:
        patterns: globs over names of inputs and outputs.
        caches: whether the inputs and outputs of all caches are meant as well.
        names: the names themselves, once they are known; None: patterns decide.
    """

    patterns: tuple[str, ...] = ()
    caches: bool = False
    names: frozenset[str] | None = None

    def __bool__(self) -> bool:
        return bool(self.patterns or self.caches or self.names)

    def within(self, graph: Graph) -> Resizing:
        """Return the resizing with the names in a graph; known names that the graph lacks are left out.

        Raises:
            UsageError: a pattern matches no input or output, or one half of a cache alone; there is no cache.
        """
        present = dict.fromkeys([*graph.inputs, *graph.outputs])
        if self.names is not None or not self:
            return Resizing(self.patterns, self.caches, frozenset(n for n in self.names or () if n in present))
        names: set[str] = set()
        for pattern in self.patterns:
            matching = [name for name in present if matches(name, pattern)]
            if not matching:
                raise UsageError(
                    f"{argument('resize_io', pattern)} matches no input or output of the model",
                    hint=nearest(pattern, present),
                )
            names.update(matching)
        pairs = find_caches(graph) if names or self.caches else []
        if self.caches and not pairs:
            raise UsageError(
                f"{argument('cache_heads')}: the model has no cache, an output that is an input with more positions",
                hint=f"Name inputs and outputs that may change size with {argument('resize_io')}, or leave it out.",
            )
        for cache in pairs:
            halves = [name for name in cache.names if name in names]
            if len(halves) == 1 and not self.caches:
                other = next(name for name in cache.names if name != halves[0])
                raise UsageError(
                    f"{argument('resize_io')} matches {halves[0]!r}, but not {other!r}, the other half of its cache",
                    hint=f"A program feeds the output back as the input: name both, or give {argument('cache_heads')}.",
                )
            names.update(cache.names if self.caches else ())
        return Resizing(self.patterns, self.caches, frozenset(names))


@dataclass(frozen=True, slots=True)
class Stage:
    """One removal from a tensor: sizes of the axes before it, and the gather steps of what remains."""

    sizes: Mapping[int, int]
    steps: Steps

    def fits(self, shape: Sequence[int]) -> bool:
        """Return whether a tensor of that shape still has the removed channels."""
        return all(axis < len(shape) and shape[axis] == size for axis, size in self.sizes.items())

    def applied(self, array: Array) -> Array:
        """Return the entries that remain."""
        for axis, index in self.steps:
            array = array.take(index, axis=axis) if index.ndim == 1 else np.take_along_axis(array, index, axis=axis)
        return array


Resized = Mapping[str, Sequence[Stage]]
"""The removals from inputs and outputs, by name, in the order in which they were made."""


def fitted(resized: Resized, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Return arrays for, or from, the original at the sizes of the pruned model; others as they are."""
    result = dict(arrays)
    for name in resized.keys() & arrays.keys():
        array = np.asarray(arrays[name])
        for stage in resized[name]:
            array = stage.applied(array) if stage.fits(array.shape) else array
        result[name] = array
    return result


def resized_of(model: onnx.ModelProto) -> Resized:
    """Return the record of a model on its inputs and outputs."""
    return read({p.key: p.value for p in model.metadata_props})


def text_of(model: onnx.ModelProto) -> str:
    """Return the record of a model as text; empty where there is none."""
    return next((p.value for p in model.metadata_props if p.key == KEY), "")


def read(properties: Mapping[str, str]) -> Resized:
    """Return the record in the properties of a model; empty where there is none that can be read."""
    text = properties.get(KEY)
    if not text:
        return {}
    try:
        return {name: [_stage(item) for item in stages] for name, stages in json.loads(text).items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        return {}


def _stage(item: Mapping[str, Any]) -> Stage:
    steps = [(int(axis), np.asarray(flat, np.int64).reshape(shape)) for axis, shape, flat in item["steps"]]
    return Stage({int(axis): int(size) for axis, size in item["sizes"].items()}, steps)


def record(model: onnx.ModelProto, stages: Mapping[str, Stage]) -> None:
    """Add removals to the record of a model; of inputs and outputs that it lacks, nothing stays recorded."""
    if not stages:
        return
    present = {value.name for value in (*model.graph.input, *model.graph.output)}
    records = {name: list(known) for name, known in resized_of(model).items() if name in present}
    for name, stage in stages.items():
        records.setdefault(name, []).append(stage)
    text = json.dumps({name: [_plain(stage) for stage in known] for name, known in records.items()})
    for entry in model.metadata_props:
        if entry.key == KEY:
            entry.value = text
            return
    model.metadata_props.add(key=KEY, value=text)


def _plain(stage: Stage) -> dict[str, Any]:
    steps = [[axis, list(index.shape), index.ravel().tolist()] for axis, index in stage.steps]
    return {"sizes": {str(axis): size for axis, size in stage.sizes.items()}, "steps": steps}
