"""Prune a YOLO model from ultralytics, with mAP as the metric of the budget, and load the result in a predictor.

python examples/prune_yolo.py yolo11n.pt coco128.yaml IMAGES/      needs ultralytics
python examples/prune_yolo.py                                      a small detector with random weights in its place
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
from onnx import numpy_helper

import onnxprune as op

STAND_IN = """<ir_version: 8, opset_import: ["" : 17]>
detector (float[N,3,32,32] images) => (float[N,5,64] output0) {
    a = Conv<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]>(images, w0)
    b = Relu(a)
    c = Conv<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]>(b, w1)
    d = Relu(c)
    e = Conv(d, w2)
    shape = Constant<value_ints=[0,5,-1]>()
    output0 = Reshape(e, shape)
}"""
"""Four numbers of a box and a score for each of 64 cells, as a YOLO model has for 8,400."""


def yolo(weights: str) -> Any:
    """Return a YOLO model.

    Raises:
        SystemExit: ultralytics is not installed.
    """
    try:
        from ultralytics import YOLO
    except ImportError:
        raise SystemExit("This recipe needs ultralytics: pip install ultralytics") from None
    return YOLO(weights)


def prune_yolo(weights: str, dataset: str, images: str) -> None:
    """Export, prune to half the multiply-accumulates, compare mAP, and predict with the result."""
    model = Path(yolo(weights).export(format="onnx", dynamic=True, simplify=False))

    def mean_precision(path: Path) -> float:
        return 100 * float(yolo(str(path)).val(data=dataset, verbose=False).box.map)

    # Outputs are boxes in pixels and probabilities: ultralytics scales images to 0..1, as this package does.
    result = op.prune(model, target="macs=0.5", data=images, metric=mean_precision, max_drop=5.0)
    small = model.with_suffix(".pruned.onnx")
    result.save(small)
    print(result.report)
    yolo(str(small)).predict(images)


def stand_in() -> onnx.ModelProto:
    """Return a detector of two hidden layers."""
    model = onnx.parser.parse_model(STAND_IN)
    draw = np.random.default_rng(0)
    for name, shape in {"w0": (16, 3, 3, 3), "w1": (16, 16, 3, 3), "w2": (5, 16, 1, 1)}.items():
        values = draw.normal(size=shape) / np.sqrt(np.prod(shape[1:]))
        model.graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), name))
    return model


def main() -> None:
    """Prune the model of the command line, or the stand-in."""
    if len(sys.argv) == 4:
        prune_yolo(*sys.argv[1:])
        return
    images = np.random.default_rng(1).random((64, 3, 32, 32), np.float32)
    # The axis of the attributes; names and shapes of real exports tell it.
    result = op.prune(stand_in(), ratio=0.25, data=images, outputs={"output0": "boxes:1"}, latency=False)
    with tempfile.TemporaryDirectory() as folder:
        result.save(Path(folder) / "small.onnx")
    fidelity = result.report.fidelity
    print(f"exact: {result.report.exactness.passed}, {fidelity.points:.1f} of 100 points")


if __name__ == "__main__":
    main()
