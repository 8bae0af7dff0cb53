"""Coverage of gradients over a folder of models, and their agreement with central differences.

    python tools/check_gradients.py FOLDER [--seconds 600] [--seed 0] [--limit 20e6] [--names a,b] [--json OUT]

FOLDER holds ``*.onnx`` files, or ``*.onnx.gz`` skeletons beside an ``inputs.json`` and a ``zoo.py`` that fills them. Of
each model the gradient of all trainable weights along one random direction is compared with central differences of the
forward pass in float32, at the best of several steps; where they differ, the median over seven single weights counts.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxprune.channels.analysis import Analysis
from onnxprune.errors import OnnxpruneError
from onnxprune.gradients.backward import training_graph
from onnxprune.gradients.static import StaticGraph, static_graph
from onnxprune.gradients.tape import Tape
from onnxprune.graph.probes import input_specs
from onnxprune.graph.view import Graph
from onnxprune.io.read import Loaded, load
from onnxprune.runtime.sessions import Feed, open_session, run
from onnxprune.training.parameters import heads, trainable


def skeletons(folder: Path) -> tuple[Any, dict[str, Any]]:
    """What fills skeletons, and the inputs of every one."""
    spec = importlib.util.spec_from_file_location("zoo", folder / "zoo.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, json.loads((folder / "inputs.json").read_text())


def inputs(loaded: Loaded, known: dict[str, Any] | None, rng: np.random.Generator) -> Feed:
    """Random inputs, of the recorded shapes where there are some."""
    feed: Feed = {}
    probed = Analysis(loaded.path).facts.probes[0].inputs if known is None and loaded.path else {}
    for k, spec in enumerate(input_specs(Graph.of(loaded.proto, loaded.weights))):
        shape = [n if isinstance(n, int) and n > 0 else (2 if axis == 0 else 16) for axis, n in enumerate(spec.shape)]
        shape = list(probed.get(spec.name, shape))
        high = 2
        if known is not None:
            shape = known["shapes"][k]
            ranges = known["ranges"] if isinstance(known["ranges"], dict) else {}
            given = ranges.get(spec.name, ranges.get(str(k), 2))
            high = given[1] if isinstance(given, (list, tuple)) else given
        if spec.dtype.kind == "f":
            feed[spec.name] = rng.standard_normal(shape).astype(spec.dtype)
        else:
            feed[spec.name] = rng.integers(0, max(1, int(high)), shape).astype(spec.dtype)
    return feed


def loss_of(graph: StaticGraph, names: list[str], rng: np.random.Generator) -> Any:
    """A random linear function of tensors."""
    seeds = {n: rng.standard_normal(graph.shapes[n]) for n in names}

    def loss(tape: Tape) -> str:
        total = ""
        for name, seed in seeds.items():
            constant = tape.constant((seed / np.sqrt(max(1, seed.size))).astype(tape.kinds[name]))
            part = tape.cast(tape.total(tape.mul(name, constant)), np.float32)
            total = tape.add(total, part) if total else part
        return total

    return loss


def agreement(graph: StaticGraph, feed: Feed, rng: np.random.Generator) -> tuple[str, float]:
    """Whether the gradients exist and agree, with the relative difference."""
    wanted, _ = trainable(graph)
    names = [head.tensor for head in heads(graph, wanted)]
    if not names:
        return "nothing to train: no output depends on a weight", 0.0
    training = training_graph(graph, loss_of(graph, names, rng), wanted)
    blocked = {why for why in training.frozen.values() if "does not depend" not in why}
    session = open_session(training.model.SerializeToString(), threads=1)
    weights = {n: graph.constants[n] for n in training.gradients}
    if not weights:
        return f"nothing to train: {next(iter(blocked), 'no weight')}", 0.0
    given = {i.name for i in session.get_inputs()}

    def at(step: float, direction: Feed) -> dict[str, Any]:
        moved = {n: (w + step * direction[n]).astype(w.dtype) for n, w in weights.items()}
        return run(session, {k: v for k, v in {**feed, **moved}.items() if k in given})

    def difference(names: list[str]) -> float:
        """Of the derivative along a random direction of some weights, at the best of several steps."""
        direction = {n: np.zeros_like(w) for n, w in weights.items()}
        for n in names:
            direction[n] = rng.standard_normal(weights[n].shape) * (np.abs(weights[n]).mean() + 1e-8)
        parts = [float((results[training.gradients[n]].astype(np.float64) * direction[n]).sum()) for n in names]
        analytic, least = sum(parts), np.inf
        for step in (1e-2, 1e-3, 1e-4, 1e-5):
            above, below = (float(at(side * step, direction)[training.loss]) for side in (1, -1))
            least = min(least, abs((above - below) / (2 * step) - analytic) / (abs(analytic) + 1e-6))
        return float(least)

    results = at(0.0, {n: np.zeros_like(w) for n, w in weights.items()})
    best = difference(list(weights))
    if best >= 0.05:  # kinks of many layers add up in float32, those of one do not
        order = rng.permutation(list(weights)).tolist()
        best = float(np.median([difference([n]) for n in order[:7]]))
    partly = f", frozen by {sorted(blocked)[0]}" if blocked else ""
    return ("agrees" if best < 0.05 else "differs") + partly, best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=20e6, help="largest number of parameters")
    parser.add_argument("--names", default="")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    zoo, known = skeletons(options.folder) if (options.folder / "zoo.py").exists() else (None, {})
    names = sorted(known) if zoo else sorted(p.stem for p in options.folder.glob("*.onnx"))
    random.Random(options.seed).shuffle(names)
    names = options.names.split(",") if options.names else names
    start, counts, rows = time.monotonic(), Counter[str](), []
    for name in names:
        if time.monotonic() - start > options.seconds:
            break
        rng = np.random.default_rng(0)
        try:
            source = zoo.fill(options.folder / f"{name}.onnx.gz") if zoo else options.folder / f"{name}.onnx"
            loaded = load(source)
            if sum(int(np.prod(w.shape)) for w in loaded.weights.values()) > options.limit:
                continue
            feed = inputs(loaded, known.get(name), rng)
            graph = static_graph(loaded.proto, loaded.weights, feed)
            outcome, difference = agreement(graph, feed, rng)
        except (OnnxpruneError, onnx.checker.ValidationError, MemoryError) as error:
            outcome, difference = f"error: {str(error)[:150]}", 0.0
        except Exception as error:
            outcome, difference = f"failure: {type(error).__name__} {str(error)[:150]}", 0.0
        counts[outcome.split(":")[0].split(",")[0]] += 1
        rows.append({"name": name, "outcome": outcome, "difference": difference})
        print(f"{name:50s} {outcome} {difference:.1e}", flush=True)
    print(dict(counts), "of", len(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    sys.exit(main())
