"""Laws of LSTM, GRU and RNN between two contractions: hidden units go from every gate, state and output at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
from build import Net, newest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from sandwich import consume

import onnxprune as op
from onnxprune.channels.selection import removed_atoms
from onnxprune.pruning.masked import masked_original

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
STEPS, BATCH, INPUTS = 3, 2, 6


def layer(net: Net, kind: str, x: str, ins: int, hidden: int, *, direction: str = "forward", optional: str = "",
          **attrs: Any) -> list[str]:  # fmt: skip
    """One layer. ``optional`` names operands to give: b(ias), l(engths), h, c (initial states), p(eepholes)."""
    directions, rows = 1 + (direction == "bidirectional"), GATES[kind] * hidden
    state = (BATCH, directions, hidden) if attrs.get("layout") else (directions, BATCH, hidden)
    operands = [x, net.weight(directions, rows, ins), net.weight(directions, rows, hidden), *[""] * 5]
    if "b" in optional:
        operands[3] = net.weight(directions, 2 * rows, scale=0.5)
    if "l" in optional:
        operands[4] = net.const([STEPS, STEPS - 1], np.int32)
    if "h" in optional:
        operands[5] = net.weight(*state, scale=0.5)
    if "c" in optional and kind == "LSTM":
        operands[6] = net.weight(*state, scale=0.5)
    if "p" in optional and kind == "LSTM":
        operands[7] = net.weight(directions, 3 * hidden, scale=0.5)
    while not operands[-1]:
        operands.pop()
    return list(net.op(kind, *operands, n=3 if kind == "LSTM" else 2, hidden_size=hidden, direction=direction, **attrs))


def sequence(net: Net, batch: int | str = BATCH, layout: int = 0) -> str:
    """[T, N, 6] (or [N, T, 6]) with channels of its own."""
    return net.linear(net.input("x", [batch, STEPS, 3] if layout else [STEPS, batch, 3]), 3, INPUTS)


def batch_first(net: Net, outputs: list[str], layout: int = 0) -> list[str]:
    """Y [N, T, dirs, H] and states [N, dirs, H]."""
    if layout:
        return outputs
    return [net.transpose(outputs[0], 2, 0, 1, 3), *(net.transpose(o, 1, 0, 2) for o in outputs[1:])]


def weights(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def recurrent(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [n for n in model.graph.node if n.op_type in GATES]


def assert_hidden(model: onnx.ModelProto, hidden: int, ins: int | None = None, which: int = 0) -> None:
    """The layer has ``hidden`` units everywhere."""
    node, known = recurrent(model)[which], weights(model)
    assert helper.get_node_attr_value(node, "hidden_size") == hidden
    given = {i: known[name].shape for i, name in enumerate(node.input) if name in known}
    rows, directions = GATES[node.op_type] * hidden, given[1][0]
    assert given[1][1:] == (rows, ins or given[1][2])
    assert given[2] == (directions, rows, hidden)
    for i, size in ((3, 2 * rows), (5, hidden), (6, hidden), (7, 3 * hidden)):
        assert i not in given or given[i][-1] == size


def prune(model: onnx.ModelProto, seed: int = 0, **options: Any) -> op.Result:
    """Cut; onnxprune itself raises where the result is not exact against the masked original."""
    stages = [
        op.passes.Prune(**{"criterion": "random", "ratio": 0.5, **options}),
        op.passes.Validate(faithful=False, timed=False),
    ]
    result = op.Pipeline(stages).run(model, seed=seed)
    assert result.report.exactness.passed
    assert result.report.exactness.error < 1e-5
    return result


@given(
    kind=st.sampled_from(sorted(GATES)),
    direction=st.sampled_from(["forward", "reverse", "bidirectional"]),
    optional=st.sets(st.sampled_from("blhcp")),
    outputs=st.sets(st.sampled_from([0, 1, 2]), min_size=1),
    opset=st.sampled_from([7, 9, 14, 17, newest()]),
    seed=st.integers(0, 9),
)
@settings(max_examples=16)
def test_cut_is_exact(kind: str, direction: str, optional: set[str], outputs: set[int], opset: int, seed: int) -> None:
    net = Net(opset, seed=seed)
    made = batch_first(net, layer(net, kind, sequence(net), INPUTS, 4, direction=direction, optional="".join(optional)))
    read = [y for i, y in enumerate(made) if i in outputs] or made[:1]
    result = prune(net.model(*(consume(net, y) for y in read)), seed=seed)
    assert_hidden(result.model, 2, ins=3)


ATTRIBUTES: list[tuple[str, dict[str, Any]]] = [
    ("LSTM", {"clip": 0.3}),
    ("LSTM", {"input_forget": 1}),
    ("LSTM", {"activations": ["HardSigmoid", "Tanh", "Softsign"], "activation_alpha": [0.3], "activation_beta": [0.4]}),
    ("GRU", {"linear_before_reset": 1}),
    ("GRU", {"clip": 0.5, "activations": ["Sigmoid", "Relu"]}),
    ("RNN", {"activations": ["Relu"]}),
]


@pytest.mark.parametrize(("kind", "attrs"), ATTRIBUTES)
def test_attributes_stay(kind: str, attrs: dict[str, Any]) -> None:
    net = Net()
    made = batch_first(net, layer(net, kind, sequence(net), INPUTS, 4, optional="b", **attrs))
    result = prune(net.model(consume(net, made[0])))
    assert_hidden(result.model, 2, ins=3)
    for name, value in attrs.items():
        kept = helper.get_node_attr_value(recurrent(result.model)[0], name)
        assert [k.decode() if isinstance(k, bytes) else pytest.approx(k) for k in np.atleast_1d(kept).tolist()] == (
            value if isinstance(value, list) else [value]
        )


def test_batch_and_time_stay_dynamic() -> None:
    net = Net()
    x = net.linear(net.input("x", ["T", "N", 3]), 3, INPUTS)
    y = layer(net, "GRU", x, INPUTS, 4, direction="bidirectional", optional="b")
    merged = net.op("Reshape", net.transpose(y[0], 0, 2, 1, 3), net.const([0, 0, -1]))
    result = prune(net.model(net.linear(merged, 8, 5)))
    assert_hidden(result.model, 2, ins=3)
    session = ort.InferenceSession(result.model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert session.run(None, {"x": np.ones((7, 5, 3), np.float32)})[0].shape == (7, 5, 5)


@pytest.mark.parametrize("kind", sorted(GATES))
def test_directions_lose_different_units(kind: str) -> None:
    """The weakest units of each direction go, whatever the other direction loses."""
    net = Net()
    made = batch_first(net, layer(net, kind, sequence(net), INPUTS, 4, direction="bidirectional", optional="b"))
    model = net.model(consume(net, made[0]))
    stay = [[0, 3], [1, 2]]
    node, gates = recurrent(model)[0], GATES[kind]
    known = weights(model)
    for i in (1, 2):
        array = known[node.input[i]].copy()
        rows = array.reshape(2, gates, 4, -1)
        for direction in (0, 1):
            gone = [j for j in range(4) if j not in stay[direction]]
            rows[direction][:, gone] *= 1e-3
        for tensor in model.graph.initializer:
            if tensor.name == node.input[i]:
                tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    result = prune(model, criterion="l2", include=[node.input[1]])
    before, after = weights(model), weights(result.model)
    w, r = (before[node.input[i]].reshape(2, gates, 4, -1) for i in (1, 2))
    for direction in (0, 1):
        kept = stay[direction]
        assert np.array_equal(after[node.input[1]][direction], w[direction][:, kept].reshape(gates * 2, -1))
        assert np.array_equal(after[node.input[2]][direction], r[direction][:, kept][:, :, kept].reshape(gates * 2, 2))


def test_directions_that_are_added_lose_the_same_units() -> None:
    net = Net()
    y = layer(net, "LSTM", sequence(net), INPUTS, 6, direction="bidirectional", optional="b")[0]
    forward, backward = net.split(y, [1, 1], 1)
    both = net.transpose(net.squeeze(net.op("Add", forward, backward), [1]), 1, 0, 2)
    assert_hidden(prune(net.model(consume(net, both))).model, 3, ins=3)


def test_stacked_layers() -> None:
    net = Net()
    x, size = sequence(net, "N"), INPUTS
    for _ in range(3):
        y = layer(net, "LSTM", x, size, 4, direction="bidirectional", optional="b")[0]
        x, size = net.op("Reshape", net.transpose(y, 0, 2, 1, 3), net.const([0, 0, -1])), 8
    result = prune(net.model(consume(net, net.transpose(x, 1, 0, 2))))
    for which in range(3):
        assert_hidden(result.model, 2, ins=3 if which == 0 else 4, which=which)


def test_states_of_an_encoder_start_a_decoder() -> None:
    """The decoder's units go with the encoder's, direction by direction."""
    net = Net()
    x = sequence(net)
    _, h, c = layer(net, "LSTM", x, INPUTS, 4, direction="bidirectional", optional="b")
    rows = [net.weight(2, 16, INPUTS), net.weight(2, 16, 4), net.weight(2, 32, scale=0.5)]
    y, _, _ = net.op("LSTM", x, *rows, "", h, c, n=3, hidden_size=4, direction="bidirectional")
    result = prune(net.model(consume(net, net.transpose(y, 2, 0, 1, 3))))
    assert_hidden(result.model, 2, ins=3)
    assert_hidden(result.model, 2, ins=3, which=1)


@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
def test_states_filled_with_zeros_at_run_time(direction: str) -> None:
    """One ConstantOfShape for both states, its batch size computed from the input, as exporters write it."""
    net, directions = Net(), 1 + (direction == "bidirectional")
    x = sequence(net, "N")
    batch = net.op("Gather", net.op("Shape", x), net.const([1]))
    shape = net.op("Concat", net.const([directions]), batch, net.const([4]), axis=0)
    zeros = net.op("ConstantOfShape", shape)
    operands = [net.weight(directions, 16, INPUTS), net.weight(directions, 16, 4), net.weight(directions, 32), ""]
    y = net.op("LSTM", x, *operands, zeros, zeros, n=3, hidden_size=4, direction=direction)[0]
    assert_hidden(prune(net.model(consume(net, net.transpose(y, 2, 0, 1, 3)))).model, 2, ins=3)


def test_weights_that_are_computed() -> None:
    """Gates in another order, put together from slices, and directions from halves: these tie the directions."""
    net, halves = Net(), []
    for size in (INPUTS, 4):
        parts = []
        for _ in range(2):
            r, z, n = net.split(net.weight(12, size), [4, 4, 4], 0)
            parts.append(net.unsqueeze(net.op("Concat", z, r, n, axis=0), [0]))
        halves.append(net.op("Concat", *parts, axis=0))
    y = net.op("GRU", sequence(net), *halves, n=2, hidden_size=4, direction="bidirectional")[0]
    result = prune(net.model(consume(net, net.transpose(y, 2, 0, 1, 3))))
    assert helper.get_node_attr_value(recurrent(result.model)[0], "hidden_size") == 2


def test_a_weight_shared_by_two_layers_loses_the_same_units_in_both() -> None:
    net = Net()
    x = sequence(net)
    operands = [net.weight(2, 16, INPUTS), net.weight(2, 16, 4), net.weight(2, 32, scale=0.5)]
    ys = [net.op("LSTM", z, *operands, n=3, hidden_size=4, direction="bidirectional")[0] for z in (x, net.op("Neg", x))]
    result = prune(net.model(*(consume(net, net.transpose(y, 2, 0, 1, 3)) for y in ys)))
    assert_hidden(result.model, 2, ins=3)
    assert_hidden(result.model, 2, ins=3, which=1)


def test_what_is_seen_from_outside_stays() -> None:
    """States that come in or go out of the model keep their size; the layer's input does not."""
    net = Net()
    h = net.input("h", [1, BATCH, 4])
    x = sequence(net)
    y, h = net.op("RNN", x, net.weight(1, 4, INPUTS), net.weight(1, 4, 4), "", "", h, n=2, hidden_size=4)
    result = prune(net.model(consume(net, net.transpose(y, 2, 0, 1, 3)), h))
    assert_hidden(result.model, 4, ins=3)


def test_a_single_hidden_unit_stays() -> None:
    net = Net()
    made = batch_first(net, layer(net, "GRU", sequence(net), INPUTS, 1, direction="bidirectional", optional="bh"))
    assert_hidden(prune(net.model(consume(net, made[0]))).model, 1, ins=3)


def batches_second(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model with layout 0, which onnxruntime has kernels for: transposes around every recurrent node."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    del result.graph.node[:], result.graph.value_info[:]
    for node in model.graph.node:
        if node.op_type not in GATES:
            result.graph.node.append(node)
            continue
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        for attribute in list(copy.attribute):
            if attribute.name == "layout":
                copy.attribute.remove(attribute)
        for i in (0, 5, 6):
            if i < len(node.input) and node.input[i]:
                copy.input[i] = f"{node.input[i]}_{i}_moved"
                move = helper.make_node("Transpose", [node.input[i]], [copy.input[i]], perm=[1, 0, 2])
                result.graph.node.append(move)
        for o, name in enumerate(node.output):
            copy.output[o] = f"{name}_still"
        result.graph.node.append(copy)
        for o, name in enumerate(node.output):
            perm = [1, 0, 2] if o else [2, 0, 1, 3]
            result.graph.node.append(helper.make_node("Transpose", [f"{name}_still"], [name], perm=perm))
    onnx.checker.check_model(result, full_check=True)
    return result


@pytest.mark.parametrize("kind", sorted(GATES))
@pytest.mark.parametrize("direction", ["reverse", "bidirectional"])
def test_batch_first_layout(kind: str, direction: str) -> None:
    """Onnxruntime refuses layout 1: the cut model and the masked original are compared after a change of layout."""
    net = Net()
    made = layer(net, kind, sequence(net, layout=1), INPUTS, 4, direction=direction, optional="bhcp", layout=1)
    model = net.model(*(consume(net, y) for y in made))
    result = op.Pipeline([op.passes.Prune("random", 0.5)]).run(model)
    assert_hidden(result.model, 2, ins=3)
    analysis = op.analyze(model)
    chosen = np.zeros(analysis.units.frozen.size, bool)
    for group in result.plan.groups:
        chosen[analysis.units.groups[group.id].units[group.removed]] = True
    masked, _ = masked_original(analysis.table, removed_atoms(analysis.units, chosen))
    for tensor in masked.graph.initializer:
        if tensor.name in weights(model):
            tensor.CopyFrom(numpy_helper.from_array(weights(model)[tensor.name], tensor.name))
    x = np.random.default_rng(1).standard_normal((BATCH, STEPS, 3)).astype(np.float32)
    runs = []
    for each in (masked, result.model):
        session = ort.InferenceSession(batches_second(each).SerializeToString(), providers=["CPUExecutionProvider"])
        runs.append(session.run(None, {"x": x}))
    for want, have in zip(*runs, strict=True):
        np.testing.assert_allclose(have, want, atol=1e-6)


TEXT = """
<ir_version: 8, opset_import: ["": 14]>
tagger (float[T, N, 4] x) => (float[T, N, 3] y)
<float[4, 6] a = {AAA}, float[1, 16, 6] w = {WWW}, float[1, 16, 4] r = {RRR}, float[1, 32] b = {BBB},
 float[4, 3] c = {CCC}, int64[1] one = {1}>
{
    h = MatMul (x, a)
    s, last, cell = LSTM <hidden_size: int = 4> (h, w, r, b)
    z = Squeeze (s, one)
    y = MatMul (z, c)
}
"""


def test_text_model_agrees_with_the_reference_evaluator() -> None:
    rng, text = np.random.default_rng(0), TEXT
    for mark, size in (("AAA", 24), ("WWW", 96), ("RRR", 64), ("BBB", 32), ("CCC", 12)):
        text = text.replace(mark, ", ".join(f"{v:.6f}" for v in rng.standard_normal(size)))
    model = onnx.parser.parse_model(text)
    onnx.checker.check_model(model)
    result = prune(model)
    assert_hidden(result.model, 2, ins=3)
    x = rng.standard_normal((5, 3, 4)).astype(np.float32)
    session = ort.InferenceSession(result.model.SerializeToString(), providers=["CPUExecutionProvider"])
    want = ReferenceEvaluator(result.model).run(None, {"x": x})[0]
    np.testing.assert_allclose(session.run(None, {"x": x})[0], want, atol=1e-5)


def test_dynamically_quantised_lstm_loses_inputs_only() -> None:
    """Its hidden state is quantised over all units at once."""
    net = Net()
    codes = [net.const(net.rng.integers(-100, 100, s), np.int8) for s in ((1, INPUTS, 16), (1, 4, 16))]
    scale, zero = net.const(np.full(1, 0.01)), net.const([0], np.int8)
    operands = [*codes, net.weight(1, 32), "", "", "", "", scale, zero, scale, zero]
    y = net.op("DynamicQuantizeLSTM", sequence(net), *operands, n=3, domain="com.microsoft", hidden_size=4)[0]
    read = net.linear(net.op("Reshape", net.transpose(y, 2, 0, 1, 3), net.const([0, 12])), 12, 4)
    result = op.prune(net.model(read, check=False, shapes={read: [BATCH, 4]}), ratio=0.5, latency=False)
    assert result.report.exactness.passed
    assert weights(result.model)[codes[0]].shape == (1, 3, 16)
    assert weights(result.model)[codes[1]].shape == (1, 4, 16)


@pytest.mark.parametrize("kind", sorted(GATES))
@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
def test_the_plan_alone_says_which_units_go_from_which_direction(kind: str, direction: str, tmp_path: Path) -> None:
    """Another program cuts every weight of the layer by the file, and gets the weights that were written."""
    net = Net()
    y = batch_first(net, layer(net, kind, sequence(net), INPUTS, 6, direction=direction, optional="bhcp"))
    model = net.model(consume(net, y[0]))
    result = prune(model)
    result.plan.save(tmp_path / "plan.json")
    plan = json.loads((tmp_path / "plan.json").read_text())
    before, after, node = weights(model), weights(result.model), recurrent(model)[0]
    directions, axes = 1 + (direction == "bidirectional"), {1: (1, 2), 2: (1, 2), 3: (1,), 5: (2,), 6: (2,), 7: (1,)}
    for i in (i for i in axes if i < len(node.input) and node.input[i]):
        name, rows = node.input[i], []
        for number in range(directions):
            row = before[name][number]
            for axis in axes[i]:
                removed = [
                    slot["removed"]
                    for group in plan["groups"]
                    for slot in group["slots"]
                    if (slot["tensor"], slot["axis"]) == (name, axis) and slot.get("at", {"0": number}) == {"0": number}
                ]
                assert len(removed) == 1
                row = np.delete(row, removed[0], axis - 1)
            rows.append(row)
        assert np.array_equal(after[name], np.stack(rows)), f"operand {i}"


def test_a_direction_of_a_plan_is_replayed_by_its_slots(tmp_path: Path) -> None:
    """A plan that names units by the slots of the recurrent weights cuts the same; a wrong place is an error."""
    net = Net()
    y = batch_first(net, layer(net, "LSTM", sequence(net), INPUTS, 6, direction="bidirectional"))
    model = net.model(consume(net, y[0]))
    result = prune(model)
    weight = recurrent(model)[0].input[2]
    plan = result.plan
    for group in plan.groups:
        if any(slot.tensor == weight for slot in group.slots):
            group.removed = None
            group.slots = [slot for slot in group.slots if slot.tensor == weight]
    plan.save(tmp_path / "plan.json")
    again = prune(model, plan=op.Plan.load(tmp_path / "plan.json"))
    assert weights(again.model).keys() == weights(result.model).keys()
    assert all(np.array_equal(array, weights(result.model)[name]) for name, array in weights(again.model).items())
    slot = next(slot for group in plan.groups for slot in group.slots if slot.tensor == weight)
    for place in ({0: 2}, {7: 0}, {slot.axis: 0}):
        slot.at = place
        with pytest.raises(op.UsageError, match="place"):
            prune(model, plan=plan)
