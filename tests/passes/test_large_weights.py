"""Large weights get no masked copies in the proof: what they are multiplied by is masked, which is as good."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from build import Net

import onnxprune as op
from onnxprune.errors import ValidationError
from onnxprune.io.weights import ArrayWeight
from onnxprune.passes import prepared
from onnxprune.pruning import masked


def model(value: float = 0.0) -> onnx.ModelProto:
    """Layers of several kinds; ``value``: stands in the weight of a unit that goes."""
    net = Net(17, seed=1)
    x = net.op("Relu", net.conv(net.conv(net.input("x", ["N", 3, 8, 8]), 3, 16), 16, 16, group=16))
    x = net.op("Relu", net.norm(net.conv(x, 16, 24), 24))
    x = net.op("Flatten", net.op("GlobalAveragePool", x), axis=1)
    first = net.rng.standard_normal((24, 32)) / 5
    first[:, 3] = 1e-6
    second = net.rng.standard_normal((32, 8)) / 6
    second[3] += value
    hidden = net.op("Relu", net.op("MatMul", x, net.const(first)))
    return net.model(net.op("MatMul", hidden, net.const(second)))


def masks_on_weights(proto: onnx.ModelProto, removed: Any) -> int:
    original, weights = masked.masked_original(op.analyze(proto).table, removed)
    names = {n for n, w in weights.items() if len(w.shape) > 1 and "__mask_" not in n}
    return sum("__mask_" in n.name and not names.isdisjoint(n.input) for n in original.graph.node)


def test_large_weights_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for those that hold what 0 times is not 0."""
    seen: list[Any] = []
    right = masked.masked_original
    monkeypatch.setattr(masked, "_BULKY", 0)
    monkeypatch.setattr("onnxprune.passes.exact.masked_original", lambda *a: (seen.append(a[1]), right(*a))[1])
    assert op.prune(model(), ratio=0.5, latency=False).report.exactness.passed
    assert [masks_on_weights(model(value), seen[0]) for value in (0.0, np.inf, np.nan)] == [0, 1, 1]
    monkeypatch.undo()
    assert masks_on_weights(model(), seen[0]) == 2


@pytest.mark.parametrize("place", range(4))
def test_mistakes_are_found_without_masks_on_weights(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masked, "_BULKY", 0)
    right = prepared.cut

    def wrong(table: object, removed: object) -> object:
        proto, weights = right(table, removed)  # type: ignore[arg-type]
        name = [n for n, w in weights.items() if len(w.shape) > 1][place]
        weights[name] = ArrayWeight(name, weights[name].read()[::-1])
        return proto, weights

    monkeypatch.setattr(prepared, "cut", wrong)
    with pytest.raises(ValidationError, match="The pruned model is not exact"):
        op.prune(model(), ratio=0.5, latency=False)
