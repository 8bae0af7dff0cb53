"""Capturing: as few passes as memory allows, any batch size, and interrupted runs that go on where they were."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from build import Net
from numpy.typing import NDArray

from onnxprune import ModelError, UsageError
from onnxprune.graph.probes import InputSpec
from onnxprune.importance import statistics
from onnxprune.importance.slots import CapturedMaps
from onnxprune.passes.calibrate import captured_maps
from onnxprune.pipeline import Context, RunSettings
from onnxprune.runtime import capture as module
from onnxprune.runtime import sessions
from onnxprune.runtime.capture import Checkpoint, Request, capture, count, to_maps
from onnxprune.runtime.data import open_data

Array = NDArray[Any]


class Interrupted(Exception):
    """What a data source throws in the middle of a run."""


class Stream:
    """Data that count how often they are gone through, may break off, and start anew on request."""

    def __init__(self, samples: int, *, seed: int = 0, scale: float = 1.0) -> None:
        self.total, self.seed, self.scale = samples, seed, scale
        self.passes, self.given, self.until = 0, 0, 1 << 30

    def __iter__(self) -> Iterator[dict[str, Array]]:
        self.passes += 1
        rng = np.random.default_rng(self.seed)
        for number in range(self.total):
            if number >= self.until and self.passes > 1:  # the first pass is the fingerprint's
                raise Interrupted
            self.given += 1
            yield {"x": self.scale * rng.standard_normal((1, 3, 6, 6)).astype(np.float32)}


def network(width: int = 8, seed: int = 0) -> onnx.ModelProto:
    net = Net(17, seed=seed)
    y = net.op("Relu", net.conv(net.input("x", ["N", 3, 6, 6]), 3, width))
    y = net.op("Relu", net.conv(y, width, width))
    return net.model(net.conv(y, width, 4))


def taken(
    data: Any, model: onnx.ModelProto | None = None, needs: tuple[str, ...] = ("moments", "gram"), **settings: Any
) -> CapturedMaps:
    context = Context.of(network() if model is None else model, RunSettings(data=data, **settings))
    analysis = context.analysis
    return captured_maps(context, analysis, analysis.units.groups, needs)


def same(left: CapturedMaps, right: CapturedMaps, exact: bool = True) -> bool:
    pairs = [(left.maps, right.maps), (left.columns, right.columns)]
    return left.samples == right.samples and all(
        mine.keys() == theirs.keys()
        and all(
            np.array_equal(mine[k][n], theirs[k][n])
            if exact
            else np.allclose(mine[k][n], theirs[k][n], rtol=1e-5, atol=1e-6)
            for k in mine
            for n in mine[k]
        )
        for mine, theirs in pairs
    )


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Samples of every call of the model, in order."""
    made: list[int] = []
    run = module.run

    def spy(session: Any, feed: dict[str, Array]) -> Any:
        made.append(len(feed["x"]))
        return run(session, feed)

    monkeypatch.setattr(module, "run", spy)
    return made


# -- passes and batches ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 4, 16, 100])
def test_batch_sizes_do_not_matter(batch: int) -> None:
    assert same(taken(Stream(21)), taken(Stream(21), batch_size=batch), exact=False)


def test_small_memory_takes_several_passes_to_the_same_result(
    monkeypatch: pytest.MonkeyPatch, calls: list[int]
) -> None:
    """Room for one tensor at one sample: two passes, sample by sample."""
    whole = taken(Stream(7))
    assert calls == [7]
    calls.clear()
    monkeypatch.setattr("onnxprune.passes.calibration.MEMORY", 4 * 8 * 36)
    data = Stream(7)
    parted = taken(data)
    assert calls == [1] * 14 and data.passes == 2
    assert same(whole, parted, exact=False)


def test_windows_are_laid_out_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = taken(Stream(9))
    monkeypatch.setattr(module, "_ARRANGED", 5000)
    assert same(whole, taken(Stream(9)), exact=False)


def test_small_calls_are_joined_where_that_makes_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """A nuclear norm is one of a batch: that statistic, and any that does not say otherwise, gets each call's own."""
    seen: dict[str, list[int]] = {}
    update = module._update

    def spy(request: Request, value: Array) -> None:
        seen.setdefault(request.name.split()[0], []).append(len(value))
        update(request, value)

    monkeypatch.setattr(module, "_update", spy)
    needs = ("moments", "gram", "similarity", "nuclear")
    joined = taken(Stream(20), needs=needs, batch_size=2)
    assert set(seen["moments"]) == set(seen["gram"]) == set(seen["similarity"]) == {2, 18}
    assert set(seen["nuclear"]) == {2}
    monkeypatch.setattr(module, "_CALLS", 1)
    assert same(joined, taken(Stream(20), needs=needs, batch_size=2), exact=False)


def test_calls_of_several_shapes_are_taken_one_by_one() -> None:
    """Sequences of different lengths cannot be joined."""
    net = Net(17)
    y = net.op("Relu", net.conv(net.input("x", ["N", 3, "H", 6]), 3, 8))
    model = net.model(net.conv(y, 8, 4))
    draw = np.random.default_rng(0)
    calls = [{"x": draw.standard_normal((2, 3, h, 6), np.float32)} for h in (6, 6, 9, 5)]
    found = taken(calls, model, ("moments", "gram"))
    assert found.samples == 8
    statistic = statistics.get("moments")()
    session = module.open_session(module.with_outputs(model, [found.sites[0].tensor]).SerializeToString())
    for call in calls:
        statistic.update(module.run(session, call)[found.sites[0].tensor])
    for name, value in statistic.result().items():
        assert np.allclose(found.maps[found.sites[0].maps_key][name], value, rtol=1e-6, atol=1e-7)


def test_what_is_wrong_shows_in_the_first_call(calls: list[int]) -> None:
    data = {"x": np.full((40, 3, 6, 6), np.finfo(np.float32).max, np.float32)}  # too large to be summed up
    with pytest.raises(ModelError, match=r"Feature map '.*' holds NaN or infinity"):
        taken(data, batch_size=2)
    assert calls == [2]


def test_progress_rises_to_one_over_all_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxprune.passes.calibration.MEMORY", 4 * 8 * 36)
    told: list[float] = []
    taken(
        {"x": np.zeros((5, 3, 6, 6), np.float32)},
        progress=lambda stage, share: told.append(share) if stage == "capture" else None,
    )
    assert told == sorted(told) and told[0] == 0.0 and told[-1] == 1.0 and len(told) > 10


def test_data_without_samples_are_an_error() -> None:
    model = onnx.ModelProto(ir_version=8, opset_import=[onnx.helper.make_opsetid("", 17)])

    class Nothing:
        samples = 0

        def batches(self, batch_size: int | None = None) -> Iterator[dict[str, Array]]:
            return iter(())

    net = Net(17)
    model = net.model(net.op("Relu", net.input("x", ["N", 3])))
    request = Request("m", "x", to_maps((1,)), statistics.get("moments")())
    with pytest.raises(UsageError, match="no samples"):
        capture((model, {}), [request], Nothing(), sizes={})


def test_heavy_weights_are_mapped_from_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, opened = taken(Stream(6)), list[tuple[int, bool]]()

    def spied(path: Path, **settings: Any) -> Any:
        opened.append((path.with_name(f"{path.name}.data").stat().st_size, sessions._frugal.get()))
        return sessions.open_session(path, **settings)

    monkeypatch.setattr(sessions, "HEAVY", 600)
    monkeypatch.setattr(module, "open_session", spied)
    assert same(taken(Stream(6)), expected, exact=False)
    assert opened and all(size >= 600 and is_frugal for size, is_frugal in opened)


def test_samples_are_counted_by_the_size_that_most_inputs_share() -> None:
    assert count({"x": np.zeros((5, 3)), "mask": np.zeros((5, 1)), "state": np.zeros((2, 5))}) == 5
    assert count({"scale": np.zeros(()), "x": np.zeros((4, 3))}) == 4
    assert count({"scale": np.zeros(())}) == 1


@pytest.mark.parametrize(
    ("axes", "shape", "wanted"),
    [((1,), (5, 3, 4), (5, 3, 4)), ((2,), (5, 3, 4), (5, 4, 3)),
     ((0,), (3, 5), (5, 3)), ((1, 3), (5, 3, 4, 2), (5, 6, 4)),
     ((0, 1), (3, 4), (1, 12))],
)  # fmt: skip
def test_channels_along_any_axes(axes: tuple[int, ...], shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    value = np.arange(np.prod(shape)).reshape(shape)
    maps = to_maps(axes)(value)
    assert maps.shape == wanted
    for channel in range(maps.shape[1]):
        at = np.unravel_index(channel, [shape[a] for a in axes])
        chosen = value
        for axis, position in sorted(zip(axes, at, strict=True), reverse=True):
            chosen = chosen.take(position, axis=axis)
        assert sorted(maps[:, channel].ravel()) == sorted(chosen.ravel())


# -- runs that are interrupted -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gathered", "saved"), [(1, 6), (2, 5), (4, 5), (32, 1)])
def test_an_interrupted_run_goes_on_where_it_was(
    gathered: int, saved: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: list[int]
) -> None:
    """Statistics take in the first call at once, then as many together as are gathered."""
    monkeypatch.setattr(module, "_CALLS", gathered)
    whole = taken(Stream(40), batch_size=4)
    assert calls == [4] * 10
    monkeypatch.setattr(module, "_SAVE_EVERY", -1.0)
    broken = Stream(40)
    broken.until = 26
    calls.clear()
    with pytest.raises(Interrupted):
        taken(broken, batch_size=4, cache=tmp_path)
    assert calls == [4] * 6
    calls.clear()
    resumed = taken(Stream(40), batch_size=4, cache=tmp_path)
    assert calls == [4] * (10 - saved)
    assert same(whole, resumed)
    calls.clear()
    assert same(whole, taken(Stream(40), batch_size=4, cache=tmp_path)) and not calls


def test_what_several_passes_have_is_kept_for_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: list[int]
) -> None:
    monkeypatch.setattr("onnxprune.passes.calibration.MEMORY", 4 * 8 * 36)
    monkeypatch.setattr(module, "_SAVE_EVERY", -1.0)
    monkeypatch.setattr(module, "_CALLS", 1)
    whole = taken(Stream(6))
    calls.clear()
    broken = Stream(6)
    broken.until = 3
    with pytest.raises(Interrupted):
        taken(broken, cache=tmp_path)
    assert len(calls) == 3
    calls.clear()
    assert same(whole, taken(Stream(6), cache=tmp_path)) and len(calls) == 3 + 6


def test_a_run_that_breaks_off_between_two_saves_loses_what_came_after(tmp_path: Path, calls: list[int]) -> None:
    broken = Stream(40)
    broken.until = 26
    with pytest.raises(Interrupted):
        taken(broken, batch_size=4, cache=tmp_path)
    calls.clear()
    taken(Stream(40), batch_size=4, cache=tmp_path)
    assert len(calls) == 10


@pytest.mark.parametrize(
    "change", ["model", "values", "samples", "batch", "needs", "size of calls", "package", "way of measuring"]
)
def test_a_cache_of_something_else_is_not_used(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: list[int]
) -> None:
    taken(Stream(12), cache=tmp_path, batch_size=4)
    calls.clear()
    stream, model, needs, batch = Stream(12), network(), ("moments", "gram"), 4
    if change == "model":
        model = network(seed=1)
    elif change == "values":
        stream = Stream(12, scale=1.0 + 1e-6)
    elif change == "samples":
        stream = Stream(13)
    elif change == "batch":
        batch = 3
    elif change == "needs":
        needs = ("moments",)
    elif change == "package":
        monkeypatch.setattr("onnxprune.runtime.capture.__version__", "0.0.0")
    elif change == "way of measuring":
        monkeypatch.setattr("onnxprune.runtime.capture.FORMAT", 0)
    else:
        monkeypatch.setattr("onnxprune.passes.calibration.MEMORY", 4 * 8 * 36 * 4)
    found = taken(stream, model, needs, cache=tmp_path, batch_size=batch)
    assert sum(calls) == len(range(stream.total))
    assert same(found, taken(stream, model, needs, batch_size=batch))


def test_what_was_cut_before_makes_a_cache_of_its_own(tmp_path: Path, calls: list[int]) -> None:
    context = Context.of(network(), RunSettings(data=Stream(4), cache=tmp_path))
    analysis = context.analysis
    groups = analysis.units.groups
    whole = captured_maps(context, analysis, groups, ("moments",))
    for unit in (0, 1):
        removed = np.isin(analysis.units.component, groups[0].units[unit])
        calls.clear()
        cut = captured_maps(context, analysis, groups, ("moments",), removed)
        assert calls == [4]
        assert len(next(iter(cut.maps.values()))["mean"]) == len(next(iter(whole.maps.values()))["mean"]) - 1


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty", "flipped"])
def test_a_damaged_cache_is_done_again(damage: str, tmp_path: Path, calls: list[int]) -> None:
    whole = taken(Stream(8), cache=tmp_path)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 0xFF
    path.write_bytes(
        {"cut": content[:-40], "garbage": b"PK" + bytes(99), "empty": b"", "flipped": bytes(flipped)}[damage]
    )
    calls.clear()
    assert same(whole, taken(Stream(8), cache=tmp_path)) and calls == [8]


def test_data_that_can_be_read_once_are_not_cached(tmp_path: Path) -> None:
    found = taken(iter(Stream(8)), cache=tmp_path)
    assert same(found, taken(Stream(8)), exact=False) and not list(tmp_path.iterdir())


def test_a_cache_that_cannot_be_made_is_bad_input(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(UsageError, match="cannot be made"):
        taken(Stream(4), cache=blocked / "inside")


def test_a_checkpoint_leaves_no_temporary_files(tmp_path: Path) -> None:
    statistic = statistics.get("moments")()
    statistic.update(np.ones((2, 3, 4)))
    keep = Checkpoint(tmp_path, "key")
    keep.save({"a|b": statistic}, 3, 7)
    fresh = statistics.get("moments")()
    assert keep.load({"a|b": fresh}) == (3, 7)
    assert all(np.array_equal(fresh.result()[n], v) for n, v in statistic.result().items())
    assert len(list(tmp_path.iterdir())) == 1
    assert Checkpoint(tmp_path, "other").load({"a|b": fresh}) == (0, 0)
    assert keep.load({"a": fresh}) == (0, 0)


# -- memory ------------------------------------------------------------------------------------------------------------


def test_memory_does_not_grow_with_the_number_of_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Feature maps are let go of batch by batch; on one core, as the peak of several depends on how they meet."""
    monkeypatch.setattr("onnxprune.runtime.sessions.os.cpu_count", lambda: 1)
    monkeypatch.setattr(module, "_CALLS", 2)
    model = network(32)

    def peak(samples: int) -> int:
        context = Context.of(model, RunSettings(data=Stream(samples), batch_size=8))
        analysis = context.analysis
        tracemalloc.start()
        captured_maps(context, analysis, analysis.units.groups, ("moments", "gram"))
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest

    peak(16)
    few, many = peak(64), peak(256)
    assert many < 1.6 * few + (64 << 10)  # threads differ in what they hold at once; samples are four times as many


def test_open_data_gives_what_capturing_takes() -> None:
    spec = InputSpec("x", np.dtype(np.float32), ("N", 3, 6, 6))
    data = open_data(Stream(5), [spec])
    assert sum(count(feed) for feed in data.batches(2)) == 5
