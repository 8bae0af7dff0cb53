"""One plausible node of every operator that a rule exists for: operands with their shapes, and attributes, drawn."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

MS = "com.microsoft"
Size = tuple[int, ...]


class Draw:
    """Seeded choices."""

    def __init__(self, seed: str) -> None:
        self.random = random.Random(seed)

    def pick(self, options: Sequence[Any]) -> Any:
        return self.random.choice(options)

    def flip(self, share: float = 0.5) -> bool:
        return self.random.random() < share

    def shape(self, low: int = 2, high: int = 4) -> Size:
        """Sizes of 2 to 6; the number of elements stays small."""
        return tuple(self.pick([2, 3, 4, 6]) for _ in range(self.random.randint(low, high)))

    def axis(self, shape: Size) -> int:
        return self.random.randrange(len(shape))

    def signed(self, axis: int, rank: int) -> int:
        """The same axis, at times counted from the end."""
        return axis - rank if self.flip() else axis


@dataclass
class Operand:
    """A floating operand: a layer, a weight or an input gives it.

    Attributes:
        before: unary operators that it goes through first, such as one that keeps numbers positive.
        low: the least number where a weight gives it; None: any.
    """

    shape: Size
    before: tuple[Any, ...] = ()
    low: float | None = None


Given = Operand | NDArray[Any] | None


@dataclass
class Case:
    """A node to be: ``operands`` are floating ones, constants, or None where an optional one is left out."""

    operands: list[Given]
    attrs: dict[str, Any] = field(default_factory=dict)
    outputs: int = 1
    opset: int = 0
    """The opset that has this form; 0: the newest of all."""

    @property
    def coded(self) -> bool:
        """Whether an operand holds codes."""
        steps = [step for x in self.operands if isinstance(x, Operand) for step in x.before]
        return any(step[0] == "QuantizeLinear" for step in steps)


Build = Callable[[Draw], Case]
CASES: dict[tuple[str, str], Build] = {}


def case(*names: str, domain: str = "") -> Callable[[Callable[[Draw, str], Case]], Callable[[Draw, str], Case]]:
    """Register a builder, which is told the operator's name, for several operators."""

    def enter(build: Callable[[Draw, str], Case]) -> Callable[[Draw, str], Case]:
        for name in names:
            CASES[domain, name] = lambda draw, name=name: build(draw, name)  # type: ignore[misc]
        return build

    return enter


def ints(*values: Any) -> NDArray[np.int64]:
    return np.asarray(values, np.int64)


# -- position by position ----------------------------------------------------------------------------------------------

POSITIVE = ("Sigmoid",)
BOOLEAN = (("Cast", {"to": 9}),)
INTEGER = (("Cast", {"to": 6}),)
UNSIGNED = ("Abs", ("Cast", {"to": 13}))
RANGES = {"Acos": POSITIVE, "Asin": POSITIVE, "Atanh": POSITIVE, "Log": POSITIVE, "Sqrt": POSITIVE}
RANGES |= {"Acosh": ("Cosh",), "Not": BOOLEAN, "BitwiseNot": INTEGER, "Reciprocal": POSITIVE, "Tan": POSITIVE}


@case(
    *("Relu Sigmoid Tanh Erf Sqrt Exp Log Abs Neg Floor Ceil Round Sign Sin Cos Tan Asin Acos Atan Sinh Cosh Asinh "
      "Acosh Atanh LeakyRelu Elu Selu Celu Gelu HardSwish HardSigmoid Mish Softplus Softsign ThresholdedRelu Shrink "
      "Swish Identity Not IsNaN IsInf Reciprocal BitwiseNot Dropout").split()
)  # fmt: skip
def unary(draw: Draw, name: str) -> Case:
    return Case([Operand(draw.shape(1), RANGES.get(name, ()))])


@case("Cast", "BitCast")
def cast(draw: Draw, name: str) -> Case:
    return Case([Operand(draw.shape(1))], {"to": draw.pick([1, 6, 9, 11])} if name == "Cast" else {"to": 6})


@case("CastLike")
def cast_like(draw: Draw, name: str) -> Case:
    return Case([Operand(draw.shape(1)), draw.pick([np.zeros((), np.float64), Operand((3, 2))])])


@case("Clip")
def clip(draw: Draw, name: str) -> Case:
    return Case([Operand(draw.shape(1)), np.asarray(-0.3, np.float32), np.asarray(0.4, np.float32)])


def partner(draw: Draw, shape: Size) -> Size:
    """A shape that broadcasts against ``shape``."""
    other = [n if draw.flip(0.7) else 1 for n in shape]
    return tuple(other[draw.pick([0, 0, 1]) :]) or (1,)


PAIRS: dict[str, tuple[Any, ...]] = dict.fromkeys(("And", "Or", "Xor"), BOOLEAN)
PAIRS |= dict.fromkeys(("BitwiseAnd", "BitwiseOr", "BitwiseXor"), INTEGER)
PAIRS |= {"Pow": POSITIVE, "Div": POSITIVE, "Mod": POSITIVE, "BitShift": UNSIGNED}


@case(
    *("Add Sub Mul Div Pow Mod Max Min Sum Mean And Or Xor Equal Less LessOrEqual Greater GreaterOrEqual PRelu "
      "BitShift BitwiseAnd BitwiseOr BitwiseXor").split()
)  # fmt: skip
def pair(draw: Draw, name: str) -> Case:
    shape = draw.shape(1)
    operands = [Operand(shape, PAIRS.get(name, ())), Operand(partner(draw, shape), PAIRS.get(name, ()))]
    if name != "PRelu" and draw.flip():
        operands.reverse()
    attrs: dict[str, Any] = {"Mod": {"fmod": 1}, "BitShift": {"direction": "LEFT"}}.get(name, {})
    return Case(list(operands), attrs)


@case("SwiGLU")
def gated(draw: Draw, name: str) -> Case:
    shape = draw.shape(1)
    return Case([Operand(shape), Operand(shape)])


@case("Where")
def where(draw: Draw, name: str) -> Case:
    shape = draw.shape(1)
    return Case([Operand(partner(draw, shape), BOOLEAN), Operand(shape), Operand(partner(draw, shape))])


# -- sums --------------------------------------------------------------------------------------------------------------


@case("MatMul")
def matmul(draw: Draw, name: str) -> Case:
    batch = draw.shape(0, 2)
    m, k, n = draw.shape(3, 3)
    left = draw.pick([(*batch, m, k), (*batch, m, k), (k,)])
    right = draw.pick([(k, n), (*batch, k, n), (k,)])
    return Case([Operand(left), Operand(right)])


@case("FusedMatMul", "TransposeMatMul", domain=MS)
def fused_matmul(draw: Draw, name: str) -> Case:
    batch = draw.shape(0, 2)
    m, k, n = draw.shape(3, 3)
    a, b = draw.flip(), draw.flip()
    attrs: dict[str, Any] = {"transA": int(a), "transB": int(b), "alpha": 0.5}
    left, right = (k, m) if a else (m, k), (n, k) if b else (k, n)
    return Case([Operand((*batch, *left)), Operand((*batch, *right))], attrs)


@case("Gemm")
@case("FusedGemm", domain=MS)
def gemm(draw: Draw, name: str) -> Case:
    m, k, n = draw.shape(3, 3)
    a, b = draw.flip(), draw.flip()
    c = draw.pick([None, Operand((n,)), Operand((m, n)), Operand((m, 1))])
    attrs: dict[str, Any] = {"transA": int(a), "transB": int(b), "alpha": 0.5, "beta": 2.0}
    if name == "FusedGemm":
        attrs["activation"] = "Relu"
    return Case([Operand((k, m) if a else (m, k)), Operand((n, k) if b else (k, n)), c], attrs)


@case("Einsum")
def einsum(draw: Draw, name: str) -> Case:
    sizes = dict(zip("abcdk", draw.shape(5, 5), strict=True))
    equation = draw.pick(
        [
            "abk,kc->abc",
            "abk,bkc->abc",
            "ab,bc,cd->ad",
            "abc,abc->ab",
            "abc,cd->bad",
            "ab,ab->",
            "abc->ca",
            "abc,abd->cd",
        ]
    )
    terms = equation.split("->")[0].split(",")
    return Case([Operand(tuple(sizes[c] for c in t)) for t in terms], {"equation": equation})


@case("CDist", domain=MS)
def distances(draw: Draw, name: str) -> Case:
    m, n, k = draw.shape(3, 3)
    return Case([Operand((m, k)), Operand((n, k))], {"metric": draw.pick(["euclidean", "sqeuclidean"])})


# -- movement ----------------------------------------------------------------------------------------------------------


@case("Transpose")
def transpose(draw: Draw, name: str) -> Case:
    shape = draw.shape(1)
    perm = list(range(len(shape)))
    draw.random.shuffle(perm)
    return Case([Operand(shape)], {"perm": perm})


@case("Reshape")
def reshape(draw: Draw, name: str) -> Case:
    shape = draw.pick(
        [(2, 12), (4, 6), (2, 3, 4), (4, 3, 2), (6, 2, 2), (2, 2, 2, 3), (24,), (3, 8), (1, 24), (1, 4, 6)]
    )
    target = draw.pick([(2, 12), (4, 6), (2, 3, 4), (24,), (-1, 4), (2, -1, 3), (1, 2, 12), (2, 3, 2, 2)])
    return Case([Operand(shape), ints(*target)])


@case("Flatten")
def flatten(draw: Draw, name: str) -> Case:
    shape = draw.shape(2)
    return Case([Operand(shape)], {"axis": draw.axis(shape)})


@case("Squeeze")
def squeeze(draw: Draw, name: str) -> Case:
    return Case([Operand(draw.pick([(1, 4, 6), (4, 1, 6), (4, 6, 1), (1, 6)])), None])


@case("Unsqueeze")
def unsqueeze(draw: Draw, name: str) -> Case:
    shape = draw.shape(1, 3)
    return Case([Operand(shape), ints(draw.signed(draw.axis((*shape, 1)), len(shape) + 1))])


@case("ExpandDims", domain=MS)
def expand_dims(draw: Draw, name: str) -> Case:
    shape = draw.shape(1, 3)
    return Case([Operand(shape), np.asarray(draw.axis(shape), np.int32)])


@case("Expand")
def expand(draw: Draw, name: str) -> Case:
    shape = draw.shape(2)
    own = tuple(n if draw.flip(0.7) else 1 for n in shape)
    target = tuple(draw.pick([n, 1]) if m == n else n for n, m in zip(shape, own, strict=True))
    return Case([Operand(own), ints(*draw.pick([(), (2,)]), *target)])


@case("Tile")
def tile(draw: Draw, name: str) -> Case:
    shape = draw.shape(1, 3)
    return Case([Operand(shape), ints(*[draw.pick([1, 1, 2, 3]) for _ in shape])])


@case("Concat")
def concat(draw: Draw, name: str) -> Case:
    shape = draw.shape(1)
    axis = draw.axis(shape)
    parts = [Operand(tuple(draw.pick([2, 4]) if a == axis else n for a, n in enumerate(shape))) for _ in range(2)]
    return Case([*parts, Operand(shape)], {"axis": draw.signed(axis, len(shape))})


@case("Split")
def split(draw: Draw, name: str) -> Case:
    shape = draw.shape(1)
    axis = draw.axis(shape)
    first = draw.random.randrange(1, shape[axis])
    return Case([Operand(shape), ints(first, shape[axis] - first)], {"axis": draw.signed(axis, len(shape))}, 2)


@case("Slice")
def cut_out(draw: Draw, name: str) -> Case:
    shape = draw.shape(1)
    axis = draw.axis(shape)
    start = draw.random.randrange(shape[axis])
    stop = draw.random.randrange(start + 1, shape[axis] + 1)
    backwards = draw.flip(0.2)
    bounds = [ints(shape[axis] - 1), ints(-99)] if backwards else [ints(start), ints(stop)]
    return Case(
        [Operand(shape), *bounds, ints(draw.signed(axis, len(shape))), ints(-1 if backwards else draw.pick([1, 2]))]
    )


@case("Pad")
def pad(draw: Draw, name: str) -> Case:
    shape = draw.shape(1)
    ends = [0] * (2 * len(shape))
    for _ in range(2):
        ends[draw.random.randrange(len(ends))] = draw.pick([1, 0, -1, 1])
    value = np.asarray(draw.pick([0.0, 0.5]), np.float32)
    return Case([Operand(shape), ints(*ends), value], {"mode": draw.pick(["constant", "constant", "reflect", "edge"])})


@case("Gather")
def gather(draw: Draw, name: str) -> Case:
    shape = draw.shape(1)
    axis = draw.axis(shape)
    size = draw.pick([(), (1,), (2,), (3,), (2, 2)])
    index = np.asarray(draw.random.choices(range(-shape[axis], shape[axis]), k=int(np.prod(size))), np.int64)
    return Case([Operand(shape), index.reshape(size)], {"axis": draw.signed(axis, len(shape))})


@case("GatherElements")
def gather_elements(draw: Draw, name: str) -> Case:
    shape = draw.shape(1, 3)
    axis = draw.axis(shape)
    size = tuple(draw.random.randrange(1, n + 1) for n in shape)
    index = np.asarray(draw.random.choices(range(shape[axis]), k=int(np.prod(size))), np.int64).reshape(size)
    if draw.flip():  # the same along every other axis, as a lookup repeated over channels has it
        first = index[tuple(slice(None) if a == axis else slice(0, 1) for a in range(len(size)))]
        index = np.broadcast_to(first, tuple(size[a] if a == axis else n for a, n in enumerate(shape)))
    return Case([Operand(shape), index], {"axis": draw.signed(axis, len(shape))})


@case("GatherND")
def gather_nd(draw: Draw, name: str) -> Case:
    shape = draw.shape(2)
    batch = draw.pick([0, 0, 1])
    depth = draw.random.randrange(1, len(shape) - batch + 1)
    size = (*shape[:batch], 3, depth)
    index = np.zeros(size, np.int64)
    for i in range(depth):
        index[..., i] = np.asarray(draw.random.choices(range(shape[batch + i]), k=int(np.prod(size[:-1])))).reshape(
            size[:-1]
        )
    return Case([Operand(shape), index], {"batch_dims": batch})


@case("Compress")
def compress(draw: Draw, name: str) -> Case:
    shape = draw.shape(1, 3)
    axis = draw.axis(shape)
    keep = np.asarray([True, *[draw.flip() for _ in range(shape[axis] - 1)]])
    return Case([Operand(shape), keep], {"axis": axis} if draw.flip(0.8) else {})


@case("ScatterElements", "Scatter")
def scatter_elements(draw: Draw, name: str) -> Case:
    shape = draw.shape(1, 3)
    axis = draw.axis(shape)
    size = tuple(draw.random.randrange(1, n + 1) for n in shape)
    columns = [draw.random.sample(range(shape[axis]), size[axis]) for _ in range(int(np.prod(size)) // size[axis])]
    moved = [n for a, n in enumerate(size) if a != axis]
    index = np.moveaxis(np.asarray(columns, np.int64).reshape(*moved, size[axis]), -1, axis)
    return Case([Operand(shape), index, Operand(size)], {"axis": axis}, opset=10 if name == "Scatter" else 0)


@case("ScatterND")
def scatter_nd(draw: Draw, name: str) -> Case:
    shape = draw.shape(1, 3)
    depth = draw.random.randrange(1, len(shape) + 1)
    rows = draw.random.sample(list(np.ndindex(*shape[:depth])), 2)
    return Case([Operand(shape), ints(*rows), Operand((2, *shape[depth:]))], {"reduction": draw.pick(["none", "add"])})


@case("TensorScatter")
def tensor_scatter(draw: Draw, name: str) -> Case:
    batch, heads, length, size, new = 2, draw.pick([2, 4]), 6, draw.pick([2, 4]), 2
    where = draw.pick([None, ints(*[draw.random.randrange(4) for _ in range(batch)])])
    return Case([Operand((batch, heads, length, size)), Operand((batch, heads, new, size)), where])


@case("Trilu")
@case("Trilu", domain=MS)
def triangle(draw: Draw, name: str) -> Case:
    return Case([Operand(draw.shape(2)), draw.pick([None, np.asarray(1, np.int64)])], {"upper": int(draw.flip())})


@case("DepthToSpace")
def depth_to_space(draw: Draw, name: str) -> Case:
    return Case([Operand((2, draw.pick([8, 12, 16]), 2, 3))], {"blocksize": 2, "mode": draw.pick(["DCR", "CRD"])})


@case("SpaceToDepth")
def space_to_depth(draw: Draw, name: str) -> Case:
    modes = [{"mode": "DCR"}, {"mode": "CRD"}] if onnx.defs.onnx_opset_version() >= 28 else []
    mode = draw.pick([{}, *modes])
    return Case([Operand((2, draw.pick([2, 3, 6]), 4, 6))], {"blocksize": 2, **mode}, opset=28 if mode else 0)


@case("Shape", "Size", "NonZero", "EyeLike", "Unique", "OneHot", "Range", "ConstantOfShape", "NonMaxSuppression")
def of_sizes(draw: Draw, name: str) -> Case:
    """What is made of the operand's sizes or values alone."""
    shape = draw.shape(2, 2)
    if name == "OneHot":
        return Case(
            [Operand(shape, ("Abs", ("Cast", {"to": 7}))), np.asarray(5, np.int64), np.asarray([0.0, 1.0], np.float32)]
        )
    if name == "Range":
        return Case([np.asarray(0, np.float32), Operand((), POSITIVE), np.asarray(0.25, np.float32)])
    if name == "ConstantOfShape":
        return Case([Operand(shape, ("Shape",))])
    if name == "NonMaxSuppression":
        return Case([Operand((1, 6, 4)), Operand((1, 2, 6)), ints(3)])
    return Case([Operand(shape)])


# -- normalisations and reductions -------------------------------------------------------------------------------------

REDUCTIONS = (
    "ReduceSum ReduceSumSquare ReduceL1 ReduceL2 ReduceMean ReduceMax ReduceMin ReduceProd ReduceLogSumExp".split()
)


@case(*REDUCTIONS, "ReduceLogSum")
def reduction(draw: Draw, name: str) -> Case:
    shape = draw.shape(1)
    axes = sorted({draw.axis(shape) for _ in range(draw.pick([1, 1, 2]))})
    chosen = ints(*[draw.signed(a, len(shape)) for a in axes])
    before = POSITIVE if name == "ReduceLogSum" else ()
    return Case([Operand(shape, before), draw.pick([chosen, chosen, None])], {"keepdims": int(draw.flip())})


@case("ArgMax", "ArgMin")
def arg(draw: Draw, name: str) -> Case:
    shape = draw.shape(1)
    return Case([Operand(shape)], {"axis": draw.signed(draw.axis(shape), len(shape)), "keepdims": int(draw.flip())})


@case("TopK")
def top(draw: Draw, name: str) -> Case:
    shape = draw.shape(1)
    axis = draw.axis(shape)
    k = draw.random.randrange(1, shape[axis] + 1)
    return Case([Operand(shape), ints(k)], {"axis": draw.signed(axis, len(shape)), "largest": int(draw.flip())}, 2)


@case("CumSum", "CumProd")
def cumulative(draw: Draw, name: str) -> Case:
    shape = draw.shape(1)
    axis = np.asarray(draw.signed(draw.axis(shape), len(shape)), np.int64)
    return Case([Operand(shape), axis], {"reverse": int(draw.flip()), "exclusive": int(draw.flip())})


@case("DFT")
def fourier(draw: Draw, name: str) -> Case:
    shape = (*draw.shape(2, 3), draw.pick([1, 2]))
    return Case([Operand(shape), None, np.asarray(draw.random.randrange(len(shape) - 1), np.int64)])


@case("Det")
def determinant(draw: Draw, name: str) -> Case:
    return Case([Operand(draw.pick([(2, 3, 3), (4, 2, 2), (2, 4, 3, 3)]))])


@case("ReverseSequence")
def reverse(draw: Draw, name: str) -> Case:
    shape = draw.shape(2)
    batch = draw.pick([0, 1])
    lengths = ints(*[draw.random.randrange(1, shape[1 - batch] + 1) for _ in range(shape[batch])])
    return Case([Operand(shape), lengths], {"batch_axis": batch, "time_axis": 1 - batch})


@case("Softmax", "LogSoftmax", "Hardmax")
def softmax(draw: Draw, name: str) -> Case:
    shape = draw.shape(1)
    attrs = {"axis": draw.signed(draw.axis(shape), len(shape))} if draw.flip(0.9) else {}
    return Case([Operand(shape)], attrs, opset=draw.pick([0, 0, 11]))


@case("LpNormalization")
def lp_norm(draw: Draw, name: str) -> Case:
    shape = draw.shape(1)
    return Case([Operand(shape)], {"axis": draw.signed(draw.axis(shape), len(shape)), "p": draw.pick([1, 2])})


@case("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
def layer_norm(draw: Draw, name: str) -> Case:
    shape = draw.shape(1)
    axis = draw.axis(shape)
    scale = Operand(draw.pick([shape[axis:], shape[-1:]]), low=0.5)
    bias = [draw.pick([None, Operand(shape[axis:])])] if name == "LayerNormalization" else []
    outputs = draw.pick([1, 1, 3]) if name == "LayerNormalization" else 1
    return Case([Operand(shape), scale, *bias], {"axis": draw.signed(axis, len(shape))}, outputs)


@case("BatchNormalization")
def batch_norm(draw: Draw, name: str) -> Case:
    shape = draw.shape(2)
    c = shape[1]
    return Case([Operand(shape), *[Operand((c,), POSITIVE) for _ in range(4)]])


@case("InstanceNormalization")
def instance_norm(draw: Draw, name: str) -> Case:
    shape = draw.shape(3)
    return Case([Operand(shape), Operand(shape[1:2], low=0.5), Operand(shape[1:2])])


@case("GroupNormalization")
def group_norm(draw: Draw, name: str) -> Case:
    groups, each = draw.pick([1, 2, 4]), draw.pick([1, 2, 3])
    shape = (2, groups * each, *draw.shape(1, 2))
    return Case([Operand(shape), Operand(shape[1:2], low=0.5), Operand(shape[1:2])], {"num_groups": groups})


@case("MeanVarianceNormalization")
def mean_variance(draw: Draw, name: str) -> Case:
    shape = draw.shape(4, 4)
    return Case([Operand(shape)], draw.pick([{}, {"axes": [2, 3]}, {"axes": [0, 1]}, {"axes": [1]}, {"axes": [-1]}]))


@case("LRN")
def response(draw: Draw, name: str) -> Case:
    return Case([Operand(draw.shape(4, 4))], {"size": 3, "alpha": 1.0})


# -- windows -----------------------------------------------------------------------------------------------------------


def window(draw: Draw, name: str) -> tuple[Size, int, Size]:
    """A kernel, the number of groups, and [N, C, ...] sizes."""
    space = draw.shape(1, 2)
    return tuple(draw.pick([1, 2]) for _ in space), draw.pick([1, 1, 2, 4]), space


@case("Conv")
@case("FusedConv", domain=MS)
def conv(draw: Draw, name: str) -> Case:
    kernel, group, space = window(draw, name)
    ins, outs = group * draw.pick([1, 2, 3]), group * draw.pick([1, 2, 3])
    operands: list[Given] = [Operand((2, ins, *space)), Operand((outs, ins // group, *kernel))]
    operands.append(draw.pick([None, Operand((outs,))]))
    attrs: dict[str, Any] = {"group": group}
    if name == "FusedConv":
        attrs["activation"] = "Relu"
        if draw.flip():
            sizes = (n - k + 1 for n, k in zip(space, kernel, strict=True))
            operands[2] = Operand((outs,))
            operands.append(Operand((2, outs, *sizes)))
    return Case(operands, attrs)


@case("ConvTranspose")
def conv_transpose(draw: Draw, name: str) -> Case:
    kernel, group, space = window(draw, name)
    ins, outs = group * draw.pick([1, 2, 3]), draw.pick([1, 2, 3])
    bias = draw.pick([None, Operand((outs * group,))])
    return Case(
        [Operand((2, ins, *space)), Operand((ins, outs, *kernel)), bias], {"group": group, "strides": [2] * len(space)}
    )


@case("MaxPool", "AveragePool", "LpPool")
def pool(draw: Draw, name: str) -> Case:
    shape = draw.shape(3, 4)
    outputs = draw.pick([1, 1, 2]) if name == "MaxPool" else 1
    return Case([Operand(shape)], {"kernel_shape": [draw.pick([1, 2]) for _ in shape[2:]]}, outputs)


@case("NhwcMaxPool", domain=MS)
def pool_last(draw: Draw, name: str) -> Case:
    return Case([Operand(draw.shape(4, 4), (("Cast", {"to": 3}),))], {"kernel_shape": [2, 2]})


@case("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")
def global_pool(draw: Draw, name: str) -> Case:
    return Case([Operand(draw.shape(3, 4))], opset=13)


@case("Resize")
def resize(draw: Draw, name: str) -> Case:
    shape = (2, 3, 4, 4) if draw.flip() else (2, 6, 3, 4)
    mode = draw.pick(["nearest", "linear", "cubic"])
    attrs: dict[str, Any] = {"mode": mode}
    attrs["coordinate_transformation_mode"] = draw.pick(
        ["half_pixel", "asymmetric", "align_corners", "tf_crop_and_resize"]
    )
    axes = draw.pick([None, None, (2, 3), (-2, -1), (3, 2)])
    chosen = range(4) if axes is None else axes
    if axes is not None:
        attrs["axes"] = list(axes)
    crop = attrs["coordinate_transformation_mode"] == "tf_crop_and_resize"
    ends = [draw.pick([(0.0, 1.0), (0.0, 1.0), (0.2, 0.7)]) if crop else (0.0, 1.0) for _ in chosen]
    region = np.asarray([e[k] for k in (0, 1) for e in ends], np.float32) if crop else None
    spatial = [a % 4 for a in chosen]
    scales = [draw.pick([1.0, 2.0, 0.5, 1.1]) if a > 1 or draw.flip(0.1) else 1.0 for a in spatial]
    if draw.flip():
        return Case([Operand(shape), region, np.asarray(scales, np.float32)], attrs)
    if draw.flip():
        attrs["keep_aspect_ratio_policy"] = draw.pick(["not_smaller", "not_larger", "stretch"])
    sizes = [max(1, int(shape[a] * s)) for a, s in zip(spatial, scales, strict=True)]
    return Case([Operand(shape), region, None, ints(*sizes)], attrs)


@case("Upsample")
def upsample(draw: Draw, name: str) -> Case:
    scales = np.asarray(
        [1.0, draw.pick([1.0, 1.0, 2.0, 1.1]), draw.pick([1.0, 2.0]), draw.pick([1.0, 1.3])], np.float32
    )
    return Case([Operand(draw.shape(4, 4)), scales], {"mode": "nearest"}, opset=9)


@case("GridSample")
@case("GridSample", domain=MS)
def grid_sample(draw: Draw, name: str) -> Case:
    attrs = {"align_corners": int(draw.flip())}
    return Case([Operand((2, draw.pick([2, 4, 6]), 3, 4)), Operand((2, 3, 2, 2), ("Tanh",))], attrs)


@case("RoiAlign")
def roi_align(draw: Draw, name: str) -> Case:
    boxes = np.asarray([[0, 0, 2, 2], [0, 1, 3, 3], [1, 0, 3, 2]], np.float32)
    attrs = {"output_height": 2, "output_width": 2, "sampling_ratio": 2}
    rois = draw.pick([boxes, Operand((3, 4), POSITIVE)])
    return Case([Operand((2, draw.pick([2, 4, 6]), 4, 5)), rois, ints(0, 1, 0)], attrs)


@case("MaxRoiPool")
def roi_pool(draw: Draw, name: str) -> Case:
    boxes = np.asarray([[0, 0, 0, 2, 2], [1, 0, 1, 3, 3]], np.float32)
    return Case([Operand((2, draw.pick([2, 4, 6]), 4, 5)), boxes], {"pooled_shape": [2, 2]}, opset=21)


@case("MaxUnpool")
def unpool(draw: Draw, name: str) -> Case:
    """Of positions that no MaxPool of the model gave, so that nothing goes; test_images.py has the pairs."""
    index = np.asarray([[0, 2], [8, 10]], np.int64)
    return Case([Operand((2, 3, 2, 2)), np.tile(index, (2, 3, 1, 1))], {"kernel_shape": [2, 2], "strides": [2, 2]})


@case("DeformConv")
def deformed(draw: Draw, name: str) -> Case:
    group, offsets = draw.pick([1, 1, 2]), draw.pick([1, 1, 2])
    ins, outs, taps = 2 * draw.pick([1, 2]), group * draw.pick([2, 3]), 4
    space = (2, 3)
    moved = Operand((2, offsets * taps * 2, *space))
    rest = [draw.pick([None, Operand((outs,))]), draw.pick([None, Operand((2, offsets * taps, *space))])]
    weight = Operand((outs, ins // group, 2, 2))
    return Case([Operand((2, ins, 3, 4)), weight, moved, *rest], {"group": group, "offset_group": offsets})


@case("Col2Im")
def columns(draw: Draw, name: str) -> Case:
    return Case([Operand((2, 4 * draw.pick([1, 2, 3]), 6)), ints(4, 3), ints(2, 2)], {"strides": [1, 1]})


@case("AffineGrid")
def affine(draw: Draw, name: str) -> Case:
    return Case([Operand((2, 2, 3)), ints(2, 3, 4, 5)], {"align_corners": int(draw.flip())})


@case("CenterCropPad")
def centre(draw: Draw, name: str) -> Case:
    shape = draw.shape(1)
    axes = sorted({draw.axis(shape) for _ in range(2)})
    sizes = [draw.pick([shape[a], shape[a] + 2, max(1, shape[a] - 1)]) for a in axes]
    return Case([Operand(shape), ints(*sizes)], {"axes": [draw.signed(a, len(shape)) for a in axes]})


# -- recurrent ---------------------------------------------------------------------------------------------------------


@case("LSTM", "GRU", "RNN")
def recurrent(draw: Draw, name: str) -> Case:
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[name]
    both, hidden, ins, batch, steps = draw.pick([1, 2]), draw.pick([2, 4]), draw.pick([2, 4]), 2, 3
    x: Size = (steps, batch, ins)
    state: Size = (both, batch, hidden)
    operands: list[Given] = [Operand(x), Operand((both, gates * hidden, ins)), Operand((both, gates * hidden, hidden))]
    operands.append(draw.pick([None, Operand((both, 2 * gates * hidden))]))
    operands.append(draw.pick([None, np.asarray([3, 2], np.int32)]))
    operands.append(draw.pick([None, Operand(state)]))
    if name == "LSTM":
        operands.append(draw.pick([None, Operand(state)]))
        operands.append(draw.pick([None, Operand((both, 3 * hidden))]))
    attrs: dict[str, Any] = {"hidden_size": hidden, "direction": "bidirectional" if both == 2 else "forward"}
    if name == "GRU":
        attrs["linear_before_reset"] = int(draw.flip())
    return Case(operands, attrs, 3 if name == "LSTM" else 2)


# -- attention ---------------------------------------------------------------------------------------------------------


@case("Attention")
def attention(draw: Draw, name: str) -> Case:
    kv = draw.pick([1, 2])
    heads, size, width, batch, s, t = kv * draw.pick([1, 2]), draw.pick([2, 4]), draw.pick([2, 4]), 2, 3, 4
    past = draw.pick([0, 0, 2])
    if draw.flip():
        q, k, v = (batch, s, heads * size), (batch, t, kv * size), (batch, t, kv * width)
        attrs: dict[str, Any] = {"q_num_heads": heads, "kv_num_heads": kv}
    else:
        q, k, v = (batch, heads, s, size), (batch, kv, t, size), (batch, kv, t, width)  # type: ignore[assignment]
        attrs = {}
    total = t + past
    mask = draw.pick([None, Operand((s, total)), Operand((batch, heads, s, total)), Operand((1, heads, s, total))])
    caches = [Operand((batch, kv, past, size)), Operand((batch, kv, past, width))] if past else [None, None]
    if draw.flip(0.3):
        attrs["is_causal"] = 1
    return Case([Operand(q), Operand(k), Operand(v), mask, *caches], attrs, draw.pick([1, 3]))


@case("RotaryEmbedding")
@case("RotaryEmbedding", domain=MS)
def rotary(draw: Draw, name: str) -> Case:
    batch, heads, s, size = draw.pick([2, 3]), draw.pick([2, 4]), draw.pick([2, 3]), draw.pick([4, 8])
    partial = draw.pick([0, 0, size // 2])
    half = (partial or size) // 2
    attrs: dict[str, Any] = {"interleaved": int(draw.flip()), "rotary_embedding_dim": partial}
    x: Size = (batch, heads, s, size) if draw.flip() else (batch, s, heads * size)
    if len(x) == 3 or partial:
        attrs["num_heads"] = heads
    table = draw.flip()
    positions = np.asarray(draw.random.choices(range(5), k=batch * s), np.int64).reshape(batch, s)
    caches = [Operand((5, half) if table else (batch, s, half)) for _ in range(2)]
    return Case([Operand(x), *caches, positions if table else None], attrs)


@case("RotaryEmbedding", domain=MS)
def ms_rotary(draw: Draw, name: str) -> Case:
    given = rotary(draw, name)
    x, *caches, positions = given.operands
    assert isinstance(x, Operand) and isinstance(caches[0], Operand)
    batch, s = x.shape[0], x.shape[-2]
    table = [Operand((5, caches[0].shape[-1])) for _ in range(2)]
    if positions is None:
        positions = np.asarray(draw.random.choices(range(5), k=batch * s), np.int64).reshape(batch, s)
    return Case([x, positions, *table], given.attrs)


@case("Attention", domain=MS)
def ms_attention(draw: Draw, name: str) -> Case:
    heads, size, ins, batch, s = draw.pick([1, 2]), draw.pick([2, 4]), draw.pick([2, 4]), 2, 3
    wide = heads * size
    added = draw.pick([None, Operand((batch, heads, s, s)), Operand((1, heads, s, s))])
    mask = draw.pick([None, np.asarray([3, 2], np.int32), np.asarray([[1, 1, 1], [1, 1, 0]], np.int32)])
    operands: list[Given] = [
        Operand((batch, s, ins)),
        Operand((ins, 3 * wide)),
        Operand((3 * wide,)),
        mask,
        None,
        added,
    ]
    return Case(operands, {"num_heads": heads, "unidirectional": int(draw.flip(0.3))})


@case("MultiHeadAttention", domain=MS)
def multi_head(draw: Draw, name: str) -> Case:
    heads, size, width, batch, s, t = draw.pick([2, 4]), draw.pick([2, 4]), draw.pick([2, 4]), 2, 3, 4
    added = draw.pick([None, Operand((batch, heads, s, t)), Operand((1, heads, s, t))])
    bias = draw.pick([None, Operand((heads * (2 * size + width),))])
    parts = [Operand((batch, s, heads * size)), Operand((batch, t, heads * size)), Operand((batch, t, heads * width))]
    return Case([*parts, bias, None, added], {"num_heads": heads}, draw.pick([1, 3]))


@case("DecoderMaskedMultiHeadAttention", domain=MS)
def decoder(draw: Draw, name: str) -> Case:
    heads, size, batch = draw.pick([2, 4]), draw.pick([2, 4]), 2
    return Case([Operand((batch, 1, heads * size)) for _ in range(3)], {"num_heads": heads})


@case("GroupQueryAttention", domain=MS)
def grouped(draw: Draw, name: str) -> Case:
    kv, each, size, batch, s = draw.pick([1, 2]), draw.pick([1, 2]), 8, 2, 3
    heads = kv * each
    parts = [Operand((batch, s, n * size)) for n in (heads, kv, kv)]
    lengths = [np.full(batch, s - 1, np.int32), np.asarray(s, np.int32)]
    attrs = {"num_heads": heads, "kv_num_heads": kv}
    return Case([*parts, None, None, *lengths], attrs, draw.pick([1, 3]))


@case("LinearAttention")
@case("LinearAttention", domain=MS)
def linear_attention(draw: Draw, name: str) -> Case:
    kv, each, size, width, batch, s = draw.pick([1, 2]), draw.pick([1, 2]), draw.pick([2, 4]), draw.pick([2, 4]), 2, 3
    rule = draw.pick(["linear", "gated", "delta", "gated_delta"])
    heads = kv * each
    decay = Operand((batch, s, draw.pick([kv, kv * size])), ("Sigmoid", "Neg")) if "gated" in rule else None
    rate = Operand((batch, s, draw.pick([kv, 1])), POSITIVE) if "delta" in rule else None
    parts = [Operand((batch, s, n)) for n in (heads * size, kv * size, kv * width)]
    attrs = {"q_num_heads": heads, "kv_num_heads": kv, "update_rule": rule}
    return Case([*parts, None, decay, rate], attrs, 2)


@case("CausalConvWithState")
@case("CausalConvWithState", domain=MS)
def causal_conv(draw: Draw, name: str) -> Case:
    c, s, k = draw.pick([2, 4, 6]), 4, 3
    state = draw.pick([None, Operand((2, c, k - 1))])
    return Case([Operand((2, c, s)), Operand((c, 1, k)), draw.pick([None, Operand((c,))]), state], {}, 2)


@case("MoE", domain=MS)
def mixture(draw: Draw, name: str) -> Case:
    experts, hidden, inner, tokens = draw.pick([2, 4]), draw.pick([2, 4]), draw.pick([2, 4]), 3
    weights: list[Given] = [Operand((experts, inner, hidden)), draw.pick([None, Operand((experts, inner))])]
    weights += [Operand((experts, hidden, inner)), draw.pick([None, Operand((experts, hidden))])]
    x: Size = draw.pick([(tokens, hidden), (1, tokens, hidden)])
    return Case([Operand(x), Operand((tokens, experts)), *weights], {"k": draw.pick([1, 2]), "activation_type": "relu"})


# -- onnxruntime's forms -----------------------------------------------------------------------------------------------


@case("Gelu", "QuickGelu", "ScaledSiLU", domain=MS)
def ms_unary(draw: Draw, name: str) -> Case:
    return Case([Operand(draw.shape(1))])


@case("BiasGelu", "FastGelu", "GatedAdd", domain=MS)
def ms_biased(draw: Draw, name: str) -> Case:
    shape = draw.shape(2, 3)
    if name == "GatedAdd":
        return Case([Operand(shape), Operand(shape), Operand((*shape[:-1], 1))])
    return Case([Operand(shape), Operand(shape[-1:])])


@case("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", domain=MS)
def skip_norm(draw: Draw, name: str) -> Case:
    shape = draw.shape(3, 3)
    c = shape[-1:]
    skip = draw.pick([shape, shape, shape[1:], (1, *shape[1:])])
    beta = [draw.pick([None, Operand(c)])] if name == "SkipLayerNormalization" else []
    return Case(
        [Operand(shape), Operand(skip), Operand(c, low=0.5), *beta, draw.pick([None, Operand(c)])],
        {},
        draw.pick([1, 4]),
    )


@case("EmbedLayerNormalization", domain=MS)
def embed(draw: Draw, name: str) -> Case:
    c = draw.pick([4, 6])
    index = np.asarray(draw.random.choices(range(5), k=6), np.int32).reshape(2, 3)
    tables = [Operand((5, c)), Operand((4, c)), None, Operand((c,), low=0.5), Operand((c,))]
    return Case([index, None, *tables, None], {}, 2)


@case("Inverse", domain=MS)
def inverse(draw: Draw, name: str) -> Case:
    return Case([Operand(draw.pick([(3, 3), (2, 3, 3), (4, 2, 2)]))])


# -- codes -------------------------------------------------------------------------------------------------------------


def scale(draw: Draw, *shape: int) -> NDArray[np.float32]:
    values = [0.01 + 0.02 * draw.random.random() for _ in range(int(np.prod(shape)))]
    return np.asarray(values, np.float32).reshape(shape)


def code(low: float = 0.02) -> tuple[Any, ...]:
    """Numbers as int8 codes."""
    return (("QuantizeLinear", {}, np.asarray(low, np.float32), np.asarray(3, np.int8)),)


def codes(draw: Draw, *shape: int) -> NDArray[np.int8]:
    values = draw.random.choices(range(-100, 100), k=int(np.prod(shape)))
    return np.asarray(values, np.int8).reshape(shape)


@case("QuantizeLinear", "DequantizeLinear")
@case("QuantizeLinear", "DequantizeLinear", domain=MS)
def quantize(draw: Draw, name: str) -> Case:
    shape = draw.shape(1)
    axis = draw.axis(shape)
    size = draw.pick([(), (shape[axis],), (1,)])
    data = Operand(shape, code() if name.startswith("De") else ())
    zero = np.zeros(size, np.int8) if draw.flip() or name.startswith("De") else np.zeros(size, np.uint8)
    factor: Given = scale(draw, *size)
    if size == (shape[axis],) and draw.flip():
        factor = Operand(size, POSITIVE)
    return Case([data, factor, zero], {"axis": axis}, opset=21)


@case("DynamicQuantizeLinear")
def dynamic_quantize(draw: Draw, name: str) -> Case:
    return Case([Operand(draw.shape(1))], {}, 3)


@case("QLinearMatMul")
def qlinear_matmul(draw: Draw, name: str) -> Case:
    m, k, n = draw.shape(3, 3)
    one: list[Given] = [scale(draw), np.asarray(3, np.int8)]
    column: list[Given] = draw.pick([one, [scale(draw, n), np.zeros(n, np.int8)]])
    a: Size = draw.pick([(m, k), (2, m, k)])
    b: list[Given] = [draw.pick([codes(draw, k, n), Operand((k, n), code())])]
    return Case([Operand(a, code()), *one, *b, *column, np.asarray(0.1, np.float32), np.asarray(1, np.int8)], opset=21)


@case("MatMulInteger")
def matmul_integer(draw: Draw, name: str) -> Case:
    m, k, n = draw.shape(3, 3)
    zeros: list[Given] = [np.asarray(3, np.int8), draw.pick([None, np.zeros(n, np.int8)])]
    return Case(
        [
            Operand(draw.pick([(m, k), (2, m, k)]), code()),
            draw.pick([codes(draw, k, n), Operand((k, n), code())]),
            *zeros,
        ]
    )


@case("DynamicQuantizeMatMul", "MatMulIntegerToFloat", domain=MS)
def matmul_float(draw: Draw, name: str) -> Case:
    m, k, n = draw.shape(3, 3)
    b: Given = codes(draw, k, n)
    factor: Given = draw.pick([scale(draw), scale(draw, n), Operand((n,), POSITIVE)])
    zero: Given = draw.pick([None, np.zeros((), np.int8)])
    bias = draw.pick([None, Operand((n,))])
    if name == "DynamicQuantizeMatMul":
        return Case([Operand((m, k)), b, factor, zero, bias])
    return Case([Operand((m, k), code()), b, scale(draw), factor, np.asarray(3, np.int8), zero, bias])


@case("QGemm", domain=MS)
def qgemm(draw: Draw, name: str) -> Case:
    m, k, n = draw.shape(3, 3)
    one: list[Given] = [scale(draw), np.asarray(3, np.int8)]
    column: list[Given] = draw.pick([one, [scale(draw, n), np.zeros(n, np.int8)]])
    c = draw.pick([None, np.arange(n, dtype=np.int32)])
    return Case([Operand((m, k), code()), *one, codes(draw, k, n), *column, c], {"transA": 0, "transB": 0})


@case("QLinearConv")
@case("QLinearConv", domain=MS)
def qlinear_conv(draw: Draw, name: str) -> Case:
    group = draw.pick([1, 1, 2])
    ins, outs = group * draw.pick([1, 2, 3]), group * draw.pick([2, 3])
    one: list[Given] = [scale(draw), np.asarray(3, np.int8)]
    each: list[Given] = draw.pick([one, [scale(draw, outs), np.zeros(outs, np.int8)]])
    each = [each[0], np.asarray(0, np.int8) if np.ndim(each[0]) == 0 else each[1]]  # type: ignore[arg-type]
    bias = draw.pick([None, np.arange(outs, dtype=np.int32)])
    w = codes(draw, outs, ins // group, 2, 2)
    last: list[Given] = [np.asarray(0.1, np.float32), np.asarray(1, np.int8)]
    return Case([Operand((2, ins, 3, 4), code()), *one, w, *each, *last, bias], {"group": group}, opset=21)


@case("ConvInteger")
def conv_integer(draw: Draw, name: str) -> Case:
    group = draw.pick([1, 1, 2])
    ins, outs = group * draw.pick([1, 2, 3]), group * draw.pick([2, 3])
    data = Operand((2, ins, 3, 4), (("QuantizeLinear", {}, np.asarray(0.02, np.float32), np.asarray(3, np.uint8)),))
    return Case([data, codes(draw, outs, ins // group, 2, 2).view(np.uint8), np.asarray(3, np.uint8)], {"group": group})


@case("MatMulNBits", domain=MS)
def four_bits(draw: Draw, name: str) -> Case:
    n, block, blocks = draw.pick([4, 6]), 16, draw.pick([1, 2, 4])
    k = block * blocks
    packed = np.asarray(draw.random.choices(range(256), k=n * k // 2), np.uint8).reshape(n, blocks, block // 2)
    zeros = draw.pick([None, np.asarray(draw.random.choices(range(256), k=n * -(-blocks // 2)), np.uint8)])
    bias = draw.pick([None, Operand((n,))])
    attrs = {"K": k, "N": n, "bits": 4, "block_size": block}
    return Case([Operand((2, 3, k)), packed, scale(draw, n * blocks), zeros, None, bias], attrs)


@case("QLinearAdd", "QLinearMul", domain=MS)
def qlinear_pair(draw: Draw, name: str) -> Case:
    shape = draw.shape(1)
    one: list[Given] = [scale(draw), np.asarray(3, np.int8)]
    return Case(
        [Operand(shape, code()), *one, Operand(partner(draw, shape), code()), *one, scale(draw), np.asarray(1, np.int8)]
    )


@case("QLinearSigmoid", "QLinearLeakyRelu", domain=MS)
def qlinear_unary(draw: Draw, name: str) -> Case:
    one: list[Given] = [np.asarray(0.02, np.float32), np.asarray(3, np.int8)]
    return Case([Operand(draw.shape(1), code()), *one, *one])


@case("QLinearSoftmax", domain=MS)
def qlinear_softmax(draw: Draw, name: str) -> Case:
    shape = draw.shape(2)
    one: list[Given] = [np.asarray(0.02, np.float32), np.asarray(3, np.int8)]
    return Case(
        [Operand(shape, code()), *one, np.asarray(1 / 256, np.float32), one[1]],
        {"axis": draw.axis(shape), "opset": draw.pick([11, 13])},
    )


@case("QLinearConcat", domain=MS)
def qlinear_concat(draw: Draw, name: str) -> Case:
    shape = draw.shape(2)
    one: list[Given] = [np.asarray(0.02, np.float32), np.asarray(3, np.int8)]
    return Case([*one, Operand(shape, code()), *one, Operand(shape, code()), *one], {"axis": draw.axis(shape)})


@case("QLinearGlobalAveragePool", "QLinearAveragePool", domain=MS)
def qlinear_pool(draw: Draw, name: str) -> Case:
    one: list[Given] = [np.asarray(0.02, np.float32), np.asarray(3, np.int8)]
    attrs: dict[str, Any] = {"channels_last": int(draw.flip())}
    if name == "QLinearAveragePool":
        attrs["kernel_shape"] = [2, 2]
    return Case([Operand(draw.shape(4, 4), code()), *one, *one], attrs)


@case("QLinearWhere", domain=MS)
def qlinear_where(draw: Draw, name: str) -> Case:
    shape = draw.shape(1)
    one: list[Given] = [np.asarray(0.02, np.float32), np.asarray(3, np.int8)]
    return Case(
        [
            Operand(partner(draw, shape), BOOLEAN),
            Operand(shape, code()),
            *one,
            Operand(partner(draw, shape), code()),
            *one,
            *one,
        ]
    )


@case("QAttention", domain=MS)
def qattention(draw: Draw, name: str) -> Case:
    heads, size, ins = draw.pick([1, 2]), draw.pick([2, 4]), draw.pick([2, 4])
    wide = 3 * heads * size
    data = Operand((2, 3, ins), (("QuantizeLinear", {}, np.asarray(0.02, np.float32), np.asarray(3, np.uint8)),))
    operands: list[Given] = [
        data,
        codes(draw, ins, wide),
        Operand((wide,)),
        scale(draw),
        scale(draw),
        None,
        np.asarray(3, np.uint8),
    ]
    return Case([*operands, np.asarray(0, np.int8)], {"num_heads": heads})


# -- com.microsoft, as models are written ------------------------------------------------------------------------------


@case("GatedRMSNorm", domain=MS)
def gated_rms_norm(draw: Draw, name: str) -> Case:
    size, heads = draw.pick([2, 4]), draw.pick([1, 2, 3])
    shape = (*draw.pick([(2,), (2, 3)]), size * heads)
    return Case([Operand(shape), Operand((size,)), Operand(shape)], {"activation": draw.pick(["silu", "sigmoid"])})


@case("BranchwiseRMSNorm", domain=MS)
def branchwise_rms_norm(draw: Draw, name: str) -> Case:
    if draw.flip(0.3):
        return Case([Operand((2, 3, 8)), draw.pick([None, Operand((8,)), Operand((4,))])], {"num_branches": 2})
    return Case([Operand((2, 3, 2, 4)), draw.pick([None, Operand((4,)), Operand((2, 4)), Operand((8,))])])


@case("LinearAttentionGate", domain=MS)
def linear_attention_gate(draw: Draw, name: str) -> Case:
    part = [Operand((2, 3, 4)), Operand((4,)), Operand((4,))]
    return Case([*part, Operand((2, 3, 4))], outputs=2) if draw.flip() else Case([*part])


@case("CropAndResize", domain=MS)
def crop_and_resize(draw: Draw, name: str) -> Case:
    regions = np.asarray([[0, 0, 0.5, 1], [0.2, 0, 1, 1]], np.float32)
    return Case([Operand((2, 4, 5, 5)), regions, np.asarray([1, 0], np.int32), np.asarray([2, 3], np.int32)])


@case("MaxpoolWithMask", domain=MS)
def max_pool_with_mask(draw: Draw, name: str) -> Case:
    return Case([Operand((2, 4, 5, 5)), np.ones((2, 4, 5, 5), np.int32)], {"kernel_shape": [2, 2]})


@case("UnfoldTensor", domain=MS)
def unfold_tensor(draw: Draw, name: str) -> Case:
    shape = draw.shape()
    return Case([Operand(shape)], {"dim": draw.axis(shape), "size": 2, "step": draw.pick([1, 2])})


@case("ConvTransposeWithDynamicPads", domain=MS)
def transposed_with_pads(draw: Draw, name: str) -> Case:
    group, bias = draw.pick([1, 2, 4]), [Operand((4,))] if draw.flip() else []
    operands = [Operand((2, 4, 4, 5)), Operand((4, 4 // group, 2, 2)), ints(*draw.pick([(0, 0, 0, 0), (1, 0, 0, 1)]))]
    return Case([*operands, *bias], {"group": group, "strides": draw.pick([[1, 1], [2, 1]])})


@case("GatherND", domain=MS)
def old_gather_nd(draw: Draw, name: str) -> Case:
    return Case([Operand((4, 6, 3)), draw.pick([ints([0], [2]), ints([[0, 1], [3, 5]]), ints([1, 2, 0])])])


@case("MatMulInteger16", domain=MS)
def integer_product(draw: Draw, name: str) -> Case:
    steps = (("Mul", {}, np.asarray(9, np.float32)), ("Cast", {"to": 5}))
    return Case([Operand((3, 4), steps), Operand((4, 6), steps)])


@case("Range", "Unique", domain=MS)
def ranges_and_sets(draw: Draw, name: str) -> Case:
    if name == "Unique":
        return Case([Operand((6,))], outputs=3)
    return Case([Operand(()), np.asarray(3, np.float32), np.asarray(1, np.float32)])


@case("Pad", domain=MS)
def old_pad(draw: Draw, name: str) -> Case:
    pads = ints(*draw.pick([(0, 1, 0, 0, 0, 2), (0, 0, 1, 0, 0, 0), (0, 0, 0, 0, 0, 0)]))
    return Case([Operand((2, 4, 3)), pads, *([np.asarray(0.5, np.float32)] if draw.flip() else [])])
