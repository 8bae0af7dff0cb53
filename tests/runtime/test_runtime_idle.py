from __future__ import annotations

import numpy as np
from runtime_models import model

from onnxprune.runtime.compare import compare_models, find_varying_feeds, varying_outputs

# y is 0 unless some x is above 100; s has one element, which is another on every input.
SLEEPY = model(
    "agraph (float[N,4] x) => (float[N,4] y, float[1] s, float[4] c) "
    "{ d = Sub(x, t) y = Relu(d) u = ReduceSum<keepdims=0>(x, axes) s = Reshape(u, one) c = Identity(k) }",
    t=np.float32(100),
    axes=np.array([0, 1]),
    one=np.array([1]),
    k=np.full(4, 7, np.float32),
)


def feed(scale: float, seed: int = 0) -> dict[str, np.ndarray]:
    return {"x": (scale * np.random.default_rng(seed).standard_normal((2, 4))).astype(np.float32)}


def test_varying_looks_within_a_run_and_from_one_to_the_next() -> None:
    assert varying_outputs(SLEEPY, [feed(1)]) == set()
    assert varying_outputs(SLEEPY, [feed(1), feed(1, 1)]) == {"s"}
    assert varying_outputs(SLEEPY, [feed(1000)]) == {"y"}


def test_only_feeds_that_wake_an_output_are_chosen_and_no_more_than_needed() -> None:
    seen = []

    def others():
        for number, scale in enumerate((1, 1, 1000, 1000), start=1):
            seen.append(number)
            yield feed(scale, number)

    idle = compare_models(SLEEPY, SLEEPY, [feed(1)]).idle
    assert idle == {"y": "is zero", "s": "is constant", "c": "is constant"}
    chosen = find_varying_feeds(SLEEPY, ["y", "s"], [feed(1)], others())
    assert [f["x"].max() > 100 for f in chosen] == [False, True]  # the first wakes s, the third y
    assert seen == [1, 2, 3]


def test_values_that_a_model_cannot_take_are_passed_over() -> None:
    bad = {"x": np.zeros((2, 5), np.float32)}
    assert find_varying_feeds(SLEEPY, ["s"], [feed(1)], [bad, feed(1, 1)])[0]["x"].shape == (2, 4)


def test_a_comparison_says_what_proves_nothing() -> None:
    found = compare_models(SLEEPY, SLEEPY, [feed(1)])
    assert found.facts.passed and not found.facts.note
    assert "proves nothing" in found.noted().note and "y is zero" in found.noted().note
    assert not compare_models(SLEEPY, SLEEPY, [feed(1), feed(1000)]).idle.keys() - {"c"}
    assert "proves little" in compare_models(SLEEPY, SLEEPY, [feed(1), feed(1000)]).noted().note
