from __future__ import annotations

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
from runtime_models import mlp, model

from onnxprune.errors import ModelError
from onnxprune.pipeline import Context, RunSettings
from onnxprune.runtime.fidelity import KnownOutputs, fidelity, points
from onnxprune.runtime.sessions import Feed, open_session


def through(text: str, kind: str = "float[N,3]", out: str = "float[N,3]") -> bytes:
    return model(f"agraph ({kind} x) => ({out} y) {{ {text} }}", two=np.float32(2), nil=np.float32(0))


IDENTITY = through("y = Identity(x)")
RNG = np.random.default_rng(0)
FEEDS = [{"x": RNG.standard_normal((n, 3)).astype(np.float32)} for n in (4, 5)]


def test_equal_models_are_faithful_in_json_ready_numbers() -> None:
    facts = fidelity(IDENTITY, IDENTITY, FEEDS, "synthetic")
    (output,) = facts.outputs
    assert (output.output, output.cosine, output.snr_db, output.top1) == ("y", 1.0, 300.0, 1.0)
    assert (facts.samples, facts.source, facts.note, facts.worst_cosine) == (9, "synthetic", "", 1.0)
    json.dumps(asdict(facts), allow_nan=False)


def test_figures_are_those_of_all_batches_together() -> None:
    rng = np.random.default_rng(1)
    original, final = mlp(rng), mlp(rng)
    feeds = [{"x": rng.standard_normal((n, 4)).astype(np.float32)} for n in (3, 6)]
    (output,) = fidelity(original, final, feeds, "d.npz").outputs
    from onnxprune.runtime.sessions import open_session, run

    both = [
        np.concatenate([run(open_session(m), feed)["y"] for feed in feeds]).astype(float) for m in (original, final)
    ]
    a, b = both
    assert output.cosine == pytest.approx(float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)), abs=1e-6)
    assert output.snr_db == pytest.approx(10 * math.log10((a**2).sum() / ((a - b) ** 2).sum()), abs=1e-4)
    assert output.top1 == pytest.approx((a.argmax(-1) == b.argmax(-1)).mean())
    assert output.cosine < 0.99


@pytest.mark.parametrize(
    ("final", "cosine", "snr", "top1"),
    [("y = Mul(x, two)", 1.0, 0.0, 1.0), ("y = Neg(x)", -1.0, -6.0206, 0.0), ("y = Mul(x, nil)", 0.0, 0.0, None)],
)
def test_known_changes_have_known_figures(final: str, cosine: float, snr: float, top1: float | None) -> None:
    (output,) = fidelity(IDENTITY, through(final), FEEDS, "s").outputs
    assert output.cosine == pytest.approx(cosine, abs=1e-6)
    assert output.snr_db == pytest.approx(snr, abs=1e-3)
    if top1 is not None:
        assert output.top1 == top1


@pytest.mark.parametrize(
    ("kind", "shape", "logits"),
    [
        ("float[N]", (4,), False),
        ("float[N,1]", (4, 1), False),
        ("float[N,2,3]", (4, 2, 3), True),
        ("float[N,2,3,3]", (4, 2, 3, 3), False),
        ("uint8[N,3]", (4, 3), True),
        ("uint8[N,2,3]", (4, 2, 3), False),
    ],
)
def test_top1_only_where_outputs_look_like_logits(kind: str, shape: tuple[int, ...], logits: bool) -> None:
    same = through("y = Identity(x)", kind, kind)
    values = RNG.uniform(0, 9, shape).astype(kind.partition("[")[0].replace("float", "float32"))
    (output,) = fidelity(same, same, [{"x": values}], "s").outputs
    assert output.top1 == (1.0 if logits else None)


def test_positions_not_finite_in_the_original_are_left_out() -> None:
    feed = {"x": np.array([[1, np.nan, 3], [np.inf, 5, 6]], np.float32)}
    (output,) = fidelity(IDENTITY, through("y = Mul(x, two)"), [feed], "s").outputs
    assert output.cosine == pytest.approx(1.0) and output.snr_db == pytest.approx(0.0, abs=1e-6)


def test_positions_not_finite_in_the_final_model_count_as_lost() -> None:
    (output,) = fidelity(IDENTITY, through("z = Mul(x, nil) y = Div(z, z)"), FEEDS, "s").outputs
    assert output.cosine == 0.0 and output.snr_db == pytest.approx(0.0)


def test_outputs_without_a_finite_value_are_left_out_and_named() -> None:
    facts = fidelity(IDENTITY, IDENTITY, [{"x": np.full((2, 3), np.nan, np.float32)}], "s")
    assert facts.outputs == [] and "no finite value there: y" in facts.note


def test_indices_are_judged_by_their_share_of_equal_elements() -> None:
    argmax = "y = ArgMax<axis=1>(x)"
    original = through(argmax, out="int64[N,1]")
    final = through(f"n = Neg(x) {argmax.replace('(x)', '(n)')}", out="int64[N,1]")
    (output,) = fidelity(original, original, FEEDS, "s").outputs
    assert output.cosine == output.top1 == 1.0
    (output,) = fidelity(original, final, FEEDS, "s").outputs
    assert output.cosine == output.top1 == 0.0


def test_other_shapes_and_missing_outputs_count_as_zero() -> None:
    wide = through("y = Concat<axis=1>(x, x)", out="float[N,6]")
    facts = fidelity(IDENTITY, wide, FEEDS, "s")
    assert facts.worst_cosine == 0.0 and "became" in facts.note
    renamed = model("agraph (float[N,3] x) => (float[N,3] z) { z = Identity(x) }")
    facts = fidelity(IDENTITY, renamed, FEEDS, "s")
    assert facts.worst_cosine == 0.0 and {o.output for o in facts.outputs} == {"y", "z"}


def test_no_feeds_and_broken_models_are_said() -> None:
    assert "no output" in fidelity(IDENTITY, IDENTITY, [], "s").note
    with pytest.raises(ModelError):
        fidelity(IDENTITY, b"broken", FEEDS, "s")


def test_probabilities_are_told_apart_by_their_square_roots() -> None:
    """Rows so sure of their class that probabilities hardly move: what is left for other classes is no rounding."""
    sure = through("z = Mul(x, two) y = Softmax(z)")
    less = model("agraph (float[N,3] x) => (float[N,3] y) { z = Mul(x, some) y = Softmax(z) }", some=np.float32(1.5))
    feeds = [{"x": np.float32([[6, 0, 0], [0, 6, 0], [0, 0, 6]])}, {"x": np.float32([[6, 0, 0]])}]
    (output,) = fidelity(sure, less, feeds, "s").outputs
    p, q = (np.exp(scale * np.array([6.0, 0, 0])) for scale in (2.0, 1.5))
    affinity = float(np.sqrt(p / p.sum() * q / q.sum()).sum())
    assert output.snr_db > 60 and output.hellinger == pytest.approx(1 - affinity, rel=1e-3)
    assert output.noise == output.hellinger


def test_only_probabilities_have_that_distance() -> None:
    (scores,) = fidelity(IDENTITY, through("y = Mul(x, two)"), FEEDS, "s").outputs
    assert scores.hellinger is None and scores.noise == pytest.approx(1.0)
    sums = [{"x": np.float32([[0.5, 0.5, 0.5], [0.2, 0.3, 0.5]])}]
    assert fidelity(IDENTITY, IDENTITY, sums, "s").outputs[0].hellinger is None
    once = [{"x": np.float32([[0.5, 0.25, 0.25]])}, *sums]
    assert fidelity(IDENTITY, IDENTITY, once[:1], "s").outputs[0].hellinger == 0.0
    assert fidelity(IDENTITY, IDENTITY, once, "s").outputs[0].hellinger is None


@pytest.mark.parametrize("together", [False, True])
def test_outputs_of_the_original_are_computed_once(together: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Comparisons with known outputs have the figures of those without; other inputs are not taken for the same."""
    original, others = mlp(RNG), [mlp(RNG), mlp(RNG)]
    feeds = [{"x": RNG.standard_normal((n, 4)).astype(np.float32)} for n in (3, 6)]
    plain = [fidelity(original, other, feeds, together=together) for other in others]
    known, opened = KnownOutputs(), []
    monkeypatch.setattr(points, "open_session", lambda m, **rest: opened.append(m) or open_session(m, **rest))
    assert [fidelity(original, other, feeds, together=together, known=known) for other in others] == plain
    assert opened.count(original) == 1
    altered = [{"x": feeds[0]["x"] + 1}, feeds[1]]
    expected = fidelity(original, others[0], altered, together=together)
    assert fidelity(original, others[0], altered, together=together, known=known) == expected != plain[0]


def computed(known: KnownOutputs, *numbers: int) -> list[int]:
    """Request outputs of 8 bytes for inputs by number; the numbers of those that had to be computed."""
    calls: list[int] = []

    def compute(feed: Feed) -> Feed:
        calls.append(int(feed["x"][0]))
        return {"y": np.float64(feed["x"])}

    for number in numbers:
        assert known.of({"x": np.array([number])}, compute)["y"] == number
        assert known.num_bytes <= 24
    return calls


def test_known_outputs_stay_within_their_limit() -> None:
    """A cycle through more inputs than there is room for finds those of the first pass; a later stage replaces them."""
    known = KnownOutputs(limit=24)
    assert computed(known, *range(5)) == [0, 1, 2, 3, 4]
    assert computed(known, *range(5)) == computed(known, *range(5)) == [3, 4]
    assert computed(known, 7, 8, 9) == computed(known, 7, 8, 9) == [7, 8, 9]
    assert computed(known, 7, 8, 9) == [] and computed(known, 0, 1) == [0, 1] and computed(known, 7, 8, 9) == []
    assert known.of({"x": np.array([7])}, dict)["y"].flags.writeable is False
    large, strings = {"y": np.zeros(4)}, {"y": np.array(["a"], dtype=object)}
    for number, outputs in ((10, large), (11, strings)):
        for _ in range(3):
            assert known.of({"x": np.array([number])}, lambda _, outputs=outputs: outputs) is outputs
    assert known.num_bytes == 24 and computed(known, 7, 8, 9) == []


def test_known_outputs_take_a_quarter_of_the_memory() -> None:
    feed, outputs = {"x": np.zeros(1)}, {"y": np.zeros(2)}
    for limit, expected in ((63, 0), (64, 16), (None, 16)):
        known = KnownOutputs.within(limit)
        known.of(feed, lambda _: outputs)
        assert known.num_bytes == expected
    assert Context.of(IDENTITY, RunSettings(memory_limit=1_000_000)).known._limit == 250_000


def test_candidates_are_compared_by_more_than_answers_on_a_few_samples() -> None:
    feeds = [{"x": np.random.default_rng(2).standard_normal((64, 3)).astype(np.float32)}]
    same_answers = fidelity(IDENTITY, through("y = Mul(x, two)"), feeds)
    (answer,) = same_answers.answers
    assert answer.kind == "classes" and same_answers.outputs[0].top1 == 1.0
    assert answer.distance == pytest.approx(same_answers.outputs[0].noise) and answer.distance == pytest.approx(1.0)
    (values,) = fidelity(IDENTITY, through("y = Mul(x, two)"), feeds, outputs={"y": ("embedding", None)}).answers
    assert values.distance == pytest.approx(1 - values.points / 100)
