"""Laws of operators that sum over channels: data and weight go together, groups stay groups."""

from __future__ import annotations

import numpy as np
import pytest
from build import Net
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_exact_cut
from sandwich import check, opsets, produce


@pytest.mark.parametrize("layout", ["ncl", "nchw", "ncdhw"])
@given(data=st.data(), opset=opsets())
@settings(max_examples=5)
def test_convolutions_of_every_rank(layout: str, data: st.DataObject, opset: int) -> None:
    net = Net(opset)
    dims = len(layout) - 2
    x = produce(net, layout, extent=6)
    kernel = data.draw(st.sampled_from([1, 2, 3]))
    attrs = {
        "strides": [data.draw(st.sampled_from([1, 2])) for _ in range(dims)],
        "dilations": [data.draw(st.sampled_from([1, 2])) for _ in range(dims)],
    }
    if data.draw(st.booleans()):
        attrs = {"strides": attrs["strides"], "auto_pad": data.draw(st.sampled_from(["SAME_UPPER", "VALID"]))}
    y = net.conv(x, 6, 8, kernel, dims=dims, bias=data.draw(st.booleans()), **attrs)
    check(net, net.op("Relu", y))


@pytest.mark.parametrize(
    ("ins", "outs", "group"), [(8, 8, 2), (8, 12, 4), (12, 6, 3), (6, 6, 6), (6, 18, 6), (6, 12, 6), (8, 4, 4)]
)
@given(layout=st.sampled_from(["ncl", "nchw", "ncdhw"]), opset=opsets(), bias=st.booleans())
@settings(max_examples=3)
def test_grouped_and_depthwise_convolutions(
    ins: int, outs: int, group: int, layout: str, opset: int, bias: bool
) -> None:
    """Channels per group, whole groups, and channel multipliers; the ``group`` attribute follows."""
    net = Net(opset)
    x = net.op("Relu", produce(net, layout, channels=ins))
    y = net.conv(x, ins, outs, 3, dims=len(layout) - 2, group=group, bias=bias)
    result = assert_exact_cut(net.model(net.conv(net.op("Tanh", y), outs, 5, 1, dims=len(layout) - 2)), seed=outs)
    assert result is not None


@pytest.mark.parametrize("seed", range(4))
def test_groups_lose_different_channels(seed: int) -> None:
    """The rows of the grid are independent: every group keeps the same number of channels, not the same ones."""
    net = Net(17, seed=seed)
    x = produce(net, "nchw", channels=16)
    y = net.conv(x, 16, 16, 3, group=4)
    result = assert_exact_cut(net.model(net.conv(y, 16, 4)), seed=seed)
    assert result is not None
    removed = next(g.slots[0].removed for g in result.plan.groups if g.slots[0].size == 16)
    rows = [sorted(r % 4 for r in removed if r // 4 == g) for g in range(4)]
    assert {len(r) for r in rows} == {2}
    grouped = next(n for n in result.model.graph.node if any(a.name == "group" and a.i == 4 for a in n.attribute))
    assert grouped.op_type == "Conv"


def test_some_seed_takes_different_channels_from_different_groups() -> None:
    net = Net(17)
    x = produce(net, "nchw", channels=16)
    model = net.model(net.conv(net.conv(x, 16, 16, 3, group=4), 16, 4))
    seen = set()
    for seed in range(3):
        result = assert_exact_cut(model, seed=seed)
        assert result is not None
        for group in result.plan.groups:
            slot = next(s for s in group.slots if s.size == 16)
            seen.add(len({tuple(sorted(r % 4 for r in slot.removed if r // 4 == g)) for g in range(4)}) > 1)
    assert True in seen


@pytest.mark.parametrize(("ins", "outs", "group"), [(6, 8, 1), (8, 8, 2), (8, 12, 4), (6, 6, 6), (6, 12, 6)])
@given(layout=st.sampled_from(["ncl", "nchw"]), opset=opsets(), data=st.data())
@settings(max_examples=3)
def test_transposed_convolutions(ins: int, outs: int, group: int, layout: str, opset: int, data: st.DataObject) -> None:
    net = Net(opset)
    dims = len(layout) - 2
    x = net.op("Relu", produce(net, layout, channels=ins))
    operands = [x, net.weight(ins, outs // group, *[3] * dims)]
    if data.draw(st.booleans()):
        operands.append(net.weight(outs, scale=0.5))
    stride = data.draw(st.sampled_from([1, 2]))
    extra = {"output_padding": [1] * dims} if stride == 2 and data.draw(st.booleans()) else {}
    y = net.op("ConvTranspose", *operands, group=group, strides=[stride] * dims, pads=[1] * (2 * dims), **extra)
    check(net, net.op("Tanh", y))


def test_transposed_convolutions_in_a_row() -> None:
    """Two outputs per group, then one."""
    net = Net(13)
    x = produce(net, "nchw", channels=4)
    y = net.op("ConvTranspose", x, net.weight(4, 2, 3, 3), group=4)
    y = net.op("ConvTranspose", y, net.weight(8, 1, 3, 3), group=4)
    check(net, y)


@given(a=st.booleans(), b=st.booleans(), alpha=st.sampled_from([1.0, 0.5]), beta=st.sampled_from([1.0, 2.0]),
       bias=st.sampled_from([(), (6,), (1, 6), (1, 1), None]), opset=opsets(7))  # fmt: skip
@settings(max_examples=12)
def test_gemm(a: bool, b: bool, alpha: float, beta: float, bias: tuple[int, ...] | None, opset: int) -> None:
    """Every transposition and every shape of C, which may be left out since opset 11."""
    net = Net(opset)
    if bias is None and opset < 11:
        bias = (6,)
    x = produce(net, "nc", channels=8)
    left = net.transpose(x, 1, 0) if a else x
    shape = (6, 8) if b else (8, 6)
    operands = [left, net.weight(*shape, scale=8**-0.5), *([net.weight(*bias, scale=0.5)] if bias is not None else [])]
    y = net.op("Gemm", *operands, transA=int(a), transB=int(b), alpha=alpha, beta=beta)
    check(net, net.op("Relu", y))


def test_gemm_adds_another_branch() -> None:
    net = Net(17)
    x, c = produce(net, "nc"), produce(net, "nc", channels=5, name="c")
    y = net.op("Gemm", x, net.weight(6, 5), c)
    check(net, net.op("Relu", y))


@pytest.mark.parametrize("shape", [(6, 5), (2, 6, 5), (1, 6, 5), (1, 3, 6, 5)], ids=str)
@given(opset=opsets())
@settings(max_examples=2)
def test_matmul_with_batched_weights(shape: tuple[int, ...], opset: int) -> None:
    net = Net(opset)
    x = produce(net, "nhwc", extent=2)
    wide = net.transpose(x, 0, 2, 1, 3) if len(shape) > 2 else x
    if len(shape) == 3:
        wide = net.reshape(net.transpose(net.slice(x, 0, 2, 2), 0, 2, 1, 3), 0, 2, 2, 6)
    check(net, net.op("Tanh", net.op("MatMul", wide, net.weight(*shape, scale=0.4))))


def test_matmul_with_vectors() -> None:
    net = Net(17)
    x = produce(net, "nlc")
    check(net, net.op("MatMul", x, net.weight(6, scale=0.4)))


def test_matmul_of_two_activations() -> None:
    """X Y^T: the summed channels of both go together; batch axes line up."""
    net = Net(17)
    left, right = produce(net, "nlc", name="a"), produce(net, "nlc", name="b", extent=5)
    scores = net.op("MatMul", left, net.transpose(right, 0, 2, 1))
    check(net, scores)
    net = Net(17)
    left, right = produce(net, "ncl", name="a", extent=5), produce(net, "nlc", name="b", extent=5)
    check(net, net.op("MatMul", left, right))


def test_weight_on_the_left() -> None:
    """W X, as in mixing positions: the channels pass, the weight's own axis is another group."""
    net = Net(17)
    x = produce(net, "nlc")
    mixed = net.op("Relu", net.op("MatMul", net.weight(8, 4), x))
    back = net.op("MatMul", net.weight(5, 8), mixed)
    check(net, back)


EQUATIONS = {
    "nlc,cd->nld": [(6, 5)],
    "nlc,dc->nld": [(5, 6)],
    "nlc,lcd->nd": [(4, 6, 5)],
    "nlc,c->nlc": [(6,)],
    "nlc,chd->nlhd": [(6, 2, 3)],
    "...c,cd->...d": [(6, 5)],
    "nlc,cd": [(6, 5)],
    "nlc->ncl": [],
    "nlc->nc": [],
    "nlc,cd,de->nle": [(6, 5), (5, 3)],
    "nlc,l->nc": [(4,)],
    "b l c , c d -> b l d": [(6, 5)],
}


@pytest.mark.parametrize("equation", EQUATIONS)
@given(opset=opsets(12))
@settings(max_examples=2)
def test_einsum(equation: str, opset: int) -> None:
    net = Net(opset)
    x = produce(net, "nlc")
    y = net.op("Einsum", x, *(net.weight(*s, scale=0.4) for s in EQUATIONS[equation]), equation=equation)
    if equation == "nlc,cd":
        # Letters sort: c is summed, d l n remain in this order.
        y = net.transpose(y, 2, 1, 0)
    check(net, net.op("Tanh", y))


def test_einsum_of_two_branches() -> None:
    net = Net(13)
    left, right = produce(net, "nlc", name="a"), produce(net, "nlc", name="b", extent=5)
    check(net, net.op("Einsum", left, right, equation="nlc,nmc->nlm"))
    net = Net(13)
    left, right = produce(net, "nlc", name="a"), produce(net, "nlc", name="b", channels=5)
    check(net, net.op("Einsum", left, right, equation="nlc,nld->ncd"))


def test_einsum_with_a_diagonal_is_exact_or_refused() -> None:
    net = Net(13)
    square = net.reshape(produce(net, "nc", channels=9), 0, 3, 3)
    check(net, net.op("Einsum", square, equation="nii->ni"), cut=None)


def test_a_graph_input_read_by_a_weight_keeps_its_size() -> None:
    """Nothing but the hidden channels of two layers may go."""
    net = Net(17)
    x = net.input("x", ["N", 4])
    result = assert_exact_cut(net.model(net.linear(net.op("Relu", net.linear(x, 4, 10, gemm=True)), 10, 3, gemm=True)))
    assert result is not None
    shapes = sorted(tuple(t.dims) for t in result.model.graph.initializer)
    assert shapes == [(3,), (4, 5), (5,), (5, 3)]


@pytest.mark.parametrize("ratio", [0.0, 0.2, 0.5, 0.9, 0.99])
def test_ratio_is_the_share_that_goes(ratio: float) -> None:
    """Rounded to the nearest count, never the last one; what stays are the channels that score highest."""
    net = Net(17)
    x = net.input("x", ["N", 4])
    model = net.model(net.linear(net.linear(x, 4, 10, gemm=True), 10, 3, gemm=True))
    result = assert_exact_cut(model, ratio=ratio, criterion="l2", expect_cut=ratio > 0)
    assert result is not None
    gone = result.plan.groups[0].removed if result.plan.groups else []
    assert gone is not None
    assert len(gone) == min(round(10 * ratio), 9)
    from onnx import numpy_helper

    arrays = {t.name: numpy_helper.to_array(t).astype(np.float64) for t in model.graph.initializer}
    first, bias, second = (next(a for a in arrays.values() if a.shape == s) for s in ((4, 10), (10,), (10, 3)))
    del bias
    score = sum(np.linalg.norm(m, axis=0) / np.linalg.norm(m, axis=0).mean() for m in (first, second.T))
    assert set(gone) == set(np.argsort(score)[: len(gone)].tolist())
