"""The original as the teacher of a training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from onnxprune.gradients.backward import inference_graph
from onnxprune.gradients.static import StaticGraph
from onnxprune.gradients.tape import Tape
from onnxprune.runtime.masks import Padding
from onnxprune.runtime.sessions import Array, Feed, open_session, run
from onnxprune.training.parameters import Head, value_to_fit


class Teacher:
    """The original: from the inputs of a call to everything that a step compares with.

    Args:
        original: the original.
        student: the model.
        fitted: its outputs.
        steps: tensors between blocks, with the channels of the original that each still has: (axis, indices).
        feed: one call, whose masks show which tensors have positions that may be padding.

    Attributes:
        names: tensor -> input of the training graph with the original's value.
        counted: tensor -> input with 1 at its positions and 0 at those that are padding; only where a mask fits.
        inputs: these inputs, shape and type by name.
    """

    def __init__(
        self,
        original: StaticGraph,
        student: StaticGraph,
        fitted: Sequence[Head],
        steps: Mapping[str, Sequence[tuple[int, Array]]],
        feed: Feed,
    ) -> None:
        tape = Tape(original.shapes, original.kinds, "teacher")
        self.names: dict[str, str] = {}
        sources = {head.tensor: value_to_fit(tape, head) for head in fitted} | {name: name for name in steps}
        for name, value in sources.items():
            for axis, index in steps.get(name, ()):
                shape = list(tape.shape(value))
                shape[axis] = index.size
                value = tape.emit("Gather", [value, tape.constant(index.astype(np.int64))], shape, axis=axis)
            self.names[name] = tape.emit("Identity", [value], tape.shape(value))
        shown = list(self.names.values())
        self._session = open_session(inference_graph(original, tape, shown).SerializeToString())
        self._accepted = {i.name for i in self._session.get_inputs()}
        self.inputs = {shown: (student.shapes[name], student.kinds[name]) for name, shown in self.names.items()}
        self.counted: dict[str, str] = {}
        self._layouts: dict[str, tuple[Sequence[int], Sequence[int]]] = {}
        padding = Padding(feed)
        channels = {head.tensor: [a for a in (head.axis,) if a is not None] for head in fitted}
        for name in self.names:
            axes = channels[name] if name in channels else [axis for axis, _ in steps[name]]
            size, kind = student.shapes[name], student.kinds[name]
            mask = padding.counted(size, axes)
            if mask is not None:
                # Masks of one size are one mask, see Padding.
                self.counted[name] = f"counted.{kind.name}.{'x'.join(map(str, mask.shape))}"
                self.inputs[self.counted[name]] = mask.shape, kind
                self._layouts[self.counted[name]] = size, axes

    def __call__(self, feed: Feed) -> Feed:
        """Return everything that a call is compared with."""
        result = run(self._session, {name: value for name, value in feed.items() if name in self._accepted})
        padding = Padding(feed)
        for name, (shape, axes) in self._layouts.items():
            size, kind = self.inputs[name]
            mask = padding.counted(shape, axes)
            result[name] = np.ones(size, kind) if mask is None or mask.shape != size else mask.astype(kind)
        return result
