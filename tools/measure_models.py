"""Accuracy of the small digit models, or of one cut from them, in onnxruntime. Needs numpy and onnxruntime only.

python tools/measure_models.py                                          all classifiers of digits under models/
python tools/measure_models.py models/residual.onnx                     one of them
python tools/measure_models.py models/residual.onnx --model cut.onnx    and another model against it
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime
from numpy.typing import NDArray

FOLDER = Path(__file__).resolve().parent.parent / "models"
TEST_SET = FOLDER / "digits_test.npz"
# Leaves a last batch of 2 from 450 images, so a model whose batch size is baked in fails here.
BATCH = 64


class MeasureError(Exception):
    """A model or test set that cannot be measured; the message is for the user."""


class Accuracy(NamedTuple):
    """How many of the images a model names rightly, and the classes it gave, int64 [N]."""

    correct: int
    images: int
    classes: NDArray[np.int64]

    @property
    def share(self) -> float:
        return self.correct / self.images


def load_test_set(path: Path = TEST_SET) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Images [N, 1, 8, 8] and labels [N]. Raises MeasureError if the file is missing or not such a set."""
    try:
        with np.load(path, allow_pickle=False) as data:
            images, labels = data["input"], data["label"]
    except (OSError, ValueError, KeyError, AttributeError, EOFError) as error:
        raise MeasureError(f"{path}: no test set with arrays 'input' and 'label': {error}") from error
    if len(images) != len(labels) or not len(labels):
        raise MeasureError(f"{path}: {len(images)} images for {len(labels)} labels")
    return images, labels


def measure(model: Path | bytes, images: NDArray[np.float32], labels: NDArray[np.int64]) -> Accuracy:
    """Run the model's first output over the images in batches. Raises MeasureError if onnxruntime refuses."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    source = str(model) if isinstance(model, Path) else model
    try:
        session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        (name,) = (argument.name for argument in session.get_inputs())
        starts = range(0, len(images), BATCH)
        logits = np.concatenate([session.run(None, {name: images[at : at + BATCH]})[0] for at in starts])
    # onnxruntime's own errors share no base class but Exception.
    except Exception as error:
        shown = model if isinstance(model, Path) else "model"
        raise MeasureError(f"{shown}: cannot be run on the digits: {error}") from error
    classes = logits.argmax(-1)
    return Accuracy(int((classes == labels).sum()), len(labels), classes)


def _row(path: Path, accuracy: Accuracy, reference: Accuracy | None = None) -> dict[str, object]:
    row: dict[str, object] = {
        "model": path.name,
        "bytes": path.stat().st_size,
        "images": accuracy.images,
        "correct": accuracy.correct,
        "accuracy": round(accuracy.share, 6),
    }
    if reference is not None:
        row["change"] = round(accuracy.share - reference.share, 6)
        row["agreement"] = round(float((accuracy.classes == reference.classes).mean()), 6)
    return row


def rows(models: Sequence[Path], other: Path | None, test_set: Path) -> list[dict[str, object]]:
    """One row per model; `other` comes last, compared with the first model."""
    images, labels = load_test_set(test_set)
    measured = [(path, measure(path, images, labels)) for path in models]
    table = [_row(path, accuracy) for path, accuracy in measured]
    if other is not None:
        table.append(_row(other, measure(other, images, labels), measured[0][1]))
    return table


def _show(row: dict[str, object]) -> str:
    line = f"{row['model']:<28} {row['bytes']:>9,} bytes   {row['correct']}/{row['images']}   {row['accuracy']:.2%}"
    if "change" in row:
        line += f"   {row['change']:+.2%}   same class {row['agreement']:.2%}"
    return line


def main() -> int:
    """Exit code 0, or 2 where a file is missing or cannot be measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path, help="models to measure (default: the classifiers here)")
    parser.add_argument("--model", type=Path, metavar="OTHER", help="another model, compared with the first")
    parser.add_argument("--data", type=Path, default=TEST_SET, help="test set with arrays 'input' and 'label'")
    parser.add_argument("--json", action="store_true", help="one JSON list on stdout")
    given = parser.parse_args()
    models = given.models or [FOLDER / f"{name}.onnx" for name in json.loads((FOLDER / "accuracy.json").read_text())]
    for path in [*models, *([given.model] if given.model else [])]:
        if not path.is_file():
            parser.error(f"{path}: no such file")
    try:
        table = rows(models, given.model, given.data)
    except MeasureError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(table, indent=2) if given.json else "\n".join(map(_show, table)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
