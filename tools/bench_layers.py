"""Where a pruned and recovered model goes wrong: per layer the error of its output, and what the errors up to it cost.

python tools/bench_layers.py ORIGINAL PRUNED PLAN DATA [--samples 64]

Columns: unknowns per output and positions per sample; the share of channels that are left; the error of the layer's
output (or of the sum that reads it) against the original's surviving channels, as a share of their variance; and the
loss of the outputs if that tensor were the original's: what is lost behind the layer. The last row is the whole model.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx

from onnxprune import Pipeline
from onnxprune.channels.survivors import Survivors
from onnxprune.io.write import assemble
from onnxprune.passes.adopt import Adopt
from onnxprune.passes.calibration import CalibrationBatches
from onnxprune.passes.comparable import comparable_tensors, survivors
from onnxprune.passes.prepared import Prepared
from onnxprune.pipeline import Context, Model, PassResult
from onnxprune.recovery.targets import find_targets
from onnxprune.runtime.capture import count
from onnxprune.runtime.fidelity import are_probabilities, roots
from onnxprune.runtime.sessions import Feed, open_session, run

Arrays = Mapping[str, np.ndarray[Any, Any]]


def layers(samples: int) -> Any:
    """Return a pass that prints the table of a pair."""

    def table(context: Context, model: Model) -> PassResult:
        feeds: list[Feed] = []
        for feed in CalibrationBatches(context, model.analysis).batches(16):
            feeds.append(feed)
            if sum(map(count, feeds)) >= samples:
                break
        after = Survivors(model.analysis.table, model.removal)
        graph = Prepared(*model.parts).graph
        targets = find_targets(graph, set(comparable_tensors(context, model)), after.shape)
        ordered = [target for level in targets.levels for target in level]
        names = list(dict.fromkeys(t.path.target for t in ordered))
        want, have = _run(context.analysis.graph, names, feeds), _run(graph, names, feeds)
        outputs = [o.name for o in graph.proto.graph.output]
        print(
            f"{'layer':<44} {'kind':<9} {'unknowns':>8} {'positions':>9} {'kept':>5} {'error':>8} {'loss behind':>11}"
        )
        for target in ordered:
            name = target.path.target
            given = [{name: survivors(lambda n, b: want[b][n], after, name, k)} for k in range(len(feeds))]
            error = _share([g[name] for g in given], [h[name] for h in have])
            shape = target.weight.shape(graph.weights)
            matrix = target.form.matrix(np.broadcast_to(np.float32(0), shape))
            data = have[0].get(name)
            positions = 0 if data is None else data[0].size // max(1, matrix.shape[0] * matrix.shape[2])
            before = want[0][name][0].size
            kind = _kind(target.node.op, shape, matrix.shape[0])
            replaced = _run(graph, (), feeds, given)
            lost = _loss(want, replaced, outputs)
            print(
                f"{target.node.label[-44:]:<44} {kind:<9} {matrix.shape[1]:>8} {positions:>9} "
                f"{given[0][name][0].size / before:>5.2f} {error:>8.4f} {lost:>11.4f}",
                flush=True,
            )
        print(f"{'whole model':<44} {'':<9} {'':>8} {'':>9} {'':>5} {'':>8} {_loss(want, have, outputs):>11.4f}")
        return PassResult(model, changed=False)

    return table


def _kind(op: str, shape: Sequence[int], parts: int) -> str:
    window = "x".join(map(str, shape[2:])) if op.startswith("Conv") and len(shape) > 2 else op
    return f"dw {window}" if parts > 1 and parts == shape[0] else f"{window}"


def _run(graph: Any, names: Sequence[str], feeds: Sequence[Feed], given: Sequence[Arrays] = ()) -> list[dict[str, Any]]:
    """Return outputs and these tensors for every call, with some tensors replaced by what is given."""
    proto = onnx.load_from_string(assemble(graph.proto, graph.weights).SerializeToString())
    for name in given[0] if given else ():
        for node in proto.graph.node:
            node.input[:] = [f"{name}__given" if n == name else n for n in node.input]
        value = given[0][name]
        kind = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
        proto.graph.input.append(onnx.helper.make_tensor_value_info(f"{name}__given", kind, [None] * value.ndim))
    known = {o.name for o in proto.graph.output}
    proto.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names if n not in known)
    session = open_session(proto.SerializeToString())
    extra = [{f"{n}__given": v for n, v in one.items()} for one in given] or [{}] * len(feeds)
    return [run(session, {**feed, **more}) for feed, more in zip(feeds, extra, strict=True)]


def _share(want: Sequence[Any], have: Sequence[Any]) -> float:
    a, b = (np.concatenate([v.ravel() for v in values]).astype(np.float64) for values in (want, have))
    return float(np.square(a - b).sum() / max(np.square(a - a.mean()).sum(), 1e-30))


def _loss(want: Sequence[Arrays], have: Sequence[Arrays], outputs: Sequence[str]) -> float:
    """Return the squared Hellinger distance of probabilities, else the share of variance; the mean over outputs."""
    losses = []
    for name in outputs:
        a, b = ([v[name] for v in values] for values in (want, have))
        if are_probabilities(a[0]):
            rows = sum(v[..., 0].size for v in a)
            pairs = zip(a, b, strict=True)
            losses.append(sum(0.5 * float(np.square(roots(x) - roots(y)).sum()) for x, y in pairs) / rows)
        elif a[0].dtype.kind == "f":
            losses.append(min(1.0, _share(a, b)))
    return float(np.mean(losses))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("original", "pruned", "plan", "data"):
        parser.add_argument(name)
    parser.add_argument("--samples", type=int, default=64)
    given = parser.parse_args()
    passes: list[Any] = [Adopt(given.pruned, given.plan), layers(given.samples)]
    Pipeline(passes).run(given.original, data=given.data)


if __name__ == "__main__":
    main()
