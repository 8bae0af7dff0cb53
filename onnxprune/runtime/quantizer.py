"""The quantizer of onnxruntime: from file to file, with its own defaults and messages kept out of the way."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from onnxprune.errors import ModelError, argument
from onnxprune.runtime.sessions import Feed

PREPARED = ("onnx.quant.pre_process", "onnxruntime.quant")
"""Metadata of a model that needs no preparation: the quantizer then recommends none."""


_DYNAMIC = ("MatMul", "LSTM", "Attention")
_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_BETWEEN = (
    *("Add", "Relu", "Clip", "MaxPool", "AveragePool", "GlobalAveragePool", "Concat", "Reshape", "Transpose"),
    *("Flatten", "Squeeze", "Unsqueeze", "Slice", "Split", "Pad", "Resize"),
)
"""Operators that pass on codes between convolutions. Sums of a transformer's residual stream would lose too much."""


def operators_for(
    present: Collection[tuple[str, str]], excluded: Collection[str], *, static: bool, bodies: bool
) -> list[str]:
    """Return the types of the operators that the quantizer is to take.

    Args:
        present: type and domain of the operators of the model.
        excluded: types to leave out.
        static: whether ranges of activations are known ahead (QDQ).
        bodies: whether nodes have bodies, which read tensors of the graph by name.
    """
    types = {op for op, _ in present} - set(excluded)
    if not static:
        # An Attention of the standard domain has no weights.
        return [op for op in _DYNAMIC if op in types and (op != "Attention" or (op, "") not in present)]
    if bodies:  # the quantizer renames tensors of the graph, and bodies read them by their names
        return []
    convolves = bool(types & {"Conv", "ConvTranspose"})
    return [op for op in (*_LAYERS, *(_BETWEEN if convolves else ())) if op in types]


class _Reader:
    """Inputs for the ranges of activations, in the form that onnxruntime reads."""

    def __init__(self, feeds: Iterable[Feed]) -> None:
        self._feeds = iter(feeds)

    def get_next(self) -> Any:
        """Return the next call's inputs; None at the end."""
        return next(self._feeds, None)


def quantize_file(
    source: Path,
    target: Path,
    *,
    operators: Sequence[str],
    per_channel: bool,
    feeds: Sequence[Feed] | None = None,
    external: bool = False,
) -> None:
    """Quantize a model to 8 bits, weights symmetric.

    Args:
        source: path of the model.
        target: path of the quantized model.
        operators: types of the operators to quantize.
        per_channel: whether each output channel of a weight has a scale of its own.
        feeds: inputs to find ranges of activations with (QDQ); None: ranges are found at run time (dynamic).
        external: whether the model is too large for one file.

    Raises:
        ModelError: the quantizer cannot process the model.
    """
    from onnxruntime import quantization as ort  # takes a moment to load, and few runs need it

    common = {
        "op_types_to_quantize": list(operators),
        "per_channel": per_channel,
        "weight_type": ort.QuantType.QInt8,
        "use_external_data_format": external,
        "extra_options": {"MatMulConstBOnly": True},
    }
    with _quiet():
        try:
            if feeds is None:
                ort.quantize_dynamic(source, target, **common)
            else:
                form = {"quant_format": ort.QuantFormat.QDQ, "activation_type": ort.QuantType.QInt8}
                ort.quantize_static(source, target, _Reader(feeds), **form, **common)
        except Exception as error:  # it raises whatever happens within it
            first = str(error).strip().partition("\n")[0] or type(error).__name__
            raise ModelError(
                f"onnxruntime's quantizer cannot process this model: {first}",
                hint=f"Drop {argument('quantize')}, or quantize the result with another tool.",
            ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the quantizer's advice, which it gives to the root logger, from the user's screen."""
    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(before)
