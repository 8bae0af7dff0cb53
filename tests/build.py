"""Small models by hand: a net that names its tensors, draws its weights from a seed and spells operators by opset."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.capi import onnxruntime_pybind11_state

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
OPEN_ENDED = (1 << 31) - 1
"""The last version of a kernel that holds until a newer one comes."""
INPUT_AXES = {"ReduceSum": 13, "Squeeze": 13, "Unsqueeze": 13}
"""From which opset an operator takes its axes as an input; the other reductions do from 18."""


@cache
def newest() -> int:
    """The newest opset that onnx knows and onnxruntime supports.

    onnxruntime loads models of an opset before it has kernels for all that is new in it. An opset counts once no
    operator lost its kernel by being defined anew there.
    """
    for opset in range(onnx.defs.onnx_opset_version(), 0, -1):
        net = Net(opset)
        model = net.model(net.op("Relu", net.input("x", ["N", 3])))
        try:
            ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        except Exception:
            continue
        if all(has_kernel(kind, opset) or not has_kernel(kind, opset - 1) for kind in defined_anew(opset)):
            return opset
    raise AssertionError("onnxruntime knows no opset")


def defined_anew(opset: int) -> list[str]:
    """Operators of the standard domain that an opset gives a new definition."""
    schemas = onnx.defs.get_all_schemas_with_history()
    return sorted({s.name for s in schemas if s.domain == "" and s.since_version == opset})


@cache
def kernels() -> dict[str, set[tuple[int, int]]]:
    """Per operator of the standard domain: the ranges of versions that onnxruntime has a processor kernel for."""
    ranges: dict[str, set[tuple[int, int]]] = defaultdict(set)
    for kernel in onnxruntime_pybind11_state.get_all_opkernel_def():
        if kernel.provider == "CPUExecutionProvider" and kernel.domain in ("", "ai.onnx"):
            ranges[kernel.op_name].add(tuple(kernel.version_range))
    return dict(ranges)


def has_kernel(kind: str, opset: int) -> bool:
    """Whether onnxruntime runs an operator of the standard domain in the form that it has at an opset."""
    try:
        version = onnx.defs.get_schema(kind, opset, "").since_version
    except onnx.defs.SchemaError:
        return False
    # A range without an end holds for the version that it starts with, as onnxruntime looks kernels up.
    return any(
        first == version or (first < version <= last and last < OPEN_ENDED) for first, last in kernels().get(kind, ())
    )


def element(dtype: Any) -> int:
    """onnx's number of an element type."""
    return int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


class Net:
    """A graph under construction. Every method returns the name of what it made, a list where there are several."""

    def __init__(self, opset: int = 17, *, ir: int = 8, seed: int = 0, dtype: Any = np.float32) -> None:
        self.opset, self.ir, self.dtype = opset, ir, np.dtype(dtype)
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.functions: list[onnx.FunctionProto] = []
        self.domains: dict[str, int] = {}
        self.hints: list[onnx.ValueInfoProto] = []
        self._count = 0

    def hint(self, name: str, shape: Sequence[int | str | None], dtype: Any = None) -> str:
        """Tell the shape of a tensor that inference cannot; the model itself does not."""
        self.hints.append(helper.make_tensor_value_info(name, element(dtype or self.dtype), shape))
        return name

    def name(self, stem: str) -> str:
        self._count += 1
        return f"{stem}_{self._count}"

    # -- sources ---------------------------------------------------------------------------------------------------

    def input(self, name: str, shape: Sequence[int | str], dtype: Any = None) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, element(dtype or self.dtype), shape))
        return name

    def const(self, value: Any, dtype: Any = None, name: str = "") -> str:
        """An initializer; integers are int64, everything else the net's type unless said."""
        array = np.asarray(value)
        if dtype is None:
            dtype = np.int64 if array.dtype.kind in "iu" else (bool if array.dtype.kind == "b" else self.dtype)
        name = name or self.name("const")
        self.initializers.append(
            numpy_helper.from_array(np.ascontiguousarray(array.astype(dtype)).reshape(array.shape), name)
        )
        return name

    def weight(self, *shape: int, name: str = "", scale: float | None = None, low: float | None = None) -> str:
        """A random weight, scaled so that sums keep their size; ``low``: the least of a positive one."""
        fan = int(np.prod(shape[1:])) or 1
        array = self.rng.standard_normal(shape) * (scale if scale is not None else 1 / np.sqrt(fan))
        if low is not None:
            array = low + np.abs(array)
        return self.const(array.astype(np.float64), self.dtype, name or self.name("w"))

    # -- operators -------------------------------------------------------------------------------------------------

    def op(self, kind: str, *inputs: str, n: int = 1, domain: str = "", **attrs: Any) -> Any:
        """One node; ``n`` outputs."""
        outputs = [self.name(kind.lower()) for _ in range(n)]
        kept = {k: v for k, v in attrs.items() if v is not None}
        self.nodes.append(
            helper.make_node(kind, list(inputs), outputs, name=self.name(f"/{kind}"), domain=domain, **kept)
        )
        if domain:
            self.domains.setdefault(domain, 1)
        return outputs[0] if n == 1 else outputs

    def conv(self, x: str, ins: int, outs: int, kernel: int = 3, *, dims: int = 2, group: int = 1, bias: bool = True,
             pad: bool = True, **attrs: Any) -> str:  # fmt: skip
        operands = [x, self.weight(outs, ins // group, *[kernel] * dims)]
        if bias:
            operands.append(self.weight(outs, scale=0.5))
        pads = [kernel // 2] * (2 * dims) if pad and "auto_pad" not in attrs else None
        return self.op("Conv", *operands, group=group, **{"pads": pads, **attrs})

    def linear(self, x: str, ins: int, outs: int, *, bias: bool = True, gemm: bool = False) -> str:
        """x W + b on the last axis; as a Gemm on request."""
        if gemm:
            return self.op("Gemm", x, self.weight(ins, outs, scale=ins**-0.5), self.weight(outs, scale=0.5))
        y = self.op("MatMul", x, self.weight(ins, outs, scale=ins**-0.5))
        return self.op("Add", y, self.weight(outs, scale=0.5)) if bias else y

    def norm(self, x: str, channels: int) -> str:
        """BatchNormalization with everything away from 0 and 1."""
        vectors = [self.weight(channels, scale=0.3, low=0.5), self.weight(channels, scale=0.3),
                   self.weight(channels, scale=0.3), self.weight(channels, scale=0.3, low=0.5)]  # fmt: skip
        return self.op("BatchNormalization", x, *vectors)

    def _with_axes(self, kind: str, x: str, axes: Sequence[int] | None, since: int, **attrs: Any) -> str:
        if axes is None:
            return self.op(kind, x, **attrs)
        if self.opset >= since:
            return self.op(kind, x, self.const(list(axes)), **attrs)
        return self.op(kind, x, axes=list(axes), **attrs)

    def reduce(self, kind: str, x: str, axes: Sequence[int] | None, keepdims: int = 1) -> str:
        return self._with_axes(kind, x, axes, INPUT_AXES.get(kind, 18), keepdims=keepdims)

    def squeeze(self, x: str, axes: Sequence[int]) -> str:
        return self._with_axes("Squeeze", x, axes, 13)

    def unsqueeze(self, x: str, axes: Sequence[int]) -> str:
        return self._with_axes("Unsqueeze", x, axes, 13)

    def transpose(self, x: str, *perm: int) -> str:
        return self.op("Transpose", x, perm=list(perm))

    def reshape(self, x: str, *target: int) -> str:
        return self.op("Reshape", x, self.const(list(target)))

    def split(self, x: str, sizes: Sequence[int], axis: int) -> Any:
        if self.opset >= 13:
            return self.op("Split", x, self.const(list(sizes)), axis=axis, n=len(sizes))
        return self.op("Split", x, split=list(sizes), axis=axis, n=len(sizes))

    def slice(self, x: str, start: int, end: int, axis: int, step: int = 1) -> str:
        if self.opset >= 10:
            return self.op("Slice", x, self.const([start]), self.const([end]), self.const([axis]), self.const([step]))
        assert step == 1
        return self.op("Slice", x, starts=[start], ends=[end], axes=[axis])

    def pad(self, x: str, pads: Sequence[int], mode: str = "constant", value: float = 0.0) -> str:
        if self.opset >= 11:
            return self.op("Pad", x, self.const(list(pads)), self.const(np.float64(value), self.dtype), mode=mode)
        return self.op("Pad", x, pads=list(pads), mode=mode, value=value)

    def gather(self, x: str, index: Any, axis: int) -> str:
        return self.op("Gather", x, self.const(np.asarray(index, np.int64)), axis=axis)

    # -- the model -------------------------------------------------------------------------------------------------

    def model(self, *outputs: str, check: bool = True, external_inputs: bool = False,
              shapes: dict[str, Sequence[int | str | None] | None] | None = None) -> onnx.ModelProto:  # fmt: skip
        """The finished model.

        ``external_inputs``: initializers are graph inputs too, as IR 3 wants. ``shapes``: of outputs that inference
        cannot tell.
        """
        inputs = list(self.inputs)
        if external_inputs or self.ir < 4:
            inputs += [helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in self.initializers]
        imports = [helper.make_opsetid("", self.opset), *(helper.make_opsetid(d, v) for d, v in self.domains.items())]
        blank = [helper.make_tensor_value_info(o, TensorProto.FLOAT, None) for o in outputs]
        for info in blank:
            info.type.tensor_type.ClearField("elem_type")
        graph = helper.make_graph(self.nodes, "net", inputs, blank, self.initializers)
        model = helper.make_model(graph, opset_imports=imports, ir_version=self.ir, functions=self.functions)
        model.graph.value_info.extend(self.hints)
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=check, data_prop=True)
        del model.graph.value_info[:]
        for mine, found in zip(model.graph.output, inferred.graph.output, strict=True):
            mine.CopyFrom(found)
            if not mine.type.tensor_type.elem_type or not mine.type.tensor_type.HasField("shape"):
                kind = mine.type.tensor_type.elem_type or element(self.dtype)
                mine.CopyFrom(helper.make_tensor_value_info(mine.name, kind, (shapes or {})[mine.name]))
        if check:
            onnx.checker.check_model(model)
        return model
