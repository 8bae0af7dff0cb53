"""The law of every form: columns of the data times the matrix of the weight are the rows of what onnxruntime gives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from build import Net
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from onnxprune.graph.view import Graph
from onnxprune.io.weights import ArrayWeight
from onnxprune.operators.contractions import Form, Pairwise, Scale, Windows, pick, rows_per_sample
from onnxprune.operators.registry import lookup

Array = NDArray[Any]


@dataclass
class Example:
    """One operator with its operands; ``data`` is the position of the one that is no weight."""

    op: str
    operands: list[Array]
    data: int = 0
    domain: str = ""
    attrs: dict[str, Any] = field(default_factory=dict)

    def run(self) -> tuple[Form | None, Array]:
        """The form that the operator's rule gives, and the output in onnxruntime."""
        net = Net(17)
        names = [
            net.input("x", list(a.shape)) if i == self.data else net.const(a, np.float32, name=f"w{i}")
            for i, a in enumerate(self.operands)
        ]
        y = net.op(self.op, *names, domain=self.domain, **self.attrs)
        model = net.model(y, check=False, shapes={y: None})
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 4
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        (value,) = session.run(None, {"x": self.operands[self.data].astype(np.float32)})
        weights = {f"w{i}": ArrayWeight(f"w{i}", a) for i, a in enumerate(self.operands) if i != self.data}
        node = Graph.of(model, weights).nodes[0]
        shapes = [tuple(a.shape) for a in self.operands]
        return lookup(node.domain, node.op, node.version).form(node, shapes, self.data), value


def draw_array(seed: int, *shape: int) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def check(example: Example) -> Form:
    """Everything that a form promises."""
    form, output = example.run()
    assert form is not None and form.data == example.data and form.plain
    data, weight = example.operands[form.data], example.operands[form.weight]
    columns, matrix, rows = form.columns(data), form.matrix(weight), form.rows(output)
    product = form.scale * np.matmul(columns.astype(np.float64), matrix.astype(np.float64))
    bias = np.zeros(1)
    if form.bias is not None and form.bias < len(example.operands):
        given_bias = form.bias_scale * example.operands[form.bias].astype(np.float64)
        bias = form.rows(
            np.broadcast_to(given_bias if example.op == "Gemm" else _spread(given_bias, output), output.shape)
        )
    assert columns.shape == (form.parts, form.count(data.shape), matrix.shape[1])
    np.testing.assert_allclose(product + bias, rows, rtol=1e-4, atol=2e-4 * max(1.0, float(np.abs(rows).max())))
    assert form.output_shape(data.shape, weight.shape) == output.shape
    assert np.array_equal(form.restore(matrix, weight), weight)
    other = draw_array(5, *weight.shape)
    assert np.array_equal(form.restore(form.matrix(other), weight), other), "restore goes by the matrix alone"
    assert matrix.shape[:2] == (form.parts, int(np.prod([data.shape[a] for a in form.axes])) // form.parts * form.taps)
    some = np.unique(np.random.default_rng(0).integers(0, columns.shape[1], 5))
    assert np.array_equal(form.columns(data, some), columns[:, some])
    assert np.array_equal(form.rows(output, some), rows[:, some])
    check_channels(form, data, columns)
    check_output_axis(form, output, rows)
    return form


def _spread(bias: Array, output: Array) -> Array:
    return bias.reshape(-1, *[1] * (output.ndim - 2))


def check_channels(form: Form, data: Array, columns: Array) -> None:
    """Column ``c * taps + t`` of a part reads channel c alone, channels in the order of ``axes``."""
    order = [*(a for a in range(data.ndim) if a not in form.axes), *form.axes]
    sizes = [data.shape[a] for a in form.axes]
    numbers = np.broadcast_to(np.arange(1, np.prod(sizes) + 1).reshape(sizes), [data.shape[a] for a in order])
    marked = form.columns(np.transpose(numbers, np.argsort(order)).astype(np.float32))
    wanted = np.arange(1, np.prod(sizes) + 1).reshape(form.parts, 1, -1, 1)
    found = marked.reshape(*marked.shape[:2], -1, form.taps)
    assert ((found == wanted) | (found == 0)).all()
    assert columns.shape[-1] == found.shape[2] * form.taps


def check_output_axis(form: Form, output: Array, rows: Array) -> None:
    """The named axis of the output is the matrix' last one, parts outermost."""
    axis = form.output_axis(output.ndim)
    if axis is None:
        return
    spread = np.moveaxis(output, axis, -1).reshape(-1, output.shape[axis])
    flat = rows.transpose(1, 0, 2).reshape(len(spread), -1)
    assert np.allclose(np.sort(spread, axis=0), np.sort(flat, axis=0))


# -- convolutions ------------------------------------------------------------------------------------------------------


@st.composite
def convolutions(draw: st.DrawFn) -> Example:
    dims = draw(st.integers(1, 3))
    group = draw(st.sampled_from([1, 1, 2, 3]))
    per_in, per_out = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    kernel = [draw(st.integers(1, 3)) for _ in range(dims)]
    sizes = [draw(st.integers(5, 7)) for _ in range(dims)]
    attrs: dict[str, Any] = {"group": group, "strides": [draw(st.integers(1, 3)) for _ in range(dims)]}
    auto = draw(st.sampled_from([None, None, "SAME_UPPER", "SAME_LOWER", "VALID"]))
    if auto is None:
        attrs["pads"] = [draw(st.integers(0, 2)) for _ in range(2 * dims)]
    else:
        attrs["auto_pad"] = auto
    # onnxruntime refuses dilations together with SAME padding.
    if auto in (None, "VALID"):
        attrs["dilations"] = [draw(st.integers(1, 2)) for _ in range(dims)]
    if draw(st.booleans()):
        attrs["kernel_shape"] = kernel
    seed = draw(st.integers(0, 99))
    operands = [draw_array(seed, 2, group * per_in, *sizes), draw_array(seed, group * per_out, per_in, *kernel)]
    if draw(st.booleans()):
        operands.append(draw_array(seed, group * per_out))
    return Example("Conv", operands, attrs=attrs)


@given(example=convolutions())
@settings(max_examples=60)
def test_convolutions(example: Example) -> None:
    check(example)


@pytest.mark.parametrize("multiplier", [1, 2, 3])
def test_depthwise_convolutions_have_a_part_per_channel(multiplier: int) -> None:
    weight = draw_array(1, 4 * multiplier, 1, 3, 3)
    form = check(Example("Conv", [draw_array(0, 2, 4, 6, 5), weight], attrs={"group": 4, "pads": [1, 0, 2, 1]}))
    assert form.parts == 4 and form.taps == 9 and form.matrix(weight).shape == (4, 9, multiplier)


def test_kernels_larger_than_what_they_slide_over() -> None:
    """One position, most of it padding."""
    check(Example("Conv", [draw_array(0, 3, 2, 2, 2), draw_array(1, 4, 2, 5, 5)], attrs={"pads": [2, 1, 1, 2]}))


@st.composite
def transposed(draw: st.DrawFn) -> Example:
    dims = draw(st.integers(1, 3))
    group = draw(st.sampled_from([1, 1, 2, 3]))
    per_in, per_out = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    kernel = [draw(st.integers(1, 4)) for _ in range(dims)]
    strides = [draw(st.integers(1, 3)) for _ in range(dims)]
    dilations = [draw(st.integers(1, 2)) for _ in range(dims)]
    attrs: dict[str, Any] = {"group": group, "strides": strides, "dilations": dilations}
    attrs["pads"] = [draw(st.integers(0, 3)) for _ in range(2 * dims)]
    if draw(st.booleans()):
        attrs["output_padding"] = [draw(st.integers(0, max(s, d) - 1)) for s, d in zip(strides, dilations, strict=True)]
    sizes = [draw(st.integers(3, 4)) for _ in range(dims)]
    seed = draw(st.integers(0, 99))
    operands = [draw_array(seed, 2, group * per_in, *sizes), draw_array(seed, group * per_in, per_out, *kernel)]
    if draw(st.booleans()):
        operands.append(draw_array(seed, group * per_out))
    return Example("ConvTranspose", operands, attrs=attrs)


@given(example=transposed())
@settings(max_examples=60)
def test_transposed_convolutions(example: Example) -> None:
    attrs, kernel = example.attrs, example.operands[1].shape[2:]
    for i, k in enumerate(kernel):
        n, s, d = example.operands[0].shape[2 + i], attrs["strides"][i], attrs["dilations"][i]
        extra = attrs.get("output_padding", [0] * len(kernel))[i]
        assume((n - 1) * s + (k - 1) * d + 1 + extra - attrs["pads"][i] - attrs["pads"][i + len(kernel)] > 0)
    check(example)


def test_transposed_convolutions_whose_padding_follows_from_a_shape_have_no_form() -> None:
    operands = [draw_array(0, 1, 2, 4, 4), draw_array(1, 2, 3, 3, 3)]
    for attrs in ({"output_shape": [8, 8], "strides": [2, 2]}, {"auto_pad": "SAME_UPPER", "strides": [2, 2]}):
        assert Example("ConvTranspose", operands, attrs=attrs).run()[0] is None


# -- products ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("left", "right", "data"),
    [
        ((5, 4), (4, 3), 0), ((2, 5, 4), (4, 3), 0), ((2, 3, 5, 4), (4, 6), 0), ((4,), (4, 3), 0), ((5, 4), (4,), 0),
        ((3, 5), (2, 5, 4), 1), ((3, 5), (5,), 1), ((5,), (5, 4), 1),
        ((2, 5, 4), (2, 4, 3), 0), ((2, 3, 5, 4), (3, 4, 6), 0), ((3, 6, 4), (2, 3, 4, 5), 1),
    ],
)  # fmt: skip
def test_matmul_with_either_operand_as_weight(left: tuple[int, ...], right: tuple[int, ...], data: int) -> None:
    check(Example("MatMul", [draw_array(0, *left), draw_array(1, *right)], data))


def test_batch_axes_of_the_weight_are_parts() -> None:
    form = check(Example("MatMul", [draw_array(0, 2, 3, 5, 4), draw_array(1, 3, 4, 6)]))
    assert form.parts == 3 and form.output_axis(4) is None
    assert check(Example("MatMul", [draw_array(0, 2, 5, 4), draw_array(1, 4, 6)])).output_axis(3) == 2


def test_a_weight_that_is_broadcast_along_a_batch_axis_has_no_form() -> None:
    """Its axis of size 1 meets another size of the data: there is no one column per channel."""
    assert Example("MatMul", [draw_array(0, 3, 5, 4), draw_array(1, 1, 4, 6)]).run()[0] is None


@pytest.mark.parametrize("bias", [None, (3,), (1, 3), (1,), ()])
@pytest.mark.parametrize(("trans_a", "trans_b"), [(0, 0), (0, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize("data", [0, 1])
def test_gemm(trans_a: int, trans_b: int, data: int, bias: tuple[int, ...] | None) -> None:
    operands = [draw_array(0, *((4, 5) if trans_a else (5, 4))), draw_array(1, *((3, 4) if trans_b else (4, 3)))]
    if bias is not None:
        operands.append(draw_array(2, *bias))
    attrs = {"transA": trans_a, "transB": trans_b, "alpha": 0.5, "beta": -2.0}
    form = check(Example("Gemm", operands, data, attrs=attrs))
    assert (form.scale, form.bias_scale) == (0.5, -2.0)


@pytest.mark.parametrize(
    ("equation", "left", "right"),
    [
        ("bij,jk->bik", (2, 3, 4), (4, 5)), ("bij,kj->bik", (2, 3, 4), (5, 4)),
        ("bhij,hjk->bhik", (2, 3, 4, 5), (3, 5, 6)),        ("bthd,hdm->btm", (2, 3, 4, 5), (4, 5, 6)),
        ("btm,hdm->bthd", (2, 3, 6), (4, 5, 6)),
        ("jb,jk->kb", (4, 3), (4, 5)),        ("bc,dc->db", (3, 4), (5, 4)),
        ("nchw,oc->nohw", (2, 3, 4, 5), (6, 3)), ("bi,i->b", (3, 4), (4,)),
        ("nct,ncv->nct", (2, 3, 4), (2, 3, 1)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("swapped", [False, True])
def test_einsum(equation: str, left: tuple[int, ...], right: tuple[int, ...], swapped: bool) -> None:
    a, b = draw_array(0, *left), draw_array(1, *right)
    example = Example("Einsum", [a, b], attrs={"equation": equation})
    if swapped:
        terms, out = equation.split("->")
        example = Example("Einsum", [b, a], 1, attrs={"equation": ",".join(reversed(terms.split(","))) + "->" + out})
    if "v" in equation:  # a letter of the weight that is summed, and that the data does not have
        assert example.run()[0] is None
    else:
        check(example)


@pytest.mark.parametrize("equation", ["...ij,jk->...ik", "ij,jk", "ii,ij->ij"])
def test_einsums_that_are_no_plain_product_have_no_form(equation: str) -> None:
    assert Example("Einsum", [draw_array(0, 4, 4), draw_array(1, 4, 4)], attrs={"equation": equation}).run()[0] is None


@pytest.mark.parametrize("trans_a", [0, 1])
@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("data", [0, 1])
def test_fused_products_with_transposes(trans_a: int, trans_b: int, batch: int, data: int) -> None:
    left = (4, 5) if trans_a else (5, 4)
    right = (3, 4) if trans_b else (4, 3)
    left = (left[0], 2, left[1]) if batch else (2, *left)
    attrs = {"transA": trans_a, "transB": trans_b, "transBatchA": batch, "alpha": 0.25}
    right = (2, *right)
    form = check(Example("FusedMatMul", [draw_array(0, *left), draw_array(1, *right)], data, "com.microsoft", attrs))
    assert form.scale == 0.25 and form.parts == 2


def test_letters_that_make_no_product_are_refused() -> None:
    for terms in (("ii", "ij", "j"), ("bi", "ijx", "bj")):
        with pytest.raises(ValueError, match="no product"):
            Pairwise(terms, [3] * len(terms[1]))


# -- scales ------------------------------------------------------------------------------------------------------------


def test_scales_multiply_every_channel_by_one_number() -> None:
    form, data = Scale(4), draw_array(0, 3, 4, 5, 2)
    weight, bias = draw_array(1, 4), draw_array(2, 4)
    output = data * weight[:, None, None] + bias[:, None, None]
    rows = form.columns(data) @ form.matrix(weight) + bias[:, None, None]
    np.testing.assert_allclose(rows, form.rows(output), rtol=1e-5, atol=1e-6)
    assert form.count(data.shape) == rows.shape[1]
    assert np.array_equal(form.restore(form.matrix(weight), weight), weight)
    assert np.array_equal(form.columns(data, np.array([1, 7])), form.columns(data)[:, [1, 7]])


# -- which rows --------------------------------------------------------------------------------------------------------


@given(samples=st.integers(1, 5), per_sample=st.integers(1, 40))
def test_picked_rows_are_spread_over_samples_and_the_same_every_time(samples: int, per_sample: int) -> None:
    form, data = Windows([3, 3]), draw_array(0, samples, 2, 12, 12)
    chosen = pick(form, data, per_sample)
    assert chosen is not None and len(chosen) == per_sample * samples
    assert np.array_equal(chosen, pick(form, data.copy(), per_sample))
    assert (np.diff(chosen) >= 0).all() and chosen.min() >= 0 and chosen.max() < form.count(data.shape)
    assert set(np.bincount(chosen // 100, minlength=samples)) == {per_sample}, "as many of every sample"
    every = form.columns(data)
    assert np.array_equal(form.columns(data, chosen), every[:, chosen])


def test_all_rows_are_taken_where_there_are_few() -> None:
    assert pick(Windows([3, 3]), draw_array(0, 2, 2, 12, 12), 100) is None


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_few_windows_are_those_of_all(data: st.DataObject) -> None:
    """Windows that are gathered one by one, with padding, cropping, strides and dilations."""
    rank = data.draw(st.integers(1, 3))
    sizes = data.draw(st.lists(st.integers(7, 10), min_size=rank, max_size=rank))
    kernel, strides, dilations = (
        data.draw(st.lists(st.integers(1, most), min_size=rank, max_size=rank)) for most in (3, 2, 2)
    )
    pads = data.draw(st.lists(st.integers(-1, 2), min_size=2 * rank, max_size=2 * rank))
    form = Windows(kernel, strides=strides, dilations=dilations, pads=pads, group=data.draw(st.sampled_from([1, 2])))
    values = draw_array(1, 6, 4, *sizes)
    every = form.columns(values)
    for some in (np.array([every.shape[1] - 1]), np.arange(0, every.shape[1], 3)):
        assert np.array_equal(form.columns(values, some), every[:, some])


def test_rows_of_all_samples_together_are_enough() -> None:
    form = Windows([3, 3], group=2)
    assert rows_per_sample(form, 512, 64, 30) * 64 >= 30 * 256 * 9
    assert rows_per_sample(form, 512, None, 30) * 512 >= 30 * 256 * 9
    assert rows_per_sample(form, 4, 10) * 10 >= 1 << 14


# -- rules -------------------------------------------------------------------------------------------------------------


def form_in(model: onnx.ModelProto, data: int = 0) -> Form | None:
    """The form of the last node of a model; weights are its initializers."""
    graph = Graph.of(
        model, {t.name: ArrayWeight(t.name, onnx.numpy_helper.to_array(t)) for t in model.graph.initializer}
    )
    node = graph.nodes[-1]
    infos = {v.name: v for v in (*model.graph.input, *model.graph.value_info, *model.graph.output)}
    shapes: list[Any] = []
    for name in node.inputs:
        if name in graph.weights:
            shapes.append(tuple(graph.weights[name].shape))
        else:
            shapes.append(tuple(d.dim_value or None for d in infos[name].type.tensor_type.shape.dim) if name else None)
    return lookup(node.domain, node.op, node.version).form(node, shapes, data)


def test_recurrent_layers_are_a_product_ahead_of_their_gates() -> None:
    net = Net(17)
    x = net.input("x", [7, "N", 5])
    for op, gates in (("LSTM", 4), ("GRU", 3), ("RNN", 1)):
        net.nodes.clear()
        y = net.op(
            op, x, net.weight(2, gates * 6, 5), net.weight(2, gates * 6, 6), hidden_size=6, direction="bidirectional"
        )
        form = form_in(net.model(y))
        assert form is not None and not form.plain and form.parts == 1 and form.axes == (2,)
        weight = draw_array(0, 2, gates * 6, 5)
        assert form.matrix(weight).shape == (1, 5, 2 * gates * 6)
        product = form.columns(draw_array(1, 7, 3, 5)) @ form.matrix(weight)
        wanted = np.einsum("sbi,dgi->sbdg", draw_array(1, 7, 3, 5), weight)
        np.testing.assert_allclose(product[0], wanted.reshape(21, -1), rtol=1e-4, atol=1e-5)


def test_what_is_done_to_the_product_is_told() -> None:
    """A fused activation or addend stands between the product and the output."""
    net = Net(17)
    x, z = net.input("x", ["N", 3, 6, 6]), net.input("z", ["N", 4, 4, 4])
    for name, operands, attrs in (("with activation", [], {"activation": "Relu"}), ("with addend", [z], {})):
        net.nodes.clear()
        y = net.op("FusedConv", x, net.weight(4, 3, 3, 3), net.weight(4), *operands, domain="com.microsoft", **attrs)
        form = form_in(net.model(y, check=False, shapes={y: ["N", 4, 4, 4]}))
        assert form is not None and not form.plain, name
    net.nodes.clear()
    y = net.op("FusedConv", x, net.weight(4, 3, 3, 3), net.weight(4), domain="com.microsoft")
    form = form_in(net.model(y, check=False, shapes={y: ["N", 4, 4, 4]}))
    assert form is not None and form.plain


def test_operators_that_are_no_product_with_a_weight_have_no_form() -> None:
    net = Net(17)
    x = net.input("x", ["N", 6, 6])
    assert form_in(net.model(net.op("Relu", x))) is None
    net = Net(17)
    x, y = net.input("x", ["N", 6, 6]), net.input("y", ["N", 6, 6])
    assert form_in(net.model(net.op("MatMul", x, y))) is None, "the weight's batch axis is not known"


@pytest.mark.parametrize(("op", "weight"), [("NhwcConv", (4, 3, 3, 6)), ("NhwcFusedConv", (4, 6, 3, 3))])
def test_convolutions_with_channels_last_have_no_form(op: str, weight: tuple[int, ...]) -> None:
    """Windows would slide over the channels."""
    net = Net(17)
    y = net.op(op, net.input("x", [2, 6, 6, 6]), net.weight(*weight), net.weight(4), domain="com.microsoft")
    assert form_in(net.model(y, check=False, shapes={y: [2, 4, 4, 4]})) is None


def test_unknown_data_sizes_leave_the_form_as_it_is() -> None:
    """Batch and positions may be free; a form goes by the weight."""
    net = Net(17)
    form = form_in(net.model(net.conv(net.input("x", ["N", 3, "H", "W"]), 3, 4)))
    assert form is not None and form.count([2, 3, 5, 6]) == 60
    net = Net(17)
    form = form_in(net.model(net.linear(net.input("x", ["N", "T", 5]), 5, 4, bias=False)))
    assert form is not None and form.output_shape([2, 7, 5], [5, 4]) == (2, 7, 4)
