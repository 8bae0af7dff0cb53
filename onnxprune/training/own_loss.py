"""A loss of the user's own, in numpy, as inputs of the training graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from onnxprune.errors import UsageError, argument, nearest
from onnxprune.gradients.backward import inference_graph
from onnxprune.gradients.static import StaticGraph
from onnxprune.gradients.tape import Tape
from onnxprune.runtime.sessions import Array, Feed, open_session, run
from onnxprune.training.losses import OFFSET
from onnxprune.training.parameters import Head
from onnxprune.training.step import Parameters

UserLoss = Callable[[Mapping[str, Array], Mapping[str, Array], Array | None], tuple[float, Mapping[str, Array]]]
"""Values of the model, those of its original, and labels -> value of the loss, and its gradients."""


class OwnLoss:
    """A loss of the user's own: its gradients are inputs of the training graph.

    Args:
        function: see :class:`onnxprune.passes.Finetune`.
        student: the model.
        weights: the weights to train.
        fitted: the tensors that it gets.
        names: names of the original's values of these tensors.
    """

    def __init__(
        self,
        function: UserLoss,
        student: StaticGraph,
        weights: Sequence[str],
        fitted: Sequence[Head],
        names: Mapping[str, str],
    ) -> None:
        self._function, self._names = function, names
        self.gradient_names = {head: f"given.{k}" for k, head in enumerate(fitted)}
        self.inputs = {
            name: (student.shapes[h.tensor], np.dtype(np.float32)) for h, name in self.gradient_names.items()
        }
        tape = Tape(student.shapes, student.kinds, "own")
        self._shown = {h: tape.emit("Identity", [h.tensor], tape.shape(h.tensor)) for h in fitted}
        graph = inference_graph(student, tape, list(self._shown.values()), weights)
        self._session = open_session(graph.SerializeToString(), spin=False)
        self._accepted = {i.name for i in self._session.get_inputs()}

    def __call__(self, feed: Feed, parameters: Parameters, labels: Array | None) -> Feed:
        """Return the gradients and the offset for one call.

        Raises:
            UsageError: the loss is no number, or a gradient does not fit.
        """
        inputs = {**feed, **parameters.views(parameters.vector)}
        values = run(self._session, {n: v for n, v in inputs.items() if n in self._accepted})
        outputs = {head.output: values[shown] for head, shown in self._shown.items()}
        targets = {head.output: feed[self._names[head.tensor]] for head in self._shown}
        value, gradients = self._checked(self._function(outputs, targets, labels), outputs)
        result: Feed = {}
        linear = 0.0
        for head, name in self.gradient_names.items():
            user_output = outputs[head.output]
            gradient = np.asarray(gradients.get(head.output, np.zeros_like(user_output)))
            is_real = gradient.dtype.kind in "iuf" and bool(np.isfinite(gradient).all())
            if gradient.shape != user_output.shape or not is_real:
                raise UsageError(
                    f"{argument('loss')} returned a gradient of shape {list(gradient.shape)} for output "
                    f"{head.output!r} of {list(user_output.shape)}, or NaN in it",
                    hint="Return finite gradients of the shape of each output.",
                )
            result[name] = gradient.astype(np.float32)
            linear += float(np.vdot(gradient, user_output))
        return {**result, OFFSET: np.asarray(value - linear, np.float32)}

    def _checked(self, returned: Any, outputs: Feed) -> tuple[float, Mapping[str, Array]]:
        """Return the value and gradients that a function returned; raises UsageError where it is anything else."""
        name = argument("loss")
        is_pair = isinstance(returned, tuple | list) and len(returned) == 2
        if not is_pair or np.ndim(returned[0]) or not isinstance(returned[1], Mapping):
            raise UsageError(
                f"{name} returned {type(returned).__name__}, not its value and its gradients",
                hint="Return a number and {output: gradient}.",
            )
        value, gradients = returned
        if not np.issubdtype(np.asarray(value).dtype, np.number) or not np.isfinite(value):
            raise UsageError(
                f"{name} returned {value}", hint="Return a finite number for every batch: divide by its size."
            )
        unknown = next((n for n in gradients if n not in outputs), None)
        if unknown is not None:
            raise UsageError(
                f"{name} returned a gradient for {unknown!r}, which is none of its outputs",
                hint=nearest(str(unknown), outputs),
            )
        return float(value), gradients
