"""Operators of ai.onnx.ml behind a network: attributes follow the features that are left, or say why they cannot."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from build import Net
from fused import attributes, cut
from onnx import helper

import onnxprune as op

ML = "ai.onnx.ml"
IN, WIDE = 6, 10


def start() -> tuple[Net, str]:
    net = Net(17)
    return net, net.op("Relu", net.op("MatMul", net.input("x", ["N", IN]), net.weight(IN, WIDE, name="first")))


def finish(net: Net, *outputs: str, wide: int = 5) -> onnx.ModelProto:
    for node in net.nodes:
        for attribute in node.attribute:
            assert attribute.type != onnx.AttributeProto.UNDEFINED
    net.domains[ML] = 3
    return net.model(*outputs, check=False, shapes={o: ["N", wide] for o in outputs})


def floats(n: int, seed: int = 0) -> list[float]:
    return np.random.default_rng(seed).uniform(0.5, 1.5, n).astype(np.float32).tolist()


def first_rows(model: onnx.ModelProto, name: str = "first") -> tuple[int, ...]:
    return next(tuple(t.dims) for t in model.graph.initializer if t.name == name)


PER_FEATURE: dict[str, tuple[str, dict[str, Any]]] = {
    "scaler": ("Scaler", {"offset": floats(WIDE), "scale": floats(WIDE, 1)}),
    "scaler of one scale": ("Scaler", {"offset": [0.25], "scale": [2.0]}),
    "imputer": ("Imputer", {"imputed_value_floats": floats(WIDE), "replaced_value_float": 0.0}),
    "imputer of one value": ("Imputer", {"imputed_value_floats": [0.5], "replaced_value_float": 0.0}),
    "binarizer": ("Binarizer", {"threshold": 0.3}),
}


@pytest.mark.parametrize(("kind", "attrs"), PER_FEATURE.values(), ids=PER_FEATURE.keys())
def test_lists_follow_the_features(kind: str, attrs: dict[str, Any]) -> None:
    net, x = start()
    y = net.op("MatMul", net.op(kind, x, domain=ML, **attrs), net.weight(WIDE, 5, name="last"))
    result = cut(finish(net, y))
    assert first_rows(result.model) == (IN, WIDE // 2) and first_rows(result.model, "last") == (WIDE // 2, 5)
    removed = next(s.removed for g in result.plan.groups for s in g.slots if s.tensor == "last")
    kept = [i for i in range(WIDE) if i not in set(removed)]
    after = attributes(result.model, kind)
    for name, values in attrs.items():
        if isinstance(values, list):
            wanted = values if len(values) == 1 else [values[i] for i in kept]
            np.testing.assert_array_equal(np.float32(after[name]), np.float32(wanted))


@pytest.mark.parametrize("transform", ["NONE", "SOFTMAX"])
def test_linear_classifier(transform: str) -> None:
    net, x = start()
    table = np.random.default_rng(2).standard_normal((3, WIDE)).astype(np.float32)
    label, scores = net.op(
        "LinearClassifier", x, n=2, domain=ML, coefficients=table.ravel().tolist(), intercepts=floats(3),
        classlabels_ints=[0, 1, 2], post_transform=transform,
    )  # fmt: skip
    net.op("Identity", label)
    result = cut(finish(net, scores, wide=3))
    assert first_rows(result.model) == (IN, WIDE // 2)
    kept = np.float32(attributes(result.model, "LinearClassifier")["coefficients"]).reshape(3, -1)
    assert kept.shape == (3, WIDE // 2) and all(any((c == t).all() for t in table.T) for c in kept.T)


def test_linear_regressor_and_joined_features() -> None:
    """Two branches are joined; each loses its own, and so do the coefficients."""
    net = Net(17)
    x = net.input("x", ["N", IN])
    parts = [net.op("Relu", net.op("MatMul", x, net.weight(IN, n, name=f"part{n}"))) for n in (4, 8)]
    joined = net.op("FeatureVectorizer", *parts, domain=ML, inputdimensions=[4, 8])
    table = np.random.default_rng(2).standard_normal(24).astype(np.float32)
    y = net.op("LinearRegressor", joined, domain=ML, coefficients=table.tolist(), intercepts=floats(2), targets=2)
    result = cut(finish(net, y, wide=2))
    assert first_rows(result.model, "part4") == (IN, 2) and first_rows(result.model, "part8") == (IN, 4)
    assert attributes(result.model, "FeatureVectorizer")["inputdimensions"] == [2, 4]
    assert len(attributes(result.model, "LinearRegressor")["coefficients"]) == 12


@pytest.mark.parametrize("norm", ["MAX", "L1", "L2"])
def test_what_knows_its_features_by_position_keeps_them(norm: str) -> None:
    net, x = start()
    y = net.op("MatMul", net.op("Normalizer", x, domain=ML, norm=norm), net.weight(WIDE, 8))
    y = net.op("MatMul", net.op("Relu", y), net.weight(8, 5, name="last"))
    model = finish(net, y)
    info = helper.make_tensor_value_info(model.graph.node[2].output[0], onnx.TensorProto.FLOAT, ["N", WIDE])
    model.graph.value_info.append(info)
    assert "Normalizer reads its features by position" in {b.detail for b in op.analyze(model).barriers}
    result = cut(model)
    assert first_rows(result.model) == (IN, WIDE) and first_rows(result.model, "last") == (4, 5)
