"""Weights of a few bits: whole blocks go along the packed axis, with their scales, zero points and order."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from build import Net
from onnx import helper, numpy_helper
from quantised import CHECKED, MS, prune, scale, shapes

import onnxprune as op
from onnxprune.operators.codes import pack, unpack


def packed_product(
    net: Net, x: str, ins: int, outs: int, *, bits: int = 4, block: int = 16, zeros: str = "", flat: bool = False,
    order: bool = False, bias: bool = False,
) -> str:  # fmt: skip
    """A MatMulNBits of random codes. ``zeros``: "" for none, "packed", or "numbers"."""
    blocks = -(-ins // block)
    width = -(-blocks * bits // 8)
    operands = [
        net.const(net.rng.integers(0, 255, (outs, blocks, block * bits // 8)), np.uint8),
        scale(net, *((outs * blocks,) if flat else (outs, blocks))),
    ]
    if zeros == "packed":
        operands.append(net.const(net.rng.integers(0, 255, (outs * width,) if flat else (outs, width)), np.uint8))
    elif zeros:
        operands.append(net.const(net.rng.uniform(0, 8, (outs * blocks,) if flat else (outs, blocks)), np.float32))
    else:
        operands.append("")
    operands.append(net.const(np.arange(ins) // block, np.int32) if order else "")
    operands.append(net.weight(outs) if bias else "")
    return net.op("MatMulNBits", x, *operands, domain=MS, K=ins, N=outs, bits=bits, block_size=block)


def numbers(model: onnx.ModelProto, node: onnx.NodeProto) -> np.ndarray:
    """[K, N] that the codes stand for, by onnxruntime's documentation."""
    known = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    attrs = {a.name: a.i for a in node.attribute}
    bits, block, n, k = (attrs[name] for name in ("bits", "block_size", "N", "K"))
    codes = known[node.input[1]]
    each = 8 // bits
    values = np.zeros((n, codes.shape[1] * block), np.float32)
    for byte in range(codes.shape[1] * codes.shape[2]):
        for part in range(each):
            values[:, byte * each + part] = (codes.reshape(n, -1)[:, byte] >> (part * bits)) & ((1 << bits) - 1)
    zeros = np.full((n, codes.shape[1]), 1 << (bits - 1), np.float32)
    given = known[node.input[3]] if len(node.input) > 3 and node.input[3] else None
    if given is not None:
        rows = given.reshape(n, -1)
        for b in range(codes.shape[1]):
            if given.dtype == np.uint8:
                zeros[:, b] = (rows[:, b // each] >> (b % each * bits)) & ((1 << bits) - 1)
            else:
                zeros[:, b] = rows[:, b]
    scales = known[node.input[2]].reshape(n, -1)
    of_block = np.arange(values.shape[1]) // block
    return ((values - zeros[:, of_block]) * scales[:, of_block])[:, :k].T


CASES: list[dict[str, Any]] = [
    {"ins": 96, "bits": 4, "block": 32, "zeros": "packed"},
    {"ins": 96, "bits": 4, "block": 32, "zeros": "packed", "flat": True, "bias": True},
    {"ins": 96, "bits": 4, "block": 32, "zeros": "numbers", "order": True},
    {"ins": 80, "bits": 2, "block": 16, "zeros": "packed"},
    {"ins": 96, "bits": 8, "block": 32, "flat": True},
    {"ins": 90, "bits": 4, "block": 16, "zeros": "packed", "flat": True},
]


@pytest.mark.newest_runtime
@pytest.mark.parametrize("case", CASES, ids=lambda c: " ".join(map(str, c.values())))
def test_whole_blocks_go(case: dict[str, Any]) -> None:
    """Of what the codes stand for exactly the rows of the removed blocks and columns are missing."""
    net, ins = Net(17), case["ins"]
    hidden = net.linear(net.input("x", ["N", 5]), 5, ins)
    y = packed_product(net, net.op("Relu", hidden), outs=8, **case)
    model = net_model(net, net.linear(net.op("Relu", y), 8, 4))
    result = op.Pipeline([op.passes.Prune("l2", 0.5), CHECKED]).run(model)
    assert result.report.exactness.passed
    before, after = (next(n for n in m.graph.node if n.op_type == "MatMulNBits") for m in (model, result.model))
    whole, rest = numbers(model, before), numbers(result.model, after)
    removed = {s.tensor: s.removed for g in result.plan.groups for s in g.slots}
    rows = np.setdiff1d(np.arange(ins), removed.get(before.input[0], []))
    columns = np.setdiff1d(np.arange(8), removed.get(before.output[0], []))
    assert rows.size < ins and columns.size == 4
    np.testing.assert_array_equal(rest, whole[np.ix_(rows, columns)])


def net_model(net: Net, y: str) -> onnx.ModelProto:
    return net.model(y, check=False, shapes={y: ["N", 4]})


def test_scales_in_another_order_keep_the_blocks() -> None:
    """Where ``g_idx`` is no run of blocks, a block's scale belongs to other positions too."""
    net = Net(17)
    hidden = net.linear(net.input("x", ["N", 5]), 5, 64)
    y = packed_product(net, net.op("Relu", hidden), 64, 8, order=True)
    shuffled = np.random.default_rng(0).permutation(np.arange(64) // 16).astype(np.int32)
    next(t for t in net.initializers if t.data_type == onnx.TensorProto.INT32).CopyFrom(
        numpy_helper.from_array(shuffled, next(t for t in net.initializers if t.data_type == 6).name)
    )
    model = prune(net, net.linear(net.op("Relu", y), 8, 4))
    assert shapes(model, "MatMulNBits")[1] == (4, 4, 8)
    reasons = op.analyze(net_model(net, net.linear(y, 8, 4))).barriers
    assert any("another order" in barrier.detail for barrier in reasons)


@pytest.mark.parametrize(("heads", "size", "block", "left"), [(4, 64, 32, 128), (8, 16, 32, 64), (4, 48, 32, 192)])
def test_value_heads_of_packed_products(heads: int, size: int, block: int, left: int) -> None:
    """Whole heads go with whole blocks; where a block spans parts of two heads all stay."""
    net, width = Net(17), heads * size

    def laid_out(y: str) -> str:
        return net.op("Transpose", net.op("Reshape", y, net.const([0, 0, heads, size])), perm=[0, 2, 1, 3])

    x = net.input("x", ["N", 6, 16])
    q, k, v = (laid_out(packed_product(net, x, 16, width)) for _ in range(3))
    scores = net.op("MatMul", q, net.op("Transpose", k, perm=[0, 1, 3, 2]))
    attended = net.op("Transpose", net.op("MatMul", net.op("Softmax", scores, axis=-1), v), perm=[0, 2, 1, 3])
    joined = net.op("Reshape", attended, net.const([0, 0, width]))
    y = packed_product(net, joined, width, 16, block=block, zeros="packed")
    model = prune(net, net.linear(y, 16, 4), sizes=["N", 6, 4], criterion="l2")
    last = [n for n in model.graph.node if n.op_type == "MatMulNBits"][-1]
    assert helper.get_node_attr_value(last, "K") == left


@pytest.mark.newest_runtime
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("criterion", ["l2", "gm"])
def test_columns_of_packed_tables_go_by_blocks(zeros: bool, criterion: str) -> None:
    """GatherBlockQuantized: bytes, scales and packed zero points of whole blocks, by what the codes stand for."""
    net = Net(17)
    table = [net.const(net.rng.integers(0, 255, (10, 24)), np.uint8), net.input("i", ["N", 3], np.int64)]
    table += [scale(net, 10, 3), *([net.const(net.rng.integers(0, 255, (10, 2)), np.uint8)] if zeros else [])]
    y = net.op("GatherBlockQuantized", *table, domain=MS, block_size=16, bits=4, gather_axis=0, quantize_axis=1)
    model = prune(net, net.linear(y, 48, 4), sizes=["N", 3, 4], criterion=criterion, ratio=0.4)
    found = shapes(model, "GatherBlockQuantized")
    assert (found[0], found[2]) == ((10, 16), (10, 2)) and (not zeros or found[3] == (10, 1))
    assert shapes(model, "MatMul")[1] == (32, 4)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_packing_is_undone_by_unpacking(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (3, 11)).astype(np.uint8)
    np.testing.assert_array_equal(unpack(pack(codes, bits), bits, 11), codes)
