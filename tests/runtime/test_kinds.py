"""What each output of a model is taken for: by its values, its name, the graph, and by what a user sets."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx.parser
import pytest

from onnxprune.channels.analysis import Analysis
from onnxprune.runtime.fidelity import Hint, hints_of
from onnxprune.runtime.fidelity.kinds import Numbers, Reading, as_scores, read_outputs, softmax
from onnxprune.runtime.sessions import Array, Feed

RNG = np.random.default_rng(0)
Draw = Callable[[], Array]


def read(outputs: Feed, inputs: Feed | None = None, **hints: Hint) -> list[Reading]:
    return read_outputs([outputs], [inputs or {"x": np.zeros((8, 3, 32, 32), np.float32)}], hints, {})


def normal(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(np.float32)


def uniform(*shape: int) -> Array:
    return RNG.uniform(0, 1, shape).astype(np.float32)


def rare(*shape: int) -> Array:
    """Scores of which few are high."""
    return (uniform(*shape) ** 8).astype(np.float32)


def pixels(*shape: int, centre: bool = False) -> Array:
    """Boxes all over an image of 640 pixels."""
    start, size = RNG.uniform(0, 560, (*shape, 2)), RNG.uniform(10, 80, (*shape, 2))
    return np.concatenate([start, size if centre else start + size], -1).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "array", "kind", "axis", "form"),
    [
        ("logits", normal(8, 10), "classes", 1, "logits"),
        ("y", normal(8, 10), "classes", 1, "logits"),
        ("y", softmax(normal(8, 10)), "classes", 1, "probabilities"),
        ("y", np.clip(normal(8, 10) * 40, -128, 127).astype(np.int8), "classes", 1, "codes"),
        ("tags", uniform(8, 20), "classes", 1, "independent"),
        ("y", normal(8, 128), "embedding", 1, ""),
        ("features", normal(8, 10), "embedding", 1, ""),
        ("y", normal(8, 20) + np.float32([9, *[0] * 19]), "values", 1, ""),  # always the same largest: quantities
        ("y", normal(8, 1), "values", 1, ""),
        ("y", RNG.integers(0, 9, (8, 3)), "labels", None, ""),
        ("y", normal(8, 12, 40), "sequence", 2, "logits"),
        ("y", normal(8, 3, 64, 64), "signal", 1, ""),
        ("y", normal(8, 1, 64, 64), "signal", 1, ""),
        ("mask", uniform(8, 1, 64, 64), "classes", 1, "independent"),
        ("y", normal(8, 21, 16, 16), "classes", 1, "logits"),
        ("seg", normal(8, 3, 64, 64), "classes", 1, "logits"),
        ("y", normal(8, 256, 8, 8), "embedding", 1, ""),
        ("wave", normal(8, 16000), "signal", 1, ""),
    ],
)
def test_single_outputs(name: str, array: Array, kind: str, axis: int | None, form: str) -> None:
    (reading,) = read({name: array})
    assert (reading.kind, reading.part.axis, reading.part.form) == (kind, axis, form)


def test_an_output_of_its_inputs_shape_is_a_signal() -> None:
    (reading,) = read({"y": normal(8, 640)}, {"x": normal(8, 640)})
    assert reading.kind == "signal"


def test_independent_logits_are_below_zero_almost_everywhere() -> None:
    logits = normal(4, 50, 2) - 3
    logits[:, ::7, 0] = 4
    (reading,) = read({"y": logits})
    assert reading.part.form == "binary logits"


@pytest.mark.parametrize(
    ("ends", "kind", "form"), [((), "sequence", "logits"), (("Sigmoid",), "classes", "binary logits")]
)
def test_logits_of_an_alphabet_may_all_lie_below_zero(ends: tuple[str, ...], kind: str, form: str) -> None:
    logits = 30 * normal(4, 18, 68) - 70
    (reading,) = read({"logits": logits}, logits=Hint(2, frozenset(ends)))
    assert (reading.kind, reading.part.form) == (kind, form)


def test_states_are_no_answers() -> None:
    state = normal(2, 1, 16)
    readings = read({"y": uniform(1, 1), "hn": state}, {"x": normal(1, 8), "h0": state})
    assert [reading.kind for reading in readings] == ["values", "state"] or readings[1].kind == "state"
    (alone,) = read({"hn": state}, {"h0": state})
    assert alone.kind == "values"  # nothing else is there to judge by


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("objectness", [False, True])
def test_boxes_and_scores_in_one_output(transposed: bool, objectness: bool) -> None:
    scores = rare(4, 500, 6)
    if objectness:
        scores[..., 0] = np.where(scores[..., 1:].max(-1) > 0.3, 0.9, 0.01)
    else:
        scores[..., 0] = np.where(scores[..., 1:].max(-1) > 0.1, 0.0, scores[..., 0])
    joint = np.concatenate([pixels(4, 500, centre=True), scores], -1)
    (reading,) = read({"out": joint.transpose(0, 2, 1) if transposed else joint}, out=Hint(1 if transposed else 2))
    (level,) = reading.levels
    assert reading.kind == "detections" and level.form == "centre" and not level.listed
    spans = [part.columns for part in level.scores]
    assert spans == ([(4, 5), (5, 10)] if objectness else [(4, 10)])


def test_offsets_from_anchors_are_no_rectangles() -> None:
    joint = np.concatenate([normal(4, 300, 2), np.abs(normal(4, 300, 2)) + 0.5, rare(4, 300, 3)], -1)
    (reading,) = read({"out": joint}, out=Hint(2))
    assert reading.levels[0].form == "raw"


def test_boxes_and_scores_in_several_outputs() -> None:
    chances = softmax(normal(4, 100, 21) + np.float32([6, *[0] * 20]))
    (reading,) = read({"scores": chances, "boxes": pixels(4, 100) / 640})
    (level,) = reading.levels
    assert level.form == "corners" and level.scores[0].background == 0 and level.scores[0].form == "probabilities"
    logits, boxes = normal(4, 100, 92) + np.float32([*[0] * 91, 9]), pixels(4, 100, centre=True) / 640
    (reading,) = read({"pred_logits": logits, "pred_boxes": boxes})
    (level,) = reading.levels
    assert level.form == "centre" and (level.scores[0].form, level.scores[0].background) == ("logits", 91)


def test_levels_with_landmarks_are_one_answer() -> None:
    outputs: Feed = {}
    for level, anchors in ((8, 400), (16, 100), (32, 25)):
        outputs[f"cls_{level}"], outputs[f"obj_{level}"] = uniform(4, anchors, 1), rare(4, anchors, 1)
        outputs[f"bbox_{level}"], outputs[f"kps_{level}"] = normal(4, anchors, 4), normal(4, anchors, 10)
    (reading,) = read(outputs)
    assert len(reading.levels) == 3 and set(reading.outputs) == set(outputs)
    assert all(len(level.scores) == 2 and len(level.extras) == 1 for level in reading.levels)


def test_raw_heads_of_a_detector() -> None:
    outputs = {}
    for size in (32, 16, 8):
        head = normal(2, 3 * 9, size, size)
        head[:, 4::9] -= 5
        outputs[f"p{size}"] = head
    (reading,) = read(outputs)
    assert len(reading.levels) == 9 and reading.levels[1].scores[0].columns == (13, 14)


@pytest.mark.parametrize("order", ["xyxy score label", "batch xyxy label score", "image label score xyxy"])
def test_lists_of_selected_detections(order: str) -> None:
    boxes, scores = pixels(50), rare(50, 1)
    labels, image = RNG.integers(0, 5, (50, 1)), np.zeros((50, 1))
    parts = {"xyxy": boxes, "score": scores, "label": labels, "batch": image, "image": image}
    table = np.concatenate([parts[word] for word in order.split()], -1).astype(np.float32)
    (reading,) = read({"out": table}, out=Hint(None, listed=True))
    (level,) = reading.levels
    assert level.listed and (level.labels[0].of({"out": table})[0, :, 0] == labels[:, 0]).all()
    assert np.allclose(level.boxes.of({"out": table})[0], boxes)


def test_lists_in_several_outputs() -> None:
    outputs = {"boxes": pixels(30), "labels": RNG.integers(0, 9, 30), "scores": rare(30)}
    (reading,) = read(outputs, **dict.fromkeys(outputs, Hint(None, listed=True)))
    (level,) = reading.levels
    assert level.listed and level.labels[0].name == "labels" and level.scores[0].name == "scores"
    counted = {"boxes": pixels(2, 40), "scores": rare(2, 40), "classes": np.ones((2, 40)), "num": np.ones(2)}
    (reading,) = read(counted)
    assert set(reading.outputs) == {"boxes", "scores", "classes"}


def test_a_user_overrules() -> None:
    values = normal(8, 10, 12)
    (reading,) = read_outputs([{"y": values}], [{"x": values}], {}, {"y": ("classes", 1)})
    assert (reading.kind, reading.part.axis, reading.set) == ("classes", 1, True)
    joint = np.concatenate([uniform(2, 50, 4), rare(2, 50, 3)], -1)
    (reading,) = read_outputs([{"y": joint}], [], {}, {"y": ("detections", -1)})
    assert reading.kind == "detections" and reading.set


def test_the_graph_shows_the_axis_of_classes() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    agraph (float[N,3,6,6] x) => (float[N,7,6] y, float[N,5] z)
    <float[7,3,1,1] w = {%s}, float[36,5] m = {%s}, int64[2] s = {-1, 36}, float[1,3,1,1] v = {1, 1, 1}> {
        a = Conv(x, w)  y = ReduceMean<axes = [2], keepdims = 0>(a)
        b = Conv(x, v)  c = Reshape(b, s)  d = MatMul(c, m)  z = Sigmoid(d) }"""
    numbers = [", ".join(f"{v:.3f}" for v in RNG.standard_normal(n)) for n in (21, 180)]
    hints = hints_of(Analysis(onnx.parser.parse_model(text % tuple(numbers))))
    assert hints["y"].axis == 1 and "ReduceMean" in hints["y"].ends
    assert hints["z"].axis == 1 and "Sigmoid" in hints["z"].ends and not hints["z"].listed


def test_a_constant_of_places_is_no_axis_of_classes() -> None:
    """Offsets of cells differ along the axis of cells; channels are what layers made, on axis 1."""
    text = """<ir_version: 8, opset_import: ["" : 17]>
    detector (float[N,3,4,4] x) => (float[N,6,16] y)
    <float[6,3,1,1] w = {%s}, float[1,2,16] cells = {%s}, int64[3] shape = {0, 6, -1}, int64[2] parts = {2, 4}> {
        maps = Conv(x, w)
        rows = Reshape(maps, shape)
        raw, rest = Split<axis = 1>(rows, parts)
        centres = Add(raw, cells)
        y = Concat<axis = 1>(centres, rest)
    }"""
    numbers = [", ".join(map(str, range(n))) for n in (18, 32)]
    assert hints_of(Analysis(onnx.parser.parse_model(text % tuple(numbers))))["y"].axis == 1


def test_scores_of_every_form() -> None:
    values: Numbers = np.array([[-1000.0, 0.0, np.nan]])
    assert as_scores(values, "logits") == pytest.approx(np.array([[0, 1, 0]]))
    assert as_scores(values, "binary logits") == pytest.approx(np.array([[0, 0.5, 0]]))
    assert as_scores(values, "independent") == pytest.approx(np.zeros((1, 3)))
    assert as_scores(np.array([[-128.0, 127.0]]), "codes") == pytest.approx(np.array([[0, 1]]))
