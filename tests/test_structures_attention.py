"""Whole attention structures, in the spellings that exporters use; heads, the channels within, and what feeds them."""

from __future__ import annotations

import numpy as np
import pytest
from build import Net
from oracle import assert_exact_cut

import onnxprune as op

B, S, D, H = "N", 6, 12, 3
W = D // H
SEEDS = pytest.mark.parametrize("seed", [0, 1])


def embed(net: Net, sequence: int | str = S) -> str:
    """[N, S, D] with channels of its own, that a normalisation then keeps."""
    x = net.linear(net.input("x", [B, sequence, 5]), 5, D)
    return net.op("LayerNormalization", x, net.weight(D, low=0.5), net.weight(D))


def attend(net: Net, q: str, k: str, v: str, scale: float = W**-0.5) -> str:
    """Scaled dot-product attention over the last two axes."""
    scores = net.op("Mul", net.op("MatMul", q, net.op("Transpose", k, perm=_swap(net, k))), net.const(scale, net.dtype))
    return net.op("MatMul", net.op("Softmax", scores, axis=-1), v)


def _swap(net: Net, x: str) -> list[int]:
    producer = next(n for n in net.nodes if x in n.output)
    rank = next((len(a.ints) for a in producer.attribute if a.name == "perm"), net_rank.get(x, 4))
    order = list(range(rank))
    order[-1], order[-2] = order[-2], order[-1]
    return order


net_rank: dict[str, int] = {}


def heads(net: Net, x: str, count: int = H, width: int = W) -> str:
    """[N, S, H W] -> [N, H, S, W]."""
    return net.transpose(net.reshape(x, 0, 0, count, width), 0, 2, 1, 3)


def merge(net: Net, y: str) -> str:
    """[N, H, S, W] -> [N, S, H W]."""
    return net.reshape(net.transpose(y, 0, 2, 1, 3), 0, 0, -1)


def shrunk(result: object, *names: str) -> list[tuple[int, ...]]:
    """Shapes of named weights in the cut model."""
    dims = {t.name: tuple(t.dims) for t in result.model.graph.initializer}  # type: ignore[attr-defined]
    return [dims[n] for n in names]


@SEEDS
def test_multi_head_attention(seed: int) -> None:
    """Queries with keys and values shrink by their own; every head may lose different channels."""
    net = Net(17, seed=seed)
    x = embed(net)
    q, k, v = (heads(net, net.linear(x, D, D)) for _ in range(3))
    assert_exact_cut(net.model(net.linear(merge(net, attend(net, q, k, v)), D, 5)), seed=seed)


@SEEDS
def test_attention_with_a_reshape_that_names_every_size(seed: int) -> None:
    """Merged heads by [0, S, D] instead of -1."""
    net = Net(17, seed=seed)
    x = embed(net)
    q, k, v = (heads(net, net.linear(x, D, D)) for _ in range(3))
    y = net.reshape(net.transpose(attend(net, q, k, v), 0, 2, 1, 3), -1, S, D)
    assert_exact_cut(net.model(net.linear(y, D, 5)), seed=seed)


@SEEDS
def test_attention_with_batch_and_heads_in_one(seed: int) -> None:
    """[S, N H, W]: the spelling of torch's own multi_head_attention, sequence first."""
    net = Net(17, seed=seed)
    x = net.transpose(embed(net), 1, 0, 2)
    q, k, v = (net.transpose(net.reshape(net.linear(x, D, D), S, -1, W), 1, 0, 2) for _ in range(3))
    scores = net.op("MatMul", net.op("Mul", q, net.const(W**-0.5, net.dtype)), net.transpose(k, 0, 2, 1))
    y = net.op("MatMul", net.op("Softmax", scores, axis=-1), v)
    y = net.reshape(net.transpose(y, 1, 0, 2), S, -1, D)
    assert_exact_cut(net.model(net.transpose(net.linear(y, D, 5), 1, 0, 2)), seed=seed)


def packed(net: Net, x: str, how: str) -> list[str]:
    """Queries, keys and values from one matrix, as three [N, H, S, W]."""
    y = net.linear(x, D, 3 * D)
    if how == "split-flat":
        return [heads(net, part) for part in net.split(y, [D, D, D], 2)]
    if how == "slice-flat":
        return [heads(net, net.slice(y, i * D, (i + 1) * D, 2)) for i in range(3)]
    if how == "per-head":
        grid = heads(net, y, H, 3 * W)
        return list(net.split(grid, [W, W, W], 3))
    grid = net.transpose(net.reshape(y, 0, S, 3, H, W), 2, 0, 3, 1, 4)
    if how == "gather":
        return [net.gather(grid, i, 0) for i in range(3)]
    if how == "split":
        return [net.squeeze(part, [0]) for part in net.split(grid, [1, 1, 1], 0)]
    return [net.squeeze(net.slice(grid, i, i + 1, 0), [0]) for i in range(3)]


@SEEDS
@pytest.mark.parametrize("how", ["gather", "split", "slice", "split-flat", "slice-flat", "per-head"])
def test_packed_queries_keys_and_values(how: str, seed: int) -> None:
    net = Net(17, seed=seed)
    q, k, v = packed(net, embed(net), how)
    for part in (q, k, v):
        net_rank[part] = 4
    y = net.linear(merge(net, attend(net, q, k, v)), D, 5)
    assert_exact_cut(net.model(y), seed=seed)


@SEEDS
@pytest.mark.parametrize("shared", [1, 3], ids=["multi-query", "grouped-query"])
def test_few_keys_for_many_queries(shared: int, seed: int) -> None:
    """Key and value heads repeated by Unsqueeze, Expand, Reshape."""
    net = Net(17, seed=seed)
    x, count = embed(net), 6
    q = heads(net, net.linear(x, D, 24), count, 4)
    pair = []
    for _ in range(2):
        few = net.unsqueeze(heads(net, net.linear(x, D, shared * 4), shared, 4), [2])
        many = net.op("Expand", few, net.const([1, 1, count // shared, 1, 1]))
        pair.append(net.reshape(many, 0, count, S, 4))
        net_rank[pair[-1]] = 4
    y = merge(net, attend(net, q, *pair))
    assert_exact_cut(net.model(net.linear(y, 24, 5)), seed=seed)


@SEEDS
def test_rotary_positions(seed: int) -> None:
    """x cos + rotate_half(x) sin: the two halves of a head go together."""
    net = Net(17, seed=seed)
    x, width = embed(net), 8
    angles = net.rng.standard_normal((1, 1, S, width // 2))
    cos, sin = (net.const(np.concatenate([f(angles)] * 2, -1), net.dtype) for f in (np.cos, np.sin))

    def rotate(y: str) -> str:
        left, right = net.slice(y, 0, width // 2, 3), net.slice(y, width // 2, 2**62, 3)
        turned = net.op("Concat", net.op("Neg", right), left, axis=-1)
        result = net.op("Add", net.op("Mul", y, cos), net.op("Mul", turned, sin))
        net_rank[result] = 4
        return result

    q, k, v = (heads(net, net.linear(x, D, H * width), H, width) for _ in range(3))
    y = merge(net, attend(net, rotate(q), rotate(k), v))
    assert_exact_cut(net.model(net.linear(y, H * width, 5)), seed=seed)


@SEEDS
def test_bias_from_a_table_of_relative_positions(seed: int) -> None:
    """A table [positions, heads] looked up by index, transposed in front of the scores."""
    net = Net(17, seed=seed)
    x = embed(net)
    q, k, v = (heads(net, net.linear(x, D, D)) for _ in range(3))
    index = (np.arange(S)[:, None] - np.arange(S)[None, :] + S - 1).ravel()
    looked = net.gather(net.weight(2 * S - 1, H, scale=1.0), index, 0)
    bias = net.unsqueeze(net.transpose(net.reshape(looked, S, S, H), 2, 0, 1), [0])
    scores = net.op("Add", net.op("MatMul", q, net.transpose(k, 0, 1, 3, 2)), bias)
    y = net.op("MatMul", net.op("Softmax", scores, axis=-1), v)
    assert_exact_cut(net.model(net.linear(merge(net, y), D, 5)), seed=seed)


@SEEDS
def test_attention_in_windows(seed: int) -> None:
    """[N, H, W, C] cut into windows that join the batch, attended to, and put together again."""
    net = Net(17, seed=seed)
    x = net.linear(net.input("x", [B, 4, 4, 5]), 5, D)
    windows = net.transpose(net.reshape(x, -1, 2, 2, 2, 2, D), 0, 1, 3, 2, 4, 5)
    flat = net.reshape(windows, -1, 4, D)
    qkv = net.transpose(net.reshape(net.linear(flat, D, 3 * D), -1, 4, 3, H, W), 2, 0, 3, 1, 4)
    q, k, v = (net.gather(qkv, i, 0) for i in range(3))
    for part in (q, k, v):
        net_rank[part] = 4
    y = net.linear(net.reshape(net.transpose(attend(net, q, k, v), 0, 2, 1, 3), -1, 4, D), D, D)
    back = net.transpose(net.reshape(y, -1, 2, 2, 2, 2, D), 0, 1, 3, 2, 4, 5)
    back = net.op("Add", x, net.reshape(back, -1, 4, 4, D))
    assert_exact_cut(net.model(net.linear(back, D, 4)), seed=seed)


@pytest.mark.parametrize("gelu", ["Erf", "Tanh"])
def test_transformer_block(gelu: str) -> None:
    """Pre-norm attention and feed-forward with a spelled-out GELU: the trunk stays, all inside is cut."""
    net = Net(17)
    x = net.linear(net.input("x", [B, S, 5]), 5, D)

    def norm(y: str) -> str:
        return net.op("LayerNormalization", y, net.weight(D, low=0.5), net.weight(D))

    normed = norm(x)
    q, k, v = (heads(net, net.linear(normed, D, D)) for _ in range(3))
    x = net.op("Add", x, net.linear(merge(net, attend(net, q, k, v)), D, D))
    h = net.linear(norm(x), D, 24)
    if gelu == "Erf":
        inner = net.op("Add", net.op("Erf", net.op("Div", h, net.const(2**0.5, net.dtype))), net.const(1.0, net.dtype))
    else:
        cubed = net.op("Mul", net.op("Pow", h, net.const(3.0, net.dtype)), net.const(0.0447, net.dtype))
        inner = net.op("Add", net.op("Tanh", net.op("Add", h, cubed)), net.const(1.0, net.dtype))
    h = net.op("Mul", net.op("Mul", h, inner), net.const(0.5, net.dtype))
    x = net.op("Add", x, net.linear(h, 24, D))
    result = assert_exact_cut(net.model(net.linear(norm(x), D, 5)))
    assert result is not None
    assert (24, D) not in [tuple(t.dims) for t in result.model.graph.initializer]


@SEEDS
@pytest.mark.parametrize("how", ["split", "slice", "chunk-interleaved"])
def test_gated_feed_forward_with_packed_weights(how: str, seed: int) -> None:
    """SwiGLU: gate and up projection in one matrix, their channels go in pairs."""
    net = Net(18, seed=seed)
    y = net.linear(embed(net), D, 32, bias=False)
    if how == "split":
        gate, up = net.split(y, [16, 16], 2)
    elif how == "slice":
        gate, up = net.slice(y, 0, 16, 2), net.slice(y, 16, 2**62, -1)
    else:
        pairs = net.reshape(y, 0, 0, 16, 2)
        gate, up = net.gather(pairs, 0, 3), net.gather(pairs, 1, 3)
    y = net.op("Mul", net.op("Mul", gate, net.op("Sigmoid", gate)), up)
    result = assert_exact_cut(net.model(net.linear(y, 16, D, bias=False)), seed=seed)
    assert result is not None
    assert any(len(t.dims) == 2 and t.dims[1] == 16 for t in result.model.graph.initializer)


def test_cross_attention() -> None:
    """Queries from one sequence, keys and values from another."""
    net = Net(17)
    x = embed(net)
    memory = net.linear(net.input("memory", [B, 5, 4]), 4, D)
    q = heads(net, net.linear(x, D, D))
    k, v = (heads(net, net.linear(memory, D, D)) for _ in range(2))
    assert_exact_cut(net.model(net.linear(merge(net, attend(net, q, k, v)), D, 5)))


def test_keys_transposed_at_once() -> None:
    """[N, S, H, W] -> [N, H, W, S] in one Transpose, and a mask added to the scores."""
    net = Net(17)
    x = embed(net)
    q, v = (heads(net, net.linear(x, D, D)) for _ in range(2))
    k = net.transpose(net.reshape(net.linear(x, D, D), 0, 0, H, W), 0, 2, 3, 1)
    mask = net.const(np.triu(np.full((S, S), -1e4), 1)[None, None], net.dtype)
    scores = net.op("Add", net.op("Div", net.op("MatMul", q, k), net.const(W**0.5, net.dtype)), mask)
    y = net.op("MatMul", net.op("Softmax", scores, axis=-1), v)
    assert_exact_cut(net.model(net.linear(merge(net, y), D, 5)))


def test_attention_by_einsum() -> None:
    net = Net(17)
    x = embed(net)
    q, k, v = (net.op("Einsum", x, net.weight(D, H, W, scale=0.3), equation="bsd,dhw->bshw") for _ in range(3))
    scores = net.op("Softmax", net.op("Einsum", q, k, equation="bqhw,bkhw->bhqk"), axis=-1)
    y = net.op("Einsum", scores, v, equation="bhqk,bkhw->bqhw")
    out = net.op("Einsum", y, net.weight(H, W, 5, scale=0.3), equation="bqhw,hwd->bqd")
    assert_exact_cut(net.model(out))


def test_scores_of_stored_queries_and_keys_are_data() -> None:
    """The scale of an attention is computed from sizes, the scores are small enough to be known: they are no size."""
    net = Net(17)
    q, k = net.weight(3, 4, 8, name="q"), net.weight(3, 6, 8, name="k")
    size = net.op("Cast", net.op("Gather", net.op("Shape", q), net.const([2])), to=1)
    scores = net.op("MatMul", net.op("Div", q, net.op("Sqrt", size)), net.transpose(k, 0, 2, 1))
    y = net.op("Add", net.op("Identity", scores), net.input("x", [3, 4, 6]))
    result = op.prune(net.model(net.linear(y, 6, 2)), criterion="random", ratio=0.5, latency=False)
    assert result.report.exactness.passed
    assert {t.name: t.dims[-1] for t in result.model.graph.initializer if t.name in "qk"} == {"q": 4, "k": 4}
