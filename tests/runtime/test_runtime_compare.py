from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from runtime_models import mlp, model

from onnxprune.errors import ModelError
from onnxprune.report.facts import Exactness
from onnxprune.runtime.compare import compare_models, exactness, noise_floor

FEEDS = [{"x": np.random.default_rng(n).standard_normal((n, 4)).astype(np.float32)} for n in (2, 3)]


def masked(rng: np.random.Generator, keep: list[int], factor: float = 1.0) -> bytes:
    """The full model of ``mlp`` with a 0/1 mask before its second layer."""
    w1 = rng.standard_normal((4, 8)).astype(np.float32)
    w2 = rng.standard_normal((8, 3)).astype(np.float32)
    mask = np.zeros(8, np.float32)
    mask[keep] = factor
    text = (
        "agraph (float[N,4] x) => (float[N,3] y) { h = MatMul(x, w1) r = Relu(h) m = Mul(r, mask) y = MatMul(m, w2) }"
    )
    return model(text, w1=w1, w2=w2, mask=mask)


def outputs_of(a: np.ndarray, b: np.ndarray, **options: bool) -> Exactness:
    """Compare two models that return these constants, on one empty call."""

    def constant(array: np.ndarray) -> bytes:
        import onnx
        from onnx import helper, numpy_helper

        # Identity of an initializer: the value arrives unchanged whatever its type
        initializer = numpy_helper.from_array(array, "c")
        info = helper.make_tensor_value_info("y", initializer.data_type, [None] * array.ndim)
        graph = helper.make_graph([helper.make_node("Identity", ["c"], ["y"])], "g", [], [info], [initializer])
        made: onnx.ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        return bytes(made.SerializeToString())

    return exactness(constant(a), constant(b), [{}], **options)


def test_exact_cut_passes_on_two_batch_sizes_and_says_so() -> None:
    keep = [0, 2, 5]
    seen: list[tuple[str, float]] = []
    facts = exactness(
        masked(np.random.default_rng(0), keep),
        mlp(np.random.default_rng(0), keep=keep),
        FEEDS,
        progress=lambda stage, share: seen.append((stage, share)),
    )
    assert facts.passed is True
    assert facts.error <= facts.tolerance == pytest.approx(1e-4)
    assert facts.batches == [2, 3]
    assert facts.worst_output == "y" and facts.note == ""
    assert [stage for stage, _ in seen] == ["exactness"] * 4
    assert [share for _, share in seen] == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("keep", [[0, 2, 6], [0, 2], [0, 5, 2, 1]])
def test_wrong_cut_fails(keep: list[int]) -> None:
    facts = exactness(masked(np.random.default_rng(0), [0, 2, 5]), mlp(np.random.default_rng(0), keep=keep), FEEDS)
    assert facts.passed is False
    assert facts.error > facts.tolerance


def test_small_error_fails_and_an_explicit_tolerance_allows_it() -> None:
    reference, other = (masked(np.random.default_rng(0), [0, 2, 5], factor) for factor in (1.0, 1.001))
    strict = exactness(reference, other, FEEDS)
    assert strict.passed is False and strict.error == pytest.approx(1e-3, rel=0.05)
    assert exactness(reference, other, FEEDS, tolerance=1e-2).passed is True


def test_other_output_names_fail() -> None:
    reference = mlp(np.random.default_rng(0))
    facts = exactness(reference, mlp(np.random.default_rng(0), output="z"), FEEDS)
    assert facts.passed is False and math.isinf(facts.error)
    assert "only the reference has it" in facts.note and "only the cut model has it" in facts.note


def test_cut_model_that_does_not_run_fails_and_a_broken_reference_raises() -> None:
    reference = mlp(np.random.default_rng(0))
    facts = exactness(reference, b"broken", FEEDS)
    assert facts.passed is False and "the cut model does not" in facts.note
    other = model("agraph (float[N,5] x) => (float[N,5] y) { y = Relu(x) }")
    assert exactness(reference, other, FEEDS).passed is False
    with pytest.raises(ModelError):
        exactness(b"broken", reference, FEEDS)


def test_nothing_to_compare_is_not_a_pass() -> None:
    reference = mlp(np.random.default_rng(0))
    facts = exactness(reference, reference, [])
    assert facts.passed is None and "nothing to compare" in facts.note


@pytest.mark.parametrize(
    ("a", "b", "note"),
    [
        ([1.0, 2.0], [1.0, 2.0, 3.0], "became"),
        ([1.0, np.nan], [1.0, 2.0], "NaN"),
        ([np.nan, 2.0], [2.0, np.nan], "NaN"),
        ([1.0, np.inf], [1.0, -np.inf], "infinite"),
        ([1.0, np.inf], [1.0, 5.0], "infinite"),
        ([1.0, 5.0], [1.0, np.inf], "infinite"),
    ],
)
def test_structural_differences_fail_with_a_note(a: list[float], b: list[float], note: str) -> None:
    facts = outputs_of(np.array(a, np.float32), np.array(b, np.float32))
    assert facts.passed is False and note in facts.note


def test_other_dtype_fails() -> None:
    assert outputs_of(np.array([1, 2], np.int64), np.array([1, 2], np.float32)).passed is False


def test_equal_nan_and_infinities_do_not_hide_the_rest() -> None:
    a = np.array([np.nan, np.inf, -np.inf, 1.0, 2.0], np.float32)
    b = a.copy()
    assert outputs_of(a, b).passed is True
    b[3] = 1.5
    facts = outputs_of(a, b)
    assert facts.passed is False and facts.error == pytest.approx(0.25)


def test_lowest_value_masks_do_not_hide_the_rest() -> None:
    a = np.array([np.finfo(np.float32).min, 1.0, 2.0], np.float32)
    b = np.array([np.finfo(np.float32).min * 0.999999, 1.0, 2.1], np.float32)
    assert outputs_of(a, b).passed is False
    b[2] = 2.0
    assert outputs_of(a, b).passed is True


def test_integers_may_differ_only_where_ties_explain_it() -> None:
    a = np.arange(1000)
    b = a.copy()
    b[:5] += 1
    facts = outputs_of(a, b)
    assert facts.passed is True and "5 of 1000 integers differ" in facts.note
    b[:6] = a[:6] + 1
    assert outputs_of(a, b).passed is False
    assert outputs_of(np.array([True, False]), np.array([True, True])).passed is False
    assert outputs_of(np.array(["a", "b"], object), np.array(["a", "c"], object)).passed is False
    assert outputs_of(np.array(["a", "b"], object), np.array(["a", "b"], object)).passed is True


def test_eight_bit_steps_pass_only_in_quantized_models() -> None:
    a = np.arange(100, dtype=np.uint8)
    b = a.copy()
    b[:50] += 1
    assert outputs_of(a, b).passed is False
    assert outputs_of(a, b, quantized=True).passed is True
    b[:50] += 1
    assert outputs_of(a, b, quantized=True).passed is False


@pytest.mark.parametrize(
    ("array", "word"),
    [
        (np.zeros((2, 3), np.float32), "is zero"),
        (np.full((2, 3), 5, np.float32), "is constant"),
        (np.full((2, 3), 5, np.int64), "is constant"),
        (np.full((2, 3), np.nan, np.float32), "has no finite value"),
        (np.zeros((0, 3), np.float32), "is empty"),
    ],
)
def test_equality_that_proves_nothing_is_said(array: np.ndarray, word: str) -> None:
    facts = outputs_of(array, array)
    assert facts.passed is True
    assert "proves nothing" in facts.note and word in facts.note


def test_narrow_floats_get_a_wider_tolerance() -> None:
    a = np.linspace(1, 2, 50)
    tolerances = [outputs_of(a.astype(t), a.astype(t)).tolerance for t in (np.float64, np.float16, ml_dtypes.bfloat16)]
    assert tolerances[0] == pytest.approx(1e-4)
    assert tolerances[0] < tolerances[1] < tolerances[2] < 0.05
    wrong = (a * 1.05).astype(ml_dtypes.bfloat16)
    assert outputs_of(a.astype(ml_dtypes.bfloat16), wrong).passed is False


def chaotic(offset: float) -> bytes:
    """A model that blows rounding up a thousandfold, shifted by ``offset``."""
    text = "agraph (float[N,4] x) => (float[N,4] y) { a = Mul(x, k) b = Sin(a) y = Add(b, c) }"
    return model(text, k=np.float32(1000), c=np.float32(offset))


def test_noise_floor_is_small_for_a_calm_model_and_large_for_a_sensitive_one() -> None:
    calm = noise_floor(mlp(np.random.default_rng(0)), FEEDS)
    assert 0 < calm < 1e-5
    assert noise_floor(chaotic(0.0), FEEDS) > 10 * calm


def test_sensitivity_raises_the_tolerance_but_never_above_the_cap() -> None:
    facts = exactness(chaotic(0.0), chaotic(0.001), FEEDS)
    assert facts.passed is True and 1e-4 < facts.error <= facts.tolerance <= 1e-2
    facts = exactness(chaotic(0.0), chaotic(0.2), FEEDS)
    assert facts.passed is False and facts.tolerance <= 1e-2


def test_noise_floor_of_a_model_of_integers_is_zero() -> None:
    text = "agraph (int64[N] x) => (int64[N] y) { y = Add(x, x) }"
    assert noise_floor(model(text), [{"x": np.arange(5)}]) == 0.0


@pytest.mark.parametrize(
    ("value", "other", "uncertain"),
    [(1e-8, 4e-8, True), (2e-6, 2.1e-6, True), (1e-8, 5e-7, False), (2e-6, 2.3e-6, False), (0.5, 0.6, False)],
)
def test_values_next_to_zero_differ_by_the_last_place_of_one(value: float, other: float, uncertain: bool) -> None:
    """A sigmoid of -18 is 0 or the next number below 1 away from 1; no disturbance of the run need show that."""

    def sum_of(c: float) -> bytes:
        text = "agraph (float[N,4] x) => (float[N,4] y) { z = Mul(x, zero) y = Add(z, c) }"
        return model(text, zero=np.zeros((), np.float32), c=np.float32(c))

    comparison = compare_models(sum_of(value), sum_of(other), FEEDS)
    assert comparison.failed == ("y",) and comparison.uncertain == (("y",) if uncertain else ())
