"""Measures of answers: 1 for equal ones, falling with damage, blind to what does not matter."""

from __future__ import annotations

import numpy as np
import pytest

from onnxprune.report.facts import Fidelity
from onnxprune.runtime.fidelity import Hint
from onnxprune.runtime.fidelity.kinds import read_outputs, softmax
from onnxprune.runtime.fidelity.measures import decoded, edit_distance, match_boxes, measure_of
from onnxprune.runtime.sessions import Array, Feed

RNG = np.random.default_rng(1)


def points(want: Feed, have: Feed, inputs: Feed | None = None, **hints: Hint) -> float:
    """Points of the worst answer, from two batches."""
    feeds = inputs or {"x": np.zeros((1, 2))}
    readings = [r for r in read_outputs([want], [feeds], hints, {}) if r.kind != "state"]
    shares = []
    for reading in readings:
        measure = measure_of(reading, [want])
        half = len(next(iter(want.values()))) // 2
        for part in (slice(None, half), slice(half, None)) if half else (slice(None),):
            sides = [{k: v[part] for k, v in side.items()} for side in (feeds, want, have)]
            measure.add(*(sides if inputs else [feeds, *sides[1:]]))
        shares.append(measure.share())
        assert measure.lost()
    return 100 * min(shares)


def normal(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(np.float32)


def anchors(samples: int = 4, rows: int = 300, classes: int = 5) -> Array:
    """Rows of centre, size and class scores, few of them high."""
    boxes = np.concatenate([RNG.uniform(0, 560, (samples, rows, 2)), RNG.uniform(20, 80, (samples, rows, 2))], -1)
    scores = RNG.uniform(0, 0.02, (samples, rows, classes))
    for sample in scores:
        sample[RNG.choice(rows, 8, replace=False), RNG.integers(0, classes, 8)] = RNG.uniform(0.4, 0.95, 8)
    return np.concatenate([boxes, scores], -1).astype(np.float32)


OUTPUTS: dict[str, Array] = {
    "logits": 3 * normal(64, 10),
    "prob": softmax(3 * normal(64, 10)).astype(np.float32),
    "tags": np.float32(RNG.uniform(0, 1, (64, 12)) ** 6),
    "seg": 3 * normal(4, 5, 16, 16),
    "sequence": 3 * normal(16, 20, 30),
    "embedding": normal(64, 32),
    "image": normal(4, 3, 32, 32),
    "y": normal(64, 1),
    "detections": anchors(),
    "offsets": np.concatenate([normal(4, 300, 4), anchors()[..., 4:]], -1),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_points_fall_with_noise(name: str) -> None:
    array = OUTPUTS[name]
    noise = RNG.standard_normal(array.shape) * array.std((0, *range(1, array.ndim - 1)), keepdims=True)
    found = []
    for level in (0, 0.05, 0.2, 0.8, 3):
        noisy = array + level * noise
        if name in ("tags", "prob"):
            noisy = np.clip(noisy, 0, 1)
        found.append(points({name: array}, {name: noisy.astype(np.float32)}))
    assert found[0] == pytest.approx(100, abs=1e-9)
    assert found == sorted(found, reverse=True) and found[1] > found[-1] + 20, found


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_dead_model_has_few_points(name: str) -> None:
    array = OUTPUTS[name]
    assert points({name: array}, {name: np.zeros_like(array)}) < 60
    assert points({name: array}, {name: np.full_like(array, np.nan)}) < 60


def test_classes_may_be_on_any_axis() -> None:
    a, b = 3 * normal(8, 6, 40), 3 * normal(8, 6, 40)
    b = a + 0.3 * b
    one = points({"y": a}, {"y": b}, y=Hint(1))
    other = points({"y": a.transpose(0, 2, 1)}, {"y": b.transpose(0, 2, 1)}, y=Hint(2))
    assert one == pytest.approx(other) and 40 < one < 99


def test_points_of_classes_are_the_answers_that_stay() -> None:
    sure = np.float32(50) * np.eye(10, dtype=np.float32)[RNG.integers(0, 10, 100)]
    wrong = sure.copy()
    wrong[:20] = np.roll(wrong[:20], 1, axis=1)
    assert points({"logits": sure}, {"logits": wrong}) == pytest.approx(80, abs=1e-6)


def test_a_background_does_not_hide_what_is_on_it() -> None:
    a = np.zeros((4, 2, 32, 32), np.float32)
    a[:, 0], a[:, 0, 8:12, 8:12], a[:, 1, 8:12, 8:12] = 9, -9, 9
    gone = a.copy()
    gone[:, 0], gone[:, 1] = 9, 0
    assert points({"seg": a}, {"seg": gone}) < 92  # 1.6 % of the pixels changed
    assert points({"seg": a}, {"seg": gone}) < points({"seg": a}, {"seg": a * np.float32(0.9)})


@pytest.mark.parametrize("name", ["detections", "offsets"])
def test_the_order_of_anchors_does_not_matter(name: str) -> None:
    a = OUTPUTS[name]
    b = a * np.float32(1 + 0.01 * RNG.standard_normal(a.shape))
    order = RNG.permutation(a.shape[1])
    one, other = points({"y": a}, {"y": b}), points({"y": a[:, order]}, {"y": b[:, order]})
    assert one == pytest.approx(other, abs=1e-6) and 60 < one < 100


@pytest.mark.parametrize("name", ["detections", "offsets"])
def test_lost_class_scores_show_beside_large_boxes(name: str) -> None:
    a = OUTPUTS[name]
    lost = a.copy()
    lost[..., 4:] *= np.float32(0.05)
    if name == "detections":
        assert a.ravel() @ lost.ravel() / np.linalg.norm(a) / np.linalg.norm(lost) > 0.999
    assert points({"y": a}, {"y": lost}) < 20


def test_boxes_that_move_away_are_lost_and_selected_rows_may_swap() -> None:
    a = OUTPUTS["detections"]
    moved = a.copy()
    moved[..., :2] += 200
    assert points({"y": a}, {"y": moved}) < 15
    boxes = np.concatenate([RNG.uniform(0, 500, (20, 2)), RNG.uniform(520, 640, (20, 2))], -1)
    table = np.concatenate([boxes, RNG.uniform(0.2, 0.99, (20, 1)), RNG.integers(0, 3, (20, 1))], -1)
    rows = table.astype(np.float32)[None]
    hints = {"y": Hint(None, listed=True)}
    assert points({"y": rows}, {"y": rows[:, ::-1]}, **hints) == pytest.approx(100)
    assert 40 < points({"y": rows}, {"y": rows[:, :12]}, **hints) < 95


def test_sequences_are_read_as_they_are_decoded() -> None:
    """The same text at other positions is the same answer: half of the points."""
    classes = np.array([[0, 0, 3, 3, 0, 5, 0, 7, 0, 0, 0, 0]] * 6)
    shifted = np.roll(classes, 1, axis=1)
    other = np.where(classes == 5, 6, classes)
    a, b, c = (np.float32(9) * np.eye(8, dtype=np.float32)[x] for x in (classes, shifted, other))
    assert points({"logits": a}, {"logits": a}, logits=Hint(2)) == 100
    assert points({"logits": a}, {"logits": b}, logits=Hint(2)) > 60
    assert points({"logits": a}, {"logits": c}, logits=Hint(2)) < 85
    assert decoded(classes[0], 0) == [3, 5, 7]
    assert edit_distance([], [1, 2]) == 2
    assert edit_distance([1, 2, 3], [1, 3]) == 1 and edit_distance([1, 2], [2, 1, 4]) == 2


def test_signals_are_measured_by_what_they_add_to_the_input() -> None:
    noisy = normal(4, 1, 16, 16) + 10
    clean = noisy - normal(4, 1, 16, 16) * np.float32(0.1)
    assert points({"y": clean}, {"y": noisy}, {"x": noisy}) == pytest.approx(0, abs=1e-3)
    assert points({"y": clean}, {"y": noisy}) > 80
    large = np.repeat(np.repeat(noisy, 2, 2), 2, 3)
    assert points({"y": large + 1}, {"y": large}, {"x": noisy}) == pytest.approx(0, abs=1e-3)


def test_embeddings_ignore_scale_and_count_neighbours() -> None:
    a = normal(64, 32)
    assert points({"embedding": a}, {"embedding": 3 * a}) == pytest.approx(100)
    assert points({"embedding": a}, {"embedding": a[RNG.permutation(64)]}) < 25


def test_numbers_have_a_scale_per_channel() -> None:
    a = np.concatenate([1000 * normal(64, 1), normal(64, 1)], -1) + np.float32([1e4, 0])
    b = a.copy()
    b[:, 1] = 0
    assert points({"y": a}, {"y": b}) == pytest.approx(50, abs=3)


def test_a_single_score_has_to_follow_even_where_its_class_never_changes() -> None:
    quiet = np.float32(RNG.uniform(0.001, 0.05, (64, 1)))
    assert points({"prob": quiet}, {"prob": quiet}) == pytest.approx(100)
    assert points({"prob": quiet}, {"prob": quiet[::-1]}) < 75


def test_lists_of_labels_are_aligned() -> None:
    a = np.arange(10)
    assert points({"y": a}, {"y": a}) == 100
    reading = read_outputs([{"y": a}], [], {}, {})[0]
    measure = measure_of(reading, [{"y": a}])
    measure.add({}, {"y": a}, {"y": a[1:]})
    assert measure.share() == pytest.approx(0.9) and "differ" in measure.lost()


def test_matching_takes_each_box_once() -> None:
    box = np.array([[0.0, 0, 10, 10]])
    partner, overlap = match_boxes(box, np.array([1]), np.repeat(box, 2, 0), np.array([1, 1]))
    assert partner.tolist() == [0, -1] and overlap[0] == pytest.approx(1)
    assert match_boxes(box, np.array([1]), box, np.array([2]))[0].tolist() == [-1]


@pytest.mark.parametrize(
    ("points", "least", "text"),
    [(46.02, 95, "46.0 points"), (99.963, 99.99, "99.96 points"), (99.98996, 99.99, "99.98996 points"), (99, 95, "")],
)
def test_a_shortfall_shows_the_digits_that_are_missing(points: float, least: float, text: str) -> None:
    assert text in Fidelity([], 1, "data", points=points).shortfall(least)
