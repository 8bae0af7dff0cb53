"""Do the new layers compute what the product of their weights does in the old layer's place?"""

from __future__ import annotations

from collections.abc import Sequence

from onnxprune.analysis import Analysis
from onnxprune.decompose.factor import Real
from onnxprune.errors import ValidationError
from onnxprune.factors.rewrite import Factorized, compose_layers
from onnxprune.files import workspace
from onnxprune.model.save import save
from onnxprune.passes.prepared import Prepared
from onnxprune.passes.trial import synthetic_feeds
from onnxprune.pipeline import Context, ModelParts
from onnxprune.report.facts import Exactness
from onnxprune.runtime import compare

_QUANTISED = {"QuantizeLinear", "QLinearConv", "QLinearMatMul", "DynamicQuantizeLinear"}


def check_products(
    context: Context,
    analysis: Analysis,
    before: ModelParts,
    after: ModelParts,
    chosen: Sequence[tuple[Factorized, Real]],
) -> Exactness:
    """The factorized model against the one in whose layers the products stand, on seeded inputs of every probe size.

    That is strides, pads, groups, biases and order: everything but the approximation itself.

    Raises:
        ValidationError: they differ.
    """
    reference = Prepared(*before)
    compose_layers(reference.graph, reference.weights, [i for i, _ in chosen], [k for _, k in chosen])
    quantized = any(node.op_type in _QUANTISED for node in before[0].graph.node)
    with workspace() as folder:
        one, other = folder / "product.onnx", folder / "factors.onnx"
        external = bool(analysis.loaded.external)
        save(*reference.model(), one, prefer_external=external)
        save(*after, other, prefer_external=external)
        facts = compare.exactness(one, other, synthetic_feeds(context, analysis), quantized=quantized)
    if facts.passed is False:
        raise ValidationError(
            f"The new layers do not compute the product of their weights: output {facts.worst_output!r} differs by "
            f"{facts.error:.3g} (allowed {facts.tolerance:.3g}). {facts.note}",
            hint="This is a bug in onnxprune: nothing was written. Please report the model's operators.",
        )
    return facts
