"""Models as onnxruntime's optimisers leave them: cut as far as the originals, as exactly."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from build import Net

import onnxprune as op

MODELS = Path(__file__).parent.parent / "models"
HEADS, SIZE, WIDE = 4, 8, 32


def optimised(source: Path, folder: Path) -> Path:
    """What onnxruntime's offline optimisation writes, fusions included, layouts of one machine left out."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    return folder / "optimised.onnx"


def kinds(model: onnx.ModelProto) -> Counter[str]:
    return Counter(n.op_type for n in model.graph.node if n.domain == "com.microsoft")


def share(result: op.Result) -> float:
    assert result.report.exactness.passed
    return result.report.totals.params_after / result.report.totals.params_before


@pytest.mark.parametrize(
    ("name", "fused"),
    [
        ("attention", {"BiasGelu", "SkipLayerNormalization"}),
        ("concat", {"FusedConv", "FusedGemm"}),
        ("depthwise", {"FusedConv"}),
        ("residual", {"FusedConv"}),
        ("recurrent", set()),
    ],
)
def test_offline_optimised_models_lose_as_much(name: str, fused: set[str], tmp_path: Path) -> None:
    source = MODELS / f"{name}.onnx"
    path = optimised(source, tmp_path)
    assert fused <= set(kinds(onnx.load(path)))
    before, after = (op.prune(p, ratio=0.5, criterion="random", latency=False) for p in (source, path))
    assert share(after) == pytest.approx(share(before), abs=0.02)
    assert kinds(after.model) == kinds(onnx.load(path))


def encoder(layers: int = 2) -> onnx.ModelProto:
    """A tiny encoder of the BERT kind, spelled out as exporters do."""
    net = Net(16)
    ids, mask = net.input("ids", ["N", "S"], np.int64), net.input("mask", ["N", "S"], np.int64)
    ahead = net.op("Cast", net.unsqueeze(net.unsqueeze(mask, [1]), [2]), to=1)
    ahead = net.op("Mul", net.op("Sub", net.const(1.0), ahead), net.const(-10000.0))
    x = norm(net, net.op("Gather", net.weight(50, WIDE), ids))
    for _ in range(layers):
        x = norm(net, net.op("Add", attention(net, x, ahead), x))
        h = net.linear(x, WIDE, 64)
        h = net.op(
            "Mul",
            net.op("Mul", h, net.op("Add", net.op("Erf", net.op("Div", h, net.const(2**0.5))), net.const(1.0))),
            net.const(0.5),
        )
        x = norm(net, net.op("Add", net.linear(h, 64, WIDE), x))
    y = net.linear(x, WIDE, 5)
    return net.model(y, check=False, shapes={y: ["N", "S", 5]})


def norm(net: Net, x: str) -> str:
    mean = net.reduce("ReduceMean", x, [-1])
    off = net.op("Sub", x, mean)
    spread = net.reduce("ReduceMean", net.op("Pow", off, net.const(2.0)), [-1])
    scaled = net.op("Div", off, net.op("Sqrt", net.op("Add", spread, net.const(1e-5))))
    return net.op("Add", net.op("Mul", scaled, net.weight(WIDE, low=0.5)), net.weight(WIDE))


def attention(net: Net, x: str, ahead: str) -> str:
    q, k, v = (net.op("Add", net.op("MatMul", x, net.weight(WIDE, WIDE)), net.weight(WIDE)) for _ in "qkv")
    q, k, v = (
        net.transpose(net.reshape(t, 0, 0, HEADS, SIZE), 0, *p)
        for t, p in zip((q, k, v), ((2, 1, 3), (2, 3, 1), (2, 1, 3)), strict=True)
    )
    scores = net.op("Add", net.op("Div", net.op("MatMul", q, k), net.const(SIZE**0.5)), ahead)
    out = net.transpose(net.op("MatMul", net.op("Softmax", scores, axis=-1), v), 0, 2, 1, 3)
    out = net.op("MatMul", net.reshape(out, 0, 0, WIDE), net.weight(WIDE, WIDE))
    return net.op("Add", out, net.weight(WIDE))


@pytest.mark.parametrize("kind", ["Attention", "MultiHeadAttention"])
def test_fused_encoders_lose_as_much(kind: str, tmp_path: Path) -> None:
    optimizer = pytest.importorskip("onnxruntime.transformers.optimizer")
    options = pytest.importorskip("onnxruntime.transformers.fusion_options").FusionOptions("bert")
    options.enable_shape_inference = False
    options.use_multi_head_attention = kind == "MultiHeadAttention"
    source = tmp_path / "encoder.onnx"
    onnx.save(encoder(), source)
    fused = optimizer.optimize_model(str(source), "bert", HEADS, WIDE, optimization_options=options, opt_level=0).model
    assert kinds(fused) == {"SkipLayerNormalization": 4, kind: 2, "BiasGelu": 2}
    before, after = (op.prune(m, ratio=0.5, criterion="random", latency=False) for m in (str(source), fused))
    assert share(after) == pytest.approx(share(before), abs=0.02)
    assert kinds(after.model) == kinds(fused)


def test_fused_encoders_are_cut_through_their_norms_on_demand(tmp_path: Path) -> None:
    source = tmp_path / "encoder.onnx"
    onnx.save(encoder(), source)
    small = op.prune(optimised(source, tmp_path), ratio=0.5, criterion="random", approximate=True, latency=False)
    tables = [t for t in small.model.graph.initializer if 50 in t.dims]
    assert [tuple(t.dims) for t in tables] == [(50, WIDE // 2)]
