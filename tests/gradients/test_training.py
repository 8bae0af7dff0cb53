"""Losses, steps, the optimiser and the loop."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from build import Net
from differences import static
from threadpoolctl import threadpool_info

from onnxprune.gradients.backward import training_graph
from onnxprune.gradients.static import StaticGraph
from onnxprune.gradients.tape import Tape
from onnxprune.training.augment import Augmentation, image_axes
from onnxprune.training.curvature import Curvature
from onnxprune.training.loop import Course, Effort, train
from onnxprune.training.losses import Losses, deviation, divergence, surprise
from onnxprune.training.parameters import Head, bottlenecks, heads, trainable
from onnxprune.training.step import Adam, Parameters, Step, rate_at, step_sizes

RNG = np.random.default_rng(0)
X = RNG.standard_normal((16, 6)).astype(np.float32)


def mlp(seed: int = 0) -> StaticGraph:
    net = Net(18, seed=seed)
    x = net.input("x", ["N", 6])
    y = net.op("Relu", net.linear(x, 6, 8, gemm=True))
    return static(net.model(net.op("Softmax", net.linear(y, 8, 3, gemm=True))), {"x": X})


def value_of(graph: StaticGraph, loss: Any, feed: dict[str, np.ndarray], shape: Any) -> float:
    inputs = {"wanted": (shape, np.dtype(np.float32))}
    training = training_graph(graph, loss, graph.variables, inputs=inputs)
    return Step(training, Parameters({n: graph.constants[n] for n in training.gradients}), threads=1)([feed])


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(e / e.sum(-1, keepdims=True))


def test_losses_equal_their_formulas() -> None:
    graph = mlp()
    (head,) = heads(graph, graph.variables)
    wanted = RNG.standard_normal((16, 3)).astype(np.float32)
    weights = [graph.constants[n].astype(np.float64) for n in sorted(graph.variables)]
    by_shape = {w.shape: w for w in weights}
    scores = np.maximum(X @ by_shape[6, 8] + by_shape[8,], 0) @ by_shape[8, 3] + by_shape[3,]
    p, q = softmax(wanted / 4), softmax(scores / 4)
    feed = {"x": X, "wanted": wanted}
    own = value_of(graph, lambda t: divergence(t, head.tensor, "wanted", 1), feed, (16, 3))
    assert own == pytest.approx(16 * (p * np.log(p / q)).sum(1).mean(), rel=1e-4)
    own = value_of(graph, lambda t: deviation(t, head.tensor, "wanted"), feed, (16, 3))
    assert own == pytest.approx(((scores - wanted) ** 2).sum() / (wanted**2).sum(), rel=1e-4)
    classes = np.eye(3, dtype=np.float32)[RNG.integers(0, 3, 16)]
    losses = Losses({head: "wanted"}, {}, {head: "wanted"}, weight=1.0)
    own = value_of(graph, losses.emit, {"x": X, "wanted": classes}, (16, 3))
    assert own == pytest.approx(-(classes * np.log(softmax(scores))).sum(1).mean(), rel=1e-4)


def test_the_softmax_at_the_end_is_left_out() -> None:
    assert heads(mlp(), mlp().variables)[0].axis == 1
    assert heads(mlp(), mlp().variables)[0].tensor != mlp().outputs[0]


def test_outputs_without_gradients_lead_to_the_tensors_in_front() -> None:
    net = Net(18)
    x = net.input("x", ["N", 6])
    scores = net.linear(x, 6, 3, gemm=True)
    best = net.op("ArgMax", scores, axis=1)
    graph = static(net.model(best), {"x": X})
    assert heads(graph, graph.variables) == [Head(scores, best)]


def test_constants_are_no_parameters() -> None:
    net = Net(18)
    x = net.input("x", ["N", 6])
    mean, table = net.weight(6, name="mean"), net.weight(1, 3, name="table")
    low = net.const(np.full((3,), -9.0), name="low")
    y = net.linear(net.op("Sub", x, mean), 6, 8, gemm=True)
    scale = net.weight(8, name="scale")
    y = net.op("Mul", y, scale)
    y = net.op("Max", net.op("Add", net.linear(y, 8, 3, gemm=True), table), low)
    names, reasons = trainable(static(net.model(y), {"x": X}))
    assert {"mean"} <= set(reasons) and "scale" in names and "table" in names
    assert len(names) == 7 - ("low" in reasons)


def test_tables_are_no_parameters() -> None:
    """Positions, rotations, masks and strides behind the last layer keep their values; biases are trained."""
    net = Net(18)
    x = net.input("x", ["N", 4, 6])
    angles = net.op("MatMul", net.weight(3, 1, name="frequencies"), net.const(np.ones((1, 4), np.float32), name="at"))
    table = net.op("Transpose", net.op("Concat", angles, angles, axis=0))
    q = net.op("Mul", net.op("MatMul", x, net.weight(6, 6, name="wq")), net.op("Cos", table))
    k = net.op("Mul", net.op("MatMul", x, net.weight(6, 6, name="wk")), net.weight(4, 6, name="rotary"))
    scores = net.op("Add", net.op("MatMul", q, net.op("Transpose", k, perm=[0, 2, 1])), net.weight(4, 4, name="mask"))
    y = net.op("MatMul", net.op("MatMul", net.op("Softmax", scores), x), net.weight(6, 5, name="last"))
    y = net.op("Mul", net.op("Add", y, net.weight(5, name="bias")), net.weight(4, 1, name="strides"))
    names, _ = trainable(static(net.model(y), {"x": X[:8].reshape(2, 4, 6)}))
    assert set(names) == {"wq", "wk", "last", "bias"}


def test_blocks_end_where_everything_passes() -> None:
    net = Net(18)
    x = net.input("x", ["N", 3, 8, 8])
    stem = net.op("Relu", net.conv(x, 3, 4))
    inner = net.op("Relu", net.conv(stem, 4, 4))
    block = net.op("Relu", net.op("Add", net.conv(inner, 4, 4), stem))
    y = net.conv(block, 4, 2)
    feed = {"x": RNG.standard_normal((2, 3, 8, 8)).astype(np.float32)}
    assert bottlenecks(static(net.model(y), feed)) == [stem, block]


def distilled(
    steps: int | None = 60,
    judge: Any = None,
    rate: float = 2e-2,
    error: float = 0.0,
    keeper: Any = None,
    draws: Any = None,
    least_gain: float = 0.0,
    **effort: Any,
) -> tuple[Course, Parameters, Any]:
    """Train one network to answer as another one does."""
    student, teacher = mlp(0), mlp(1)
    (head,) = heads(student, student.variables)
    target = RNG.standard_normal((16, 3)).astype(np.float32)
    names, _ = trainable(student)
    losses = Losses({head: "wanted"}, {}, {})
    inputs = {"wanted": ((16, 3), np.dtype(np.float32))}
    training = training_graph(student, losses.emit, names, inputs=inputs)
    parameters = Parameters({n: student.constants[n] for n in training.gradients})
    step = Step(training, parameters, threads=1)
    call = {"x": X, "wanted": target}
    sizes, _ = step_sizes(step, [call], parameters, 0)
    judge = judge or (lambda: step([call]))
    adam = Adam(parameters, sizes)
    draw = draws or (lambda number: [call])
    more = {"keeper": keeper, "least_gain": least_gain}
    course = train(step, adam, parameters, draw, judge, Effort(steps, **effort), rate, lambda _: error, **more)
    assert teacher.variables
    return course, parameters, step([call])


def test_training_lowers_the_loss_and_keeps_the_best() -> None:
    course, _, final = distilled()
    assert course.steps == 60 and course.losses[-1] < 0.5 * course.losses[0]
    assert course.curve[0][0] == 0 and len(course.curve) == 11
    assert final == pytest.approx(min(value for _, value in course.curve), rel=1e-5)


def test_the_same_seed_gives_the_same_weights() -> None:
    global RNG
    RNG = np.random.default_rng(5)
    one = distilled(20)[1].vector
    RNG = np.random.default_rng(5)
    np.testing.assert_array_equal(one, distilled(20)[1].vector)


def test_growth_is_taken_back_and_ends_it() -> None:
    values = iter([1.0, *(10.0 + k for k in range(100))])
    course, parameters, _ = distilled(60, judge=lambda: next(values))
    assert course.best == 0 and "grew" in course.stopped and course.steps < 60
    start, names = mlp(0), list(parameters.spans)
    np.testing.assert_array_equal(parameters.views(parameters.vector)[names[0]], start.constants[names[0]])


def test_the_end_is_kept_where_it_is_as_good_as_the_best() -> None:
    values = [1.0, 0.5, 0.3, 0.6, 0.6, 0.6, 0.6, 0.5, 0.5, 0.4, 0.35]
    for error, best in ((0.1, 60), (0.01, 12)):
        judged = iter(values)
        course, _, _ = distilled(60, judge=lambda judged=judged: next(judged), error=error)
        assert course.best == best
    judged = iter([0.3, *values[1:]])
    assert distilled(60, judge=lambda: next(judged), error=1.0)[0].best == 0


def test_numbers_that_are_none_are_taken_back() -> None:
    course, parameters, _ = distilled(60, judge=lambda: 1.0, rate=float("nan"))
    assert course.best == 0 and np.isfinite(parameters.vector).all()


def test_time_ends_it() -> None:
    course, _, _ = distilled(None, seconds=0.2)
    assert course.steps > 0 and 0.2 <= course.seconds < 20


def test_an_interruption_keeps_the_best() -> None:
    calls: list[int] = []

    def judge() -> float:
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return 1.0 / len(calls)

    before = signal.getsignal(signal.SIGINT)
    course, _, _ = distilled(60, judge=judge)
    assert course.stopped == "interrupted" and course.steps < 60 and course.best > 0
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupted_training_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    class Kept(dict):
        def load(self) -> Any:
            return self or None

        def save(self, state: Any) -> None:
            self.update({name: np.copy(value) for name, value in state.items()})

    def draws(number: int) -> Any:
        if number == 31 and not broken:
            broken.append(number)
            raise KeyboardInterrupt
        return [{"x": X * np.float32(1 + number / 100), "wanted": np.ones((16, 3), np.float32)}]

    def trained(keeper: Any) -> Any:
        monkeypatch.setitem(globals(), "RNG", np.random.default_rng(5))
        return distilled(60, draws=draws, keeper=keeper)

    broken = [0]
    whole, weights, _ = trained(None)
    broken.clear()
    kept = Kept()
    with pytest.raises(KeyboardInterrupt):
        trained(kept)
    assert int(kept["numbers"][0]) == 30
    rest, resumed, _ = trained(kept)
    assert (rest.losses, rest.best, not kept) == (whole.losses, whole.best, True)
    np.testing.assert_array_equal(resumed.vector, weights.vector)


def test_calls_add_up_to_one_step() -> None:
    graph = mlp()
    training = training_graph(graph, lambda t: t.total(graph.outputs[0]), graph.variables)
    parameters = Parameters({n: graph.constants[n] for n in training.gradients})
    step = Step(training, parameters, threads=1)
    parts = []
    for scale in (1.0, 2.0):
        step([{"x": X * np.float32(scale)}])
        parts.append(step.gradient.copy())
    step([{"x": X}, {"x": X * np.float32(2)}])
    np.testing.assert_allclose(step.gradient, np.mean(parts, axis=0), rtol=1e-5, atol=1e-7)


def test_steep_weights_get_small_steps() -> None:
    """Two large weights that cancel: the loss depends on them far more steeply than on others."""
    net = Net(18)
    x = net.input("x", ["N", 6])
    y = net.op("MatMul", x, net.const(1e3 * np.ones((6, 4)), name="steep"))
    y = net.op("Sub", y, net.const(1e3 * np.ones(4), name="shift"))
    y = net.op("MatMul", net.op("Tanh", net.op("Mul", y, net.const(np.full(4, 1e-3), name="small"))), net.weight(4, 5))
    for _ in range(3):
        y = net.op("Tanh", net.op("MatMul", y, net.weight(5, 5)))
    graph = static(net.model(y), {"x": X})
    (head,) = heads(graph, graph.variables)
    inputs = {"wanted": ((16, 5), np.dtype(np.float32))}
    training = training_graph(graph, Losses({head: "wanted"}, {}, {}).emit, trainable(graph)[0], inputs=inputs)
    parameters = Parameters({n: graph.constants[n] for n in training.gradients})
    call = {"x": X, "wanted": RNG.standard_normal((16, 5)).astype(np.float32)}
    start = parameters.vector.copy()
    sizes, doubling = step_sizes(Step(training, parameters, threads=1), [call], parameters, 0)
    assert (sizes <= parameters.scales() * (1 + 1e-6)).all() and 0 < doubling < np.inf
    np.testing.assert_array_equal(parameters.vector, start)


def test_a_detector_is_fitted_by_its_boxes_and_the_logits_of_its_scores() -> None:
    """The output of a YOLO is joined from them, decoded boxes beside a selection of probabilities."""
    net = Net(18)
    x = net.input("x", ["N", 2, 4])
    maps = [net.op("MatMul", x, net.weight(4, 6)) for _ in range(2)]
    probabilities = net.op("Sigmoid", net.op("Concat", *maps, axis=1))
    boxes = net.op("Mul", net.slice(probabilities, 0, 4, 2), net.const(np.float32(8)))
    scores = net.transpose(net.slice(probabilities, 4, 6, 2), 1, 0, 2)
    y = net.op("Concat", net.transpose(boxes, 1, 0, 2), scores, axis=2)
    data = RNG.standard_normal((3, 2, 4)).astype(np.float32)
    graph = static(net.model(y), {"x": data})
    assert [h.tensor for h in heads(graph, graph.variables)] == [y]
    fitted = {bool(h.logits): h for h in heads(graph, graph.variables, by_parts=True)}
    assert len(fitted) == 2 and graph.shapes[fitted[False].tensor] == (3, 4, 4)
    shape, positions = graph.shapes[fitted[True].tensor], fitted[True].positions
    assert positions is not None and positions.shape == shape and len(np.unique(positions)) == positions.size
    assert fitted[False].positions is None and fitted[True] == replace(fitted[True], positions=None)
    wanted = RNG.standard_normal(shape).astype(np.float32)
    losses = Losses({fitted[True]: "wanted"}, {}, {})
    own = value_of(graph, losses.emit, {"x": data, "wanted": wanted}, shape)
    logits = np.concatenate([data @ graph.constants[w] for w in graph.variables], 1)[:, :, 4:]
    logits = logits if logits.shape == shape else logits.transpose(1, 0, 2)
    p, q = 1 / (1 + np.exp(-wanted.astype(float))), 1 / (1 + np.exp(-logits.astype(float)))
    nats = (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).sum()
    assert own == pytest.approx(nats / (1 + np.minimum(p, 1 - p).sum()), rel=1e-4)


def test_few_objects_count_among_many_places_without_any() -> None:
    """A lost object costs as much in a thousand places as in ten, and an unsaturated one has a gradient."""
    values = []
    for size in (10, 1000):
        wanted = np.full((1, size), -9, np.float32)
        wanted[0, 0] = 3
        net = Net(18)
        y = net.op("Mul", net.input("x", [1, size]), net.weight(1, size))
        graph = static(net.model(y), {"x": wanted})
        lost = {"x": np.full_like(wanted, -9) / graph.constants[graph.variables[0]], "wanted": wanted}
        values.append(value_of(graph, lambda t, y=y: surprise(t, y, "wanted"), lost, wanted.shape))
    assert values[0] > 5 and values[1] == pytest.approx(values[0], rel=0.15)


def test_steps_along_the_axes_of_the_inputs_learn_what_adam_does_not() -> None:
    """Two inputs that are nearly equal, and a target that depends on their difference."""
    rng = np.random.default_rng(3)
    common, single = rng.standard_normal((2, 64, 1))
    data = np.concatenate([common, common + 0.2 * single], 1).astype(np.float32)
    target = single.astype(np.float32) + np.zeros((64, 3), np.float32)
    net = Net(18)
    y = net.linear(net.input("x", ["N", 2]), 2, 3, gemm=True)
    graph = static(net.model(y), {"x": data})
    loss = Losses({Head(y, y): "wanted"}, {}, {})
    training = training_graph(graph, loss.emit, graph.variables, inputs={"wanted": ((64, 3), np.dtype(np.float32))})
    call, ends = {"x": data, "wanted": target}, []
    for turned in (False, True):
        parameters = Parameters({n: graph.constants[n] for n in training.gradients})
        step = Step(training, parameters, threads=1)
        curvature = Curvature.measured(graph, parameters, [call] if turned else [])
        assert len(curvature.axes) == turned
        moved = rng.standard_normal(parameters.vector.size).astype(np.float32)
        for own in curvature.axes.values():
            np.testing.assert_allclose(own.vectors @ own.vectors.swapaxes(1, 2), np.eye(2)[None], atol=1e-5)
        assert curvature.back(curvature.turned(moved)).shape == moved.shape
        adam = Adam(parameters, parameters.scales(), coordinates=curvature)
        for _ in range(100):
            step([call])
            adam.update(step.gradient, 0.02)
        ends.append(step([call]))
    assert ends[1] < 0.5 * ends[0], ends


def test_rates_warm_up_and_fall() -> None:
    assert rate_at(0.15, 1.0) == pytest.approx(1.0)
    assert rate_at(0.0, 1.0) < 0.01 and rate_at(1.0, 1.0) == pytest.approx(0.0, abs=1e-12)


def test_images_are_varied_where_the_model_does_not_mind() -> None:
    images = {"x": RNG.random((4, 3, 24, 24), dtype=np.float32)}
    assert image_axes(images["x"]) == (2, 3) and image_axes(images["x"].transpose(0, 2, 3, 1)) == (1, 2)
    assert image_axes(X) is None

    def mean(feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        return [feed["x"].mean((2, 3))]

    def corner(feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        return [np.sin(100 * feed["x"][:, :, 0, :2])]

    suited = Augmentation.suited([images], mean)
    assert suited.name == "shifts and reflections"
    assert Augmentation.suited([images], corner).name == ""
    assert Augmentation.suited([{"x": X}], lambda f: [f["x"]]).name == ""
    places = Augmentation.suited([images], lambda f: [f["x"]])  # answers at every position move with the image
    assert places.name == "shifts and reflections"
    varied = suited(images, np.random.default_rng(0))["x"]
    assert varied.shape == images["x"].shape and not np.array_equal(varied, images["x"])


def test_frozen_layers_are_left_alone() -> None:
    graph = mlp()
    names, reasons = trainable(replace(graph, kinds={n: np.dtype(np.float16) for n in graph.kinds}))
    assert not names and all("float32 alone" in why for why in reasons.values())
    assert isinstance(Tape({}, {}), Tape)


def test_distances_that_are_no_numbers_count_as_growth() -> None:
    values = iter([1.0, *[float("nan")] * 100])
    course, _, _ = distilled(60, judge=lambda: next(values))
    assert course.best == 0 and "grew" in course.stopped


def test_products_of_the_optimiser_take_one_thread() -> None:
    """More of them would spin on the cores that the step needs."""
    threads: list[int] = []

    def judge() -> float:
        threads.extend(x["num_threads"] for x in threadpool_info() if x["user_api"] == "blas")
        return 1.0

    distilled(10, judge=judge)
    assert set(threads[len(threads) // 2 :]) == {1}


def test_a_training_without_gain_ends_when_its_patience_does() -> None:
    values = iter([1.0, *(1.1 for _ in range(100))])
    course, parameters, _ = distilled(60, judge=lambda: next(values), patience=0.5)
    assert (course.steps, course.best) == (30, 0) and "closer" in course.stopped
    start, name = mlp(0), next(iter(parameters.spans))
    np.testing.assert_array_equal(parameters.views(parameters.vector)[name], start.constants[name])
    late = iter([1.0, 1.1, 1.1, 1.1, 0.9, *(1.1 for _ in range(100))])
    course, _, _ = distilled(60, judge=lambda: next(late), patience=0.5)
    assert (course.steps, course.best) == (60, 24)
    assert Effort(40, patience=0.5).part(0.25) == Effort(10, patience=0.5)


def test_a_gain_of_next_to_nothing_is_none() -> None:
    values = [1.0, 0.99, 0.99, 0.985, 0.99, 0.95, 0.94, 0.96, 0.95, 0.95, 0.98]
    for least, best in ((0.1, 0), (0.02, 36), (0.001, 36)):
        judged = iter(values)
        course, parameters, _ = distilled(60, judge=lambda judged=judged: next(judged), least_gain=least)
        assert course.best == best
        if not best:
            start, name = mlp(0), next(iter(parameters.spans))
            np.testing.assert_array_equal(parameters.views(parameters.vector)[name], start.constants[name])
