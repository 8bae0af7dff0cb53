"""Operators of classical machine learning (domain ai.onnx.ml), whose parameters are attributes and not weights.

Attributes own no channels; channels of a preceding network can be pruned where the attribute can be sliced with them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from onnxprune.graph.view import Node
from onnxprune.labels.algebra import Shape, concatenate
from onnxprune.labels.atoms import Reason
from onnxprune.operators.context import Cut, Step
from onnxprune.operators.elementwise import Elementwise
from onnxprune.operators.registry import Rule, register

DOMAIN = "ai.onnx.ml"


class PerFeature(Rule):
    """Scaler and Imputer: position-wise, with lists of one value for all features or one value per feature."""

    _LISTS = ("offset", "scale", "imputed_value_floats")

    def propagate(self, step: Step) -> None:
        """Pass the features, which are on the last axis."""
        labels, last = step.labels(0), len(step.shape(0)) - 1
        step.fix_all_but(labels, (last,), Reason.FIXED_SIZE, "samples keep their places")
        if len(step.attr("imputed_value_int64s") or []) > 1:
            step.freeze(labels, Reason.UNSUPPORTED_FORM, "integers are filled in by position")
        step.set(0, labels)

    def rewrite(self, cut: Cut) -> None:
        """Slice the lists to the surviving features."""
        keep = cut.keep(cut.node.inputs[0], len(cut.before.shape(0)) - 1)
        for name in self._LISTS:
            values = cut.attr(name) or []
            if keep is not None and len(values) > 1:
                cut.set_attr(name, np.asarray(values)[keep].tolist())

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """Return the shape of the data."""
        return [shapes[0]]


class Linear(Rule):
    """LinearRegressor and LinearClassifier: sums over features [N, F] with coefficients [targets, F]."""

    def propagate(self, step: Step) -> None:
        """Sum over the features, which end here."""
        step.fix_all_but(step.labels(0), (len(step.shape(0)) - 1,), Reason.FIXED_SIZE, "samples keep their places")

    def rewrite(self, cut: Cut) -> None:
        """Slice the coefficients to the surviving features."""
        size = cut.before.shape(0)[-1]
        keep = cut.keep(cut.node.inputs[0], len(cut.before.shape(0)) - 1)
        if keep is not None:
            table = np.asarray(cut.attr("coefficients")).reshape(-1, size)
            cut.set_attr("coefficients", table[:, keep].ravel().tolist())

    def contracted_axes(self, step: Step) -> list[tuple[int, tuple[int, ...]]]:
        """Return the axis of the features."""
        return [(0, (len(step.shape(0)) - 1,))]

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """Return shape [N, targets]; of a classifier the labels [N] and the scores [N, classes]."""
        x = shapes[0]
        samples = None if x is None else x[0] if len(x) > 1 else 1
        if node.op == "LinearRegressor":
            return [(samples, int(node.attrs.get("targets", 1)))]
        classes = node.attrs.get("classlabels_ints") or node.attrs.get("classlabels_strings") or []
        return [(samples,), (samples, len(classes) or None)]


class FeatureVectorizer(Rule):
    """Concatenation of the features of several inputs."""

    def propagate(self, step: Step) -> None:
        """Concatenate inputs [N, F] along the features."""
        if any(len(step.shape(i)) != 2 for i in range(len(step.node.inputs))):
            return  # single samples are concatenated along another axis
        operands = [(step.labels(i), step.shape(i)) for i in range(len(step.node.inputs))]
        step.set(0, concatenate(step.atoms, operands, 1, step.reason, step.node.outputs[0]))

    def rewrite(self, cut: Cut) -> None:
        """Update the number of features of every input."""
        if "inputdimensions" in cut.node.attrs:
            cut.set_attr("inputdimensions", [cut.shape(i)[1] for i in range(len(cut.node.inputs))])

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """Return shape [N, sum of features]."""
        parts = [x for x in shapes if x is not None and len(x) == 2]
        sizes = [x[1] for x in parts]
        if len(parts) < len(shapes) or any(n is None for n in sizes):
            return [None]
        return [(parts[0][0], sum(n or 0 for n in sizes))]


class Learned(Rule):
    """Trees, support vectors, norms and look-ups: a feature is addressed by position, and 0 is an ordinary value."""

    def propagate(self, step: Step) -> None:
        """Freeze every input."""
        for i in range(len(step.node.inputs)):
            step.freeze(step.labels(i), Reason.FIXED_SIZE, f"{step.node.op} reads its features by position")


register(DOMAIN, "Scaler", "Imputer", rule=PerFeature())
register(DOMAIN, "LinearRegressor", "LinearClassifier", rule=Linear())
register(DOMAIN, "FeatureVectorizer", rule=FeatureVectorizer())
register(DOMAIN, "Binarizer", rule=Elementwise([0]))
register(
    DOMAIN,
    *("TreeEnsemble", "TreeEnsembleClassifier", "TreeEnsembleRegressor", "SVMClassifier", "SVMRegressor"),
    *("Normalizer", "ArrayFeatureExtractor", "OneHotEncoder", "LabelEncoder", "DictVectorizer"),
    rule=Learned(),
)
