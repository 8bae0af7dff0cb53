"""Repair without data: exact where others say the same, in the range that the model was made for, never worse."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from build import Net
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from planted import Planted, draw, error, how, outputs, plan, repaired, weights
from test_redundancy import CASES, assert_only_weights_change, residual

import onnxprune as op
from onnxprune.channels.analysis import Analysis
from onnxprune.passes.synthetic import draw_calibration
from onnxprune.pipeline import Context
from onnxprune.recovery.plausibility import measure_divergence, measure_response
from onnxprune.runtime.inputs import RANGES, pattern

Array = NDArray[Any]

# -- laws --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_what_others_say_too_is_found_without_data(name: str) -> None:
    """Doubles, mixtures and constants of every kind of layer."""
    model, removal = CASES[name](Planted(17, seed=3))
    fresh = draw(model, 7, seed=1)
    before, result = repaired(model, removal, None, "datafree")
    assert error(model, before, fresh) > 1e-2, "the cut alone has to hurt"
    assert error(model, result.model, fresh) < 1e-5, how(result)
    assert_only_weights_change(before, result.model)


def test_a_mixture_behind_a_normalisation_is_found_under_its_own_statistics() -> None:
    """Those of other inputs would give the mixture other shares."""
    net = Planted(17, seed=3)
    y = net.conv(net.input("x", ["N", 3, 6, 6]), 3, 6)
    kernel, bias = net.operands(y)
    for name in (kernel, bias):
        value = net.value(name)
        value[4] = 0.5 * value[0] - 2.0 * value[3]
        net.change(name, value)
    model = net.model(net.conv(net.norm(y, 6), 6, 4, pad=False))
    _, result = repaired(model, plan((y, 1, 6, [4])), None, "datafree")
    assert error(model, result.model, draw(model, 7, 1)) < 1e-5, how(result)


def test_a_model_that_lost_nothing_stays_as_it_is() -> None:
    model, _ = residual(Planted(17, seed=3))
    before, result = repaired(model, plan(), None, "datafree")
    assert result.model.SerializeToString() == before.SerializeToString() == model.SerializeToString()


def test_the_same_run_gives_the_same_weights_and_another_seed_others() -> None:
    model, removal = alike(0)
    one, two, other = (repaired(model, removal, None, "datafree", seed=s)[1].model for s in (0, 0, 1))
    assert one.SerializeToString() == two.SerializeToString() != other.SerializeToString()


# -- what is only alike ------------------------------------------------------------------------------------------------


def alike(seed: int, gain: float = 1.0, norm: bool = False) -> tuple[onnx.ModelProto, op.Plan]:
    """Every other channel is near to the one in front of it; ``gain`` is what inputs of sd 1 are divided by."""
    net = Planted(17, seed=seed)
    x = net.input("x", ["N", 3, 8, 8])
    y = net.conv(x, 3, 12)
    (kernel, bias) = net.operands(y)
    for name, scale in ((kernel, 1.0 / gain), (bias, 1.0)):
        value = net.value(name) * scale
        value[1::2] = value[::2] + 0.3 * value[1::2]
        net.change(name, value)
    middle = net.norm(y, 12) if norm else y
    end = net.linear(net.op("Flatten", net.op("Relu", net.conv(net.op("Relu", middle), 12, 8))), 512, 5, gemm=True)
    return net.model(end), plan((y, 1, 12, [1, 5, 9]))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("norm", [False, True])
def test_inputs_that_nobody_recorded_are_enough_to_be_better(seed: int, norm: bool) -> None:
    """On others of their kind."""
    model, removal = alike(seed, norm=norm)
    before, result = repaired(model, removal, None, "datafree")
    assert result.report.recovery.inputs.startswith("synthetic inputs")
    spread = RANGES[result.report.recovery.inputs.partition("range ")[2].rstrip(")")]
    fresh = {"x": spread(pattern((100, 3, 8, 8), np.random.default_rng(1234))).astype(np.float32)}
    assert error(model, result.model, fresh) < error(model, before, fresh), how(result)


@pytest.mark.parametrize("norm", [False, True])
def test_statistics_of_normalisations_stay(norm: bool) -> None:
    """They are others only while layers are fitted."""
    model, removal = alike(1, norm=norm)
    before, result = repaired(model, removal, None, "datafree")
    old, new = weights(before), weights(result.model)
    for node in result.model.graph.node:
        if node.op_type == "BatchNormalization":
            assert all(old[n].tobytes() == new[n].tobytes() for n in node.input[3:])
    assert any(r.done for r in result.report.repairs)


# -- what goes in ------------------------------------------------------------------------------------------------------


def chosen(model: onnx.ModelProto) -> tuple[str, list[dict[str, Array]]]:
    feeds, spread = draw_calibration(Context.of(model), Analysis(model))
    return spread, feeds


@pytest.mark.parametrize("spread", ["sd 0.1", "-1..1", "0..1", "sd 10", "0..255"])
def test_normalisations_tell_the_range(spread: str) -> None:
    """Their statistics are those of what the model was trained on."""
    net = Planted(17, seed=5)
    y = net.conv(net.input("x", ["N", 3, 16, 16]), 3, 8)
    end = net.norm(y, 8)
    mean, variance = net.operands(end)[2:]
    seen = RANGES[spread](pattern((64, 3, 16, 16), np.random.default_rng(99))).astype(np.float32)
    (values,) = outputs(net.model(y), {"x": seen})
    net.change(mean, values.mean(axis=(0, 2, 3)))
    net.change(variance, values.var(axis=(0, 2, 3)))
    assert chosen(net.model(net.conv(net.op("Relu", end), 8, 4)))[0] == spread


@pytest.mark.parametrize(("scale", "least", "most"), [(0.1, 0, 3), (1.0, 1, 5), (100.0, 5, 8)])
def test_folded_biases_tell_the_range_roughly(scale: float, least: int, most: int) -> None:
    """Where outputs and biases are of one size, as training leaves them, the layer uses all that it has."""
    net = Planted(17, seed=5)
    x = net.input("x", ["N", 3, 16, 16])
    for gain, before, after in ((scale, 3, 16), (1.0, 16, 16), (1.0, 16, 8)):
        x = net.conv(x, before, after)
        kernel, bias = net.operands(x)
        norms = np.linalg.norm(net.value(kernel).reshape(after, -1), axis=1)
        net.change(kernel, net.value(kernel) / norms[:, None, None, None] / gain)
        net.change(bias, net.rng.uniform(-0.7, 0.7, after))
        x = net.op("Relu", x)
    assert least <= list(RANGES).index(chosen(net.model(x))[0]) <= most


def test_integers_masks_and_small_batches() -> None:
    """Tokens stay inside their table, and a batch that is fixed is kept."""
    net = Net(17, seed=0)
    ids, mask = net.input("ids", [1, 6], np.int64), net.input("attention_mask", [1, 6])
    embedded = net.op("Gather", net.weight(9, 8), ids)
    kept = net.op("Mul", embedded, net.op("Unsqueeze", mask, net.const([2], np.int64)))
    model = net.model(net.linear(net.op("Relu", net.linear(kept, 8, 12)), 12, 4))
    _, feeds = chosen(model)
    assert {f["ids"].shape for f in feeds} == {(1, 6)} and len(feeds) >= 64
    assert max(int(f["ids"].max()) for f in feeds) == 8 and all((f["attention_mask"] == 1).all() for f in feeds)


@given(rows=st.integers(2, 40), o=st.integers(1, 12), seed=st.integers(0, 99), gain=st.floats(0.01, 100.0))
@settings(max_examples=40)
def test_interest_is_a_share_and_knows_no_scale(rows: int, o: int, seed: int, gain: float) -> None:
    values = np.random.default_rng(seed).standard_normal((rows, o))
    score = measure_response(values)
    assert 0.0 <= score <= 1.0 + 1e-9
    assert measure_response(gain * values) == pytest.approx(score, rel=1e-6)
    assert measure_response(values + 100.0) == 0.0


def test_interest_is_the_formula() -> None:
    values = np.random.default_rng(0).standard_normal((500, 4)) @ np.random.default_rng(1).standard_normal((4, 6))
    own = np.linalg.eigvalsh(np.corrcoef(values.T))
    above = (values > 0).mean(axis=0)
    wanted = own.sum() ** 2 / np.square(own).sum() / 6 * (4 * above * (1 - above)).mean()
    assert measure_response(values) == pytest.approx(wanted, rel=1e-9)
    assert measure_response(np.tile(values[:, :1], 6)) == pytest.approx((4 * above * (1 - above))[0] / 6)
    assert measure_response(values[:3]) <= 3 / 6 + 1e-9


def test_divergence_is_0_for_the_same_and_bounded() -> None:
    mean, variance = np.array([0.3, -2.0]), np.array([0.5, 4.0])
    assert measure_divergence(mean, variance, mean, variance) == 0.0
    assert measure_divergence(mean + 1, variance, mean, variance) == pytest.approx(0.5 * np.mean(1 / variance))
    assert measure_divergence(mean, variance * 0, mean, variance) == 10.0


# -- with data ---------------------------------------------------------------------------------------------------------


def test_data_are_compared_on_and_not_fitted_to() -> None:
    model, removal = alike(1)
    one, two = (repaired(model, removal, draw(model, n, n), "datafree")[1] for n in (40, 60))
    assert one.model.SerializeToString() == two.model.SerializeToString()
    facts = one.report.recovery
    assert facts.after is not None and facts.after.samples == facts.aside == 40
    alone = repaired(model, removal, None, "datafree")[1].report.recovery
    assert facts.samples == alone.samples + alone.aside, "none has to be set aside"


def test_what_data_show_to_be_worse_is_undone() -> None:
    """Data far from all that was made up: weights of a cut model that was made right for them stay."""
    model, removal = alike(2)
    data = {"x": np.full((40, 3, 8, 8), 0.5, np.float32) + 0.01 * draw(model, 40)["x"]}
    known = repaired(model, removal, data, "full")[1]
    stages = [op.passes.Adopt(known.model, known.plan), op.passes.Recover("datafree")]
    again = op.Pipeline(stages).run(model, data=data)
    assert again.report.recovery.undone
    assert again.model.SerializeToString() == known.model.SerializeToString()
    assert any("inputs of your own" in w for w in again.report.warnings)


def test_layers_that_were_taken_apart_are_repaired_without_data_too() -> None:
    model, _ = alike(0)
    result = op.factorize(model, method="svd", ratio=0.5, recover="datafree", latency=False)
    facts = result.report.recovery
    assert facts.before is not None and facts.after is not None and not facts.undone
    assert facts.after.outputs[0].snr_db > facts.before.outputs[0].snr_db
