"""The detector and the tagger under models/: pruned exactly, compared as boxes and words, scored by users' metrics."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

import onnxprune as op

ROOT = Path(__file__).resolve().parent.parent
METRICS = {"detector": "mean_precision", "tagger": "slots"}


@pytest.mark.parametrize(("name", "kind", "least"), [("detector", "detections", 93.0), ("tagger", "sequence", 88.0)])
def test_tasks_beside_classification(name: str, kind: str, least: float) -> None:
    """Outputs are compared by what they hold, and a metric in a file gets models as users write them."""
    model = ROOT / "models" / f"{name}.onnx"
    data, metric = model.with_name(f"{name}_calibration.npz"), f"{ROOT}/examples/task_metrics.py:{METRICS[name]}"
    result = op.prune(model, ratio=0.15, criterion="ziplm", data=data, metric=metric, latency=False)
    report = result.report
    assert report.exactness.passed and report.totals.macs_after < 0.9 * report.totals.macs_before
    assert report.fidelity is not None and report.fidelity.answers[0].kind == kind
    assert report.metric is not None and report.metric.before > 93 and report.metric.after > least


def test_padding_of_the_tagger_changes_nothing() -> None:
    """Words behind the end of a sentence are masked: scores of its words are those without them."""
    test = np.load(ROOT / "models" / "tagger_test.npz")
    session = ort.InferenceSession(ROOT / "models" / "tagger.onnx", providers=["CPUExecutionProvider"])
    ids, mask = test["input_ids"][:1], test["attention_mask"][:1]
    length = int(mask.sum())
    assert 0 < length < mask.size
    filled = np.where(mask == 1, ids, 7)
    whole, short = (
        session.run(None, {"input_ids": i, "attention_mask": m})[0][:, :length]
        for i, m in ((filled, mask), (ids[:, :length], mask[:, :length]))
    )
    np.testing.assert_allclose(whole, short, rtol=1e-4, atol=1e-4)
