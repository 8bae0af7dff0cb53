"""Which numbers of channels are fast here? Times of layers at 1 to 64 channels, and the multiples that pay.

python tools/bench_rounding.py                            every kind of layer, one thread
python tools/bench_rounding.py --only conv --most 128 --step 4 --threads 2

A layer is timed with few and with many of the channels that it reads or writes, between two others of its kind where
they change how it stores its numbers. The last line of each gives, for every power of two, the median time of the
counts that are multiples of it and of no larger one, over that of the next multiple of 32: below 1 the channels that
are not there are saved, at 1 they cost what whole blocks do, above it they cost more. Times are the least of many runs
of all models in turn. The rules of ``onnxprune/allocation/rounding.py`` come from here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from itertools import pairwise
from statistics import median

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SIDE = 28
FEATURES = 128
ROWS = 64


def _filter(name: str, *shape: int) -> onnx.TensorProto:
    values = np.random.default_rng(0).standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
    return numpy_helper.from_array(values.astype(np.float32), name)


def _model(nodes: list[onnx.NodeProto], weights: list[onnx.TensorProto], shape: list[int]) -> bytes:
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    made = helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "layers", [given], [made], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


def _chain(counts: list[int], kernel: int, groups: tuple[bool, ...]) -> bytes:
    """Return convolutions one after the other: ``counts`` channels between them."""
    nodes, weights, last = [], [], "x"
    for i, (reads, writes) in enumerate(pairwise(counts)):
        own = groups[i]
        size = 3 if own else kernel
        weights.append(_filter(f"w{i}", writes, 1 if own else reads, size, size))
        pads = [size // 2] * 4
        nodes.append(
            helper.make_node("Conv", [last, f"w{i}"], [f"c{i}"], pads=pads, group=reads if own else 1, name=f"conv{i}")
        )
        nodes.append(helper.make_node("Relu", [f"c{i}"], [f"y{i}"]))
        last = f"y{i}"
    return _model(nodes, weights, [1, counts[0], SIDE, SIDE])


def conv3(n: int) -> bytes:
    """Return 3x3 convolutions 64 → n → n → 64."""
    return _chain([64, n, n, 64], 3, (False,) * 3)


def conv3_writes(n: int) -> bytes:
    """Return 3x3 convolutions 64 → n → 64."""
    return _chain([64, n, 64], 3, (False,) * 2)


def conv1(n: int) -> bytes:
    """Return 1x1 convolutions 64 → n → n → 64."""
    return _chain([64, n, n, 64], 1, (False,) * 3)


def depthwise(n: int) -> bytes:
    """Return a depthwise convolution between pointwise ones: 64 → n → n → 64."""
    return _chain([64, n, n, 64], 1, (False, True, False))


def image(n: int) -> bytes:
    """Return the first layers of a network: 3 → n → 64."""
    return _chain([3, n, 64], 3, (False,) * 2)


def gemm(n: int) -> bytes:
    """Return matrix products of 64 rows, 128 → n → n → 128 features."""
    sizes = [FEATURES, n, n, FEATURES]
    nodes, weights, last = [], [], "x"
    for i, (reads, writes) in enumerate(pairwise(sizes)):
        weights.append(_filter(f"w{i}", reads, writes))
        nodes.append(helper.make_node("MatMul", [last, f"w{i}"], [f"c{i}"]))
        nodes.append(helper.make_node("Relu", [f"c{i}"], [f"y{i}"]))
        last = f"y{i}"
    return _model(nodes, weights, [ROWS, FEATURES])


def conv3_int8(n: int) -> bytes:
    """Return quantized 3x3 convolutions 64 → n → n → 64."""
    counts = [64, n, n, 64]
    scale, zero = numpy_helper.from_array(np.float32(0.02), "s"), numpy_helper.from_array(np.uint8(128), "z")
    even = numpy_helper.from_array(np.int8(0), "z8")
    nodes = [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"])]
    weights, last = [scale, zero, even], "q"
    draw = np.random.default_rng(0)
    for i, (reads, writes) in enumerate(pairwise(counts)):
        values = draw.integers(-100, 100, (writes, reads, 3, 3)).astype(np.int8)
        weights.append(numpy_helper.from_array(values, f"w{i}"))
        inputs = [last, "s", "z", f"w{i}", "s", "z8", "s", "z"]
        nodes.append(helper.make_node("QLinearConv", inputs, [f"c{i}"], pads=[1] * 4))
        last = f"c{i}"
    nodes.append(helper.make_node("DequantizeLinear", [last, "s", "z"], ["y"]))
    return _model(nodes, weights, [1, 64, SIDE, SIDE])


KINDS: dict[str, Callable[[int], bytes]] = {
    "conv3x3": conv3,
    "conv3x3-single": conv3_writes,
    "conv1x1": conv1,
    "depthwise": depthwise,
    "image": image,
    "matmul": gemm,
    "conv3x3-int8": conv3_int8,
}


def times(make: Callable[[int], bytes], counts: list[int], threads: int, seconds: float) -> list[float]:
    """Return the least milliseconds at every count, measured in turn."""
    from onnxprune.runtime.latency import Device, in_turn

    models = [make(n) for n in counts]
    shape = [d.dim_value for d in onnx.load_from_string(models[0]).graph.input[0].type.tensor_type.shape.dim]
    feed = {"x": np.random.default_rng(1).standard_normal(shape).astype(np.float32)}
    steady = threads == 1
    found = in_turn(models, [feed], Device(threads=threads), runs=400, budget_s=seconds, steady=steady)
    return [min(x) for x in found]


def summary(counts: list[int], found: list[float]) -> str:
    """Return the time per channel at multiples of 1, 2, 4, ... over that of the next whole block."""
    by = dict(zip(counts, found, strict=True))
    said = []
    for power in (1, 2, 4, 8, 16):
        each = []
        for n in counts:
            whole = -(-n // 32) * 32
            if n % power == 0 and n % (2 * power) and n > power and whole in by:
                each.append(by[n] / by[whole])
        said.append(f"{power}: {median(each):.2f}" if each else f"{power}: -")
    return "  ".join(said)


def main() -> int:
    """Print the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of a kind's name")
    parser.add_argument("--most", type=int, default=64, help="largest number of channels")
    parser.add_argument("--step", type=int, default=1, help="time every so many")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=4.0, help="per kind")
    given = parser.parse_args()
    counts = sorted({*range(given.step, given.most + 1, given.step), 1})
    for name, make in KINDS.items():
        if given.only not in name:
            continue
        found = times(make, counts, given.threads, given.seconds)
        print(f"{name}: microseconds by channels")
        told = [f"{n:>3}:{1e3 * ms:7.0f}" for n, ms in zip(counts, found, strict=True)]
        for row in range(0, len(told), 8):
            print("   " + "  ".join(told[row : row + 8]))
        print(f"   over the time of the next 32, by the power of two in the count: {summary(counts, found)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
