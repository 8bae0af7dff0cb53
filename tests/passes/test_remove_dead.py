"""Dead units go, with what they add folded into biases, and the outputs stay what they were."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from build import Net
from click.testing import CliRunner
from generate import generate
from onnx import numpy_helper
from oracle import assert_close, make_feed, reference, run

import onnxprune as op
from onnxprune.channels import dead as dead_units
from onnxprune.cli import main
from onnxprune.errors import PreconditionError, ValidationError

TOLERANCE = 2e-5
Axes = tuple[tuple[int, int, list[int]], ...]
"""Slices to set to a number: (position of the weight, axis, indices)."""


def zeroed(model: onnx.ModelProto, *places: tuple[int, int, list[int]], value: float = 0.0) -> onnx.ModelProto:
    """Return the model with slices of its weights, counted in the order of their making, set to a number."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    weights = [t for t in copy.graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
    for number, axis, indices in places:
        array = numpy_helper.to_array(weights[number]).copy()
        array[(slice(None),) * axis + (indices,)] = value
        weights[number].CopyFrom(numpy_helper.from_array(array, weights[number].name))
    return copy


def assert_removed(model: onnx.ModelProto, *, evaluator: bool = True) -> op.Result:
    """Remove dead units; the outputs are the original's at two sizes, in both runtimes, and the cut itself is exact."""
    result = op.Pipeline([op.passes.RemoveDead(), op.passes.Exact()]).run(model)
    for number in (0, 1):
        feed = make_feed(model, number)
        assert_close(run(model, feed), run(result.model, feed), TOLERANCE, "onnxruntime")
    if evaluator:
        assert_close(reference(model, feed), reference(result.model, feed), TOLERANCE, "the reference evaluator")
    return result


@pytest.mark.parametrize("seed", range(10))
def test_outputs_stay_whatever_is_zero_in_random_graphs(seed: int) -> None:
    model, draw = generate(seed, rare=seed % 2 == 0), np.random.default_rng(seed)
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor).copy()
        for axis in range(array.ndim if array.dtype == np.float32 else 0):
            if draw.random() < 0.5:
                array[(slice(None),) * axis + (draw.random(array.shape[axis]) < 0.4,)] = 0
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    facts = assert_removed(model, evaluator=False).report.dead
    assert facts is not None and facts.removed <= facts.found <= facts.units
    assert facts.removed, "no unit of this graph is dead: choose another seed"


# -- kinds of graphs ---------------------------------------------------------------------------------------------------


def chain(kernel: int = 3, pad: bool = True, between: Callable[[Net, str], str] | None = None) -> onnx.ModelProto:
    """Weights 0 and 1 of a convolution to 8 channels, then those of one that reads them."""
    net = Net(17)
    y = net.op("Relu", net.conv(net.input("x", ["N", 3, 8, 8]), 3, 8))
    y = between(net, y) if between is not None else y
    return net.model(net.conv(y, 8, 4, kernel, pad=pad))


def test_a_constant_becomes_a_bias_where_no_border_sees_it() -> None:
    rows: Axes = ((0, 0, [2, 5]),)
    positive = zeroed(zeroed(chain(1), *rows), (1, 0, [2, 5]), value=0.7)
    facts = assert_removed(positive).report.dead
    assert facts is not None and (facts.found, facts.removed, facts.folded) == (2, 2, 2)
    padded = zeroed(zeroed(chain(3), *rows), (1, 0, [2, 5]), value=0.7)
    result = assert_removed(padded)
    assert result.report.dead is not None and result.report.dead.removed == 0
    (reason,) = result.report.dead.reasons.values()
    assert reason.startswith("2 constant: ") and "zeros" in reason
    assert str(result.report).count(reason) == 1
    silent = zeroed(zeroed(chain(3), *rows), (1, 0, [2, 5]), value=-0.7)  # 0 behind the activation, at borders too
    facts = assert_removed(silent).report.dead
    assert facts is not None and (facts.removed, facts.folded) == (2, 0)
    bare = zeroed(zeroed(chain(3, pad=False), *rows), (1, 0, [2, 5]), value=0.7)
    facts = assert_removed(bare).report.dead
    assert facts is not None and (facts.removed, facts.folded) == (2, 2)


def test_constants_pass_everything_that_works_channel_by_channel() -> None:
    def between(net: Net, y: str) -> str:
        y = net.op("HardSwish", net.norm(y, 8))
        y = net.op("MaxPool", y, kernel_shape=[3, 3], pads=[1, 1, 1, 1])
        y = net.conv(y, 8, 8, 1, group=8)
        y = net.op("Mul", y, net.op("Sigmoid", net.op("GlobalAveragePool", y)))
        return net.transpose(net.reshape(net.transpose(y, 0, 2, 3, 1), 0, 64, 8), 0, 2, 1)

    net = Net(17)
    y = net.op("Relu", net.conv(net.input("x", ["N", 3, 8, 8]), 3, 8))
    model = net.model(net.linear(net.transpose(between(net, y), 0, 2, 1), 8, 5, bias=False))
    result = assert_removed(zeroed(zeroed(model, (0, 0, [1, 6])), (1, 0, [1, 6]), value=0.4))
    facts = result.report.dead
    assert facts is not None and (facts.found, facts.removed) == (2, 2) and facts.folded >= 2
    assert [node.op_type for node in result.model.graph.node].count("Add") == 1  # a product without a bias got one


def test_a_scale_of_zero_makes_a_constant() -> None:
    net = Net(17)
    y = net.norm(net.conv(net.input("x", ["N", 3, 6, 6]), 3, 8), 8)
    model = net.model(net.conv(net.op("Relu", y), 8, 4, 1))
    facts = assert_removed(zeroed(model, (2, 0, [0, 3, 7]))).report.dead
    assert facts is not None and facts.removed == 3


def test_a_unit_that_no_unit_reads_goes_with_all_that_only_it_reads() -> None:
    net = Net(17)
    x = net.op("Relu", net.conv(net.input("x", ["N", 3, 6, 6]), 3, 6))
    y = net.op("Relu", net.conv(x, 6, 8))
    model = net.model(net.conv(y, 8, 4))
    # Channel 1 of y is not read; channels 0 and 2 of x have weights towards it alone.
    model = zeroed(model, (4, 1, [1]))
    weights = [t for t in model.graph.initializer if len(t.dims) == 4]
    array = numpy_helper.to_array(weights[1]).copy()
    array[[k for k in range(8) if k != 1], 0] = 0
    array[[k for k in range(8) if k != 1], 2] = 0
    weights[1].CopyFrom(numpy_helper.from_array(array, weights[1].name))
    result = assert_removed(model)
    sizes = {t.name: list(t.dims) for t in result.model.graph.initializer if len(t.dims) == 4}
    assert list(sizes.values()) == [[4, 3, 3, 3], [7, 4, 3, 3], [4, 7, 3, 3]]


def residual() -> onnx.ModelProto:
    net = Net(17)
    x = net.conv(net.input("x", ["N", 3, 6, 6]), 3, 8)
    y = net.op("Add", x, net.conv(net.op("Relu", net.conv(x, 8, 8)), 8, 8))
    return net.model(net.conv(net.op("Add", y, net.conv(net.op("Relu", y), 8, 8)), 8, 2))


def concatenated() -> onnx.ModelProto:
    net = Net(17)
    x = net.input("x", ["N", 3, 6, 6])
    y = net.op("Concat", net.op("Relu", net.conv(x, 3, 4)), net.op("Relu", net.conv(x, 3, 6)), axis=1)
    return net.model(net.conv(y, 10, 2, 1))


def grouped() -> onnx.ModelProto:
    net = Net(17)
    x = net.op("Relu", net.conv(net.input("x", ["N", 3, 6, 6]), 3, 8, bias=False))
    return net.model(net.conv(net.op("Relu", net.conv(x, 8, 8, group=2)), 8, 2))


def recurrent() -> onnx.ModelProto:
    net = Net(17)
    x, size = net.transpose(net.input("x", ["N", 5, 4]), 1, 0, 2), 6
    w, r = net.weight(1, 4 * size, 4), net.weight(1, 4 * size, size)
    y = net.op("LSTM", x, w, r, net.weight(1, 8 * size, scale=0.3), n=3, hidden_size=size)[1]
    return net.model(net.linear(net.squeeze(y, [0]), size, 3))


def attention() -> onnx.ModelProto:
    net, heads, width = Net(17), 2, 4
    x = net.input("x", ["N", 5, 6])
    parts = [net.linear(x, 6, heads * width) for _ in range(3)]
    q, k, v = (net.transpose(net.reshape(p, 0, 5, heads, width), 0, 2, 1, 3) for p in parts)
    scores = net.op("Softmax", net.op("MatMul", q, net.transpose(k, 0, 1, 3, 2)), axis=3)
    y = net.reshape(net.transpose(net.op("MatMul", scores, v), 0, 2, 1, 3), 0, 5, heads * width)
    return net.model(net.linear(y, heads * width, 6))


GRAPHS: list[tuple[Callable[[], onnx.ModelProto], Axes, int]] = [
    # A stream's channel that every writer leaves 0, and one that no reader looks at.
    (residual, tuple((k, 0, [3]) for k in (0, 1, 4, 5, 6, 7)), 1),
    (residual, ((2, 1, [5]), (6, 1, [5]), (8, 1, [5])), 1),
    # One that is read by nobody but a unit of a block which writes nothing: both.
    (residual, ((4, 1, [2]), (2, 1, [6]), (6, 1, [6]), (8, 1, [6])), 2),
    (concatenated, ((0, 0, [1]), (1, 0, [1]), (4, 1, [7, 8])), 3),
    # Every group of a convolution loses the same number: two and one can go, one of each does.
    (grouped, ((0, 0, [0, 1, 6]),), 2),
    (grouped, ((0, 0, [0, 1]),), 0),
    # Channel 1 of the queries is 0 in both heads: so is its product with the keys; channel 3 of the values is not read.
    (attention, ((0, 1, [1, 5]), (1, 0, [1, 5])), 2),
    (attention, ((6, 0, [3, 7]),), 2),
]


@pytest.mark.parametrize(("make", "places", "count"), GRAPHS)
def test_dead_units_of_every_kind_of_graph_go(make: Callable[[], onnx.ModelProto], places: Axes, count: int) -> None:
    facts = assert_removed(zeroed(make(), *places)).report.dead
    assert facts is not None and facts.removed == count


def test_hidden_units_that_only_read_each_other_go() -> None:
    model = zeroed(recurrent(), (3, 0, [2, 4]))
    r = next(t for t in model.graph.initializer if list(t.dims) == [1, 24, 6])
    array = numpy_helper.to_array(r).copy()
    others = [g * 6 + unit for g in range(4) for unit in (0, 1, 3, 5)]
    array[:, others, 2] = array[:, others, 4] = 0  # 2 and 4 read each other and themselves
    r.CopyFrom(numpy_helper.from_array(array, r.name))
    result = assert_removed(model, evaluator=False)
    assert result.report.dead is not None and result.report.dead.removed == 2
    assert next(n for n in result.model.graph.node if n.op_type == "LSTM").attribute[0].i == 4


# -- what stays --------------------------------------------------------------------------------------------------------


def test_a_unit_that_is_constant_on_data_alone_stays() -> None:
    net = Net(17)
    x = net.op("Abs", net.input("x", ["N", 3, 6, 6]))
    model = net.model(net.conv(net.op("Relu", net.conv(x, 3, 8, bias=False)), 8, 4))
    weight = model.graph.initializer[0]
    array = numpy_helper.to_array(weight).copy()
    array[3] = -np.abs(array[3])  # never more than 0 on what Abs gives, which no weight says
    weight.CopyFrom(numpy_helper.from_array(array, weight.name))
    result = op.Pipeline([op.passes.RemoveDead()]).run(model)
    assert result.report.dead is not None and result.report.dead.found == 0
    assert result.model.SerializeToString() == model.SerializeToString()


def test_channels_that_are_tied_to_each_other_are_still_inputs() -> None:
    """All channels in front of a product may be one unit: they are what it sums over, not what it makes."""
    net = Net(17)
    x = net.op("Relu", net.conv(net.input("x", ["N", 3, 4, 4]), 3, 8))
    y = net.op("SpaceToDepth", net.op("DepthToSpace", x, blocksize=2), blocksize=2)
    model = net.model(net.conv(net.op("Relu", net.conv(y, 8, 8, 1)), 8, 2, 1))
    facts = assert_removed(model).report.dead
    assert facts is not None and facts.found == 0


def test_one_unit_of_a_dead_group_stays() -> None:
    facts = assert_removed(zeroed(chain(), (2, 1, list(range(8))))).report.dead
    assert facts is not None and (facts.found, facts.removed) == (8, 7)


def test_a_wrong_answer_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The result is held against the model that came in, not against one with masks."""
    spread = dead_units._spread

    def too_many(units: object, readers: object) -> np.ndarray:
        is_read = spread(units, readers)  # type: ignore[arg-type]
        is_read[np.flatnonzero(is_read & ~units.frozen & (units.group_of >= 0))[:1]] = False  # type: ignore[attr-defined]
        return is_read

    monkeypatch.setattr(dead_units, "_spread", too_many)
    with pytest.raises(ValidationError):
        op.Pipeline([op.passes.RemoveDead()]).run(chain())


def test_dead_units_come_before_other_removals() -> None:
    with pytest.raises(PreconditionError, match="removed channels"):
        op.Pipeline([op.passes.Prune("l2", 0.25), op.passes.RemoveDead()]).run(chain())


# -- by hand -----------------------------------------------------------------------------------------------------------


def test_the_command_line_removes_dead_units_alone(tmp_path: Path) -> None:
    path, out = tmp_path / "model.onnx", tmp_path / "small.onnx"
    onnx.save(zeroed(chain(), (0, 0, [2, 5]), (1, 0, [2, 5])), path)
    for extra in ((), ("--ratio", "0")):
        done = CliRunner().invoke(main, ["prune", str(path), "--remove-dead", "-o", str(out), "--json", *extra])
        assert done.exit_code == 0, done.output
        report = json.loads(done.stdout)
        assert report["dead"] == {"units": 8, "found": 2, "removed": 2, "folded": 0, "reasons": {}}
        assert report["exactness"]["passed"]
    assert [list(t.dims) for t in onnx.load(out).graph.initializer] == [[6, 3, 3, 3], [6], [4, 6, 3, 3], [4]]
    for extra in (("--ratio", "0.3"), ("--criterion", "l1"), ("--target", "macs=0.5"), ("--scope", "global")):
        done = CliRunner().invoke(main, ["prune", str(path), "--remove-dead", *extra, "-o", str(tmp_path / "no.onnx")])
        assert done.exit_code == 2 and extra[0] in done.output, done.output
    assert not (tmp_path / "no.onnx").exists()
    with pytest.raises(op.UsageError, match="remove_dead"):
        op.prune(path, remove_dead=True, ratio=0.2)
    assert op.prune(path, remove_dead=True, latency=False).report.dead.removed == 2
