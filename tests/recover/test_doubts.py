"""What is said of data that cannot carry a repair: once, and the result is no worse than without."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from planted import Planted, draw, error, plan, repaired

from onnxprune.channels.plan import Plan
from onnxprune.recovery.regression import Sums

Array = NDArray[Any]


def classifier(seed: int = 0, hidden: int = 24) -> tuple[onnx.ModelProto, Plan]:
    """Class scores behind two layers, the first of which loses a third of its channels."""
    net = Planted(17, seed=seed)
    y = net.conv(net.input("x", ["N", 3, 6, 6]), 3, hidden)
    z = net.conv(net.op("Relu", y), hidden, 2)
    scores = net.linear(net.op("Flatten", z), 72, 6, gemm=True)
    return net.model(scores), plan((y, 1, hidden, range(0, hidden, 3)))


def warned(
    model: onnx.ModelProto, removal: Plan, data: Any, mode: str = "full"
) -> tuple[list[str], onnx.ModelProto, Any]:
    before, result = repaired(model, removal, data, mode)
    return result.report.warnings, before, result


def no_worse(model: onnx.ModelProto, before: onnx.ModelProto, result: Any, feed: dict[str, Array]) -> None:
    assert error(model, result.model, feed) <= 1.01 * error(model, before, feed)


def test_good_data_get_no_warning() -> None:
    model, removal = classifier()
    assert warned(model, removal, draw(model, 128))[0] == []


def test_data_of_one_class() -> None:
    """Around one sample the scores name one class; what is won there is not lost elsewhere."""
    model, removal = classifier()
    near = {"x": draw(model, 1, 5)["x"] + 0.05 * draw(model, 96)["x"]}
    found, before, result = warned(model, removal, near)
    (said,) = [w for w in found if "same class" in w]
    assert "all 87 calibration samples" in said
    no_worse(model, before, result, near)
    no_worse(model, before, result, {"x": draw(model, 1, 5)["x"] + 0.05 * draw(model, 50, 3)["x"]})


def test_outputs_that_are_no_scores_have_no_class() -> None:
    net = Planted(17, seed=0)
    y = net.conv(net.input("x", ["N", 3, 6, 6]), 3, 12)
    model = net.model(net.conv(net.op("Relu", y), 12, 4))
    near = {"x": draw(model, 1, 5)["x"] + 0.05 * draw(model, 96)["x"]}
    assert not [w for w in warned(model, plan((y, 1, 12, [0, 3])), near)[0] if "class" in w]


def test_constant_inputs() -> None:
    model, removal = classifier()
    same = {"x": np.repeat(draw(model, 1)["x"], 80, axis=0)}
    found, before, result = warned(model, removal, same)
    assert [w for w in found if "are the same" in w] == found and len(found) == 1, "nothing is said twice"
    no_worse(model, before, result, same)


def test_fewer_rows_than_unknowns() -> None:
    """Two layers fall short: one warning names the worst."""
    net = Planted(17, seed=1)
    y = net.linear(net.input("x", ["N", 24]), 24, 300, gemm=True)
    z = net.linear(net.op("Relu", y), 300, 200, gemm=True)
    model = net.model(net.linear(net.op("Relu", z), 200, 6, gemm=True))
    removal = plan((y, 1, 300, range(0, 300, 3)), (z, 1, 200, range(0, 200, 4)))
    found, before, result = warned(model, removal, draw(model, 100))
    (said,) = [w for w in found if "unknowns" in w]
    assert said.startswith("2 layers have more unknowns than the data has rows") and ", 200 and 80)" in said
    no_worse(model, before, result, draw(model, 200, 4))


def test_inputs_that_vary_in_few_directions() -> None:
    """Samples on a line, with rows enough: the Gram matrix of the second layer has the rank of a curve."""
    net = Planted(17, seed=1)
    y = net.linear(net.input("x", ["N", 24]), 24, 40)
    model = net.model(net.linear(y, 40, 6, gemm=True))
    line = {"x": np.outer(np.linspace(-1, 1, 200), np.ones(24)).astype(np.float32)}
    found, before, result = warned(model, plan((y, 1, 40, range(0, 40, 3))), line)
    (said,) = [w for w in found if "directions" in w]
    assert said.startswith("1 layer has inputs that vary in less than half") and "of 26)" in said
    no_worse(model, before, result, line)


def test_dead_channels_alone_are_no_reason() -> None:
    """Half of the channels never fire: nothing can be learned of them, and nothing has to be."""
    model, removal = classifier()
    (bias,) = [t for t in model.graph.initializer if list(t.dims) == [24]]
    value = onnx.numpy_helper.to_array(bias).copy()
    value[1::6] = -100
    bias.CopyFrom(onnx.numpy_helper.from_array(value, bias.name))
    assert warned(model, removal, draw(model, 128))[0] == []


@pytest.mark.parametrize("mode", ["bias", "bn", "lstsq"])
def test_every_mode_is_doubted(mode: str) -> None:
    model, removal = classifier()
    near = {"x": draw(model, 1, 5)["x"] + 0.05 * draw(model, 96)["x"]}
    found, before, result = warned(model, removal, near, mode)
    assert any("same class" in w for w in found)
    no_worse(model, before, result, near)


@given(rank=st.integers(1, 12), rows=st.integers(13, 60), seed=st.integers(0, 50), shift=st.floats(-1, 1))
@settings(max_examples=40)
def test_directions_are_the_rank_about_the_mean(rank: int, rows: int, seed: int, shift: float) -> None:
    rng = np.random.default_rng(seed)
    data = (rng.standard_normal((rows, rank)) @ rng.standard_normal((rank, 12)) + shift)[None]
    assert Sums.of(data, data[..., :1]).directions() == rank


def test_directions_of_parts_dead_and_many_columns() -> None:
    rng = np.random.default_rng(0)
    data = rng.standard_normal((4, 50, 6))
    data[..., 2] = 3.0
    assert Sums.of(data, data[..., :1]).directions() == 5
    assert Sums.of(np.ones((1, 9, 4)), np.ones((1, 9, 1))).directions() == 0
    wide = rng.standard_normal((1, 40, 1500)).astype(np.float32)
    assert 39 <= Sums.of(wide, wide[..., :1]).directions() <= 90
