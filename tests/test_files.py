"""Files that appear whole or not at all, whatever moment a run is killed at, and what killed runs leave behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from onnxprune.errors import UsageError
from onnxprune.io import files
from onnxprune.io.read import load
from onnxprune.io.write import check_output, data_path, save


def product(value: float, width: int = 32) -> onnx.ModelProto:
    """A model that multiplies with a matrix of one value."""
    weight = numpy_helper.from_array(np.full((width, width), value, np.float32), "w")
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, width]) for n in "xy"]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "net", ends[:1], ends[1:], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def value_of(path: Path) -> float:
    model = onnx.load(path)
    assert model.metadata_props[0].value == str(numpy_helper.to_array(model.graph.initializer[0]).flat[0])
    return float(ReferenceEvaluator(model).run(None, {"x": np.ones((1, 32), np.float32)})[0][0, 0]) / 32


def write(path: Path, value: float, **options: object) -> None:
    model = product(value)
    model.metadata_props.add(key="value", value=str(np.float32(value)))
    loaded = load(model)
    save(loaded.proto, loaded.weights, path, **options)  # type: ignore[arg-type]


CALLS = [(os, "fsync"), (Path, "replace"), (Path, "rename"), (Path, "unlink")]


class Killed(BaseException):
    """The end of a process: nothing is cleaned up behind it."""


@pytest.fixture
def kill_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """After [n] calls that change a folder every further one, and all cleaning up, has no effect any more."""
    room = [1 << 30]

    def limited(original):
        def call(*args, **named):
            room[0] -= 1
            if room[0] < 0:
                raise Killed
            return original(*args, **named)

        return call

    for owner, name in CALLS:
        monkeypatch.setattr(owner, name, limited(getattr(owner, name)))
    yield room


@pytest.mark.parametrize("before", ["nothing", "inline", "external"])
def test_a_kill_at_any_moment_leaves_the_old_or_the_new_model(before: str, tmp_path: Path, kill_at: list[int]) -> None:
    states = set()
    for moment in range(40):
        folder = tmp_path / str(moment)
        folder.mkdir()
        path, plan = folder / "m.onnx", folder / "plan.json"
        if before != "nothing":
            write(path, 1.0, external=before == "external", companions={plan: b"1.0"})
        kill_at[0] = moment
        try:
            write(path, 2.0, external=True, companions={plan: b"2.0"})
        except Killed:
            finished = False
        else:
            finished = True
        kill_at[0] = 1 << 30
        value = value_of(path) if path.exists() else 0.0
        states.add(value)
        assert value in ({0.0, 2.0} if before == "nothing" else {1.0, 2.0})
        # A plan is never beside another model than its own.
        assert not plan.exists() or float(plan.read_bytes()) == value
        for unlocked in folder.glob("*.new"):
            os.utime(unlocked, (0, 0))
        # The next run removes what this one has left.
        write(path, 3.0, external=True, companions={plan: b"3.0"})
        assert value_of(path) == 3.0
        assert len(list(folder.iterdir())) == 3
        if finished:
            break
    assert finished and len(states) == 2


def test_the_same_model_written_twice_is_the_same_file(tmp_path: Path) -> None:
    path, fresh = tmp_path / "m.onnx", tmp_path / "fresh" / "m.onnx"
    fresh.parent.mkdir()
    for target, value in ((path, 2.0), (path, 2.0), (fresh, 2.0)):
        write(target, value, external=True)
    assert path.read_bytes() == fresh.read_bytes()
    assert data_path(path).read_bytes() == data_path(fresh).read_bytes()


def test_data_of_others_are_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    write(path, 1.0, external=True)
    path.rename(tmp_path / "mine.onnx")
    for value in (2.0, 3.0, 2.0):
        write(path, value, external=True)
        assert (value_of(path), value_of(tmp_path / "mine.onnx")) == (value, 1.0)
    assert len(list(tmp_path.iterdir())) == 4
    write(path, 4.0)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data", "mine.onnx"]


WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_files import write
for k in range(12):
    write(Path({path!r}), float(sys.argv[1]), external=True, companions={{Path({plan!r}): sys.argv[1].encode()}})
"""


def test_two_runs_into_one_output_are_never_mixed(tmp_path: Path) -> None:
    path, plan = tmp_path / "m.onnx", tmp_path / "plan.json"
    code = WRITER.format(tests=str(Path(__file__).parent), path=str(path), plan=str(plan))
    runs = [subprocess.Popen([sys.executable, "-c", code, value]) for value in ("1.0", "2.0")]
    assert [run.wait() for run in runs] == [0, 0]
    assert value_of(path) == float(plan.read_bytes())
    assert len(list(tmp_path.iterdir())) == 3


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link.onnx").symlink_to(tmp_path / "there" / "real.onnx")
    for value in (1.0, 2.0):
        write(tmp_path / "link.onnx", value)
        assert (tmp_path / "link.onnx").is_symlink()
        assert value_of(tmp_path / "there" / "real.onnx") == value
    (tmp_path / "lost.onnx").symlink_to(tmp_path / "nowhere" / "real.onnx")
    with pytest.raises(UsageError, match="nowhere"):
        check_output(tmp_path / "lost.onnx", None)


@pytest.mark.parametrize("name", ["n" * 250 + ".onnx", "\N{SNOWMAN}" * 83 + ".onnx"])
def test_the_longest_names_can_be_written(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    for value in (1.0, 2.0):
        write(path, value, external=True)
        assert value_of(path) == value
    assert len(list(tmp_path.iterdir())) == 2
    assert len(os.fsencode(data_path(path).name)) <= 255


def test_a_name_that_is_not_text_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"m\xff.onnx")
    write(path, 1.0)
    assert load(path).size > 0


HOLDER = """
import sys, time
from onnxprune.io import files
with files.workspace() as folder, files.replacing(__import__("pathlib").Path({target!r})) as new, new.open() as file:
    print(folder, flush=True)
    time.sleep(60)
"""


def test_what_a_killed_run_leaves_is_removed_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    target = tmp_path / "out.json"
    started = [
        subprocess.Popen([sys.executable, "-c", HOLDER.format(target=str(target))], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    folders = [Path(run.stdout.readline().strip()) for run in started]
    (tmp_path / "onnxprune-of-somebody").mkdir()
    started[0].send_signal(signal.SIGKILL)
    started[0].wait()
    files.remove_stale()
    files.write(target, json.dumps({}).encode())
    assert [folder.exists() for folder in folders] == [False, True]
    assert (tmp_path / "onnxprune-of-somebody").exists()
    assert len(list(tmp_path.glob(".out.json.*"))) == 1  # of the run that is still at work
    started[1].kill()
    started[1].wait()
    for run in started:
        run.stdout.close()
    files.remove_stale()
    files.write(target, b"[]")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["onnxprune-of-somebody", "out.json"]
