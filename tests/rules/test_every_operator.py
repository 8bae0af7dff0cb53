"""Every operator that has a rule, between layers: whatever axis of whatever operand has channels, cuts are exact.

An operand comes from a layer whose channels are one axis of it, or two of them (a grid such as heads, whose rows lose
different channels); the others are weights, inputs or layers. What comes out is read by contractions. Either channels
go exactly, as the oracle says, or all stay with a reason.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from build import Net, newest
from hypothesis import given, settings
from hypothesis import strategies as st
from masks import run
from operator_cases import CASES, MS, Case, Draw, Operand, Size
from oracle import assert_exact_cut, make_feed, runnable

import onnxprune as op
from onnxprune.operators.built_in import BUILT_IN
from onnxprune.operators.registry import known

# The oracle in numpy does not know where these sum: the tool's own proof, made of other code, judges them alone.
SUMS_WITHIN = {
    *("Attention", "LSTM", "GRU", "RNN", "QLinearConv", "QLinearMatMul", "MatMulInteger", "ConvInteger"),
    *("LinearAttention", "CausalConvWithState", "DeformConv"),
    *("DynamicQuantizeLinear", "DequantizeLinear", "QuantizeLinear"),
    "LRN",  # onnx's evaluator sums as many channels as there are samples
    "MeanVarianceNormalization",  # a channel that the oracle makes constant has a variance below 0
}
KERNELS = 21
"""The newest opset whose QuantizeLinear every onnxruntime has a kernel of."""
ELSEWHERE = {
    "DynamicQuantizeLSTM": "its weights come in a form of their own: test_quantized.py",
    "QMoE": "its weights are codes in bytes: test_experts.py",
    "GatherBlockQuantized": "only its table has channels: test_packed_codes.py",
    **dict.fromkeys(
        [
            *("PackedAttention", "PackedMultiHeadAttention", "FusedMatMulActivation", "GemmFastGelu", "NhwcConv"),
            *("NhwcFusedConv", "BiasAdd", "BiasDropout", "LayerNormalization", "SimplifiedLayerNormalization"),
            *("GroupNorm", "SkipGroupNorm", "BiasSplitGelu", "BiasSoftmax", "RelativePositionBias"),
            *("SwiGLU", "TorchEmbedding"),
        ],
        "no kernel for processors: test_microsoft.py and test_packed.py",
    ),
}

SEQUENCES = {
    *("ConcatFromSequence", "SequenceAt", "SequenceConstruct", "SequenceEmpty", "SequenceErase", "SequenceInsert"),
    *("SequenceLength", "SplitToSequence"),
}
"""Operators that read or make no tensors: test_laws_sequences.py."""
DRAWING = {"Bernoulli", "RandomNormalLike", "RandomUniformLike"}
"""Operators whose numbers are others in every run."""
FORGOTTEN = {"Affine", "ParametricSoftplus", "Scale", "ScaledTanh"}
"""Operators that onnx has no schema of any more."""


def layer(net: Net, shape: Size, axes: tuple[int, ...]) -> str:
    """A tensor whose ``axes`` are the channels of a layer, split into a grid where there are two."""
    rest = [a for a in range(len(shape)) if a not in axes]
    x = net.input(net.name("x"), [*(shape[a] for a in rest), 3])
    sizes = [shape[a] for a in axes]
    wide = int(np.prod(sizes))
    y = net.op("Add", net.op("MatMul", x, net.weight(3, wide)), net.weight(wide, scale=0.5))
    if len(axes) > 1:
        y = net.reshape(y, *(shape[a] for a in rest), *sizes)
    order = [*rest, *axes]
    return y if order == sorted(order) else net.transpose(y, *(order.index(a) for a in range(len(shape))))


def operand(net: Net, slot: Operand, source: str, draw: Draw) -> str:
    """A floating operand from a ``source``: "weight", "input", "axis" or "grid" of a layer."""
    shape = slot.shape
    axes = [a for a, n in enumerate(shape) if n > 1]
    if source == "grid" and len(axes) > 1:
        x = layer(net, shape, tuple(draw.random.sample(axes, 2)))
    elif source in ("axis", "grid") and axes:
        x = layer(net, shape, (draw.pick(axes),))
    elif source == "input":
        x = net.input(net.name("x"), shape)
    else:
        x = net.weight(*shape, low=slot.low, scale=0.5)
    for step in slot.before:
        kind, attrs, *constants = (step, {}) if isinstance(step, str) else step
        x = net.op(kind, x, *(net.const(c, c.dtype) for c in constants), **attrs)
    return x


def place(net: Net, domain: str, kind: str, case: Case, draw: Draw) -> list[str]:
    """The node among its operands, of which one at least comes from a layer."""
    floats = [i for i, x in enumerate(case.operands) if isinstance(x, Operand)]
    chosen = draw.pick(floats)
    names = []
    for i, slot in enumerate(case.operands):
        if isinstance(slot, Operand):
            source = (
                draw.pick(["axis", "grid"]) if i == chosen else draw.pick(["weight", "weight", "input", "axis", "grid"])
            )
            names.append(operand(net, slot, source, draw))
        else:
            names.append("" if slot is None else net.const(slot, slot.dtype))
    while names and not names[-1]:
        names.pop()
    made = net.op(kind, *names, n=case.outputs, domain=domain, **case.attrs)
    return [made] if isinstance(made, str) else made


def consume(net: Net, y: str, value: np.ndarray[Any, Any], draw: Draw) -> str:
    """A product over everything, over one axis, or over two axes laid one after the other."""
    if value.dtype != np.float32:
        y = net.op("Cast", y, to=1)
    rank = value.ndim
    form = draw.pick(["all", "axis", "axes"]) if rank else "all"
    if form == "all" or rank < 2:
        return net.op("MatMul", net.reshape(y, 1, value.size), net.weight(value.size, 2))
    last = draw.random.sample(range(rank), 2 if form == "axes" else 1)
    order = [*(a for a in range(rank) if a not in last), *last]
    y = net.transpose(y, *order)
    wide = int(np.prod([value.shape[a] for a in last]))
    if len(last) > 1:
        y = net.reshape(y, *(value.shape[a] for a in order[:-2]), wide)
    return net.op("MatMul", y, net.weight(wide, 2))


def build(domain: str, kind: str, seed: int) -> onnx.ModelProto | None:
    """The whole model; None where the drawn form is none that runs, or gives numbers that are not finite."""
    draw = Draw(f"{domain}.{kind} {seed}")
    case = CASES[domain, kind](draw)
    net = Net(case.opset or (KERNELS if domain or case.coded else newest()), seed=seed % 1000)
    outputs = place(net, domain, kind, case, draw)
    alone = net.model(*outputs, check=False, shapes={o: [] for o in outputs})
    del alone.graph.output[:]
    alone.graph.output.extend(onnx.ValueInfoProto(name=o) for o in outputs)  # of whatever type
    try:
        values = run(alone, make_feed(alone, 0))
    except Exception:
        return None
    if not all(np.isfinite(np.asarray(v, np.float64)).all() and np.size(v) for v in values.values()):
        return None
    for name, value in values.items():
        net.hint(name, value.shape, value.dtype)
    wanted = [o for i, o in enumerate(outputs) if i == 0 or draw.flip()]
    ends = [consume(net, o, np.asarray(values[o]), draw) for o in wanted]
    try:
        return net.model(*ends, check=False, shapes={e: [] for e in ends})
    except onnx.shape_inference.InferenceError:
        return None


def check(domain: str, kind: str, seed: int) -> bool | None:
    """Cut half of the channels: whether any went; None where the drawn form is none that runs."""
    model = build(domain, kind, seed)
    if model is None:
        return None
    if kind not in SUMS_WITHIN and domain != MS:
        return assert_exact_cut(model, expect_cut=None, seed=seed, tolerance=1e-4) is not None
    stages = [op.passes.Prune("random", 0.5)]
    if runnable(model):
        stages.append(op.passes.Validate(faithful=False, timed=False))
    try:
        op.Pipeline(stages).run(model, seed=seed)
    except op.BudgetError:
        return False
    return True


NEWEST_RUNTIME = {("com.microsoft", "ExpandDims")}
"""Operators at some of whose models an older onnxruntime ends the process."""


@pytest.mark.parametrize(
    ("domain", "kind"),
    [
        pytest.param(*case, marks=[pytest.mark.newest_runtime] * (case in NEWEST_RUNTIME), id="-".join(case))
        for case in CASES
    ],
)
@given(seed=st.integers(0, 1 << 30))
@settings(max_examples=2)
def test_channels_beside_every_operator_go_exactly_or_stay(domain: str, kind: str, seed: int) -> None:
    check(domain, kind, seed)


def test_every_rule_has_a_case() -> None:
    assert BUILT_IN  # importing them registers them
    rules = {(d, k) for d, k in known() if d in ("", MS)}
    own = {("", kind) for kind in FORGOTTEN | SEQUENCES | DRAWING}
    assert rules == CASES.keys() | {(MS, kind) for kind in ELSEWHERE} | own
