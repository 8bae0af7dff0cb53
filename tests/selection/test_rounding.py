"""Counts that kernels like: multiples per layer and device, small groups, the same work overall, own tables."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

import onnxprune as op
from onnxprune import devices
from onnxprune.allocation.rounding import halved, rounded_counts
from onnxprune.devices import DEVICES, MULTIPLES, Kernels, kernels_of

MODELS = Path(__file__).resolve().parent.parent.parent / "models"


def text_model(body: str, weights: dict[str, tuple[int, ...]]) -> onnx.ModelProto:
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 20]> net (float[1,3,8,8] x) => (float[1,5,8,8] y) {{ {body} }}'
    )
    draw = np.random.default_rng(0)
    for name, shape in weights.items():
        values = draw.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    return model


def remaining(model: onnx.ModelProto | Path, **options: object) -> list[int]:
    """Channels after the cut of every convolution but the last, in order."""
    report = op.prune(model, latency=False, validate=False, **options).report
    return [layer.channels_after for layer in report.layers if layer.op == "Conv"][:-1]


def chain(*counts: int) -> onnx.ModelProto:
    """3x3 convolutions between so many channels."""
    sizes = [3, *counts, 5]
    body, last = "", "x"
    for i in range(len(sizes) - 1):
        out = "y" if i == len(counts) else f"r{i}"
        body += f"c{i} = Conv<pads = [1,1,1,1]>({last}, w{i}) {out} = Relu(c{i}) "
        last = out
    return text_model(body, {f"w{i}": (m, n, 3, 3) for i, (n, m) in enumerate(pairwise(sizes))})


@given(st.integers(1, 70), st.sampled_from([1, 2, 4, 8, 16, 32]), st.integers(1, 3), st.sampled_from([0.3, 0.9, 1.0]))
def test_a_group_may_stay_whole_and_may_shrink(steps: int, multiple: int, each: int, widest: float) -> None:
    fitting = halved(multiple, steps)
    counts = rounded_counts(steps * each, steps, fitting, widest=widest)
    assert counts[0] == 0 and (np.diff(counts) > 0).all() and counts[-1] < steps
    assert fitting == multiple or steps < 4 * fitting
    if int(widest * steps) >= 1 and steps > 1:
        assert counts.size > 1
    if widest == 1 and steps > 1:
        assert all((steps - c) % fitting == 0 for c in counts[1:])


@pytest.mark.parametrize(
    ("device", "counts", "ratio", "expected"),
    [
        ("avx512", (64, 96, 48), 0.5, [32, 48, 32]),
        ("avx512", (64, 64, 64), 0.3, [48, 48, 48]),
        ("avx512", (24, 24, 24), 0.5, [16, 16, 16]),
        ("avx512", (16, 8, 4), 0.5, [8, 4, 2]),
        ("avx512", (16, 16, 16), 0.3, [8, 16, 8]),
        ("avx512", (64, 64, 16), 0.5, [32, 32, 16]),
        ("avx512", (64, 64, 16), 0.7, [16, 16, 8]),
        ("avx2", (64, 24, 48), 0.5, [32, 16, 24]),
        ("hexagon", (128, 64), 0.5, [64, 32]),
        ("ethos-u", (40, 17), 0.5, [16, 16]),
    ],
)
def test_channels_are_multiples_of_the_device(
    device: str, counts: tuple[int, ...], ratio: float, expected: list[int]
) -> None:
    assert remaining(chain(*counts), ratio=ratio, device=device) == expected


def test_a_group_takes_what_fits_all_of_its_layers() -> None:
    """Depthwise, grouped and quantized layers want other multiples than the convolution in front of them."""
    kernels = Kernels("own", 2, 2, 8, 4, 2, 2, {"writes": 16, "reads": 16})
    weights = {"w0": (32, 3, 1, 1), "w1": (32, 1, 3, 3), "w2": (5, 32, 1, 1)}
    body = "a = Conv(x, w0) b = Conv<group = 32, pads = [1,1,1,1]>(a, w1) y = Conv(b, w2)"
    assert remaining(text_model(body, weights), ratio=0.2, device=kernels) == [24, 24]
    plain = text_model("a = Conv(x, w0) y = Conv(a, w2)", weights)
    assert remaining(plain, ratio=0.2, device=kernels) == [26]
    quantized = text_model(
        "a = Conv(x, w0) q = QuantizeLinear(a, s, z) d = DequantizeLinear(q, s, z) y = Conv(d, w2)", weights
    )
    quantized.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(0.1), "s"))
    quantized.graph.initializer.append(onnx.numpy_helper.from_array(np.uint8(128), "z"))
    assert remaining(quantized, ratio=0.2, device=kernels) == [32]
    grouped = text_model(
        "a = Conv(x, w0) b = Conv<group = 2, pads = [1,1,1,1]>(a, w1) y = Conv(b, w2)",
        {"w0": (32, 3, 1, 1), "w1": (32, 16, 3, 3), "w2": (5, 32, 1, 1)},
    )
    assert all(n % 8 == 0 and n < 32 for n in remaining(grouped, ratio=0.3, device=kernels))


@pytest.mark.parametrize("name", ["residual", "depthwise", "concat", "attention", "recurrent"])
@pytest.mark.parametrize("device", ["avx512", "avx2", "hexagon"])
def test_rounding_leaves_the_work_that_the_ratio_asks_for(name: str, device: str) -> None:
    for ratio in (0.3, 0.5):
        path, plain = MODELS / f"{name}.onnx", {"ratio": ratio, "latency": False, "validate": False}
        free = op.prune(path, round_to=1, **plain).report.totals
        report = op.prune(path, device=device, **plain).report
        assert report.totals.macs_after < 0.9 * report.totals.macs_before
        assert abs(report.totals.macs_after - free.macs_after) < 0.2 * report.totals.macs_before
        assert report.settings["device"] == device and report.settings["round_to"] == "auto"


def test_groups_in_the_middle_share_the_work() -> None:
    """All groups of 32 are nearest to 16, which would leave a quarter of the work where the ratio leaves half."""
    kept = remaining(chain(*[32] * 8), ratio=0.3, device="avx512")
    assert sorted(set(kept)) == [16, 32]
    own = remaining(chain(*[32] * 8), ratio=0.3, device="avx512", layers={"w3": 0.4})
    assert own[3] == 16


def test_numbers_mean_what_they_did() -> None:
    assert remaining(chain(64, 50), ratio=0.3, round_to=1, device="avx512") == [45, 35]
    assert remaining(chain(64, 50), ratio=0.3, round_to=8) == [48, 32]
    assert remaining(chain(64, 50), ratio=0.3, round_to="AUTO") == [45, 35]  # the tests' machine likes any number


def test_budgets_keep_the_multiples() -> None:
    model = chain(64, 96, 48)
    report = op.prune(model, target="macs=0.5", device="avx512", latency=False).report
    assert report.totals.macs_after <= 0.5 * report.totals.macs_before
    assert all(layer.channels_after % 16 == 0 for layer in report.layers[:-1])


def test_several_steps_never_take_back_units() -> None:
    assert remaining(chain(64, 64, 40), ratio=0.5, steps=3, device="avx512") == [32, 32, 16]


def test_a_device_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "chip.json"
    file.write_text(json.dumps({"writes": 20, "reads": 20, "source": "its data sheet"}))
    assert remaining(chain(60, 60), ratio=0.3, device=str(file)) == [40, 40]
    assert kernels_of(str(file)).name == "chip"
    op.devices.register(Kernels("chip", writes=20, reads=20))
    try:
        assert remaining(chain(60, 60), ratio=0.3, device="chip") == [40, 40]
        with pytest.raises(ValueError, match="already registered"):
            op.devices.register(Kernels("chip"))
    finally:
        op.devices.unregister("chip")


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("avx51", "Unknown device 'avx51'"),
        (3, "device: 3 is no device"),
        ("none.json", "device: cannot read 'none.json'"),
    ],
)
def test_no_such_device(device: object, message: str) -> None:
    with pytest.raises(op.UsageError, match=message):
        op.prune(chain(8), device=device)


@pytest.mark.parametrize("told", ['{"writes": 0}', '{"wide": 8}', "[8]", '{"int8": {"wide": 8}}', '{"writes": true}'])
def test_a_file_that_holds_something_else(told: str, tmp_path: Path) -> None:
    file = tmp_path / "chip.json"
    file.write_text(told)
    with pytest.raises(op.UsageError, match="device"):
        Kernels.load(file)


def test_every_preset_has_its_source() -> None:
    assert {"avx512", "avx2", "arm64", "tensorrt", "hexagon", "ethos-u", "ascend", "xnnpack"} < set(op.devices.names())
    for device in DEVICES.values():
        assert len(device.source) > 20
        assert all(device.of(kind, quantized=True) >= 1 for kind in MULTIPLES)


@pytest.mark.parametrize(
    ("machine", "features", "expected"),
    [
        ("x86_64", {"avx2", "avx512f"}, "avx512"),
        ("AMD64", {"avx2"}, "avx2"),
        ("x86_64", set(), "avx2"),
        ("arm64", set(), "arm64"),
        ("aarch64", {"neon"}, "arm64"),
    ],
)
def test_the_machine_is_known(machine: str, features: set[str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices.platform, "machine", lambda: machine)
    monkeypatch.setattr(devices, "_features", lambda: features)
    assert devices.instruction_set.__wrapped__() == expected


def test_the_place_of_timing_decides_where_no_device_is_named() -> None:
    assert kernels_of(None, ("CUDAExecutionProvider", "CPUExecutionProvider")).name == "tensorrt"
    assert kernels_of(None, ("CPUExecutionProvider",)).name == "plain"
    assert kernels_of("avx2", ("CUDAExecutionProvider",)).name == "avx2"
