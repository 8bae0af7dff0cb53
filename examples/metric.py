"""A metric of your own in a file: the path of a model in, a number out, higher is better.

onnxprune models/residual.onnx --max-drop 1 --metric examples/metric.py:top1 --data models/digits_calibration.npz
python examples/metric.py [MODEL.onnx]     prints it
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort

MODELS = Path(__file__).resolve().parent.parent / "models"


def top1(path: str | Path) -> float:
    """Return the accuracy on held-out digits in percent; other ones than recovery sees."""
    test = np.load(MODELS / "digits_test.npz")
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: test["input"]})
    return 100 * float((logits.argmax(axis=1) == test["label"]).mean())


if __name__ == "__main__":
    print(f"{top1(sys.argv[1] if len(sys.argv) > 1 else MODELS / 'residual.onnx'):.1f} %")
