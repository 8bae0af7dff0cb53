"""Train the small models under models/ on the digits that ship with scikit-learn, and write them as ONNX.

pip install '.[models]' && python tools/make_models.py --out models

One seed, one thread: about two and a half minutes on one core.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime
import torch
from digits import conv_nets, data, readme, sequence_nets
from digits.export import INPUT, export
from digits.train import train
from measure_models import measure
from torch import nn

SEED = 0
MAX_BYTES = 1_000_000
MIN_ACCURACY = 0.95
# Logits of torch and of onnxruntime may differ by this much, relative and absolute (float32, other summation order).
TOLERANCE = 1e-4


class Recipe(NamedTuple):
    """How one model is trained and exported."""

    network: Callable[[], nn.Module]
    epochs: int
    rate: float
    opset: int
    dynamo: bool = False
    decay: float = 0.05
    sparsity: float = 0.0


# Opsets and exporters differ on purpose: the models are test material for what users bring. So does training: residual
# is trained to be cut, the others are not.
RECIPES = {
    "residual": Recipe(conv_nets.Residual, epochs=40, rate=5e-3, opset=13, decay=2.0, sparsity=0.01),
    "depthwise": Recipe(conv_nets.Depthwise, epochs=50, rate=5e-3, opset=17),
    "concat": Recipe(conv_nets.Concat, epochs=40, rate=5e-3, opset=11),
    "attention": Recipe(sequence_nets.Attention, epochs=80, rate=2e-3, opset=20, dynamo=True),
    "recurrent": Recipe(sequence_nets.Recurrent, epochs=80, rate=4e-3, opset=14),
}


class MakeError(Exception):
    """A model that came out wrong, too large or too inaccurate."""


def check_same(model: nn.Module, file: bytes, images: np.ndarray) -> None:
    """Hold the exported file to the network's own logits at two batch sizes. Raises MakeError."""
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for count in (1, len(images)):
        with torch.no_grad():
            expected = model(torch.from_numpy(images[:count])).numpy()
        actual = session.run(None, {INPUT: images[:count]})[0]
        if actual.shape != expected.shape or not np.allclose(actual, expected, rtol=TOLERANCE, atol=TOLERANCE):
            raise MakeError(f"batch {count}: onnxruntime and torch differ by {np.abs(actual - expected).max():.3g}")


def make(name: str, recipe: Recipe, digits: data.Digits, folder: Path) -> dict[str, object]:
    """Train, export, check and write `folder/name.onnx`; returns its facts for accuracy.json. Raises MakeError."""
    model = train(
        recipe.network,
        digits.train,
        digits.train_label,
        epochs=recipe.epochs,
        rate=recipe.rate,
        decay=recipe.decay,
        sparsity=recipe.sparsity,
        seed=SEED,
    )
    file = export(model, opset=recipe.opset, dynamo=recipe.dynamo).SerializeToString(deterministic=True)
    check_same(model, file, digits.test)
    accuracy = measure(file, digits.test, digits.test_label)
    if len(file) > MAX_BYTES or accuracy.share < MIN_ACCURACY:
        raise MakeError(
            f"{name}: {len(file)} bytes (at most {MAX_BYTES}), accuracy {accuracy.share:.4f} (at least {MIN_ACCURACY})"
        )
    (folder / f"{name}.onnx").write_bytes(file)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "bytes": len(file),
        "sha256": hashlib.sha256(file).hexdigest(),
        "opset": recipe.opset,
        "exporter": "dynamo" if recipe.dynamo else "torchscript",
        "images": accuracy.images,
        "correct": accuracy.correct,
        "accuracy": round(accuracy.share, 6),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("models"), help="folder to write into (default: models)")
    parser.add_argument("--only", choices=list(RECIPES), action="append", help="make this model only (repeatable)")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    digits = data.load()
    data.save(digits, given.out)
    record = given.out / "accuracy.json"
    facts = json.loads(record.read_text()) if given.only and record.exists() else {}
    for name in given.only or RECIPES:
        start = time.perf_counter()
        try:
            facts[name] = make(name, RECIPES[name], digits, given.out)
        except MakeError as error:
            sys.exit(f"error: {error}")
        print(f"{name:<10} accuracy {facts[name]['accuracy']:.2%}   {time.perf_counter() - start:.0f} s", flush=True)
    facts = {name: facts[name] for name in RECIPES if name in facts}
    record.write_text(json.dumps(facts, indent=2) + "\n")
    readme.write(given.out, digits)


if __name__ == "__main__":
    main()
