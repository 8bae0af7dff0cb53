"""Train models/detector.onnx and models/tagger.onnx, and write them with their calibration and test data.

pip install '.[models]' && python tools/make_task_models.py --out models

One seed, one thread: about two minutes on one core.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from digits import data, readme
from digits.export import strip
from tasks import detection, tagging
from torch import nn

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))
import task_metrics

SEED, BATCH = 0, 32
CANVASES = 104
"""For the calibration, and for the test."""
STEPS = {"detector": 1500, "tagger": 1500}
RATE = {"detector": 6e-3, "tagger": 4e-3}
MAX_BYTES = 300_000
"""Of a model with its data."""
LEAST = {"detector": 90.0, "tagger": 90.0}
TOLERANCE = 1e-4


def train(model: nn.Module, loss: Callable[[int], torch.Tensor], steps: int, rate: float) -> nn.Module:
    """Train with AdamW and a one-cycle learning rate; returns the network in evaluation mode."""
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for step in range(steps):
        optimizer.zero_grad()
        value = loss(step)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 0:
            print(f"  step {step}: loss {value.item():.3f}", flush=True)
    return model.eval()


def export(model: nn.Module, feed: dict[str, np.ndarray[Any, Any]], output: str, axes: Any) -> bytes:
    """Export with torch's tracing exporter, and hold the file to the network at two sizes of a batch."""
    buffer = io.BytesIO()
    examples = tuple(torch.from_numpy(value[:2]) for value in feed.values())
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            examples,
            buffer,
            training=torch.onnx.TrainingMode.PRESERVE,  # BatchNormalization stays a node of its own
            input_names=list(feed),
            output_names=[output],
            dynamic_axes=axes,
            opset_version=17,
            dynamo=False,
        )
    proto = onnx.load_from_string(buffer.getvalue())
    strip(proto)
    onnx.checker.check_model(proto, full_check=True)
    file = proto.SerializeToString(deterministic=True)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for count in (1, 7):
        part = {name: value[:count] for name, value in feed.items()}
        with torch.no_grad():
            expected = model(*map(torch.from_numpy, part.values())).numpy()
        if not np.allclose(session.run(None, part)[0], expected, rtol=TOLERANCE, atol=TOLERANCE):
            sys.exit(f"error: onnxruntime and torch differ at a batch of {count}")
    return file


def make_detector(folder: Path) -> bytes:
    """Train the detector and write its data; returns the file."""
    digits = data.load()
    draw = np.random.default_rng([SEED, 1])
    unlabelled = np.zeros(len(digits.calibration), np.int64)
    calibration = detection.canvases(digits.calibration, unlabelled, CANVASES, draw)
    test = detection.canvases(digits.test, digits.test_label, CANVASES, draw)
    model = detection.Detector()

    def loss(step: int) -> torch.Tensor:
        batch = detection.canvases(digits.train, digits.train_label, BATCH, np.random.default_rng([SEED, 2, step]))
        return detection.loss(model, batch)

    train(model, loss, STEPS["detector"], RATE["detector"])
    np.savez_compressed(folder / "detector_calibration.npz", images=calibration.images)
    np.savez_compressed(folder / "detector_test.npz", images=test.images, boxes=test.boxes)
    return export(model, {"images": test.images}, "output0", {"images": {0: "batch"}, "output0": {0: "batch"}})


def make_tagger(folder: Path) -> bytes:
    """Train the tagger and write its data; returns the file."""
    draw = np.random.default_rng([SEED, 1])
    calibration, test = tagging.sentences(256, draw), tagging.sentences(400, draw)
    model = tagging.Tagger()

    def loss(step: int) -> torch.Tensor:
        return tagging.loss(model, tagging.sentences(BATCH, np.random.default_rng([SEED, 2, step])))

    train(model, loss, STEPS["tagger"], RATE["tagger"])
    np.savez_compressed(folder / "tagger_calibration.npz", input_ids=calibration.ids, attention_mask=calibration.mask)
    np.savez_compressed(
        folder / "tagger_test.npz",
        input_ids=test.ids,
        attention_mask=test.mask,
        slots=test.slots,
        words=np.array(tagging.WORDS),
        names=np.array(tagging.SLOTS),
    )
    feed = {"input_ids": test.ids, "attention_mask": test.mask}
    axes = {name: {0: "batch", 1: "sequence"} for name in (*feed, "logits")}
    return export(model, feed, "logits", axes)


MAKERS = {"detector": (make_detector, task_metrics.mean_precision), "tagger": (make_tagger, task_metrics.slots)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("models"), help="folder to write into (default: models)")
    parser.add_argument("--only", choices=list(MAKERS), action="append", help="make this model only (repeatable)")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    record = given.out / "tasks.json"
    facts = json.loads(record.read_text()) if record.exists() else {}
    task_metrics.MODELS = given.out
    for name in given.only or MAKERS:
        start = time.perf_counter()
        make, metric = MAKERS[name]
        torch.manual_seed(SEED)
        file = make(given.out)
        (given.out / f"{name}.onnx").write_bytes(file)
        points = metric(given.out / f"{name}.onnx")
        total = sum(path.stat().st_size for path in given.out.glob(f"{name}*"))
        print(f"{name}: {points:.2f}, {len(file)} bytes, {total} with data, {time.perf_counter() - start:.0f} s")
        if total > MAX_BYTES or points < LEAST[name]:
            sys.exit(f"error: {name}: at most {MAX_BYTES} bytes and at least {LEAST[name]} points")
        elements = sum(int(np.prod(t.dims)) for t in onnx.load_from_string(file).graph.initializer)
        facts[name] = {"elements": elements, "bytes": len(file), "points": round(points, 2)}
    record.write_text(json.dumps({name: facts[name] for name in MAKERS if name in facts}, indent=2) + "\n")
    readme.write(given.out, data.load())


if __name__ == "__main__":
    main()
