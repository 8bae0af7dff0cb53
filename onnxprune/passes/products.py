"""Check that the new layers are equivalent to the product of their weights in the old layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx

from onnxprune.errors import ModelError, ValidationError
from onnxprune.factorization.codes import Coded
from onnxprune.factorization.layers import NUMBERS
from onnxprune.factorization.rewriting import Factorized, compose_layers
from onnxprune.operators.kernels import Real
from onnxprune.passes.comparing import Pair, kinds_of, rounding_of
from onnxprune.passes.preparation import hold_against_file
from onnxprune.passes.prepared import Prepared
from onnxprune.passes.workspace import Workspace, synthetic_feeds
from onnxprune.pipeline import Context, Model, ModelParts
from onnxprune.report.facts import Exactness
from onnxprune.runtime.compare import TOLERANCE
from onnxprune.runtime.sessions import Feed

# Nodes to go back at most from an output that its own rounding decides.
_STEPS_BACK = 8


def check_products(
    context: Context,
    model: Model,
    after: ModelParts,
    factorized: Sequence[tuple[Factorized, Real]],
) -> Exactness:
    """Compare the factorized model with the one whose layers hold the products, on seeded inputs of every probe size.

    This checks strides, pads, groups, biases and order: everything but the approximation itself.

    Args:
        context: context of the run.
        model: the model before.
        after: the factorized model, with numbers in the place of the codes of its new layers.
        factorized: the replaced layers, and the products.

    Raises:
        ValidationError: they differ, or the preparation of the model changed its outputs.
    """
    analysis = context.analysis
    feeds = synthetic_feeds(context, model.analysis, model.refused)
    reference = Prepared(*model.parts, decoded=True)
    with Workspace.of(analysis) as trial:
        if model.removed is None and model.as_pruned is None:  # else the preparation was compared with the file before
            prepared = Prepared(*model.parts)
            hold_against_file(analysis, trial, (prepared.graph.proto, prepared.weights), feeds)
        compose_layers(reference.graph, reference.weights, [i for i, _ in factorized], [k for _, k in factorized])
        pair = Pair(trial, reference.model(), after, kinds_of(analysis), rounding_of(analysis, TOLERANCE))
        try:
            facts = _compared(pair, feeds)
        except ModelError:  # the model declares sizes open at which it does not run
            if len(feeds) < 2:
                raise
            facts = _compared(pair, feeds[:1])
    if facts.passed is False:
        raise ValidationError(
            f"The factorized layers do not compute the product of their weights: output {facts.worst_output!r} "
            f"differs by {facts.error:.3g} (allowed {facts.tolerance:.3g}). {facts.note}",
            hint="This is a bug in onnxprune: nothing was written. Please report the model's operators.",
        )
    return facts


def _compared(pair: Pair, feeds: Sequence[Feed]) -> Exactness:
    """Return the facts on the outputs; of outputs that their own rounding decides, on what they are computed from."""
    comparison = pair.compared(feeds)
    for _ in range(_STEPS_BACK):
        undecided = comparison.failed
        if comparison.facts.passed is not False or not undecided or set(undecided) != set(comparison.uncertain):
            break
        graphs = [parts[0].graph for parts in (pair.reference, pair.other)]
        sources = {i for n in graphs[0].node if set(n.output) & set(undecided) for i in n.input if i}
        computed = [{o for node in graph.node for o in node.output} for graph in graphs]
        sources &= computed[0] & computed[1]
        if not sources:
            break
        one, other = (_with_outputs(parts, undecided, sorted(sources)) for parts in (pair.reference, pair.other))
        pair = replace(pair, reference=one, other=other, file=None, final=None)
        comparison = pair.compared(feeds)
    return comparison.noted()


def _with_outputs(parts: ModelParts, without: Sequence[str], names: Sequence[str]) -> ModelParts:
    """Return a model without some outputs, and with tensors as outputs in their place."""
    proto = onnx.ModelProto()
    proto.CopyFrom(parts[0])
    outputs = [output for output in proto.graph.output if output.name not in without]
    present = {output.name for output in outputs}
    del proto.graph.output[:]
    proto.graph.output.extend(outputs)
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in present)
    return proto, parts[1]


def check_codes(after: ModelParts, coded: Mapping[str, Coded]) -> None:
    """Check that the codes of new layers stand for the numbers that were compared, bit for bit.

    Args:
        after: the factorized model.
        coded: {constant of numbers: its codes}.

    Raises:
        ValidationError: they stand for others.
    """
    if not coded:
        return
    weights = Prepared(*after, decoded=True).weights
    for name, item in coded.items():
        decoded = weights.get(f"{name}/codes{NUMBERS}")
        if decoded is None or not np.array_equal(decoded.read(), item.numbers.astype(decoded.dtype)):
            raise ValidationError(
                f"The codes of the new weight {name!r} do not stand for its numbers.",
                hint="This is a bug in onnxprune: nothing was written. Please report the model's operators.",
            )
