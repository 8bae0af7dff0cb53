"""Sparse models: accuracy against density for patterns and criteria, with and without recovery and training.

python tools/bench_sparsify.py TRAINED                      a folder with models/*.onnx and evaluate.py
python tools/bench_sparsify.py TRAINED --only resnet56 --pattern 2:4 --criterion obs --recover full --out rows.jsonl
python tools/bench_sparsify.py --layer 4096                 time of the OBS update of one square layer

``evaluate.py NAME --model FILE`` must print one JSON object of metrics, and ``--record OUT.npz --samples N`` write the
model's real inputs, other ones than it measures on. No run sees a label.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from bench import files
from bench.labelled import evaluate, recorded

from onnxprune import errors, sparsify
from onnxprune.sparsification.obs import inverse_factor, prune_columns
from onnxprune.sparsification.patterns import Pattern

MODELS = ("resnet56", "resnet20", "cifar10_mlperf_resnet8", "kwt1", "squeezenet11")


def run(path: Path, data: Path, home: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Sparsify one model and measure it."""
    row: dict[str, Any] = {"model": files.name(path), **options}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        out = Path(folder) / "sparse.onnx"
        try:
            result = sparsify(path, data=str(data), latency=False, **options)
        except errors.OnnxpruneError as error:
            return row | {"error": str(error)}
        result.save(out)
        row["seconds"] = round(time.perf_counter() - start, 1)
        done = [layer for layer in result.report.sparsified if layer.pattern]
        row["layers"] = len(done)
        row["zeros"] = round(sum(x.zeros for x in done) / sum(x.elements for x in done), 4)
        row["metric"] = evaluate(home, row["model"], out)
    return row


def layer(size: int, pattern: str) -> dict[str, Any]:
    """Time the update of one square layer."""
    rng = np.random.default_rng(0)
    data = rng.normal(size=(size + 64, size)).astype(np.float32)
    gram = (data.T @ data).astype(np.float64) / len(data)
    matrix = rng.normal(size=(size, size))
    start = time.perf_counter()
    prune_columns(matrix, inverse_factor(gram), Pattern.of(pattern), size * size // 2, np.zeros(matrix.shape, bool))
    return {"size": size, "pattern": pattern, "seconds": round(time.perf_counter() - start, 1)}


def main() -> int:
    """Write a row per run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="folder with models/*.onnx and evaluate.py")
    parser.add_argument("--only", action="append", default=[], metavar="PATTERN", help="part of a name, or glob")
    parser.add_argument("--pattern", action="append", default=[])
    parser.add_argument("--criterion", action="append", default=[])
    parser.add_argument("--recover", action="append", default=[])
    parser.add_argument("--ratio", action="append", default=[], type=float, help="for patterns that take one")
    parser.add_argument("--finetune", help="steps or time")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--data", type=Path, help="folder of NAME.npz; recorded there where they are missing")
    parser.add_argument("--layer", type=int, help="time the update of a layer of this size, and nothing else")
    parser.add_argument("--out", type=Path, help="JSON lines, one per run")
    given = parser.parse_args()
    if given.layer:
        print(json.dumps(layer(given.layer, (given.pattern or ["2:4"])[0])))
        return 0
    if given.folder is None or not (given.folder / "evaluate.py").is_file():
        parser.error("give a folder with models/*.onnx and evaluate.py")
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        home = given.data or Path(folder)
        for path in files.find([given.folder / "models"], given.only or MODELS):
            data = recorded(given.folder, files.name(path), [home], given.samples)
            if data is None:
                continue
            choices = product(given.pattern or ["2:4"], given.criterion or ["magnitude", "wanda", "obs"],
                              given.recover or ["none"], given.ratio or [None])  # fmt: skip
            for pattern, criterion, mode, ratio in choices:
                options = {"pattern": pattern, "criterion": criterion, "recover": mode, "ratio": ratio}
                row = run(path, data, given.folder, {**options, "finetune": given.finetune})
                print(json.dumps(row), flush=True)
                if given.out is not None:
                    with given.out.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
