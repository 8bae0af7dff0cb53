"""The options for calibration data: what they hold, what reaches the API, and what a model gets of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import parser

import onnxprune as op
from onnxprune.pipeline import Context

IMAGE_OPTIONS = {"size": (24, 32), "mean": (0.5,), "std": (0.1, 0.2, 0.3), "layout": "nhwc", "order": "bgr", "scale": 1}

BAD = [
    (["--samples", "0"], "--samples: 0 is not allowed", "whole number from 1"),
    (["--samples", "many"], "--samples: many is not allowed", "whole number from 1"),
    (["--batch-size", "-2"], "--batch-size: -2 is not allowed", "whole number from 1"),
    (["--image-size", "0"], "--image-size: '0' is not a size", "224x320"),
    (["--image-size", "1x2x3"], "--image-size: '1x2x3' is not a size", "height and width"),
    (["--image-size", "big"], "--image-size: 'big' is not a size", "height and width"),
    (["--mean", "0.5,0.5"], "--mean: '0.5,0.5' is not allowed", "1 or 3 numbers with commas"),
    (["--mean", "a,b,c"], "--mean: 'a,b,c' is not allowed", "1 or 3 numbers with commas"),
    (["--mean", "nan"], "--mean: 'nan' is not allowed", "1 or 3 numbers with commas"),
    (["--std", "1,0,1"], "--std: '1,0,1' is not allowed", "none of them 0"),
    (["--layout", "nch"], "--layout: unknown value 'nch'", "nchw, nhwc"),
    (["--pixel-order", "gbr"], "--pixel-order: unknown value 'gbr'", "rgb"),
    (["--pixel-scale", "0"], "--pixel-scale: '0' is not allowed", "1 number other than 0"),
    (["--pixel-scale", "1,2,3"], "--pixel-scale: '1,2,3' is not allowed", "1 number other than 0"),
]
ALONE = [["--samples", "4"], ["--batch-size", "4"], ["--image-size", "8"], ["--mean", "0"], ["--layout", "nchw"]]


@pytest.mark.parametrize(("args", "message", "hint"), BAD, ids=[" ".join(case[0]) for case in BAD])
def test_bad_value_is_named_with_what_was_allowed(api, run, model, args, message, hint) -> None:
    data = model.with_name("d.npz")
    data.touch()
    result = run(model, "--data", data, *args)
    assert (result.exit_code, result.stdout, api.calls) == (2, "", [])
    first, second = result.stderr.splitlines()
    assert first == f"error: {message}"
    assert second.startswith("hint: ") and hint in second


@pytest.mark.parametrize("args", ALONE, ids=[case[0] for case in ALONE])
def test_options_about_data_need_data(api, run, model, args) -> None:
    result = run(model, *args)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {args[0]} describes how to read data, but --data is not given\n")
    assert api.calls == []


def test_what_was_said_about_images_reaches_the_api(api, run, model) -> None:
    args = ["--image-size", "24x32", "--mean", "0.5", "--std", "0.1,0.2,0.3", "--layout", "NHWC"]
    args += ["--pixel-order", "bgr", "--pixel-scale", "1"]
    assert run(model, "--data", model.parent, *args, "--samples", "3").exit_code == 0
    assert run(model, "--data", model.parent, "--image-size", "16").exit_code == 0
    one, other = (call for call in api.calls)
    assert one["images"] == op.ImageOptions(**IMAGE_OPTIONS)
    assert (one["data"], one["samples"], one["batch_size"]) == (model.parent, 3, None)
    assert other["images"] == op.ImageOptions(size=(16, 16))


@pytest.fixture
def net(tmp_path: Path) -> Path:
    """Two convolutions and a pool: 3 -> 8 -> 4 channels, with the size of images left open."""
    proto = parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> agraph (float[N,3,H,W] x) => (float[N,4,1,1] y)'
        " <float[8,3,3,3] w1, float[4,8,1,1] w2> "
        "{ a = Conv(x, w1) b = Relu(a) c = Conv(b, w2) y = GlobalAveragePool(c) }"
    )
    draw = np.random.default_rng(0)
    del proto.graph.initializer[:]
    for name, shape in (("w1", (8, 3, 3, 3)), ("w2", (4, 8, 1, 1))):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(draw.normal(size=shape).astype(np.float32), name))
    path = tmp_path / "net.onnx"
    onnx.save(proto, path)
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Five images of uneven sizes."""
    images = pytest.importorskip("PIL.Image")
    folder = tmp_path / "pictures"
    folder.mkdir()
    draw = np.random.default_rng(1)
    for index in range(5):
        pixels = draw.integers(0, 256, (10 + index, 14, 3), dtype=np.uint8)
        images.fromarray(pixels).save(folder / f"{index}.png")
    return folder


def fidelity(result: Any) -> dict[str, Any]:
    assert result.exit_code == 0, result.stderr
    facts: dict[str, Any] = json.loads(result.stdout)["fidelity"]
    return facts


def test_a_model_is_validated_on_a_folder_of_images(net: Path, pictures: Path, run) -> None:
    args = [net, "--data", pictures, "--image-size", "12x10", "--recover", "none", "--json"]
    facts = fidelity(run(*args))
    assert facts["samples"] == 5 and facts["source"] == str(pictures)
    shifted = fidelity(run(*args, "--samples", "3", "--batch-size", "2", "--mean", "0.5", "--std", "0.25"))
    assert shifted["samples"] == 3
    assert shifted["outputs"][0]["cosine"] != facts["outputs"][0]["cosine"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "does not tell the size of its images"),
        (["--image-size", "12", "--samples", "6"], "holds 5 samples, 6 were asked for"),
        (["--image-size", "12", "--layout", "nhwc"], "has its channels where layout 'nhwc' has none"),
    ],
)
def test_images_that_do_not_fit_write_nothing(net: Path, pictures: Path, run, args: list[str], words: str) -> None:
    result = run(net, "--data", pictures, *args)
    assert result.exit_code == 2 and words in result.stderr and result.stdout == ""
    assert not net.with_name("net.pruned.onnx").exists()


def test_image_options_beside_arrays_are_refused(net: Path, tmp_path: Path, run) -> None:
    np.save(tmp_path / "d.npy", np.zeros((2, 3, 8, 8), np.float32))
    result = run(net, "--data", tmp_path / "d.npy", "--image-size", "8")
    assert result.exit_code == 2 and "have no meaning for data of arrays" in result.stderr


def test_python_takes_iterators_and_readers_and_counts_them(net: Path) -> None:
    items = [{"x": np.full((2, 3, 8, 8), value, np.float32)} for value in range(4)]

    class Reader:
        left = iter(items)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.left, None)

    for data in (iter(items), Reader()):
        report = op.prune(net, data=data, samples=6, batch_size=3, recover="none", latency=False).report
        assert report.fidelity is not None and report.fidelity.samples == 6
    with pytest.raises(op.UsageError, match="holds 8 samples, 9 were asked for"):
        op.prune(net, data=iter(items), samples=9, latency=False)


def test_without_a_number_validation_takes_no_more_than_it_needs(net: Path) -> None:
    report = op.prune(net, data=np.ones((300, 3, 4, 4), np.float32), recover="none", latency=False).report
    assert report.fidelity is not None and report.fidelity.samples == 256


@pytest.mark.parametrize("given", [{"samples": 3}, {"batch_size": 3}, {"images": op.ImageOptions(size=8)}])
def test_python_refuses_reading_options_without_data(net: Path, given: dict[str, Any]) -> None:
    with pytest.raises(op.UsageError, match=f"{next(iter(given))} describes how to read data"):
        op.prune(net, **given)
    with pytest.raises(op.UsageError, match="needs calibration data"):
        Context.of(net).inputs()
