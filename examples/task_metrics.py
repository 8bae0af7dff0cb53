"""Metrics of a detector and of a tagger of words: the path of a model in, a number out, higher is better.

onnxprune models/detector.onnx --max-drop 2 --metric examples/task_metrics.py:mean_precision \\
    --data models/detector_calibration.npz
python examples/task_metrics.py     prints both for the models under models/
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

MODELS = Path(__file__).resolve().parent.parent / "models"
Array = NDArray[Any]


def mean_precision(path: str | Path, overlap: float = 0.5) -> float:
    """Return the mean average precision of a detector in percent, over its classes, at an overlap of 0.5.

    Args:
        path: a model from images to [N, 4 + classes, cells]: x, y, width, height, and a score for each class.
        overlap: least intersection over union of a detection and the box that it finds.
    """
    test = np.load(MODELS / "detector_test.npz")
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {"images": test["images"]})
    found = [detections(image) for image in output]
    classes = range(output.shape[1] - 4)
    return 100 * float(np.mean([average_precision(found, test["boxes"], kind, overlap) for kind in classes]))


def detections(output: Array, least: float = 0.02, overlap: float = 0.5) -> Array:
    """Return the detections [n, 6] of an image: score, class, box; without those that overlap a better one."""
    boxes, scores = output[:4].T, output[4:].max(axis=0)
    order = np.argsort(-scores, kind="stable")
    rows: list[int] = []
    for k in order[scores[order] > least].tolist():
        if not rows or intersection_over_union(boxes[[k]], boxes[rows]).max() < overlap:
            rows.append(k)
    return np.column_stack([scores[rows], output[4:, rows].argmax(axis=0), boxes[rows]])


def average_precision(found: list[Array], truth: Array, kind: int, overlap: float) -> float:
    """Return the area below the precision of one class over its recall.

    Args:
        found: detections of every image.
        truth: boxes [images, most, 5]: class, x, y, width, height; class -1 for none.
        kind: the class.
        overlap: least intersection over union.
    """
    hits: list[tuple[float, bool]] = []
    for rows, boxes in zip(found, truth, strict=True):
        wanted = boxes[boxes[:, 0] == kind, 1:]
        free = np.ones(len(wanted), bool)
        for row in rows[rows[:, 1] == kind]:
            shared = intersection_over_union(row[None, 2:], wanted)[0] * free if len(wanted) else np.zeros(0)
            hit = bool(shared.size and shared.max() >= overlap)
            if hit:
                free[shared.argmax()] = False
            hits.append((row[0], hit))
    hits.sort(key=lambda pair: -pair[0])
    true = np.cumsum([hit for _, hit in hits])
    precision = true / np.arange(1, len(hits) + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]  # of any recall at least as high
    return float(sum(p for p, (_, hit) in zip(best, hits, strict=True) if hit) / (truth[:, :, 0] == kind).sum())


def intersection_over_union(a: Array, b: Array) -> Array:
    """Return the shared area of boxes [n, 4] and [m, 4] over that of both, [n, m]."""
    low = np.maximum((a[:, :2] - a[:, 2:] / 2)[:, None], (b[:, :2] - b[:, 2:] / 2)[None])
    high = np.minimum((a[:, :2] + a[:, 2:] / 2)[:, None], (b[:, :2] + b[:, 2:] / 2)[None])
    shared = np.clip(high - low, 0, None).prod(axis=-1)
    return np.asarray(shared / (a[:, 2:].prod(axis=1)[:, None] + b[:, 2:].prod(axis=1)[None] - shared))


def slots(path: str | Path) -> float:
    """Return the share of words in a slot that a tagger puts into it, in percent; padding does not count."""
    test = np.load(MODELS / "tagger_test.npz")
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    (scores,) = session.run(None, {name: test[name] for name in ("input_ids", "attention_mask")})
    counted = test["slots"] > 0  # slot 0 is none
    return 100 * float((scores.argmax(axis=-1) == test["slots"])[counted].mean())


if __name__ == "__main__":
    print(f"mean average precision {mean_precision(MODELS / 'detector.onnx'):.1f} %")
    print(f"slots {slots(MODELS / 'tagger.onnx'):.1f} %")
