"""Prune a YOLO model from ultralytics, with mAP as the metric of the budget, and load the result in a predictor.

python examples/prune_yolo.py yolo11n.pt coco128.yaml IMAGES/      needs ultralytics
python examples/prune_yolo.py                                      models/detector.onnx in its place
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import task_metrics

import onnxprune as op

MODELS = Path(__file__).resolve().parent.parent / "models"


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


def main() -> None:
    """Prune the model of the command line, or the stand-in."""
    if len(sys.argv) == 4:
        prune_yolo(*sys.argv[1:])
        return
    metric, data = task_metrics.mean_precision, MODELS / "detector_calibration.npz"
    result = op.prune(MODELS / "detector.onnx", ratio=0.25, data=data, metric=metric, latency=False)
    with tempfile.TemporaryDirectory() as folder:
        result.save(Path(folder) / "small.onnx")
    points = result.report.metric
    print(f"exact: {result.report.exactness.passed}, mAP {points.before:.1f} -> {points.after:.1f}")


if __name__ == "__main__":
    main()
