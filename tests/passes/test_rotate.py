"""Rotations of residual streams: what is turned computes the same, and the rest says why it is not."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from build import Net, newest
from onnx.reference import ReferenceEvaluator
from oracle import run

import onnxprune as op
from onnxprune.channels.analysis import Analysis
from onnxprune.pruning.rotation import find_streams
from onnxprune.runtime.masks import counted_rows

WIDTH, RANK = 12, 4
Norm = Callable[[Net, str], str]


def scale(net: Net, low: float = 0.5) -> str:
    return net.weight(WIDTH, low=low)


def root(net: Net, x: str) -> str:
    mean = net.reduce("ReduceMean", net.op("Pow", x, net.const(2.0, net.dtype)), [-1])
    return net.op("Sqrt", net.op("Add", mean, net.const(1e-3, net.dtype)))


def spelled_root_mean_square(net: Net, x: str) -> str:
    return net.op("Mul", net.op("Add", scale(net), net.const(1.0, net.dtype)), net.op("Div", x, root(net, x)))


def spelled_layer_norm(net: Net, x: str) -> str:
    centred = net.op("Sub", x, net.reduce("ReduceMean", x, [-1]))
    return net.op("Add", net.op("Mul", net.op("Div", centred, root(net, centred)), scale(net)), scale(net))


def batch_norm(net: Net, x: str) -> str:
    return net.transpose(net.norm(net.transpose(x, 0, 2, 1), WIDTH), 0, 2, 1)


NORMS: dict[str, tuple[int, Norm]] = {
    "LayerNormalization": (17, lambda n, x: n.op("LayerNormalization", x, scale(n), scale(n), epsilon=1e-3)),
    "LayerNormalization, newest": (newest(), lambda n, x: n.op("LayerNormalization", x, scale(n), epsilon=1e-3)),
    "spelled root mean square": (13, spelled_root_mean_square),
    "spelled LayerNorm": (11, spelled_layer_norm),
    "norm": (17, lambda n, x: n.op("Mul", n.op("LpNormalization", x, axis=-1, p=2), scale(n))),
    "BatchNormalization": (17, batch_norm),
}


def stream(net: Net, norm: Norm, rank: int = WIDTH, x: str = "", **options: Any) -> str:
    """A stream [N, 5, WIDTH] with two blocks, whose writers have columns in a space of ``rank`` dimensions."""
    basis = np.linalg.qr(net.rng.standard_normal((WIDTH, WIDTH)))[0][:rank]
    basis = basis - basis.mean(axis=1, keepdims=True)

    def written(y: str, ins: int, bias: bool = True) -> str:
        y = net.op("MatMul", y, net.const(net.rng.standard_normal((ins, rank)) @ basis * ins**-0.5, net.dtype))
        return net.op("Add", y, net.const(net.rng.standard_normal(rank) @ basis * 0.3, net.dtype)) if bias else y

    x = written(x or net.input("x", ["N", 5, 7]), 7)
    for _ in range(2):
        inner = net.op("Tanh", net.linear(norm(net, x), WIDTH, 9, bias=options.get("bias", True)))
        x = net.op("Add", x, written(inner, 9))
    return net.op("MatMul", norm(net, x), net.weight(WIDTH, 6))


def data_for(model: onnx.ModelProto, samples: int = 48) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((samples, 5, 7)).astype(np.float32)


def close(one: np.ndarray, other: np.ndarray, allowed: float = 1e-4) -> None:
    assert float(np.abs(one - other).max()) <= allowed * float(np.abs(one).max())


@pytest.mark.parametrize("kind", NORMS)
def test_a_turned_stream_computes_the_same_and_is_cut_exactly(kind: str) -> None:
    opset, norm = NORMS[kind]
    net = Net(opset)
    model = net.model(stream(net, norm, bias=kind != "LayerNormalization"))
    x = data_for(model)
    whole = op.prune(model, ratio=0, rotate="yes", data=x, latency=False, recover="none")
    feed = {"x": x[:3]}
    (expected,), (turned,) = run(model, feed).values(), run(whole.model, feed).values()
    close(expected, turned)
    assert float(np.abs(turned - expected).max()) > 0, "nothing was turned"
    close(expected, ReferenceEvaluator(whole.model).run(None, feed)[0])
    (facts,) = whole.report.rotations
    assert (facts.channels_before, facts.channels_after, facts.energy) == (WIDTH, WIDTH, pytest.approx(1.0))
    half = op.prune(
        model, ratio=0.5, criterion="l2", scope="local", rotate="yes", data=x, recover="none", latency=False
    )
    assert half.report.exactness is not None and half.report.exactness.passed
    assert half.report.rotations[0].channels_after == WIDTH // 2
    assert 0.2 < half.report.rotations[0].energy < 1


@pytest.mark.parametrize("kind", ["SkipLayerNormalization", "SkipSimplifiedLayerNormalization"])
def test_sums_inside_normalizations_are_turned(kind: str) -> None:
    """Of a sum in a normalisation, the addends and the bias are turned; a LayerNormalization is none of means then."""
    net = Net(17)
    x = net.linear(net.input("x", ["N", 5, 7]), 7, WIDTH)
    skip = (
        net.linear(net.op("Tanh", net.linear(x, WIDTH, 9)), 9, WIDTH)
        if "Simplified" in kind
        else net.linear(x, WIDTH, WIDTH)
    )
    if "Simplified" not in kind:
        skip = net.linear(net.input("z", ["N", 5, 7]), 7, WIDTH)
        x = net.linear(net.input("w", ["N", 5, 7]), 7, WIDTH)
    parameters = [scale(net), *([scale(net)] if "Simplified" not in kind else []), scale(net)]
    y, _, _, total = net.op(kind, x, skip, *parameters, n=4, domain="com.microsoft", epsilon=1e-3)
    net.hint(y, ["N", 5, WIDTH]), net.hint(total, ["N", 5, WIDTH])
    y = net.op("Add", total, net.linear(net.op("Tanh", net.linear(y, WIDTH, 9)), 9, WIDTH))
    last = net.op("LayerNormalization", y, scale(net)) if "Simplified" not in kind else net.op("Div", y, root(net, y))
    model = net.model(net.linear(last, WIDTH, 4))
    data = {i.name: data_for(model, 24) for i in model.graph.input}
    result = op.prune(model, ratio=0.4, rotate="yes", data=data, recover="none", latency=False)
    assert result.report.exactness is not None and result.report.exactness.passed
    assert result.report.rotations[0].channels_after < WIDTH
    whole = op.prune(model, ratio=0, rotate="yes", data=data, recover="none", latency=False)
    feed = {name: values[:2] for name, values in data.items()}
    close(*run(model, feed).values(), *run(whole.model, feed).values())


@pytest.mark.parametrize("kind", ["LayerNormalization", "spelled root mean square"])
def test_a_stream_of_few_directions_is_cut_to_them_without_loss(kind: str) -> None:
    """By default, where there are data; without rotation every channel carries as much as the others."""
    opset, norm = NORMS[kind]
    net = Net(opset)
    model = net.model(stream(net, norm, RANK))
    options: dict[str, Any] = {"ratio": 0.66, "layers": {}, "scope": "local", "data": data_for(model), "latency": False}
    rest = [w.name for w in model.graph.initializer if w.dims == [WIDTH, 9]]
    options["exclude"] = rest
    plain, turned = op.prune(model, rotate="no", **options), op.prune(model, **options)
    assert [f.channels_after for f in turned.report.rotations] == [RANK]
    assert turned.report.rotations[0].energy > 1 - 1e-6
    assert turned.report.totals.macs_after == plain.report.totals.macs_after
    assert turned.report.fidelity.worst_cosine > 1 - 1e-6 > plain.report.fidelity.worst_cosine


def test_a_plan_repeats_its_rotations(tmp_path: Path) -> None:
    opset, norm = NORMS["LayerNormalization"]
    net = Net(opset)
    model = net.model(stream(net, norm))
    result = op.prune(model, ratio=0.4, rotate="yes", data=data_for(model), recover="none", latency=False)
    result.plan.save(tmp_path / "plan.json")
    again = op.prune(model, plan=tmp_path / "plan.json", latency=False)
    feed = {"x": data_for(model, 2)}
    close(*run(result.model, feed).values(), *run(again.model, feed).values(), 1e-6)
    assert [vars_of(f) for f in again.report.rotations] == [vars_of(f) for f in result.report.rotations]
    mended = op.recover(model, result.model, plan=tmp_path / "plan.json", data=data_for(model))
    assert mended.report.recovery.after is not None

    plan = op.Plan.load(tmp_path / "plan.json")
    plan.rotations[0].matrix = plan.rotations[0].matrix[:-8]
    with pytest.raises(op.errors.UsageError, match="damaged"):
        op.prune(model, plan=plan)
    plan = op.Plan.load(tmp_path / "plan.json")
    model.graph.initializer[0].raw_data = (
        model.graph.initializer[1].raw_data[:4] + model.graph.initializer[0].raw_data[4:]
    )
    with pytest.raises(op.errors.UsageError, match="another model"):
        op.prune(model, plan=plan)
    plan.model_sha256, plan.rotations[0].tensor = "", "elsewhere"
    with pytest.raises(op.errors.UsageError, match="'elsewhere' with 12 channels"):
        op.prune(model, plan=plan)


def vars_of(facts: Any) -> tuple[Any, ...]:
    return (facts.name, facts.channels_before, facts.channels_after, facts.energy)


# -- what cannot be turned ---------------------------------------------------------------------------------------------


def post_norm(net: Net) -> str:
    x = net.linear(net.input("x", ["N", 5, 7]), 7, WIDTH)
    x = net.op("LayerNormalization", net.op("Add", x, net.linear(x, WIDTH, WIDTH)), scale(net), scale(net))
    x = net.op("LayerNormalization", net.op("Add", x, net.linear(x, WIDTH, WIDTH)), scale(net), scale(net))
    return net.linear(x, WIDTH, 4)


def activated(net: Net) -> str:
    x = net.op("Relu", net.linear(net.input("x", ["N", 5, 7]), 7, WIDTH))
    return net.linear(net.op("LayerNormalization", x, scale(net)), WIDTH, 4)


def read_uncentred(net: Net) -> str:
    x = net.linear(net.input("x", ["N", 5, 7]), 7, WIDTH)
    y = net.linear(net.op("LayerNormalization", x, scale(net)), WIDTH, 4)
    return net.op("Add", y, net.linear(x, WIDTH, 4))


def tied(net: Net) -> str:
    table = net.weight(20, WIDTH)
    x = net.op("Gather", table, net.input("x", ["N", 5], np.int64))
    y = net.op("Mul", net.op("Div", x, root(net, x)), scale(net))
    return net.op("MatMul", y, net.transpose(table, 1, 0))


def raised(net: Net) -> str:
    x = net.op("Add", net.linear(net.input("x", ["N", 5, 7]), 7, WIDTH), net.const(1.0, net.dtype))
    return net.linear(net.op("LayerNormalization", x, scale(net)), WIDTH, 4)


REFUSED = {
    post_norm: "adds to what .* scales channel by channel",
    activated: "Relu .* works on its channels one by one",
    read_uncentred: "reads it without its mean over channels being subtracted",
    tied: "shared with a reader that has no scale in front of it",
    raised: "adds the same number to all channels",
}


@pytest.mark.parametrize("build", REFUSED)
def test_a_stream_that_cannot_be_turned_has_a_reason(build: Callable[[Net], str]) -> None:
    net = Net(17)
    model = net.model(build(net))
    data = np.zeros((8, 5), np.int64) if build is tied else data_for(model, 8)
    with pytest.raises(op.errors.ModelError, match="no stream that can be rotated") as caught:
        op.prune(model, rotate="yes", data=data, latency=False)
    assert caught.value.exit_code == 3
    assert re.search(REFUSED[build], str(caught.value.hint))
    assert op.prune(model, data=data, latency=False).report.rotations == []


def test_a_tied_table_without_a_scale_stays_tied() -> None:
    net = Net(17)
    table = net.weight(20, WIDTH)
    x = net.op("Gather", table, net.input("x", ["N", 5], np.int64))
    x = net.op("Add", x, net.linear(net.op("Div", x, root(net, x)), WIDTH, WIDTH))
    model = net.model(net.op("MatMul", net.op("Div", x, root(net, x)), net.transpose(table, 1, 0)))
    data = np.random.default_rng(0).integers(0, 20, (16, 5))
    result = op.prune(model, ratio=0, rotate="yes", data=data, latency=False)
    assert result.report.totals.params_after == result.report.totals.params_before
    close(*run(model, {"x": data[:2]}).values(), *run(result.model, {"x": data[:2]}).values())


def test_rotation_without_data_or_stream() -> None:
    net = Net(17)
    model = net.model(net.linear(net.op("Relu", net.linear(net.input("x", ["N", 5, 7]), 7, 8)), 8, 4))
    with pytest.raises(op.errors.UsageError, match="directions of data, and there is none"):
        op.prune(model, rotate="yes")
    with pytest.raises(op.errors.UsageError, match="rotate"):
        op.prune(model, rotate="maybe")
    with pytest.raises(op.errors.ModelError, match="no stream that can be rotated") as caught:
        op.prune(model, rotate="yes", data=data_for(model, 8))
    assert "A stream is a group of channels" in str(caught.value.hint)


# -- padding -----------------------------------------------------------------------------------------------------------


def test_rows_that_a_mask_leaves_out_do_not_count() -> None:
    feed = {"attention_mask": np.array([[1, 1, 0], [1, 0, 0], [0, 0, 0]]), "token_types": np.zeros((3, 3), np.int64)}
    expected = [True, True, False, True, False, False, True, True, True]
    assert counted_rows(feed, (3, 3)).tolist() == expected
    assert counted_rows(feed, (9,)).tolist() == expected
    assert counted_rows(feed, (3, 3, 2)).tolist() == np.repeat(expected, 2).tolist()
    assert counted_rows(feed, (3, 4)) is None
    assert counted_rows({"mask": np.array([[0.5, 1.0]])}, (1, 2)) is None
    assert counted_rows({"x": np.ones((3, 3))}, (3, 3)) is None


def test_padding_neither_turns_a_stream_nor_recovers_a_layer() -> None:
    """Whatever stands where the mask is 0, directions and recovered weights are those of the rest."""
    net = Net(17)
    x, mask = net.input("x", ["N", 5, 7]), net.input("attention_mask", ["N", 5], np.int64)
    y = stream(net, NORMS["spelled root mean square"][1], x=x)
    y = net.op("Mul", y, net.unsqueeze(net.op("Cast", mask, to=1), [2]))
    model = net.model(y)
    value, ones = data_for(model, 16), np.ones((16, 5), np.int64)
    ones[:, 3:] = 0
    energies: list[Any] = []
    weights = []
    for padding in (0.0, 50.0):
        filled = np.where(ones[..., None] > 0, value, padding).astype(np.float32)
        data = {"x": filled, "attention_mask": ones}
        result = op.prune(model, ratio=0, rotate="yes", data=data, latency=False)
        energies.append(result.plan.rotations[0].energy)
        pruned = op.prune(model, ratio=0.3, criterion="l2", rotate="no", finetune=False, data=data, latency=False)
        assert any(repair.done for repair in pruned.report.repairs)
        weights.append([w.raw_data for w in pruned.model.graph.initializer])
    assert energies[0] == energies[1]
    assert weights[0] == weights[1]


def test_streams_are_found_without_data() -> None:
    net = Net(17)
    streams, reasons = find_streams(Analysis(net.model(stream(net, NORMS["LayerNormalization"][1]))))
    assert [(s.size, s.is_centred, len(s.sites)) for s in streams] == [(WIDTH, True, 3)]
    assert reasons == {}
