"""Points of fidelity against real metrics: Spearman's rank correlation over levels of damage, model by model.

python tools/bench_fidelity.py TRAINED --only lprnet --only yolox        a folder with models/*.onnx and evaluate.py
python tools/bench_fidelity.py TRAINED --levels 6 --keep damaged/ --out fidelity.jsonl

Each model is damaged at 12 levels: ratios from 0.02 to 0.6 by several criteria, with and without recovery, and noise on
its weights. ``evaluate.py NAME --model FILE`` must print one JSON object of metrics, ``--record FILE.npz`` write inputs
for calibration, other ones than those measured on: models are recovered from one half of them and compared on the other
half, for outputs on inputs that a model was fitted to look better than others. Beside the points stands the cosine,
smallest over the outputs.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from bench import files
from bench.labelled import evaluate, record
from onnx import numpy_helper
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from onnxprune import compare, errors, prune


class Damage(NamedTuple):
    """A ratio with a criterion and a mode of recovery, or the size of noise on weights, relative to each weight."""

    ratio: float = 0.0
    criterion: str = "l2"
    recover: str = "none"
    noise: float = 0.0


LEVELS = (
    Damage(0.02),
    Damage(noise=0.03),
    Damage(0.05, "wanda", "full"),
    Damage(0.1, "gm", "full"),
    Damage(0.1),
    Damage(noise=0.08),
    Damage(0.2, "wanda", "full"),
    Damage(0.2, "l1"),
    Damage(0.3, "l2", "full"),
    Damage(0.45, "l2", "lstsq"),
    Damage(0.4, "gm"),
    Damage(0.6, "wanda", "full"),
)


Inputs = list[dict[str, Any]]


def halves(home: Path, model: Path, samples: int, folder: Path) -> tuple[Inputs, Inputs]:
    """Return two lists of calls: those to recover from, and as many others to compare on."""
    name = files.name(model)
    data = folder / f"{name}.{2 * samples}.npz"
    if not data.exists():
        record(home, name, data, 2 * samples)
    with np.load(data) as file:
        arrays = {key: file[key] for key in file.files}
    rows = {}  # of each input in a call: where the model fixes the first axis it is not the axis of samples alone
    for value in onnx.load(model, load_external_data=False).graph.input:
        shape = value.type.tensor_type.shape.dim
        rows[value.name] = max(1, shape[0].dim_value) if shape else 0
    number = min(len(array) // rows[key] for key, array in arrays.items() if rows.get(key) and array.ndim)
    calls = [
        {k: v[i * rows[k] : (i + 1) * rows[k]] if v.ndim and rows.get(k) else v for k, v in arrays.items()}
        for i in range(number)
    ]
    return calls[: number // 2], calls[number // 2 :]


def tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Yield the weights of a graph and of the bodies in it."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from tensors(attribute.g)
            elif node.op_type == "Constant" and attribute.HasField("t"):
                yield attribute.t


def damaged(model: Path, level: Damage, data: Inputs, target: Path) -> None:
    """Write the model with one level of damage."""
    if level.noise:
        proto, rng = onnx.load(model), np.random.default_rng(0)
        for tensor in tensors(proto.graph):
            array = numpy_helper.to_array(tensor)
            if array.dtype == np.float32 and array.ndim > 1:
                noisy = array * (1 + level.noise * rng.standard_normal(array.shape))
                tensor.CopyFrom(numpy_helper.from_array(noisy.astype(np.float32), tensor.name))
        onnx.save(proto, target)
        return
    reads = level.recover != "none" or level.criterion == "wanda"
    given: dict[str, Any] = {"data": data} if reads else {}
    how = {"ratio": level.ratio, "criterion": level.criterion, "recover": level.recover, "round_to": 1}
    prune(model, **how, **given, validate=level.recover != "none", latency=False).save(target)


def evaluated(home: Path, name: str, target: Path) -> dict[str, float]:
    """Return the metrics of a damaged model, from the file beside it where there is one."""
    stored = target.with_suffix(".json")
    if not stored.exists():
        stored.write_text(json.dumps(evaluate(home, name, target)))
    metrics: dict[str, float] = json.loads(stored.read_text())
    return metrics


def measure(home: Path, model: Path, given: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Return metric, points and cosine of a model at every level."""
    name, records = files.name(model), list[dict[str, Any]]()
    data, others = halves(home, model, given.samples, folder)
    for number, level in enumerate(LEVELS[: given.levels]):
        target = folder / f"{name}.{number}.onnx"
        try:
            if not target.exists():
                damaged(model, level, data, target)
            metrics = evaluated(home, name, target)
            facts = compare(model, target, data=others, latency=False).fidelity
        except (errors.OnnxpruneError, RuntimeError) as error:
            print(f"{name} {level}: {type(error).__name__}: {error}", flush=True)
            continue
        assert facts is not None
        key = next((key for key in ("mAP50_95", "cos") if key in metrics), next(iter(metrics)))
        row = {"model": name, **level._asdict(), "metric": key, "value": metrics[key], "points": facts.points}
        row |= {"cosine": facts.worst_cosine, "centred": facts.worst_centred_cosine}
        records.append(row)
        print(json.dumps(row), flush=True)
    return records


def show(records: list[dict[str, Any]]) -> None:
    """Print the rank correlations of every model."""
    table = Table(title="Spearman's rank correlation with the metric")
    for column in ("model", "metric", "levels", "cosine", "centred cosine", "points"):
        table.add_column(column, justify="left" if column in ("model", "metric") else "right")
    for name in dict.fromkeys(row["model"] for row in records):
        rows = [row for row in records if row["model"] == name]
        values = [row["value"] for row in rows]
        found = [spearmanr(values, [row[key] for row in rows])[0] for key in ("cosine", "centred", "points")]
        table.add_row(name, rows[0]["metric"], str(len(rows)), *(f"{value:.3f}" for value in found))
    Console().print(table)


def main() -> int:
    """Measure and show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with models/*.onnx and evaluate.py")
    parser.add_argument("--only", action="append", default=[], metavar="PATTERN", help="part of a name, or glob")
    parser.add_argument("--levels", type=int, default=len(LEVELS), help="the first so many levels")
    parser.add_argument("--samples", type=int, default=64, help="inputs to recover from, and as many to compare on")
    parser.add_argument("--keep", type=Path, help="folder of the damaged models and their metrics, which are made once")
    parser.add_argument("--out", type=Path, help="JSON lines, one per level")
    given = parser.parse_args()
    records = []
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        folder = given.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for model in files.find([given.folder / "models"], given.only):
            records += measure(given.folder.resolve(), model.resolve(), given, folder)
    if given.out is not None:
        given.out.write_text("".join(json.dumps(row) + "\n" for row in records))
    show(records)
    return 0


if __name__ == "__main__":
    sys.exit(main())
